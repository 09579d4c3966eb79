# SPDX-License-Identifier: MIT
"""`ssmk bench`: how fast this machine runs ssmk, as ratios measured in one run.

Every case is a share of a ceiling (what the machine does at best on the same memory) and a multiple
of a peer (what people run today on the same tensors).  Ceiling, ssmk and peer take turns, so a
machine that slows down slows all three.

    method.py     taking turns, buffers larger than the caches, the best and the median of repeats
    ceilings.py   the machine's own rates, from the native loops in native/
    cases/        one file per family of cases
    peers.py      whom ssmk is compared with
    memory.py     peak memory, in processes of their own
    models.py     whole models of transformers, with ssmk and without
    overhead.py   what a call costs above an empty one
    report.py     table, Markdown, plot
    cli.py        the command line
"""


def main(argv=None):
    """Run the command line; the exit status."""
    import sys

    try:
        from .cli import main as run
    except ModuleNotFoundError as error:
        if error.name != "numpy":
            raise
        print("ssmk bench: needs NumPy: pip install ssmk[bench]", file=sys.stderr)
        return 1
    return run(argv)
