# SPDX-License-Identifier: MIT
"""Every instruction-set level that this machine has, and what a level that it lacks answers.

The level is picked at the first use of the library, so each one gets a process of its own.
"""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent

# What the kernel calls the instructions of the x86-64 psABI levels (abm is lzcnt).
V3 = {"avx", "avx2", "bmi1", "bmi2", "f16c", "fma", "abm", "movbe", "xsave"}
V4 = V3 | {"avx512f", "avx512bw", "avx512cd", "avx512dq", "avx512vl"}
LEVELS = ("portable", "x86-64-v3", "x86-64-v4", "neon")


def cpu_flags():
    """Of the first processor; none where the system does not say."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    return set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


def expected(level):
    """Whether this machine has a level, as far as the system tells."""
    machine = platform.machine().lower()
    if level == "portable":
        return True
    if level == "neon":
        return machine in ("aarch64", "arm64")
    if machine not in ("x86_64", "amd64"):
        return False
    return (V3 if level == "x86-64-v3" else V4) <= cpu_flags()


def python(level, *arguments, timeout=300):
    env = {
        **os.environ,
        "SSMK_ISA": level,
        "PYTHONPATH": os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")])),
    }
    return subprocess.run(
        [sys.executable, *arguments], env=env, cwd=HERE, capture_output=True, text=True,
        timeout=timeout,
    )


def level_in_use(level):
    ran = python(level, "-c", "import ssmk; print(ssmk.cpu_isa())")
    assert ran.returncode == 0, ran.stderr
    return ran.stdout.strip()


@pytest.mark.parametrize("level", LEVELS)
def test_operations_on_level(level):
    """The compact part of the suite (marked core), with the level forced."""
    in_use = level_in_use(level)
    if in_use != level:
        assert not expected(level), f"this machine has {level}, the library answers {in_use}"
        pytest.skip(f"this machine ({platform.machine()}) lacks {level}")
    files = [
        str(HERE / f"test_{name}.py")
        for name in (
            "selective_scan", "ssd_chunk", "ssd_chunk_mamba3", "state_update", "state_update_mamba3",
            "causal_conv1d", "mla_decode", "numbers",
        )
    ]
    ran = python(
        level, "-m", "pytest", "-q", "-x", "-m", "core", "-p", "no:cacheprovider", "-p", "no:xdist",
        *files,
    )
    assert ran.returncode == 0, ran.stdout[-5000:] + ran.stderr[-2000:]
    assert " passed" in ran.stdout


CALLS = """
import numpy as np, ssmk
f = lambda *shape: np.ones(shape, np.float32)
calls = [
    lambda out: ssmk.selective_scan(f(1, 2, 3), f(1, 2, 3), f(2, 4), *[f(1, 4, 3)] * 2, out=out),
    lambda out: ssmk.state_update(f(1, 2, 4), f(1, 2), f(1, 2), f(2, 4), f(1, 4), f(1, 4), out=out),
    lambda out: ssmk.causal_conv1d(f(1, 2, 3), f(2, 4), out=out),
    lambda out: ssmk.causal_conv1d_update(f(1, 2), f(1, 2, 3), f(2, 4), out=out),
    lambda out: ssmk.ssd_chunk(f(1, 2, 3, 4), f(1, 2, 3), f(3), *[f(1, 2, 1, 5)] * 2, out=out),
]
for call, shape in zip(calls, [(1, 2, 3), (1, 2), (1, 2, 3), (1, 2), (1, 2, 3, 4)]):
    out = f(*shape) * 7
    try:
        call(out)
    except NotImplementedError as error:
        print(error)
    else:
        raise SystemExit("the call went through")
    assert (out == 7).all(), "the call wrote its output"
"""


@pytest.mark.parametrize("level", ("no-such-level", "X86-64-V3", *LEVELS))
def test_level_that_is_missing_is_not_replaced(level):
    if level in LEVELS and level_in_use(level) == level:
        pytest.skip(f"this machine has {level}")
    assert level_in_use(level) == "invalid"
    ran = python(level, "-c", CALLS)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    messages = ran.stdout.splitlines()
    assert len(messages) == 5
    operations = (
        "selective_scan", "state_update", "causal_conv1d", "causal_conv1d_update", "ssd_chunk",
    )
    for operation, message in zip(operations, messages):
        assert message.startswith(f"{operation}: SSMK_ISA: must be one of ") and message.endswith(
            f"got {level}"
        ), message


def test_best_level_is_the_default():
    env = {k: v for k, v in os.environ.items() if k != "SSMK_ISA"}
    code = "import ssmk; print(ssmk.cpu_isa())"
    ran = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, check=True
    )
    has = [level for level in LEVELS if level_in_use(level) == level]
    assert ran.stdout.strip() == level_in_use("") == has[-1]
