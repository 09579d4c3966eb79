# SPDX-License-Identifier: MIT
"""ssd_chunk as Mamba-2: against the reference, and what must hold bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import (
    BF16, F16, F32, FLOATS, I32, I64, LAYOUTS, assert_close, assert_same_bits, blank, log_uniform,
    normal, repeated, uniform,
)
from cases_ssd import (
    TENSORS, TOKEN_TENSORS, Ssd, assert_like_reference, assert_same_results, check,
    make, rounded_to, run, starting_from, tokens_of, wanted_results,
)

# batch, seqlen, nheads, headdim, dstate, ngroups
SHAPES = [
    (2, 0, 4, 16, 16, 1), (0, 5, 4, 16, 16, 1), (2, 1, 3, 1, 1, 1), (1, 2, 2, 8, 5, 2),
    (1, 63, 2, 64, 128, 1), (1, 64, 3, 48, 64, 1), (2, 65, 2, 80, 16, 2), (1, 127, 4, 8, 96, 2),
    (1, 128, 2, 128, 16, 1), (1, 129, 6, 7, 16, 3), (3, 31, 2, 192, 64, 1), (1, 300, 2, 64, 16, 1),
    (1, 40, 2, 96, 256, 2), (1, 257, 1, 1, 128, 1), (1, 193, 3, 17, 1, 3), (2, 97, 5, 16, 33, 5),
    (1, 33, 24, 64, 128, 1), (9, 3, 8, 16, 16, 4), (1, 70, 2, 16, 7, 1), (1, 66, 2, 300, 5, 1),
    (1, 35, 2, 5, 520, 1), (40, 2, 2, 8, 16, 1), (1, 70, 9, 8, 16, 1), (2, 70, 34, 8, 16, 2),
    (2, 70, 33, 8, 16, 3), (2, 5, 0, 8, 16, 1), (2, 70, 2, 0, 16, 1), (2, 70, 2, 8, 0, 1),
]


@pytest.mark.core
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(ops, rng, shape):
    check(ops, rng, Ssd(*shape))


@pytest.mark.parametrize("seqlen", (3, 7, 15, 16, 17, 31, 32, 33, 61, 95, 96, 160, 191, 256, 509))
def test_every_length(ops, rng, seqlen):
    check(ops, rng, Ssd(1, seqlen, 2, 16, 16))


@pytest.mark.core
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", ((2, 70, 4, 64, 128, 1), (1, 133, 6, 24, 48, 2)), ids=str)
def test_one_dtype_throughout(ops, rng, dtype, shape):
    check(ops, rng, Ssd(*shape, dtype=dtype))


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
@pytest.mark.parametrize(
    "name", (*TENSORS, "adt", "initial_states", "out", "final_states", "captured_states")
)
def test_one_tensor_of_another_dtype(ops, rng, name, dtype):
    p = Ssd(1, 70, 4, 16, 32, 2, adt=name == "adt", captures=3, dtype={name: dtype})
    check(ops, rng, p)


@pytest.mark.core
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(ops, rng, layout):
    check(ops, rng, Ssd(2, 70, 4, 16, 32, 2, layout=layout, captures=4))
    check(ops, rng, Ssd(2, 21, 3, 7, 5, 1, layout=layout, captures=4, dtype=BF16, channel_D=True))


@pytest.mark.core
@pytest.mark.parametrize(
    "has", [(), ("D",), ("z",), ("dt_bias",), ("D", "z"), ("D", "z", "dt_bias")], ids=str
)
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("initial", [False, True])
def test_every_option_absent_or_present(ops, rng, has, softplus, initial):
    p = Ssd(2, 75, 4, 8, 16, has=has, softplus=softplus, initial=initial, final=not initial)
    check(ops, rng, p)


@pytest.mark.parametrize("channel_D", [False, True], ids=["D per head", "D per channel"])
@pytest.mark.parametrize("adt", [False, True], ids=["A", "adt"])
@pytest.mark.parametrize("rank", (None, 1))
def test_forms_of_D_and_of_the_decay(ops, rng, channel_D, adt, rank):
    check(ops, rng, Ssd(2, 70, 4, 24, 16, 2, rank, channel_D=channel_D, adt=adt))


@pytest.mark.parametrize(
    "limit", [(0.0, float("inf")), (0.05, 0.1), (0.0, 0.08), (-0.1, 0.2)], ids=str
)
@pytest.mark.parametrize("softplus", [False, True])
def test_dt_limit_clamps_after_softplus(ops, rng, limit, softplus):
    check(ops, rng, Ssd(2, 70, 4, 8, softplus=softplus, dt_limit=limit))
    check(ops, rng, Ssd(2, 70, 4, 8, softplus=softplus, dt_limit=limit, adt=True))


def test_dt_limit_of_two_zeros_is_refused_not_ignored(ops, rng):
    with pytest.raises(ValueError, match="dt_limit"):
        run(ops, make(rng, Ssd()), dt_limit=(0.0, 0.0))


def test_negative_dt_is_used_as_it_is(ops, rng):
    """Without limits nothing is clamped: such a step grows."""
    a = make(rng, Ssd(2, 70, softplus=False))
    a["dt"] = uniform(rng, -0.05, 0.1, a["dt"].shape)
    assert_like_reference(ops, a)


@pytest.mark.core
@pytest.mark.parametrize("chunk_size", (1, 2, 7, 16, 64, 100, 256, 4096, 2**31 - 1))
def test_chunk_size_changes_only_rounding(ops, rng, chunk_size):
    check(ops, rng, Ssd(2, 150, 3, 16, 32, captures=5, options={"chunk_size": chunk_size}))
    p = Ssd(1, 150, 4, 16, 32, 2, nseq=4, captures=5, options={"chunk_size": chunk_size})
    check(ops, rng, p)


def test_strides_of_zero_are_read_as_written(ops, rng):
    a = make(rng, Ssd(3, 70, 6, 8, 16, 2, channel_D=True))
    a["x"] = repeated(a["x"], 0, 3)
    a["dt"] = repeated(a["dt"], 2, 6)
    a["A"] = repeated(a["A"], 0, 6)
    a["B"] = repeated(a["B"], 1, 70)
    a["C"] = repeated(a["C"], 2, 2)
    a["D"] = repeated(a["D"], 1, 8)
    a["z"] = repeated(a["z"], 3, 8)
    a["initial_states"] = repeated(a["initial_states"], 0, 3)
    assert_like_reference(ops, a)


# Packed sequences


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sequences_without_tokens_pass_their_states(ops, rng, dtype):
    a = make(rng, Ssd(1, 5, nseq=4, dtype={"initial_states": dtype}))
    a["cu_seqlens"] = np.array([0, 0, 5, 5, 5])
    final = run(ops, a)["final_states"]
    assert_same_bits(final[[0, 2, 3]], a["initial_states"][[0, 2, 3]], "final_states")
    a["has_initial_state"] = np.array([True, True, False, True])
    final = run(ops, a)["final_states"]
    assert (final[2] == 0).all()
    assert_same_bits(final[[0, 3]], a["initial_states"][[0, 3]], "final_states")


def test_no_tokens_without_initial_states_give_zeros(ops, rng):
    final = run(ops, make(rng, Ssd(2, 0, initial=False)))["final_states"]
    assert (final == 0).all()
    a = make(rng, Ssd(1, 9, nseq=3, initial=False))
    a["cu_seqlens"] = np.array([0, 0, 9, 9])
    final = run(ops, a)["final_states"]
    assert (final[[0, 2]] == 0).all() and (final[1] != 0).any()


@pytest.mark.core
@pytest.mark.parametrize("index_dtype", (I32, I64), ids=str)
@pytest.mark.parametrize("nseq", (1, 2, 5, 40))
def test_cu_seqlens(ops, rng, nseq, index_dtype):
    p = Ssd(1, 231, 4, 8, 16, 2, nseq=nseq, index_dtype=index_dtype, flags="bool", captures=9)
    check(ops, rng, p)
    check(ops, rng, replace(p, layout="sliced"))


def test_cu_seqlens_of_no_tokens_at_all(ops, rng):
    check(ops, rng, Ssd(1, 0, nseq=3))
    check(ops, rng, Ssd(1, 0, nseq=0))


def test_sequences_whose_ends_are_the_ends_of_chunks(ops, rng):
    for chunk_size in (0, 16, 32, 64, 128):
        a = make(rng, Ssd(1, 400, 2, 8, nseq=6, options={"chunk_size": chunk_size}))
        a["cu_seqlens"] = np.array([0, 64, 128, 144, 145, 272, 400])
        assert_like_reference(ops, a)


@pytest.mark.core
@pytest.mark.parametrize("index_dtype", (I32, I64), ids=str)
def test_seq_idx(ops, rng, index_dtype):
    p = Ssd(3, 150, 4, 8, 16, 2, seq_idx=True, index_dtype=index_dtype, captures=9)
    check(ops, rng, p)
    check(ops, rng, replace(p, layout="mixed", flags="uint8"))


def test_seq_idx_of_long_runs(ops, rng):
    """Runs longer than a chunk, and pads that fill whole chunks."""
    a = make(rng, Ssd(2, 700, 2, 8))
    a["seq_idx"] = np.array(
        [np.repeat([-1, 3, -2, 3, 8, 8], [100, 150, 200, 50, 100, 100]),
         np.repeat([0, 7, -1, -5, 2, -1], [1, 299, 100, 100, 1, 199])]
    )  # fmt: skip
    assert_like_reference(ops, a)


def test_seq_idx_that_comes_back_starts_a_new_sequence(ops, rng):
    a = make(rng, Ssd(1, 9))
    a["seq_idx"] = np.array([[0, 0, 1, 1, 0, 0, -1, 0, 2]])
    assert_like_reference(ops, a)
    a = make(rng, Ssd(1, 90))
    a["seq_idx"] = np.repeat([[5, 2, 5]], 30, 1)
    assert_like_reference(ops, a)


def test_ids_of_seq_idx_are_compared_in_full(ops, rng):
    """Ids that agree in their low 32 bits are different ids; the largest are ids like others."""
    a = make(rng, Ssd(1, 12))
    a["seq_idx"] = np.repeat([[1, 2**32 + 1, 2**63 - 1, 2**31]], 3, 1)
    assert_like_reference(ops, a)
    a["seq_idx"] = np.repeat([[0, -(2**63), 0, -(2**32)]], 3, 1)
    assert_like_reference(ops, a)


@pytest.mark.parametrize("flags", ("bool", "int8", "uint8"))
def test_has_initial_state(ops, rng, flags):
    check(ops, rng, Ssd(5, 8, flags=flags))
    a = make(rng, Ssd(3, 8))
    a["has_initial_state"] = np.array([0, -128, 2], np.int8)  # whatever is not 0 counts
    assert_like_reference(ops, a)


# States and pools


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_states_in_place(ops, rng, dtype, layout):
    dtypes = {"initial_states": dtype, "final_states": dtype}
    check(ops, rng, Ssd(3, 70, in_place=True, dtype=dtypes, layout=layout))


@pytest.mark.core
@pytest.mark.parametrize("packing", ("rows", "cu_seqlens", "seq_idx"))
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("pad_slot", [None, 0, 3])
def test_pools(ops, rng, packing, in_place, pad_slot):
    p = Ssd(
        4, 73, 3, 8, pool=9, in_place=in_place, pad_slot=pad_slot, flags="int8", index_dtype=I32,
        captures=6,
    )
    if packing == "cu_seqlens":
        p = replace(p, batch=1, nseq=6)
    check(ops, rng, replace(p, seq_idx=packing == "seq_idx"))
    check(ops, rng, replace(p, seq_idx=packing == "seq_idx", layout="mixed"))


def test_a_pool_that_is_only_written(ops, rng):
    check(ops, rng, Ssd(4, 30, pool=7, initial=False))


def test_pool_gives_the_bits_of_gather_dense_scatter(ops, rng):
    for p in (Ssd(4, 140, pool=11), Ssd(1, 140, pool=11, nseq=6, dtype=BF16)):
        a = make(rng, p)
        a["state_indices"] = rng.permutation(11)[: p.sequences]
        pool = blank(rng, a["initial_states"].shape, p.dtype_of("final_states"), "sliced").array
        out, _ = ops.ssd_chunk(**a, final_states=pool)
        dense = {k: v for k, v in a.items() if k != "state_indices"}
        dense["initial_states"] = a["initial_states"][a["state_indices"]]
        states = np.empty_like(pool[: p.sequences])
        want, _ = ops.ssd_chunk(**dense, final_states=states)
        assert_same_bits(out, want)
        assert_same_bits(pool[a["state_indices"]], states, "pool")


def test_initial_and_final_states_may_interleave_in_one_buffer(ops, rng):
    a = make(rng, Ssd(4, 70, 3, 8, 16))
    want = wanted_results(a)
    buffer = normal(rng, (4, 3, 8, 2, 16))
    buffer[..., 0, :] = a["initial_states"]
    a["initial_states"] = buffer[..., 0, :]
    out, _ = ops.ssd_chunk(**a, final_states=buffer[..., 1, :])
    assert_close(out, want["out"])
    assert_close(buffer[..., 1, :], want["final_states"], "final_states")


def test_a_pool_that_is_only_read_may_be_read_twice(ops, rng):
    a = make(rng, Ssd(4, 70, pool=5))
    a["state_indices"] = np.array([2, 2, -1, 2])
    assert_close(ops.ssd_chunk(**a), wanted_results(a)["out"])


def test_allocated_results(ops, rng):
    a = make(rng, Ssd(2, 7, dtype=BF16))
    out = ops.ssd_chunk(**a)
    assert out.dtype == BF16 and out.shape == a["x"].shape
    final = run(ops, a)["final_states"]
    assert final.dtype == BF16 and final.shape == a["initial_states"].shape
    del a["initial_states"]
    final = run(ops, a)["final_states"]
    assert final.dtype == F32
    assert_close(final, wanted_results(a)["final_states"], "final_states", rounded_to(ops, a))


# Captured states


@pytest.mark.core
@pytest.mark.parametrize("index_dtype", (I32, I64), ids=str)
def test_captures_anywhere(ops, rng, index_dtype):
    """The first and the last token of every row, borders of chunks, twice, unordered, skipped."""
    a = make(rng, Ssd(2, 150, 3, 8, 16))
    positions = [299, 0, 149, 150, -1, 63, 64, 65, 127, 128, 0, 299, 214, -5, 16, 15, 31, 32, 299]
    a["capture_positions"] = np.array(positions, index_dtype)
    want = wanted_results(a)["captured_states"]
    got = run(ops, a)["captured_states"]
    skipped = a["capture_positions"] < 0
    assert np.isnan(got[skipped]).all()
    assert_close(got[~skipped], want[~skipped], "captured_states")
    assert_same_bits(got[10], got[1])
    assert_same_bits(got[18], got[0])


def test_captures_are_the_final_states_of_the_cut_sequence(ops, rng):
    a = make(rng, Ssd(2, 200, 2, 8, 16, dtype={"captured_states": BF16}))
    positions = np.array([0, 1, 62, 63, 64, 100, 199, 200, 263, 399])
    got = run(ops, a, capture_positions=positions)
    for i, position in enumerate(positions):
        row, token = divmod(int(position), 200)
        cut = tokens_of(a, row, 0, token + 1)
        cut["initial_states"] = a["initial_states"][row : row + 1]
        final = run(ops, cut)["final_states"]
        assert_close(got["captured_states"][i], final[0].astype(float), "captured_states")


def test_every_token_captured(ops, rng):
    a = make(rng, Ssd(2, 70, 2, 8, 16))
    order = rng.permutation(140)
    want = wanted_results({**a, "capture_positions": order})["captured_states"]
    got = run(ops, a, capture_positions=order)["captured_states"]
    assert_close(got, want, "captured_states")


def test_captures_do_not_change_the_other_results(ops, rng):
    """More than rounding."""
    a = make(rng, Ssd(2, 150, 2, 8))
    want = wanted_results(a)
    got = run(ops, a, capture_positions=rng.integers(0, 300, 40))
    assert_close(got["out"], want["out"])
    assert_close(got["final_states"], want["final_states"], "final_states")


def test_captures_without_final_states_and_of_none(ops, rng):
    check(ops, rng, Ssd(2, 70, final=False, captures=4))
    a = make(rng, Ssd(2, 70))
    got = run(ops, a, capture_positions=np.zeros(0, I64))
    assert got["captured_states"].shape == (0, 4, 16, 16)
    assert_close(got["out"], wanted_results(a)["out"])
    a = make(rng, Ssd(1, 0))
    got = run(ops, a, capture_positions=np.array([-1, -2]))
    assert np.isnan(got["captured_states"]).all()


def test_captures_on_pads_are_left_alone(ops, rng):
    a = make(rng, Ssd(2, 8))
    a["seq_idx"] = np.array([[-1, 0, -1, 0, 1, -1, -1, 1], [-1] * 8])
    a["capture_positions"] = np.array([0, 2, 3, 5, 6, 8, 15, 7, 1])
    want, got = wanted_results(a)["captured_states"], run(ops, a)["captured_states"]
    assert np.isnan(got[[0, 1, 3, 4, 5, 6]]).all()
    assert_close(got[[2, 7, 8]], want[[2, 7, 8]], "captured_states")
    a = make(rng, Ssd(1, 9, nseq=3, pool=4))
    a["cu_seqlens"], a["state_indices"] = np.array([0, 3, 6, 9]), np.array([1, -1, 3])
    a["capture_positions"] = np.array([2, 3, 5, 6, 8])
    captured = np.full((5, 4, 16, 16), np.nan, F32)
    ops.ssd_chunk(**a, captured_states=captured)
    want = wanted_results(a)["captured_states"]
    assert np.isnan(captured[[1, 2]]).all()
    assert_close(captured[[0, 3, 4]], want[[0, 3, 4]], "captured_states")


# Cutting up


def test_a_call_cut_in_two_equals_the_whole(ops, rng):
    a = make(rng, Ssd(2, 140, 3, 8, 16))
    want = wanted_results(a)
    for cut in (0, 1, 2, 31, 63, 64, 65, 100, 127, 128, 129, 139, 140):
        for row in (0, 1):
            outs, states = [], {"initial_states": a["initial_states"][row : row + 1]}
            for start, end in ((0, cut), (cut, 140)):
                got = run(ops, tokens_of(a, row, start, end), **states)
                outs.append(got["out"])
                states = starting_from(got)
            assert_close(np.concatenate(outs, 1)[0], want["out"][row])
            assert_close(states["initial_states"][0], want["final_states"][row], "final_states")


def test_decode_goes_on_where_prefill_stopped(ops, rng):
    """Token by token, and several tokens a call."""
    for dtype in (F32, BF16):
        a = make(rng, Ssd(2, 75, 4, 16, 32, 2, dtype=dtype))
        a["initial_states"] = normal(rng, a["initial_states"].shape)
        want = wanted_results(a)
        first = {k: v[:, :66] if k in TOKEN_TENSORS and v is not None else v for k, v in a.items()}
        got = run(ops, first)
        state, outs = got["final_states"].astype(F32), [got["out"]]
        weights = {k: a[k] for k in ("A", "D", "dt_bias", "dt_softplus")}
        for start, end in ((66, 67), (67, 68), (68, 72), (72, 75)):
            token = {k: a[k][:, start:end] for k in ("x", "dt", "B", "C", "z")}
            outs.append(ops.state_update(state, **token, **weights))
        assert_close(np.concatenate(outs, 1), want["out"])
        assert_close(state, want["final_states"], "state", rounded_to(ops, a))


# Hard numbers


def hard(rng, seqlen=150, **changes):
    """A call of moderate numbers, with some tensors replaced."""
    return {**make(rng, Ssd(2, seqlen, 4, 8, 16, has=("D",), softplus=False)), **changes}


@pytest.mark.core
def test_large_dt_is_its_own_softplus(ops, rng):
    dt = uniform(rng, 15, 60, (2, 150, 4))
    a = hard(rng, dt=dt, dt_softplus=True, A=-uniform(rng, 0.001, 0.02, 4))
    assert_like_reference(ops, a)


@pytest.mark.core
def test_decay_that_underflows_is_zero(ops, rng):
    """Sums of log decays far below what exp() can tell from 0, single ones too."""
    a = hard(rng, A=-uniform(rng, 100, 1e6, 4), dt=uniform(rng, 1, 100, (2, 150, 4)))
    assert_like_reference(ops, a)
    a = hard(rng, A=None, adt=-uniform(rng, 500, 1500, (2, 150, 4)))
    assert_like_reference(ops, a)
    a["adt"] = np.full((2, 150, 4), -np.inf, F32)
    assert_like_reference(ops, a)


@pytest.mark.core
def test_one_token_that_forgets_everything(ops, rng):
    """One decay of exp(-1000), or of 0, between moderate ones: what comes after it is exact."""
    for forget in (-1000, -100, -3e38, -np.inf):
        a = hard(rng, A=None, adt=-log_uniform(rng, 0.003, 0.3, (2, 150, 4)))
        a["adt"][0, 70, :2] = forget
        a["adt"][1, [0, 63, 64, 149], 1:] = forget
        assert_like_reference(ops, a)


@pytest.mark.core
@pytest.mark.parametrize("forget", (-300, -1000, -1e30, -np.inf))
def test_what_is_forgotten_does_not_grow_back(ops, rng, forget):
    """A decay to 0, then growth by exp(80) of the zeros that are left, all within a chunk."""
    a = hard(rng, 40, A=None, adt=np.full((2, 40, 4), -0.1, F32))
    a["adt"][:, 20] = forget
    a["adt"][:, 21:30] = 8.9
    a["x"] = a["x"].copy()
    a["x"][:, 20:30] = 0
    assert_like_reference(ops, a)


@pytest.mark.core
@pytest.mark.parametrize("step", (0.5, 1.5, 3, 10, 60))
def test_sums_of_log_decays_in_the_hundreds(ops, rng, step):
    """A chunk's sum may be in the hundreds or thousands; differences of sums must stay exact."""
    a = hard(rng, 300, A=None, adt=-uniform(rng, step / 2, step, (2, 300, 4)))
    assert_like_reference(ops, a)


