# SPDX-License-Identifier: MIT
"""causal_conv1d and causal_conv1d_update against the reference, and what must hold bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import cases_update
import reference
from cases import (
    BF16, F16, F32, FLOATS, I32, I64, LAYOUTS, assert_close, assert_same_bits, normal, repeated,
)
from cases_conv import (
    Conv, ConvUpdate, assert_moved, check, check_update, make, make_update, run_update,
)

CHANNELS = pytest.mark.parametrize(
    "channels_last", [False, True], ids=["channels_first", "channels_last"]
)
# batch, dim, seqlen
SHAPES = [
    (0, 5, 9), (1, 1, 1), (2, 3, 63), (1, 17, 64), (3, 48, 65), (1, 80, 1000), (2, 130, 7),
    (1, 3, 1023), (1, 2, 1025), (1, 1, 4100), (1, 513, 33), (40, 3, 5),
]
WIDTHS = pytest.mark.parametrize("width", range(2, 9))


def rerun(ops, a, **changes):
    return ops.causal_conv1d(**{**a, **changes}, return_final_states=True)


def assert_same_result(got, want):
    assert_same_bits(got[0], want[0], "out")
    assert_same_bits(got[1], want[1], "final_states")


def assert_like_reference(ops, a):
    want, want_final = reference.causal_conv1d(**a)
    out, final = rerun(ops, a)
    assert_close(out, want)
    assert_moved(final, want_final, "final_states")


# Prefill


@pytest.mark.core
@CHANNELS
@WIDTHS
def test_every_width(ops, rng, width, channels_last):
    for seqlen in (0, 1, 2, width - 1, 30):
        check(ops, rng, Conv(2, 19, seqlen, width, channels_last=channels_last))


@pytest.mark.core
@CHANNELS
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(ops, rng, shape, channels_last):
    check(ops, rng, Conv(*shape, channels_last=channels_last))
    check(ops, rng, Conv(*shape, channels_last=channels_last, initial=False, activation=None))


@pytest.mark.core
@CHANNELS
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_dtype_throughout(ops, rng, dtype, channels_last):
    check(ops, rng, Conv(2, 35, 70, dtype=dtype, channels_last=channels_last))


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
@pytest.mark.parametrize("name", ("x", "weight", "bias", "initial_states", "final_states", "out"))
def test_one_tensor_of_another_dtype(ops, rng, name, dtype):
    check(ops, rng, Conv(2, 9, 37, dtype={name: dtype}))


@pytest.mark.core
@CHANNELS
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(ops, rng, layout, channels_last):
    check(ops, rng, Conv(2, 9, 21, layout=layout, channels_last=channels_last))
    check(ops, rng, Conv(2, 18, 34, 3, layout=layout, channels_last=channels_last, dtype=BF16))


@CHANNELS
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_large_outputs(ops, rng, dtype, channels_last):
    """More than the caches hold, and more tokens than a task takes."""
    shape = (1, 520, 8900) if dtype == F32 else (2, 520, 8900)
    check(ops, rng, Conv(*shape, dtype=dtype, channels_last=channels_last))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("final", [False, True])
def test_every_option_absent_or_present(ops, rng, activation, bias, initial, final):
    check(ops, rng, Conv(activation=activation, bias=bias, initial=initial, final=final))


@pytest.mark.core
@pytest.mark.parametrize("state_len", (4, 5, 11))
@pytest.mark.parametrize("seqlen", (0, 1, 3, 6, 20))
def test_states_longer_than_the_taps(ops, rng, state_len, seqlen):
    check(ops, rng, Conv(2, 5, seqlen, 4, state_len))
    check(ops, rng, Conv(2, 5, seqlen, 4, state_len, in_place=True))
    check(ops, rng, Conv(2, 5, seqlen, 4, state_len, initial=False))
    check(ops, rng, Conv(1, 5, seqlen, 4, state_len, nseq=3, channels_last=True))
    check(ops, rng, Conv(2, 5, seqlen, 4, state_len, seq_idx=True))


def test_strides_of_zero_are_read_as_written(ops, rng):
    a = make(rng, Conv(3, 6, 11))
    a["x"] = repeated(a["x"], 0, 3)
    a["weight"] = repeated(a["weight"], 0, 6)
    a["bias"] = repeated(a["bias"], 0, 6)
    a["initial_states"] = repeated(a["initial_states"], 2, 3)
    assert_like_reference(ops, a)


@pytest.mark.core
@CHANNELS
@pytest.mark.parametrize("nseq", (1, 3, 40))
def test_cu_seqlens(ops, rng, nseq, channels_last):
    p = Conv(1, 9, 31, nseq=nseq, channels_last=channels_last, index_dtype=I32, flags="bool")
    check(ops, rng, p)
    check(ops, rng, replace(p, layout="sliced", index_dtype=I64, width=8))


def test_sequences_without_tokens_pass_their_states(ops, rng):
    a = make(rng, Conv(1, 6, 5, nseq=4))
    a["cu_seqlens"] = np.array([0, 0, 5, 5, 5])
    a["has_initial_state"] = np.array([True, True, False, True])
    _, final = rerun(ops, a)
    assert_same_bits(final[[0, 3]], a["initial_states"][[0, 3]], "final_states")
    assert (final[2] == 0).all()


def test_cu_seqlens_of_no_tokens_at_all(ops, rng):
    check(ops, rng, Conv(1, 6, 0, nseq=3))
    check(ops, rng, Conv(1, 6, 0, nseq=0))


@pytest.mark.core
@CHANNELS
@pytest.mark.parametrize("width", (2, 4, 8))
def test_seq_idx(ops, rng, channels_last, width):
    p = Conv(3, 9, 50, width, seq_idx=True, channels_last=channels_last)
    check(ops, rng, p)
    check(ops, rng, replace(p, layout="mixed", index_dtype=I32, flags="uint8"))
    check(ops, rng, replace(p, initial=False, dtype=BF16))
    check(ops, rng, replace(p, state_len=11))


def test_taps_go_by_position(ops, rng):
    """A pad between two tokens of a sequence counts 0; an id that comes back is the same."""
    a = make(rng, Conv(1, 3, 6, 3, activation=None, bias=False, initial=False))
    a["seq_idx"] = np.array([[0, -1, 0, 1, 0, 0]])
    x, w = a["x"][0], a["weight"]
    out, _ = rerun(ops, a)
    assert_close(out[0, :, 2], (w[:, 0] * x[:, 0] + w[:, 2] * x[:, 2]).astype(np.float64))
    assert_close(out[0, :, 4], (w[:, 0] * x[:, 2] + w[:, 2] * x[:, 4]).astype(np.float64))


def test_seq_idx_final_state_is_of_the_last_sequence_only(ops, rng):
    a = make(rng, Conv(2, 5, 8, 4, 6))
    a["seq_idx"] = np.array([[0, 0, 0, 1, 1, 2, 2, -1], [3, 3, 3, 3, -1, -1, -1, -1]])
    assert_like_reference(ops, a)
    _, final = rerun(ops, a)
    assert (final[0, :, :4] == 0).all()
    assert_same_bits(final[0, :, 4:], a["x"][0, :, 5:7], "final_states")


@pytest.mark.core
@pytest.mark.parametrize("packing", ("rows", "cu_seqlens", "seq_idx"))
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("pad_slot", [None, 0, 3])
def test_pools(ops, rng, packing, in_place, pad_slot):
    p = Conv(4, 5, 13, pool=9, in_place=in_place, pad_slot=pad_slot, flags="int8", index_dtype=I32)
    if packing == "cu_seqlens":
        p = replace(p, batch=1, nseq=6)
    check(ops, rng, replace(p, seq_idx=packing == "seq_idx"))
    check(ops, rng, replace(p, seq_idx=packing == "seq_idx", layout="mixed", channels_last=True))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_states_in_place(ops, rng, dtype, layout):
    check(ops, rng, Conv(3, 5, 2, in_place=True, layout=layout, dtype={"initial_states": dtype}))


def test_pool_gives_the_bits_of_gather_dense_scatter(ops, rng):
    for p in (Conv(4, 7, 30, pool=11), Conv(1, 7, 30, pool=11, nseq=6, dtype=BF16)):
        a = make(rng, p)
        a["state_indices"] = rng.permutation(11)[: p.sequences]
        pool = np.zeros(p.state_shape, p.dtype_of("final_states"))
        out, _ = ops.causal_conv1d(**a, final_states=pool)
        dense = {k: v for k, v in a.items() if k != "state_indices"}
        dense["initial_states"] = a["initial_states"][a["state_indices"]]
        want, states = rerun(ops, dense)
        assert_same_bits(out, want)
        assert_same_bits(pool[a["state_indices"]], states, "pool")


def test_allocated_results(ops, rng):
    a = make(rng, Conv(2, 5, 7, dtype=BF16))
    out, final = rerun(ops, a)
    assert out.dtype == BF16 and final.dtype == BF16 and final.shape == (2, 5, 3)
    del a["initial_states"]
    out, final = rerun(ops, a)
    assert final.dtype == F32 and final.shape == (2, 5, 3)
    assert_moved(final, reference.causal_conv1d(**a)[1], "final_states")


def test_silu_saturates_without_nan(ops, rng):
    a = make(rng, Conv(2, 5, 20))
    a["x"] = a["x"] * np.float32(100)
    assert_like_reference(ops, a)


@CHANNELS
def test_bits_do_not_depend_on_the_number_of_threads(ops, rng, threads, channels_last):
    for p in (
        Conv(1, 70, 300), Conv(3, 37, 65), Conv(1, 5, 200, nseq=7), Conv(2, 33, 40, seq_idx=True),
    ):
        a = make(rng, replace(p, channels_last=channels_last))
        threads(1)
        want = rerun(ops, a)
        for n in (2, 3, 7):
            threads(n)
            assert_same_result(rerun(ops, a), want)


@CHANNELS
def test_a_row_has_the_bits_that_it_has_alone(ops, rng, channels_last):
    a = make(rng, Conv(5, 19, 70, channels_last=channels_last))
    out, final = rerun(ops, a)
    for row in (0, 3):
        alone = {k: a[k][row : row + 1] for k in ("x", "initial_states")}
        got, got_final = rerun(ops, a, **alone)
        assert_same_bits(got[0], out[row])
        assert_same_bits(got_final[0], final[row], "final_states")


@CHANNELS
def test_packed_sequences_have_the_bits_of_separate_calls(ops, rng, channels_last):
    a = make(rng, Conv(1, 21, 83, nseq=6, channels_last=channels_last))
    out, final = rerun(ops, a)
    time, cu = (1 if channels_last else 2), a["cu_seqlens"]
    for s, (start, end) in enumerate(zip(cu[:-1], cu[1:])):
        one = {k: v for k, v in a.items() if k != "cu_seqlens"}
        one["x"] = np.take(a["x"], np.arange(start, end), time)
        one["initial_states"] = a["initial_states"][s : s + 1]
        got, got_final = rerun(ops, one)
        assert_same_bits(got, np.take(out, np.arange(start, end), time))
        assert_same_bits(got_final[0], final[s], "final_states")


def test_a_call_cut_in_two_equals_the_whole(ops, rng):
    a = make(rng, Conv(2, 5, 40))
    want, want_final = rerun(ops, a)
    for cut in (0, 1, 2, 3, 17, 40):
        left, states = rerun(ops, a, x=a["x"][..., :cut])
        right, states = rerun(ops, a, x=a["x"][..., cut:], initial_states=states)
        assert_close(np.concatenate([left, right], -1), want.astype(np.float64))
        assert_same_bits(states, want_final, "final_states")


def test_nan_in_a_row_stays_in_that_row(ops, rng):
    a = make(rng, Conv(4, 20, 40))
    clean = rerun(ops, a)
    rest = [0, 1, 3]
    for name in ("x", "initial_states"):
        dirty = a[name].copy()
        dirty[2] = np.nan
        out, final = rerun(ops, a, **{name: dirty})
        assert np.isnan(out[2]).any(), f"{name}: NaN was lost"
        assert_same_bits(out[rest], clean[0][rest])
        assert_same_bits(final[rest], clean[1][rest], "final_states")


def test_nan_in_a_token_reaches_only_the_taps_that_see_it(ops, rng):
    for channels_last in (False, True):
        a = make(rng, Conv(1, 20, 40, channels_last=channels_last))
        a["x"] = a["x"].copy()
        a["x"].swapaxes(1, 2 if channels_last else 1)[0, 3, 17] = np.nan
        out = rerun(ops, a)[0].swapaxes(1, 2 if channels_last else 1)
        expected = np.zeros((20, 40), bool)
        expected[3, 17:21] = True
        assert (np.isnan(out[0]) == expected).all()


@pytest.mark.parametrize("packing", ("cu_seqlens", "seq_idx"))
def test_nan_in_a_sequence_stays_in_that_sequence(ops, rng, packing):
    a = make(rng, Conv(1, 6, 30, initial=packing == "seq_idx"))
    if packing == "seq_idx":
        a["seq_idx"] = np.repeat([[4, 5, 9]], 10, 1)
    else:
        a["cu_seqlens"] = np.array([0, 10, 20, 30])
    clean, clean_final = rerun(ops, a)
    dirty = a["x"].copy()
    dirty[..., 10:20] = np.nan
    out, final = rerun(ops, a, x=dirty)
    rest = np.r_[0:10, 20:30]
    assert_same_bits(out[..., rest], clean[..., rest])
    assert_same_bits(final[-1], clean_final[-1], "final_states")


def test_pad_tokens_are_not_read_and_give_zeros(ops, rng):
    a = make(rng, Conv(2, 6, 30, seq_idx=True))
    pads = a["seq_idx"] < 0
    clean = rerun(ops, a)
    out, final = rerun(ops, a, x=np.where(pads[:, None], np.float32(np.nan), a["x"]))
    assert_same_result((out, final), clean)
    assert (np.moveaxis(out, 1, 2)[pads] == 0).all()


def test_pad_slots_are_neither_read_nor_written(ops, rng):
    a = make(rng, Conv(3, 6, 9, pool=5))
    a["state_indices"] = np.array([3, -1, 0])
    a["x"] = a["x"].copy()
    a["x"][1] = np.nan
    pool = normal(rng, (5, 6, 3))
    before = pool.copy()
    out, _ = ops.causal_conv1d(**a, final_states=pool)
    assert (out[1] == 0).all() and np.isfinite(out).all()
    assert_same_bits(pool[[1, 2, 4]], before[[1, 2, 4]], "pool")


@st.composite
def calls(draw):
    packing = draw(st.sampled_from(("rows", "rows", "cu_seqlens", "seq_idx")))
    initial, final = draw(st.booleans()), draw(st.booleans())
    nseq = draw(st.integers(1, 6)) if packing == "cu_seqlens" else None
    batch = 1 if nseq else draw(st.integers(0, 4))
    width = draw(st.integers(2, 8))
    return Conv(
        batch=batch,
        dim=draw(st.sampled_from((1, 3, 8, 16, 17, 33, 64))),
        seqlen=draw(st.sampled_from((0, 1, 2, 3, 5, 8, 13, 17, 32, 33, 64, 67))),
        width=width,
        state_len=draw(st.sampled_from((None, None, width, width + 5))),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from((None, "silu"))),
        channels_last=draw(st.booleans()),
        nseq=nseq,
        seq_idx=packing == "seq_idx",
        initial=initial,
        final=final,
        in_place=initial and final and draw(st.booleans()),
        flags=draw(st.sampled_from((None, "bool", "int8", "uint8"))) if initial else None,
        pool=(nseq or batch) + draw(st.integers(1, 4))
        if draw(st.booleans()) and (initial or final)
        else None,
        pad_slot=draw(st.sampled_from((None, 0, 1))),
        dtype={
            n: draw(st.sampled_from(FLOATS))
            for n in ("x", "weight", "bias", "initial_states", "final_states", "out")
        },
        index_dtype=draw(st.sampled_from((I32, I64))),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


@given(calls(), st.integers(0, 2**32 - 1))
def test_random_calls(ops, p, seed):
    check(ops, np.random.default_rng(seed), p if p.pool else replace(p, pad_slot=None))


# Decode


@pytest.mark.core
@WIDTHS
@pytest.mark.parametrize("T", [None, 1, 3])
@pytest.mark.parametrize("ring", [False, True])
def test_update_of_every_width(ops, rng, width, T, ring):
    for extra in (0, 1, 6):
        check_update(ops, rng, ConvUpdate(3, T, 19, width, width - 1 + extra, ring=ring))


@pytest.mark.core
@pytest.mark.parametrize("dim", (1, 3, 17, 64, 130, 513))
@pytest.mark.parametrize("batch", (0, 1, 5, 8, 17))
def test_update_of_every_shape(ops, rng, batch, dim):
    check_update(ops, rng, ConvUpdate(batch, None, dim))
    check_update(ops, rng, ConvUpdate(batch, 2, dim, channels_last=True))


@pytest.mark.parametrize("T", (4, 8, 9, 20))
@pytest.mark.parametrize("ring", [False, True])
def test_update_of_more_tokens_than_the_state_holds(ops, rng, T, ring):
    for state_len in (3, 4, 7):
        check_update(ops, rng, ConvUpdate(2, T, 5, 4, state_len, ring=ring))
        check_update(
            ops, rng, ConvUpdate(4, T, 5, 4, state_len, ring=ring, counts=True, channels_last=True)
        )


@pytest.mark.core
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("state", FLOATS, ids=str)
def test_update_with_inputs_of_one_dtype_and_states_of_another(ops, rng, dtype, state):
    dtypes = {**dict.fromkeys(("x", "weight", "bias", "out"), dtype), "conv_state": state}
    for ring in (False, True):
        check_update(ops, rng, ConvUpdate(3, None, 18, dtype=dtypes, ring=ring))
        check_update(ops, rng, ConvUpdate(3, 5, 18, dtype=dtypes, ring=ring))


@pytest.mark.core
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T", [None, 3])
def test_update_of_every_layout(ops, rng, layout, T):
    for channels_last in (False, True):
        p = ConvUpdate(3, T, 18, layout=layout, channels_last=channels_last)
        check_update(ops, rng, p)
        check_update(ops, rng, replace(p, ring=True, state_len=5, dtype=BF16))


@pytest.mark.parametrize("activation", [None, "silu"])
@pytest.mark.parametrize("bias", [False, True])
def test_update_with_every_option_absent_or_present(ops, rng, activation, bias):
    check_update(ops, rng, ConvUpdate(activation=activation, bias=bias))


@pytest.mark.core
@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("writes", [False, True])
@pytest.mark.parametrize("pad_slot", [None, 0, 5])
def test_update_of_slots_of_a_pool(ops, rng, ring, writes, pad_slot):
    p = ConvUpdate(
        6, None, 9, pool=20, reads=True, writes=writes, ring=ring, pad_slot=pad_slot, pads=0.3
    )
    check_update(ops, rng, p)
    check_update(ops, rng, replace(p, T=3, counts=True, layout="mixed", index_dtype=I32))


def test_update_of_a_pool_larger_than_the_batch_without_indices(ops, rng):
    check_update(ops, rng, ConvUpdate(3, 2, pool=5))
    check_update(ops, rng, ConvUpdate(3, 2, pool=9, writes=True))


def test_update_of_a_ring_rolls_back_to_a_smaller_count(ops, rng):
    """Four draft tokens, two of them rejected: as if the other two had been the only ones."""
    a, placed = make_update(rng, ConvUpdate(2, 4, 5, 4, 8, ring=True))
    start = placed.array
    more = normal(rng, (2, 5, 1))
    _, drafted = run_update(ops, a, start)
    out, _ = run_update(ops, a, drafted, x=more, cache_seqlens=a["cache_seqlens"] + 2)
    once = reference.causal_conv1d_update(**{**a, "x": a["x"][..., :2]}, conv_state=start)[1]
    want, _ = reference.causal_conv1d_update(
        **{**a, "x": more, "cache_seqlens": a["cache_seqlens"] + 2}, conv_state=once
    )
    assert_close(out, want)


def test_decode_goes_on_where_prefill_stopped(ops, rng):
    for width in range(2, 9):
        a = make(rng, Conv(2, 5, 30, width))
        want, want_final = reference.causal_conv1d(**a)
        first, state = rerun(ops, a, x=a["x"][..., :20])
        common = {k: a[k] for k in ("weight", "bias", "activation")}
        outs = [first]
        for cut in (slice(20, 21), slice(21, 25), slice(25, 30)):
            outs.append(ops.causal_conv1d_update(a["x"][..., cut], state, **common))
        assert_close(np.concatenate(outs, -1), want)
        assert_moved(state, want_final, "conv_state")


def test_update_bits_do_not_depend_on_the_number_of_threads(ops, rng, threads):
    for p in (ConvUpdate(9, None, 300), ConvUpdate(1, 7, 301), ConvUpdate(33, 2, 7, ring=True)):
        a, placed = make_update(rng, p)
        threads(1)
        want = run_update(ops, a, placed.array)
        for n in (2, 3, 7):
            threads(n)
            assert_same_result(run_update(ops, a, placed.array), want)


def test_update_of_a_row_has_the_bits_that_it_has_alone(ops, rng):
    a, placed = make_update(rng, ConvUpdate(7, 3, 21))
    out, state = run_update(ops, a, placed.array)
    for row in (0, 4, 6):
        got, got_state = run_update(ops, a, placed.array[row : row + 1], x=a["x"][row : row + 1])
        assert_same_bits(got[0], out[row])
        assert_same_bits(got_state[0], state[row], "conv_state")


def test_update_gives_the_bits_of_gather_dense_scatter(ops, rng):
    for dtype in FLOATS:
        a, placed = make_update(
            rng, ConvUpdate(6, 2, 10, pool=11, reads=True, pads=0, layout="mixed", dtype=dtype)
        )
        slots = a.pop("state_indices")
        want, states = run_update(ops, a, np.ascontiguousarray(placed.array[slots]))
        expected = placed.array.copy()
        expected[slots] = states
        out, pool = run_update(ops, a, placed.array, state_indices=slots)
        assert_same_bits(out, want)
        assert_same_bits(pool, expected, "pool")


def test_update_keeps_nan_in_its_row(ops, rng):
    a, placed = make_update(rng, ConvUpdate(5, 2, 20))
    clean, clean_state = run_update(ops, a, placed.array)
    rest = [0, 1, 3, 4]
    dirty = a["x"].copy()
    dirty[2] = np.nan
    out, state = run_update(ops, a, placed.array, x=dirty)
    assert np.isnan(out[2]).any()
    assert_same_bits(out[rest], clean[rest])
    assert_same_bits(state[rest], clean_state[rest], "conv_state")


def test_update_neither_reads_nor_writes_pads(ops, rng):
    a, placed = make_update(rng, ConvUpdate(4, 2, 7, pool=6))
    a.update(state_indices=np.array([4, -1, 2, 0]), pad_slot=2)
    a["x"] = a["x"].copy()
    a["x"][1:3] = np.nan
    pool = placed.array.copy()
    pool[2] = np.nan
    out, after = run_update(ops, a, pool)
    assert (out[1:3] == 0).all() and np.isfinite(out).all()
    assert_same_bits(after[[1, 2, 3, 5]], pool[[1, 2, 3, 5]], "pool")


def test_update_does_not_read_tokens_past_the_count(ops, rng):
    for ring in (False, True):
        a, placed = make_update(rng, ConvUpdate(3, 4, 6, 4, 5, ring=ring))
        a["num_tokens"] = np.array([0, 2, 4])
        clean = run_update(ops, a, placed.array)
        dirty = a["x"].copy()
        dirty[0] = np.nan
        dirty[1, :, 2:] = np.nan
        got = run_update(ops, a, placed.array, x=dirty)
        assert_same_result(got, clean)
        assert (got[0][0] == 0).all() and (got[0][1, :, 2:] == 0).all()
        assert_same_bits(got[1][0], placed.array[0], "state of the row without tokens")


def test_conv_and_ssm_states_of_a_layer_may_share_a_buffer(ops, rng):
    """A slot of a serving engine's buffer holds the conv state (bf16) and the SSM state (fp32)."""
    dim, dstate, width, slots = 6, 16, 4, 5
    conv_bytes, ssm_bytes = dim * width * 2, dim * dstate * 4
    buffer = rng.integers(0, 256, (slots, conv_bytes + ssm_bytes), np.uint8)
    conv = buffer[:, :conv_bytes].view(BF16).reshape(slots, dim, width)
    ssm = buffer[:, conv_bytes:].view(F32).reshape(slots, dim, dstate)
    conv[...], ssm[...] = normal(rng, conv.shape, BF16), normal(rng, ssm.shape)
    before = buffer.copy()
    indices = np.array([3, 1])

    a, _ = make_update(rng, ConvUpdate(2, None, dim, width))
    u = cases_update.make(rng, cases_update.Update(2, None, False, 3, 2, dstate))
    a["state_indices"] = u["state_indices"] = indices
    want, want_conv = reference.causal_conv1d_update(conv_state=conv, **a)
    want_update = reference.state_update(ssm, **u)
    assert_close(ops.causal_conv1d_update(a.pop("x"), conv, **a), want)
    assert_close(ops.state_update(ssm, **u), want_update.out)
    assert_moved(conv[indices], want_conv[indices], "conv_state")
    assert_close(ssm[indices], want_update.states["state"][indices], "state")
    assert_same_bits(buffer[[0, 2, 4]], before[[0, 2, 4]], "slots of nobody")


