# SPDX-License-Identifier: MIT
"""The vector functions of every instruction-set level that this machine can build and run (tests/c/simd.cc)."""

import importlib.resources
import os
import pathlib
import platform
import shutil
import subprocess

import pytest
import ssmk

ROOT = pathlib.Path(__file__).resolve().parent.parent
X86 = platform.machine() in ("x86_64", "AMD64")


def cpu_flags():
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            return set(next(line for line in f if line.startswith("flags")).split())
    except (OSError, StopIteration):
        return set()


LEVELS = {
    "portable": ([], True),
    "x86_64_v3": (["-march=x86-64-v3"], X86 and {"avx2", "fma"} <= cpu_flags()),
    "x86_64_v4": (["-march=x86-64-v4"], X86 and {"avx512f", "avx512dq", "avx512bw"} <= cpu_flags()),
    "neon": ([], platform.machine() == "aarch64"),
}


@pytest.mark.parametrize("level", LEVELS)
def test_vector_functions_are_exact_to_a_few_ulp(level, tmp_path):
    flags, runs = LEVELS[level]
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    if not runs:
        pytest.skip(f"this machine has no {level}")
    if not compiler:
        pytest.skip("no C++ compiler")
    # By way of a file: an editable install is spread over folders.
    header = importlib.resources.files(ssmk).joinpath("include", "dlpack", "dlpack.h")
    include = pathlib.Path(str(header)).parent.parent
    program = tmp_path / "simd"
    subprocess.run(
        [
            compiler,
            "-std=c++17",
            "-O2",
            *flags,
            "-ffp-contract=fast",
            "-w",
            f"-DSSMK_ISA={level}",
            f"-I{ROOT}/src",
            f"-I{ROOT}/include",
            "-isystem",
            str(include),
            ROOT / "tests/c/simd.cc",
            "-o",
            program,
        ],
        check=True,
    )
    done = subprocess.run([program], text=True, capture_output=True)
    assert done.returncode == 0, done.stdout
