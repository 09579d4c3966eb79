# SPDX-License-Identifier: MIT
"""Options and fixtures: which backend the operations run on, and reproducible hypothesis runs."""

import os

import numpy as np
import pytest
from hypothesis import HealthCheck, settings

import ssmk

from carry import Carried

# Examples are drawn from a fixed seed, so that a run in CI can be repeated anywhere;
# --hypothesis-profile=explore looks further.
quiet = dict(
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("ci", max_examples=300, derandomize=True, **quiet)
settings.register_profile("explore", max_examples=1000, **quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_addoption(parser):
    parser.addoption(
        "--backend",
        action="append",
        choices=("cpu", "cuda", "metal", "carried"),
        help="run the operations on this backend (repeat for several; default: cpu); carried: on "
        "the CPU with torch tensors, as arrays are carried to a GPU",
    )


def pytest_configure(config):
    config.addinivalue_line(
        "markers", "core: the compact part that is run again on every instruction set"
    )


def pytest_generate_tests(metafunc):
    if "ops" in metafunc.fixturenames:
        backends = metafunc.config.getoption("--backend") or ["cpu"]
        metafunc.parametrize("ops", backends, indirect=True, scope="session")


@pytest.fixture(scope="session")
def ops(request):
    """The public functions, taking NumPy arrays, on the backend under test."""
    kind = request.param
    if kind == "carried":
        return Carried("cpu")
    if not ssmk.backend_built(kind):
        pytest.skip(f"this build has no {kind} backend")
    if ssmk.device_count(kind) == 0:
        pytest.skip(f"this machine has no {kind} device")
    if kind == "metal":
        pytest.skip("the tests do not carry NumPy arrays to metal yet")
    return ssmk if kind == "cpu" else Carried("cuda:0")


@pytest.fixture
def rng(request):
    """Random numbers that depend on nothing but the name of the test."""
    return np.random.default_rng(list(request.node.name.encode()))


@pytest.fixture
def threads():
    """ssmk.set_num_threads, put back to the default afterwards."""
    yield ssmk.set_num_threads
    ssmk.set_num_threads(0)