@st.composite
def update_calls(draw):
    batch, reads, writes = draw(st.integers(0, 6)), draw(st.booleans()), draw(st.booleans())
    width = draw(st.integers(2, 8))
    T = draw(st.sampled_from((None, 1, 2, 5, 11)))
    return ConvUpdate(
        batch=batch,
        T=T,
        dim=draw(st.sampled_from((1, 3, 8, 16, 17, 33, 64))),
        width=width,
        state_len=width - 1 + draw(st.integers(0, 6)),
        bias=draw(st.booleans()),
        activation=draw(st.sampled_from((None, "silu"))),
        channels_last=draw(st.booleans()),
        ring=draw(st.booleans()),
        pool=3 * batch + 2 if reads or writes else None,
        reads=reads,
        writes=writes,
        pad_slot=draw(st.sampled_from((None, 0, 1))) if reads else None,
        counts=T is not None and draw(st.booleans()),
        dtype={
            n: draw(st.sampled_from(FLOATS)) for n in ("x", "weight", "bias", "conv_state", "out")
        },
        index_dtype=draw(st.sampled_from((I32, I64))),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


@given(update_calls(), st.integers(0, 2**32 - 1))
def test_random_updates(ops, p, seed):
    check_update(ops, np.random.default_rng(seed), p)