def test_a_slow_head_after_a_steep_start(ops, rng):
    """Decays of hundreds at the start of a chunk, then hardly any: the small ones must not drown."""
    adt = np.full((2, 200, 4), -0.01, F32)
    adt[:, :10] = -90
    adt[:, 100:110] = -700
    a = hard(rng, 200, A=None, adt=adt)
    assert_like_reference(ops, a)


@pytest.mark.core
def test_growing_states_are_computed_as_written(ops, rng):
    a = hard(rng, A=uniform(rng, 0.1, 1, 4), dt=uniform(rng, 0.001, 0.1, (2, 150, 4)))
    assert_like_reference(ops, a)
    a = hard(rng, A=None, adt=uniform(rng, -0.3, 0.3, (2, 150, 4)))
    assert_like_reference(ops, a)
    # One large step up and down again.
    a["adt"][:, 60] = 40
    a["adt"][:, 61] = -40
    assert_like_reference(ops, a)


def test_growth_beyond_what_a_chunk_holds(ops, rng):
    """A sum of log decays of 85 within a chunk, then as far down: all results are ordinary."""
    adt = np.zeros((2, 120, 4), F32)
    adt[:, 10:60] = 1.7
    adt[:, 60:110] = -1.7
    assert_like_reference(ops, hard(rng, 120, A=None, adt=adt))


