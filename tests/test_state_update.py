# SPDX-License-Identifier: MIT
"""state_update against the reference; and what must hold bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cases_scan
import reference
from cases import (
    BF16, F16, F32, FLOATS, I32, I64, LAYOUTS, assert_close, assert_same_bits, normal, repeated,
)
from cases_update import TENSORS, Update, check, make, pools, run

MODELS = pytest.mark.parametrize("heads", [False, True], ids=["mamba1", "mamba2"])

# batch, nheads, headdim, dstate, ngroups
SHAPES = [
    (0, 4, 8, 16, 1), (1, 1, 1, 1, 1), (2, 3, 3, 5, 3), (3, 5, 17, 16, 5), (2, 6, 48, 24, 2),
    (1, 4, 80, 64, 4), (1, 3, 96, 96, 1), (4, 8, 64, 128, 2), (1, 2, 5, 256, 1), (2, 2, 3, 1031, 1),
    (1, 1, 255, 16, 1), (1, 2, 257, 5, 1), (2, 2, 100, 256, 1), (1, 2, 3, 1024, 1),
    (9, 3, 8, 16, 3), (1, 2, 20, 1025, 2),
]


@pytest.mark.core
@MODELS
@pytest.mark.parametrize("T", [None, 1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(ops, rng, shape, T, heads):
    batch, nheads, headdim, dstate, ngroups = shape
    check(ops, rng, Update(batch, T, heads, nheads, headdim, dstate, ngroups))


@pytest.mark.core
@pytest.mark.parametrize("state", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@MODELS
def test_inputs_of_one_dtype_and_states_of_another(ops, rng, dtype, state, heads):
    dtypes = dict.fromkeys((*TENSORS, "out"), dtype)
    dtypes["state"] = state
    check(ops, rng, Update(3, None, heads, 5, 16, 32, dtype=dtypes))
    check(ops, rng, Update(3, 3, heads, 5, 9, 19, dtype=dtypes))


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
@pytest.mark.parametrize("name", (*TENSORS, "out"))
@MODELS
def test_one_tensor_of_another_dtype(ops, rng, name, dtype, heads):
    check(ops, rng, Update(2, 2, heads, dtype={name: dtype}))


@pytest.mark.core
@MODELS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(ops, rng, layout, heads):
    check(ops, rng, Update(3, None, heads, 4, 8, 16, 2, layout=layout))
    check(ops, rng, Update(2, 3, heads, 3, 5, 17, 3, layout=layout, dtype=BF16))


@pytest.mark.core
@pytest.mark.parametrize(
    "tied",
    [(), ("dt",), ("A",), ("D",), ("dt_bias",), ("dt", "A"), ("dt", "A", "D", "dt_bias")],
    ids=str,
)
def test_values_per_head_or_per_channel(ops, rng, tied):
    check(ops, rng, Update(2, None, True, 3, 6, 16, tied=tied))
    check(ops, rng, Update(2, 2, True, 3, 6, 16, tied=tied))


def test_tied_by_strides_of_zero(ops, rng):
    """How transformers calls: every per-head value expanded over headdim and dstate."""
    p = Update(3, None, True, 4, 16, 32, 2)
    a, state = make(rng, p), normal(rng, (3, 4, 16, 32))
    want = run(ops, a, state)
    wide = dict(a)
    wide["A"] = np.broadcast_to(a["A"][:, None, None], (4, 16, 32))
    wide["dt"] = np.broadcast_to(a["dt"][..., None], (3, 4, 16))
    wide["D"] = np.broadcast_to(a["D"][:, None], (4, 16))
    wide["dt_bias"] = np.broadcast_to(a["dt_bias"][:, None], (4, 16))
    got = run(ops, wide, state)
    assert_close(got[0], want[0].astype(np.float64))
    assert_close(got[1], want[1].astype(np.float64), "state")


@pytest.mark.parametrize("group_axis", [False, True])
@pytest.mark.parametrize("T", [None, 2])
def test_mamba1_coefficients_with_and_without_groups(ops, rng, T, group_axis):
    check(ops, rng, Update(2, T, False, 4, 3, 16, 3 if group_axis else 1, group_axis=group_axis))


@pytest.mark.core
@MODELS
@pytest.mark.parametrize("has", [(), ("D",), ("z",), ("dt_bias",), ("D", "z", "dt_bias")], ids=str)
@pytest.mark.parametrize("softplus", [False, True])
def test_every_option_absent_or_present(ops, rng, has, softplus, heads):
    check(ops, rng, Update(2, None, heads, has=has, softplus=softplus))


@MODELS
@pytest.mark.parametrize(
    "limit", [(0.0, float("inf")), (0.05, 0.1), (0.0, 0.08), (-0.1, 0.2)], ids=str
)
@pytest.mark.parametrize("softplus", [False, True])
def test_dt_limit_clamps_after_softplus(ops, rng, limit, softplus, heads):
    check(ops, rng, Update(2, 2, heads, softplus=softplus, dt_limit=limit))


def test_inputs_with_strides_of_zero(ops, rng):
    a = make(rng, Update(3, 2, True, 4, 6, 16, 2))
    a["x"] = repeated(a["x"], 0, 3)
    a["z"] = repeated(a["z"], 3, 6)
    a["B"] = repeated(a["B"], 2, 2)
    a["C"] = repeated(a["C"], 3, 16)
    state = normal(rng, (3, 4, 6, 16))
    want = reference.state_update(state, **a)
    out, after = run(ops, a, state)
    assert_close(out, want.out)
    assert_close(after, want.states["state"], "state")


# Slots


@pytest.mark.core
@MODELS
@pytest.mark.parametrize("pad_slot", [None, 0, 5])
@pytest.mark.parametrize("index_dtype", (I32, I64), ids=str)
def test_slots_of_a_pool(ops, rng, heads, pad_slot, index_dtype):
    p = Update(
        6, None, heads, pool=20, reads=0, pad_slot=pad_slot, index_dtype=index_dtype, pads=0.3
    )
    check(ops, rng, p)
    check(ops, rng, replace(p, writes=0))
    check(ops, rng, replace(p, writes=0, layout="mixed", T=3))


@MODELS
def test_a_pool_larger_than_the_batch_without_indices(ops, rng, heads):
    check(ops, rng, Update(3, 2, heads, pool=5))
    check(ops, rng, Update(3, 2, heads, pool=9, writes=0))


@pytest.mark.core
@MODELS
@pytest.mark.parametrize("reads", [None, 0, 4])
@pytest.mark.parametrize("counts", [False, True])
def test_the_state_after_each_token_goes_to_a_slot_of_its_own(ops, rng, heads, reads, counts):
    p = Update(
        4, 3, heads, pool=48, reads=reads, writes=1, counts=counts, accepted=bool(reads), pads=0.3
    )
    check(ops, rng, p)
    check(ops, rng, replace(p, layout="sliced", dtype={"state": BF16}))


@MODELS
def test_accepted_counts_choose_the_slot_to_read(ops, rng, heads):
    check(ops, rng, Update(5, 2, heads, pool=40, reads=4, accepted=True))
    check(ops, rng, Update(5, 2, heads, pool=40, reads=4, writes=0, accepted=True, index_dtype=I32))


def test_a_row_may_write_the_slots_that_it_reads(ops, rng):
    a = make(rng, Update(2, 3))
    a["state_indices"] = np.array([[4, 1, 2], [0, 6, 3]])
    a["state_indices_out"] = a["state_indices"]
    a["num_accepted_tokens"] = np.array([2, 3])
    state = normal(rng, (8, 4, 8, 16))
    want = reference.state_update(state, **a)
    out, after = run(ops, a, state)
    assert_close(out, want.out)
    assert_close(after, want.states["state"], "state")


@pytest.mark.parametrize("writes", [None, 0])
@MODELS
def test_token_counts(ops, rng, heads, writes):
    p = Update(6, 4, heads, pool=20, reads=0, writes=writes, counts=True)
    a, out, _ = check(ops, rng, p)
    for row, n in enumerate(a["num_tokens"]):
        assert (out[row, n:] == 0).all()


def test_no_tokens_of_a_row_copy_its_state_to_the_slot_it_writes(ops, rng):
    a = make(rng, Update(2, 3))
    a.update(
        state_indices=np.array([0, 1]), state_indices_out=np.array([2, 3]),
        num_tokens=np.array([0, 3]),
    )
    state = normal(rng, (4, 4, 8, 16), BF16)
    out, after = run(ops, a, state)
    assert_same_bits(after[2], state[0], "the written slot")
    assert (out[0] == 0).all()


@pytest.mark.core
@MODELS
@pytest.mark.parametrize("indices", [False, True])
@pytest.mark.parametrize("accepted", [False, True])
@pytest.mark.parametrize("keep_state", [False, True])
def test_intermediate_states(ops, rng, heads, indices, accepted, keep_state):
    p = Update(
        5, 3, heads, pool=12, reads=0, counts=True, intermediate=7, intermediate_indices=indices,
        accepted=accepted, keep_state=keep_state,
    )
    check(ops, rng, p)
    check(ops, rng, replace(p, layout="mixed", dtype={"intermediate_states": BF16, "state": F16}))


def test_intermediate_states_of_a_call_without_T(ops, rng):
    check(ops, rng, Update(3, None, intermediate=3))


def test_rejected_tokens_are_rolled_back(ops, rng):
    """Verify 4 draft tokens, accept some, go on: as if only the accepted ones had been decoded."""
    p = Update(5, 4)
    draft, more = make(rng, p), make(rng, p)
    for name in ("A", "D", "dt_bias"):
        more[name] = draft[name]
    state = normal(rng, (5, 4, 8, 16))
    kept = np.zeros((5, 4, 4, 8, 16), F32)
    accepted = np.array([0, 1, 2, 3, 4])
    pool = state.copy()
    ops.state_update(pool, **draft, intermediate_states=kept, keep_state=True)
    assert_same_bits(pool, state, "pool under keep_state")
    out = ops.state_update(pool, **more, intermediate_states=kept, num_accepted_tokens=accepted)
    once = reference.state_update(state, **draft, num_tokens=accepted)
    want = reference.state_update(once.states["state"], **more)
    assert_close(out, want.out)
    assert_close(pool, want.states["state"], "state")


def test_kept_states_leave_the_pool_alone(ops, rng):
    check(ops, rng, Update(4, 2, pool=6, reads=0, keep_state=True))
    a = make(rng, Update(3, None, keep_state=True))
    a["state_indices"] = np.array([1, 1, 1])
    state = normal(rng, (2, 4, 8, 16))
    want = reference.state_update(state, **a)
    out, after = run(ops, a, state)
    assert_close(out, want.out)
    assert_same_bits(after, state, "pool under keep_state")


def test_pads_are_neither_read_nor_written(ops, rng):
    for heads in (False, True):
        p = Update(5, 2, heads, pool=8)
        a = make(rng, p)
        a["state_indices"] = np.array([3, -1, 0, 6, -5])
        a["pad_slot"] = 6
        for name in ("x", "dt", "B", "C", "z"):
            a[name] = a[name].copy()
            a[name][[1, 3, 4]] = np.nan
        state = pools(rng, p, {})["state"].array
        out, after = run(ops, a, state)
        assert (out[[1, 3, 4]] == 0).all()
        assert np.isfinite(out).all()
        assert_same_bits(after[[1, 2, 4, 5, 6, 7]], state[[1, 2, 4, 5, 6, 7]], "slots of pads")


def test_a_pad_to_write_is_a_pad_to_read(ops, rng):
    a = make(rng, Update(3, None))
    a.update(state_indices=np.array([0, 1, 2]), state_indices_out=np.array([3, -1, 4]))
    state = normal(rng, (5, 4, 8, 16))
    state[1] = np.nan
    out, after = run(ops, a, state)
    assert (out[1] == 0).all() and np.isfinite(out).all()
    assert_same_bits(after[:3], state[:3], "slots that are only read")


def test_pool_gives_the_bits_of_gather_dense_scatter(ops, rng):
    for dtype in FLOATS:
        for heads in (False, True):
            p = Update(6, 2, heads, 3, 5, 24, pool=11, layout="packed", dtype={"state": dtype})
            a = make(rng, p)
            state = pools(rng, replace(p, layout="mixed"), {})["state"].array
            a["state_indices"] = rng.permutation(11)[:6]
            dense = {k: v for k, v in a.items() if k != "state_indices"}
            want, states = run(ops, dense, np.ascontiguousarray(state[a["state_indices"]]))
            scattered = state.copy()
            scattered[a["state_indices"]] = states
            out = ops.state_update(state, **a)
            assert_same_bits(out, want)
            assert_same_bits(state, scattered, "pool")


def test_two_pools_may_interleave_in_one_buffer(ops, rng):
    """A serving engine keeps the states of all layers of one request together."""
    a, b = make(rng, Update(3)), make(rng, Update(3))
    buffer = normal(rng, (5, 2, 4, 8, 16))
    before = buffer.copy()
    for layer, args in enumerate((a, b)):
        args["state_indices"] = np.array([4, 0, 2])
        want = reference.state_update(before[:, layer], **args)
        out = ops.state_update(buffer[:, layer], **args)
        assert_close(out, want.out)
        assert_close(buffer[[4, 0, 2], layer], want.states["state"][[4, 0, 2]], "state")
    assert_same_bits(buffer[[1, 3]], before[[1, 3]], "slots of nobody")


def test_pool_and_intermediate_states_may_interleave_in_one_buffer(ops, rng):
    a = make(rng, Update(3, 2))
    buffer = normal(rng, (3, 3, 4, 8, 16))
    want = reference.state_update(buffer[:, 0], **a, intermediate_states=buffer[:, 1:])
    out = ops.state_update(buffer[:, 0], **a, intermediate_states=buffer[:, 1:])
    assert_close(out, want.out)
    assert_close(buffer[:, 0], want.states["state"], "state")
    assert_close(buffer[:, 1:], want.states["intermediate_states"], "intermediate_states")


# Tokens


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@MODELS
def test_a_call_of_many_tokens_equals_calls_of_one(ops, rng, heads, dtype):
    """With float32 states; a rounder dtype is rounded once a call."""
    a = make(rng, Update(3, 6, heads, dtype={"x": dtype, "B": dtype}))
    state = pools(rng, Update(3, 6, heads), {})["state"].array
    want, want_state = run(ops, a, state)
    pieces = state.copy()
    for t in range(6):
        one = {k: v[:, t] if k in ("x", "dt", "B", "C", "z") else v for k, v in a.items()}
        assert_close(ops.state_update(pieces, **one), want[:, t].astype(np.float64))
    assert_close(pieces, want_state.astype(np.float64), "state")


def test_decode_goes_on_where_prefill_stopped(ops, rng):
    """Mamba-1: a scan of 40 tokens, then 3 + 1 tokens of state_update, against one scan of all."""
    a = cases_scan.make(
        rng, cases_scan.Scan(2, 6, 44, 16, 2, channels_last=True, dt_limit=(0.02, 0.3))
    )
    want, want_state = reference.selective_scan(**a)
    prompt = {k: v[:, :40] if k in ("x", "dt", "B", "C", "z") else v for k, v in a.items()}
    out, state = ops.selective_scan(**prompt, return_final_states=True)
    common = {k: a[k] for k in ("A", "D", "dt_bias", "dt_softplus", "dt_limit")}
    outs = [out]
    outs.append(
        ops.state_update(state, **common, **{k: a[k][:, 40:43] for k in ("x", "dt", "B", "C", "z")})
    )
    outs.append(
        ops.state_update(state, **common, **{k: a[k][:, 43] for k in ("x", "dt", "B", "C", "z")})[
            :, None
        ]
    )
    assert_close(np.concatenate(outs, 1), want)
    assert_close(state, want_state, "state")


# Reproducibility


@MODELS
def test_bits_do_not_depend_on_the_number_of_threads(ops, rng, threads, heads):
    for p in (
        Update(7, None, heads, 8, 64, 64), Update(1, 5, heads, 8, 64, 64),
        Update(33, None, heads, 2, 3, 16),
    ):
        a, state = make(rng, p), pools(rng, p, {})["state"].array
        threads(1)
        want = run(ops, a, state)
        for n in (2, 3, 7):
            threads(n)
            got = run(ops, a, state)
            assert_same_bits(got[0], want[0])
            assert_same_bits(got[1], want[1], "state")


@MODELS
def test_a_row_has_the_bits_that_it_has_alone(ops, rng, heads):
    for T in (None, 3):
        p = Update(7, T, heads, 5, 16, 24)
        a, state = make(rng, p), pools(rng, p, {})["state"].array
        out, after = run(ops, a, state)
        for row in (0, 4, 6):
            alone = {
                k: v[row : row + 1] if k in ("x", "dt", "B", "C", "z") else v for k, v in a.items()
            }
            got, got_state = run(ops, alone, state[row : row + 1])
            assert_same_bits(got[0], out[row])
            assert_same_bits(got_state[0], after[row], "state")


@MODELS
def test_nan_in_a_row_stays_in_that_row(ops, rng, heads):
    p = Update(5, 2, heads, 4, 8, 16)
    a, state = make(rng, p), pools(rng, p, {})["state"].array
    clean, clean_state = run(ops, a, state)
    rest = [0, 1, 3, 4]
    for name in ("x", "dt", "B", "C", "z", "state"):
        dirty = dict(a)
        start = state.copy()
        if name == "state":
            start[2] = np.nan
        else:
            dirty[name] = a[name].copy()
            dirty[name][2] = np.nan
        out, after = run(ops, dirty, start)
        assert np.isnan(out[2]).any(), f"{name}: NaN was lost"
        assert_same_bits(out[rest], clean[rest])
        assert_same_bits(after[rest], clean_state[rest], "state")


def test_tokens_past_the_count_are_not_read(ops, rng):
    a = make(rng, Update(3, 4))
    a["num_tokens"] = np.array([0, 2, 4])
    state = normal(rng, (3, 4, 8, 16))
    clean, clean_state = run(ops, a, state)
    dirty = dict(a)
    for name in ("x", "dt", "B", "C", "z"):
        dirty[name] = a[name].copy()
        dirty[name][0] = np.nan
        dirty[name][1, 2:] = np.nan
    out, after = run(ops, dirty, state)
    assert_same_bits(out, clean)
    assert_same_bits(after, clean_state, "state")


# Everything at once


@st.composite
def calls(draw):
    heads = draw(st.booleans())
    ngroups = draw(st.integers(1, 3))
    group_axis = heads or ngroups > 1 or draw(st.booleans())
    batch = draw(st.integers(0, 6))
    T = draw(st.sampled_from((None, None, 1, 2, 5)))
    tokens = T or 1
    reads = draw(st.sampled_from((None, 0, 0, 3)))
    writes = draw(st.sampled_from((None, 0, 1))) if T else draw(st.sampled_from((None, 0)))
    needs = batch * (1 + (reads or 1) + (tokens if writes else 1)) + 2
    keep_state = writes is None and draw(st.sampled_from((False, False, True)))
    plain = reads is None and writes is None
    intermediate = batch + draw(st.integers(0, 2)) if draw(st.booleans()) else None
    accepted = bool(reads) or (intermediate is not None and draw(st.booleans()))
    names = (*TENSORS, "out", "intermediate_states")
    return Update(
        batch=batch,
        T=T,
        heads=heads,
        nheads=ngroups * draw(st.integers(1, 3)),
        headdim=draw(st.sampled_from((1, 2, 3, 8, 16, 17))),
        dstate=draw(st.sampled_from((1, 2, 5, 8, 16, 17, 24, 48, 64, 128))),
        ngroups=ngroups,
        tied=tuple(n for n in ("dt", "A", "D", "dt_bias") if draw(st.booleans())),
        group_axis=group_axis,
        has=tuple(n for n in ("D", "z", "dt_bias") if draw(st.booleans())),
        softplus=draw(st.booleans()),
        dt_limit=draw(st.sampled_from((None, None, (0.02, 0.3)))),
        pool=None if plain and draw(st.booleans()) else needs,
        reads=reads,
        writes=writes,
        pad_slot=None if reads is None else draw(st.sampled_from((None, 0, 1))),
        counts=T is not None and draw(st.booleans()),
        accepted=accepted,
        intermediate=intermediate,
        intermediate_indices=draw(st.booleans()),
        keep_state=keep_state,
        dtype={name: draw(st.sampled_from(FLOATS)) for name in names},
        index_dtype=draw(st.sampled_from((I32, I64))),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


@given(calls(), st.integers(0, 2**32 - 1))
def test_random_calls(ops, p, seed):
    check(ops, np.random.default_rng(seed), p)
