# SPDX-License-Identifier: MIT
"""Threads: their number, calls from several at once, and forked children."""

import multiprocessing
import os
import subprocess
import sys
import threading

import numpy as np
import pytest

import cases_conv
import cases_mla
import cases_scan
import cases_ssd
import cases_update
import ssmk
from cases import assert_same_bits


def results(rng_seed):
    """The results of one call of each operation, large enough for several threads."""
    rng = np.random.default_rng(rng_seed)
    scan = cases_scan.make(rng, cases_scan.Scan(2, 64, 200, 16))
    ssd = cases_ssd.make(rng, cases_ssd.Ssd(2, 200, 8, 32, 32, has=cases_ssd.SISO))
    conv = cases_conv.make(rng, cases_conv.Conv(2, 64, 2000))
    p = cases_update.Update(16, None, True, 8, 64, 64)
    update, state = cases_update.make(rng, p), cases_update.pools(rng, p, {})["state"].array
    one, placed = cases_conv.make_update(rng, cases_conv.ConvUpdate(64, 2, 512))
    mla, cache = cases_mla.make(rng, cases_mla.Mla(2, 2, 16, 128, capacity=900, append=True))
    return [
        *ssmk.selective_scan(**scan, return_final_states=True),
        *ssmk.ssd_chunk(**ssd, return_final_states=True),
        *ssmk.causal_conv1d(**conv, return_final_states=True),
        *cases_update.run(ssmk, update, state),
        *cases_conv.run_update(ssmk, one, placed.array),
        *cases_mla.run(ssmk, mla, cases_mla.arrays_of(cache))[:2],
    ]


def assert_same_results(got, want):
    for i, (a, b) in enumerate(zip(got, want)):
        assert_same_bits(a, b, f"result {i}")


def test_number_of_threads_is_set_and_restored(threads):
    default = ssmk.num_threads()
    assert default >= 1
    for n in (1, 3):
        threads(n)
        assert ssmk.num_threads() == n
    threads(0)
    assert ssmk.num_threads() == default
    threads(-5)
    assert ssmk.num_threads() == default


def test_default_follows_the_environment_and_the_processors():
    def number(**env):
        code = "import ssmk; print(ssmk.num_threads())"
        clean = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        return int(
            subprocess.run(
                [sys.executable, "-c", code], env={**clean, **env}, capture_output=True, check=True
            ).stdout
        )

    assert number(OMP_NUM_THREADS="3") == 3
    if hasattr(os, "sched_getaffinity"):
        assert number() == len(os.sched_getaffinity(0))


def test_results_repeat_from_run_to_run():
    want = results(0)
    for _ in range(3):
        assert_same_results(results(0), want)


def test_calls_from_several_threads_at_once():
    want = [results(seed) for seed in range(4)]
    failures = []

    def work(seed):
        try:
            for _ in range(5):
                assert_same_results(results(seed), want[seed])
        except BaseException as error:
            failures.append(error)

    workers = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not failures, failures[0]


def child(connection):
    connection.send(results(1))
    connection.close()


@pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_forked_children_work_after_the_parent_did(threads):
    """As a data loader does: the threads of a pool made before the fork are gone after it."""
    threads(2)
    want = results(1)
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=child, args=(there,))
        process.start()
        there.close()
        answered = here.poll(60)
        if not answered:
            process.kill()
        assert answered, "the child hangs"
        assert_same_results(here.recv(), want)
        process.join()
        assert process.exitcode == 0
    assert_same_results(results(1), want)