def test_no_decay_at_all(ops, rng):
    assert_like_reference(ops, hard(rng, A=np.zeros(4, F32)))


def test_gate_saturates_without_nan(ops, rng):
    assert_like_reference(ops, hard(rng, z=normal(rng, (2, 150, 4, 8)) * np.float32(200)))


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
def test_long_sequences_are_as_exact_as_short_ones(ops, rng, dtype):
    """Slow decays over 4096 tokens: the error does not grow with the length."""
    p = Ssd(1, 4096, 2, 8, 16, has=("D",), adt=True, captures=4, dtype=dtype)
    a = make(rng, p)
    a["adt"] = -log_uniform(rng, 1e-4, 1e-2, a["adt"].shape)
    a["capture_positions"] = np.array([4095, 4000, 1, 2048])
    assert_like_reference(ops, a)


# Reproducibility


KINDS = {
    "wide": Ssd(1, 300, 6, 32, 32, captures=7),
    "rows": Ssd(3, 65, 4, 64, 16, 2),
    "packed": Ssd(1, 300, 3, 16, 64, nseq=7),
    "labelled": Ssd(2, 200, 3, 16, 64, seq_idx=True),
    "one head": Ssd(1, 1000, 1, 64, 64),
}


@pytest.mark.parametrize("p", KINDS.values(), ids=KINDS)
def test_bits_do_not_depend_on_the_number_of_threads(ops, rng, threads, p):
    a = make(rng, p)
    threads(1)
    want = run(ops, a)
    assert_same_results(run(ops, a), want)
    for n in (2, 3, 7):
        threads(n)
        assert_same_results(run(ops, a), want)


