# SPDX-License-Identifier: MIT
"""The command line: `ssmk` or `python -m ssmk`."""

import argparse
import os
import sys
from importlib import metadata, util
from pathlib import Path

import ssmk

FRAMEWORKS = ("numpy", "ml_dtypes", "torch", "jax", "cupy", "mlx")


def main(argv=None):
    """The exit status: 0; 1 if the command found something wrong; 2 if it could not run; 130 if
    interrupted."""
    argv = sys.argv[1:] if argv is None else list(argv)
    # Where the output's encoding lacks a character, a question mark is better than no output.
    sys.stdout.reconfigure(errors="replace")
    try:
        if argv[:1] == ["bench"]:  # has arguments of its own
            from ssmk import bench

            return bench.main(argv[1:])
        args = _parser().parse_args(argv)
        status = args.run(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # As in `ssmk demo FILE | head`.  Python flushes again at exit, and must not complain then.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser():
    parser = argparse.ArgumentParser(prog="ssmk", description="State-space-model kernels.")
    parser.add_argument("--version", action="version", version=f"ssmk {ssmk.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    about = "what this installation can use"
    command = commands.add_parser("info", help=about, description=info.__doc__)
    command.set_defaults(run=info)

    from ssmk import demo

    about = "label every character of a text with its language, using a trained model"
    command = commands.add_parser("demo", help=about, description=about.capitalize() + ".")
    demo.add_arguments(command)
    command.set_defaults(run=_demo)

    commands.add_parser("bench", help="measure the kernels")
    return parser


def _demo(args):
    from ssmk import demo

    try:
        return demo.run(args)
    except demo.DemoError as error:
        print(f"ssmk demo: {error}", file=sys.stderr)
        return 2


def info(args):
    """Backends, devices, instruction set, threads, and the frameworks that are installed."""
    isa = ssmk.cpu_isa()
    rows = [
        ("version", ssmk.__version__),
        ("library", _library()),
        *((f"{kind} backend", _backend(kind)) for kind in ("cpu", "cuda", "metal")),
        (
            "instruction set",
            f"none: SSMK_ISA={os.environ['SSMK_ISA']}" if isa == "invalid" else isa,
        ),
        ("threads", str(ssmk.num_threads())),
        *((name, version) for name in FRAMEWORKS if (version := _version(name))),
    ]
    _print_rows(rows)
    return 1 if isa == "invalid" else 0


def _backend(kind):
    if not ssmk.backend_built(kind):
        return "not built"
    count = ssmk.device_count(kind)
    return f"built, {count} device{'' if count == 1 else 's'}"


def _library():
    """Where the C library lies that this process has loaded."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        for line in maps.read_text(errors="replace").splitlines():
            if "libssmk" in line:
                return line.split(maxsplit=5)[-1]
    found = sorted(Path(ssmk.__file__).parent.rglob("*ssmk*.d*l*"))  # .dylib, .dll
    return str(found[0]) if found else "not beside the package"


def _version(package):
    """The version of an installed package, found without importing it; None if it is not there."""
    if not util.find_spec(package):
        return None
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "of an unknown version"


def _print_rows(rows):
    width = max(len(name) for name, _ in rows)
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError:
        for name, value in rows:
            print(f"{name:{width}}  {value}")
        return
    console = Console()
    for name, value in rows:
        console.print(Text.assemble((f"{name:{width}}", "bold"), f"  {value}"), soft_wrap=True)


if __name__ == "__main__":
    sys.exit(main())
