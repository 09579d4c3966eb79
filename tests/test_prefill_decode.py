# SPDX-License-Identifier: MIT
"""Prefill, then decode: what ssd_chunk leaves behind is what state_update goes on from."""

import numpy as np
import pytest

from cases import BF16, F32, assert_close, normal
from cases_ssd import (
    CAPTURED, FINAL, INITIAL, MAMBA2, MIMO, SISO, TOKEN_TENSORS, Ssd, assert_state, make,
    rounded_to, run, wanted_results,
)

POOLS = ("state", "angle_state", "k_state", "v_state")
KINDS = {
    "mamba2": Ssd(2, 140, 4, 16, 32, 2),
    "siso": Ssd(2, 140, 4, 16, 32, 2, has=(*SISO, "norm_weight"), adt=True),
    "half": Ssd(2, 140, 4, 16, 32, 1, 1, has=SISO, rotary="half", head_angles=False),
    "mimo": Ssd(2, 140, 4, 16, 32, 1, 4, has=MIMO, adt=True, rotary="half"),
    "apart": Ssd(2, 140, 2, 16, 32, 1, 3, has=MIMO[:-1], trap_sigmoid=True),
    "euler": Ssd(2, 140, 4, 8, 16, 1, 2, has=(*MAMBA2, "angles", "mimo_out"), channel_D=True),
}
EVERY = pytest.mark.parametrize("p", KINDS.values(), ids=KINDS)


def part_of(a, start, end):
    """Some tokens of all rows, without states."""
    return {
        k: v[:, start:end] if k in TOKEN_TENSORS and v is not None else v
        for k, v in a.items()
        if k not in INITIAL
    }


def pools_of(results, names):
    """The pools of a decode call, from results or arguments of prefill."""
    return {
        pool: np.array(results[name], F32) for pool, name in zip(POOLS, names) if name in results
    }


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@EVERY
def test_decode_goes_on_where_prefill_stopped(ops, rng, p, dtype):
    """Token by token and several at once equal the long prefill; so do the states in the end."""
    p = Ssd(**{**vars(p), "dtype": {name: dtype for name in (*TOKEN_TENSORS, "out")}})
    a = make(rng, p)
    want = wanted_results(a)
    for stop in (1, 64, 131):
        got = run(ops, {**part_of(a, 0, stop), **{k: a[k] for k in INITIAL if k in a}})
        pools, outs = pools_of(got, FINAL), [got["out"]]
        for start, end in ((stop, stop + 1), (stop + 1, stop + 2), (stop + 2, stop + 9)):
            outs.append(ops.state_update(**pools, **part_of(a, start, end)))
        end = stop + 9
        assert_close(np.concatenate(outs, 1), want["out"][:, :end])
        if end == p.seqlen:
            for pool, name in zip(POOLS, FINAL):
                if pool in pools:
                    assert_state(pools[pool], want[name], name, rounded_to(ops, a))


@EVERY
def test_decode_of_a_prompt_is_its_prefill(ops, rng, p):
    """Nothing of the states is prefill's own."""
    a = make(rng, p)
    got = run(ops, a)
    pools, outs = pools_of(a, INITIAL), []
    for start in range(0, p.seqlen, 20):
        outs.append(ops.state_update(**pools, **part_of(a, start, start + 20)))
    assert_close(np.concatenate(outs, 1), got["out"].astype(float))
    for pool, name in zip(POOLS, FINAL):
        if pool in pools:
            assert_state(pools[pool], got[name].astype(float), name)


@EVERY
def test_prefill_goes_on_where_decode_stopped(ops, rng, p):
    a = make(rng, p)
    want = wanted_results(a)
    pools = pools_of(a, INITIAL)
    outs = [ops.state_update(**pools, **part_of(a, 0, 5))]
    start = {name: pools[pool] for pool, name in zip(POOLS, INITIAL) if pool in pools}
    got = run(ops, {**part_of(a, 5, p.seqlen), **start})
    assert_close(np.concatenate([outs[0], got["out"]], 1), want["out"])
    for name in FINAL:
        if name in got:
            assert_state(got[name], want[name], name)


@EVERY
def test_captured_states_are_what_decode_keeps(ops, rng, p):
    """The states after each token, from both operations."""
    a = make(rng, p)
    count = 9
    positions = (np.arange(2)[:, None] * p.seqlen + np.arange(count)).reshape(-1)
    captured = run(ops, a, capture_positions=positions)
    pools = pools_of(a, INITIAL)
    kept = {
        f"intermediate_{pool}s": normal(rng, (2, count, *array.shape[1:]))
        for pool, array in pools.items()
    }
    ops.state_update(**pools, **part_of(a, 0, count), **kept)
    for pool, name in zip(POOLS, CAPTURED):
        if pool in pools:
            states = kept[f"intermediate_{pool}s"]
            assert_state(states.reshape(-1, *states.shape[2:]), captured[name].astype(float), name)


@EVERY
def test_a_long_answer_does_not_drift_away(ops, rng, p):
    """A thousand steps of decode against one prefill of all of them."""
    p = Ssd(**{**vars(p), "seqlen": 1000, "nheads": 2, "ngroups": 1})
    a = make(rng, p)
    want = run(ops, a)
    pools, outs = pools_of(a, INITIAL), []
    for start in range(0, 1000, 50):
        outs.append(ops.state_update(**pools, **part_of(a, start, start + 50)))
    assert_close(np.concatenate(outs, 1), want["out"].astype(float))
    for pool, name in zip(POOLS, FINAL):
        if pool in pools:
            assert_state(pools[pool], want[name].astype(float), name)