def test_batch_invariant_row_has_the_bits_that_it_has_alone(ops, rng):
    a = make(rng, Ssd(5, 170, 3, 16, 32, options={"batch_invariant": True}))
    want = run(ops, a)
    for row in (0, 3):
        alone = tokens_of(a, row, 0, 170)
        alone["initial_states"] = a["initial_states"][row : row + 1]
        got = run(ops, alone)
        for name in want:
            assert_same_bits(got[name][0], want[name][row], name)


def test_packed_sequences_have_the_bits_of_separate_calls(ops, rng):
    a = make(rng, Ssd(1, 283, 3, 16, 32, nseq=6, options={"batch_invariant": True}))
    want, cu = run(ops, a), a["cu_seqlens"]
    for s, (start, end) in enumerate(zip(cu[:-1], cu[1:])):
        one = tokens_of(a, 0, start, end)
        one["initial_states"] = a["initial_states"][s : s + 1]
        got = run(ops, one)
        assert_same_bits(got["out"], want["out"][:, start:end])
        assert_same_bits(got["final_states"][0], want["final_states"][s], "final_states")


# NaN stays where it is


@pytest.mark.parametrize("poison", (np.nan, np.inf), ids=str)
def test_nan_in_a_row_stays_in_that_row(ops, rng, poison):
    a = make(rng, Ssd(4, 100, 3, 16, 16))
    clean = run(ops, a)
    rest = [0, 1, 3]
    for name in ("x", "dt", "B", "C", "z", "initial_states"):
        dirty = a[name].copy()
        dirty[2] = poison
        got = run(ops, a, **{name: dirty})
        if np.isnan(poison):
            assert np.isnan(got["out"][2]).any(), f"{name}: NaN was lost"
        assert_same_results(got, clean, lambda value: value[rest])


