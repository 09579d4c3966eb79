# SPDX-License-Identifier: MIT
"""The library without Python: installed by meson, found by pkg-config, called from C and C++."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import ssmk

HERE = Path(__file__).parent
WARNINGS = ["-Wall", "-Wextra", "-pedantic", "-Werror"]


def run(*command, **options):
    ran = subprocess.run(
        [str(c) for c in command], capture_output=True, text=True, timeout=600, **options
    )
    assert ran.returncode == 0, (
        f"{' '.join(map(str, command))}\n{ran.stdout[-2000:]}\n{ran.stderr[-2000:]}"
    )
    return ran.stdout


def tool(*names):
    """The first of these programs that there is, beside this Python or on the PATH."""
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    found = next(filter(None, (shutil.which(name, path=path) for name in names)), None)
    if not found:
        pytest.skip(f"there is no {' or '.join(names)} on this machine")
    return found


def dlpack_include():
    """The DLPack header that the Python package brought along, else what the build finds itself."""
    installed = Path(ssmk.__file__).parent / "include"
    if (installed / "dlpack" / "dlpack.h").exists():
        return {"DLPACK_INCLUDE": str(installed)}
    if importlib.util.find_spec("tvm_ffi") or "DLPACK_INCLUDE" in os.environ:
        return {}
    pytest.skip("there is no dlpack.h on this machine")


@pytest.fixture(scope="module")
def prefix(tmp_path_factory):
    """Where the library is installed."""
    meson, _, _ = tool("meson"), tool("ninja", "ninja-build"), tool("pkg-config", "pkgconf")
    tool("cc", "gcc", "clang"), tool("c++", "g++", "clang++")
    folder = tmp_path_factory.mktemp("install")
    path = os.pathsep.join([os.path.dirname(sys.executable), os.environ.get("PATH", "")])
    env = {**os.environ, **dlpack_include(), "PATH": path}
    build = folder / "build"
    # -O1: what is tested is that it builds, installs and links; speed is not.
    run(
        meson, "setup", build, HERE.parent, "-Dpython=disabled", f"--prefix={folder / 'prefix'}",
        "-Doptimization=1", env=env,
    )
    run(meson, "compile", "-C", build, "-j", "2", env=env)
    run(meson, "install", "-C", build, "--no-rebuild", env=env)
    return folder / "prefix"


@pytest.fixture(scope="module")
def flags(prefix):
    """(compile flags, link flags, folder of the library), as pkg-config says."""
    folder = next(prefix.rglob("ssmk.pc")).parent
    env = {**os.environ, "PKG_CONFIG_PATH": str(folder)}
    pkg_config = tool("pkg-config", "pkgconf")
    answers = [
        run(pkg_config, option, "ssmk", env=env).split()
        for option in ("--cflags", "--libs", "--variable=libdir")
    ]
    assert run(pkg_config, "--modversion", "ssmk", env=env).strip() == ssmk.__version__
    return answers


def compile_and_run(compiler, source, standard, program, flags):
    compile_flags, link_flags, libdir = flags
    run(
        compiler, f"-std={standard}", *WARNINGS, *compile_flags, HERE / "c" / source, "-o", program,
        *link_flags, "-lm", f"-Wl,-rpath,{libdir[0]}",
    )
    return run(program)


def test_operations_from_c99(flags, tmp_path):
    output = compile_and_run(
        tool("cc", "gcc", "clang"), "operations.c", "c99", tmp_path / "operations", flags
    )
    print(output)
    assert output.count(" ok") == 15, output


def test_header_in_cpp17(flags, tmp_path):
    compile_and_run(tool("c++", "g++", "clang++"), "header.cc", "c++17", tmp_path / "header", flags)


def test_only_the_interface_is_exported(prefix):
    if not sys.platform.startswith("linux"):
        pytest.skip("reads ELF symbols")
    library = next(prefix.rglob("libssmk.so*"))
    symbols = [
        line.split() for line in run(tool("nm"), "-D", "--defined-only", library).splitlines()
    ]
    names = {symbol[-1] for symbol in symbols if symbol[-2] != "A"}
    exported = {name.split("@")[0] for name in names}
    assert exported and all(name.startswith("ssmk_") for name in exported), exported
    assert all(name.endswith("@@SSMK_1") for name in names), names


def test_library_needs_no_python_and_nothing_unusual(prefix):
    if not sys.platform.startswith("linux"):
        pytest.skip("reads ELF headers")
    library = next(prefix.rglob("libssmk.so*"))
    needed = [
        line.split("[")[1].rstrip("]")
        for line in run(tool("readelf"), "-d", library).splitlines()
        if "(NEEDED)" in line
    ]
    usual = (
        "libstdc++.", "libm.", "libgomp.", "libomp.", "libgcc_s.", "libc.", "libc++.", "libc++abi.",
        "libpthread.", "ld-linux",
    )
    assert all(name.startswith(usual) for name in needed), needed