@pytest.mark.parametrize("poison", (np.nan, np.inf), ids=str)
def test_nan_in_a_head_stays_in_that_head(ops, rng, poison):
    a = make(rng, Ssd(2, 100, 5, 16, 16))
    clean = run(ops, a)
    rest = np.arange(5) != 3
    for name in ("x", "dt", "z"):
        dirty = a[name].copy()
        dirty[:, :, 3] = poison
        got = run(ops, a, **{name: dirty})
        assert_same_bits(got["out"][:, :, rest], clean["out"][:, :, rest])
        assert_same_bits(got["final_states"][:, rest], clean["final_states"][:, rest])
    for name in ("A", "D", "dt_bias"):
        dirty = a[name].copy()
        dirty[3] = poison
        got = run(ops, a, **{name: dirty})
        assert_same_bits(got["out"][:, :, rest], clean["out"][:, :, rest])
        assert_same_bits(got["final_states"][:, rest], clean["final_states"][:, rest])
    a = make(rng, Ssd(2, 100, 6, 16, 16, 3))
    clean = run(ops, a)
    rest = np.array([0, 1, 4, 5])
    for name in ("B", "C"):
        dirty = a[name].copy()
        dirty[:, :, 1] = poison
        got = run(ops, a, **{name: dirty})
        assert_same_bits(got["out"][:, :, rest], clean["out"][:, :, rest])
        assert_same_bits(got["final_states"][:, rest], clean["final_states"][:, rest])


def test_nan_in_a_channel_stays_in_that_channel(ops, rng):
    a = make(rng, Ssd(2, 100, 3, 40, 16, channel_D=True))
    clean = run(ops, a)
    rest = np.arange(40) != 17
    for name in ("x", "z", "D"):
        dirty = a[name].copy()
        dirty[..., 17] = np.nan
        got = run(ops, a, **{name: dirty})
        assert np.isnan(got["out"][..., 17]).any(), f"{name}: NaN was lost"
        assert_same_bits(got["out"][..., rest], clean["out"][..., rest])
        assert_same_bits(got["final_states"][:, :, rest], clean["final_states"][:, :, rest])


@pytest.mark.core
@pytest.mark.parametrize("poison", (np.nan, np.inf, -np.inf), ids=str)
@pytest.mark.parametrize("token", (1, 17, 63, 64, 100, 149))
def test_a_later_token_never_reaches_earlier_outputs(ops, rng, token, poison):
    """A chunk is computed at once, with its masked half among it.  A capture may end a chunk: the
    outputs are looked at without one."""
    a = make(rng, Ssd(1, 150, 2, 16, 16))
    capture = np.array([token - 1])
    clean, captured = run(ops, a), run(ops, a, capture_positions=capture)
    for name in ("x", "dt", "B", "C", "z"):
        dirty = a[name].copy()
        dirty[:, token:] = poison
        got = run(ops, a, **{name: dirty})
        assert_same_bits(got["out"][:, :token], clean["out"][:, :token], name)
        got = run(ops, a, **{name: dirty}, capture_positions=capture)
        assert_same_bits(got["out"][:, :token], captured["out"][:, :token], name)
        assert_same_bits(got["captured_states"], captured["captured_states"], name)
    adt = -log_uniform(rng, 0.003, 3, a["dt"].shape)
    clean = run(ops, a, A=None, adt=adt)
    adt = adt.copy()
    adt[:, token:] = poison
    assert_same_bits(run(ops, a, A=None, adt=adt)["out"][:, :token], clean["out"][:, :token])


@pytest.mark.core
@pytest.mark.parametrize("packing", ("cu_seqlens", "seq_idx"))
@pytest.mark.parametrize("poison", (np.nan, np.inf), ids=str)
def test_nan_in_a_sequence_stays_in_that_sequence(ops, rng, packing, poison):
    a = make(rng, Ssd(1, 90, 3, 8, nseq=None if packing == "seq_idx" else 3, has=("z",)))
    if packing == "seq_idx":
        a["seq_idx"] = np.repeat([[4, 5, 9]], 30, 1)
    else:
        a["cu_seqlens"] = np.array([0, 30, 60, 90])
    clean = run(ops, a)
    rest = np.r_[0:30, 60:90]
    for name in ("x", "dt", "B", "C", "z"):
        dirty = a[name].copy()
        dirty[:, 30:60] = poison
        got = run(ops, a, **{name: dirty})
        assert_same_bits(got["out"][:, rest], clean["out"][:, rest])
        last = slice(2, 3) if packing == "cu_seqlens" else slice(0, 1)
        assert_same_bits(got["final_states"][last], clean["final_states"][last], "final_states")


def test_nan_initial_state_reaches_the_first_sequence_only(ops, rng):
    for poison in (np.nan, np.inf):
        a = make(rng, Ssd(1, 90))
        a["seq_idx"] = np.repeat([[-1, 4, 5]], 30, 1)
        clean = run(ops, a)
        got = run(ops, a, initial_states=np.full_like(a["initial_states"], poison))
        assert not np.isfinite(got["out"][:, 30:60]).all()
        rest = np.r_[0:30, 60:90]
        assert_same_bits(got["out"][:, rest], clean["out"][:, rest])
        assert_same_bits(got["final_states"], clean["final_states"])


@pytest.mark.core
def test_pad_tokens_are_not_read_and_give_zeros(ops, rng):
    a = make(rng, Ssd(2, 130, 4, 8, 16, 2, seq_idx=True))
    pads = a["seq_idx"] < 0
    clean = run(ops, a)
    for poison in (np.nan, np.inf):
        dirty = {}
        for name in ("x", "dt", "B", "C", "z"):
            dirty[name] = a[name].copy()
            dirty[name][pads] = poison
        got = run(ops, a, **dirty)
        assert_same_results(got, clean)
        assert (got["out"][pads] == 0).all()


def test_a_row_of_pads_passes_its_state(ops, rng):
    a = make(rng, Ssd(2, 5))
    a["seq_idx"] = np.full((2, 5), -1)
    got = run(ops, a)
    assert (got["out"] == 0).all()
    assert_same_bits(got["final_states"], a["initial_states"], "final_states")


def test_pad_slots_are_neither_read_nor_written(ops, rng):
    a = make(rng, Ssd(1, 130, nseq=5, pool=7))
    a["cu_seqlens"] = np.array([0, 37, 63, 63, 92, 130])
    a["state_indices"] = np.array([3, -1, 5, -1, 0])
    a["x"] = a["x"].copy()
    a["x"][:, 37:92] = np.nan
    pool = normal(rng, (7, 4, 16, 16))
    before = pool.copy()
    out, _ = ops.ssd_chunk(**a, final_states=pool)
    assert (out[:, 37:92] == 0).all()
    assert np.isfinite(out).all()
    assert_same_bits(pool[[1, 2, 4, 6]], before[[1, 2, 4, 6]], "pool")
    assert_same_bits(pool[5], a["initial_states"][5], "state of the sequence without tokens")


def test_a_state_without_flag_is_not_read(ops, rng):
    a = make(rng, Ssd(3, 70))
    a["initial_states"] = a["initial_states"].copy()
    a["initial_states"][1] = np.nan
    a["has_initial_state"] = np.array([1, 0, 1], np.int8)
    clean = {**a, "initial_states": np.nan_to_num(a["initial_states"])}
    assert_same_results(run(ops, a), run(ops, clean))


# Everything at once


@st.composite
def calls(draw):
    packing = draw(st.sampled_from(("rows", "rows", "cu_seqlens", "seq_idx")))
    ngroups = draw(st.sampled_from((1, 1, 2, 3)))
    initial, final = draw(st.booleans()), draw(st.booleans())
    nseq = draw(st.integers(1, 6)) if packing == "cu_seqlens" else None
    batch = 1 if nseq else draw(st.integers(0, 3))
    pooled = draw(st.booleans()) and (initial or final)
    pool = (nseq or batch) + draw(st.integers(1, 4)) if pooled else None
    names = (*TENSORS, "adt", "initial_states", "out", "final_states", "captured_states")
    dtype = {name: draw(st.sampled_from(FLOATS)) for name in names}
    in_place = initial and final and draw(st.booleans())
    if in_place:
        dtype["final_states"] = dtype["initial_states"]
    return Ssd(
        batch=batch,
        seqlen=draw(st.sampled_from((0, 1, 2, 3, 8, 17, 32, 33, 63, 64, 65, 67, 130))),
        nheads=ngroups * draw(st.integers(1, 3)),
        headdim=draw(st.sampled_from((1, 2, 5, 8, 16, 17, 24, 40, 64))),
        dstate=draw(st.sampled_from((1, 2, 5, 8, 16, 17, 24, 48, 64))),
        ngroups=ngroups,
        rank=draw(st.sampled_from((None, 1))),
        has=tuple(n for n in ("D", "z", "dt_bias") if draw(st.booleans())),
        channel_D=draw(st.booleans()),
        adt=draw(st.booleans()),
        softplus=draw(st.booleans()),
        dt_limit=draw(st.sampled_from((None, None, (0.02, 0.3)))),
        nseq=nseq,
        seq_idx=packing == "seq_idx",
        initial=initial,
        final=final,
        captures=draw(st.sampled_from((0, 0, 1, 5))),
        in_place=in_place,
        flags=draw(st.sampled_from((None, "bool", "int8", "uint8"))) if initial else None,
        pool=pool,
        pad_slot=draw(st.sampled_from((None, 0, 1))) if pool else None,
        dtype=dtype,
        index_dtype=draw(st.sampled_from((I32, I64))),
        layout=draw(st.sampled_from(LAYOUTS)),
        options={
            "chunk_size": draw(st.sampled_from((0, 0, 1, 16, 50, 128))),
            "batch_invariant": draw(st.booleans()),
        },
    )


@given(calls(), st.integers(0, 2**32 - 1))
def test_random_calls(ops, p, seed):
    check(ops, np.random.default_rng(seed), p)
