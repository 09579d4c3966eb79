# SPDX-License-Identifier: MIT
"""selective_scan against the reference; and what must hold bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from cases import (
    BF16, C64, F16, F32, FLOATS, I32, I64, LAYOUTS, assert_close, assert_same_bits, blank, normal,
    repeated, uniform,
)
from cases_scan import TENSORS, Scan, assert_same_result, check, make, rerun

# batch, dim, seqlen, dstate, ngroups
SHAPES = [
    (2, 4, 0, 16, 1), (0, 4, 5, 16, 1), (2, 3, 1, 1, 1), (1, 1, 2, 5, 1), (2, 17, 63, 16, 1),
    (1, 48, 64, 5, 3), (1, 80, 65, 24, 5), (1, 96, 33, 64, 2), (3, 34, 7, 96, 17),
    (1, 6, 1000, 16, 3), (1, 3, 1537, 8, 1), (1, 3, 31, 128, 1), (1, 2, 40, 256, 2),
    (1, 3, 9, 1030, 3), (5, 21, 12, 3, 7), (1, 63, 127, 4, 1), (1, 128, 129, 63, 2),
    (2, 130, 66, 65, 2), (1, 2000, 20, 8, 1), (70, 5, 4, 16, 1), (1, 40, 3, 1024, 1),
    (1, 20, 70, 1025, 2),
]


@pytest.mark.core
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(ops, rng, shape, channels_last):
    batch, dim, seqlen, dstate, ngroups = shape
    check(ops, rng, Scan(batch, dim, seqlen, dstate, ngroups, channels_last=channels_last))


@pytest.mark.core
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
def test_one_dtype_throughout(ops, rng, dtype, channels_last):
    check(ops, rng, Scan(2, 19, 70, 16, dtype=dtype, channels_last=channels_last))


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
@pytest.mark.parametrize("name", (*TENSORS, "out", "final_states"))
def test_one_tensor_of_another_dtype(ops, rng, name, dtype):
    check(ops, rng, Scan(1, 10, 37, 16, 2, dtype={name: dtype}))


@pytest.mark.core
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(ops, rng, layout, channels_last):
    check(ops, rng, Scan(2, 10, 21, 16, 2, layout=layout, channels_last=channels_last))
    check(ops, rng, Scan(2, 5, 34, 7, 1, layout=layout, channels_last=channels_last, dtype=BF16))


@pytest.mark.core
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
@pytest.mark.parametrize("C_kind", ("grouped", "one group", "constant"))
@pytest.mark.parametrize("B_kind", ("grouped", "one group", "constant"))
@pytest.mark.parametrize("form", ("real", "complex", "interleaved"))
def test_every_form_of_A_B_and_C(ops, rng, form, B_kind, C_kind, channels_last):
    ngroups = 1 if "one group" in (B_kind, C_kind) else 3
    p = Scan(
        2, 9, 18, 12, ngroups, B_kind, C_kind, form != "real", form == "interleaved", channels_last
    )
    check(ops, rng, p)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_complex_with_interleaved_coefficients_of_any_dtype_and_stride(ops, rng, dtype):
    for layout in ("packed", "mixed"):
        p = Scan(2, 7, 13, 6, 1, complex_a=True, interleaved=True, layout=layout, dtype=dtype)
        check(ops, rng, p)
        check(ops, rng, replace(p, channels_last=True))


@pytest.mark.core
@pytest.mark.parametrize(
    "has", [(), ("D",), ("z",), ("dt_bias",), ("D", "z"), ("D", "z", "dt_bias")], ids=str
)
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("initial", [False, True])
def test_every_option_absent_or_present(ops, rng, has, softplus, initial):
    check(
        ops, rng, Scan(2, 5, 23, 16, has=has, softplus=softplus, initial=initial, final=not initial)
    )


@pytest.mark.parametrize(
    "limit", [(0.0, float("inf")), (0.05, 0.1), (0.0, 0.08), (-0.1, 0.2)], ids=str
)
@pytest.mark.parametrize("softplus", [False, True])
def test_dt_limit_clamps_after_softplus(ops, rng, limit, softplus):
    check(ops, rng, Scan(2, 6, 30, 8, softplus=softplus, dt_limit=limit))


def test_dt_limit_of_two_zeros_is_refused_not_ignored(ops, rng):
    """To the C struct two zeros mean that no limit is given; who writes them in Python means 0."""
    with pytest.raises(ValueError, match="dt_limit"):
        rerun(ops, make(rng, Scan(1, 4, 9, 8)), dt_limit=(0.0, 0.0))


def test_strides_of_zero_are_read_as_written(ops, rng):
    p = Scan(3, 6, 11, 8, 2)
    a = make(rng, p)
    a["x"] = repeated(a["x"], 0, 3)
    a["dt"] = repeated(a["dt"], 1, 6)
    a["A"] = repeated(a["A"], 1, 8)
    a["B"] = repeated(a["B"], 3, 11)
    a["C"] = repeated(a["C"], 1, 2)
    a["D"] = repeated(a["D"], 0, 6)
    a["initial_states"] = repeated(a["initial_states"], 0, 3)
    want, want_final = reference.selective_scan(**a)
    out, final = rerun(ops, a)
    assert_close(out, want)
    assert_close(final, want_final, "final_states")


# Packed sequences


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sequences_without_tokens_pass_their_states(ops, rng, dtype):
    a = make(rng, Scan(1, 6, 5, 16, nseq=4, dtype={"initial_states": dtype}))
    a["cu_seqlens"] = np.array([0, 0, 5, 5, 5])
    _, final = rerun(ops, a)
    assert_same_bits(final[[0, 2, 3]], a["initial_states"][[0, 2, 3]], "final_states")
    a["has_initial_state"] = np.array([True, True, False, True])
    _, final = rerun(ops, a)
    assert (final[2] == 0).all()
    assert_same_bits(final[[0, 3]], a["initial_states"][[0, 3]], "final_states")


@pytest.mark.core
@pytest.mark.parametrize("index_dtype", (I32, I64), ids=str)
@pytest.mark.parametrize("nseq", (1, 2, 5, 40))
def test_cu_seqlens(ops, rng, nseq, index_dtype):
    check(ops, rng, Scan(1, 6, 31, 16, 2, nseq=nseq, index_dtype=index_dtype, flags="bool"))
    check(
        ops,
        rng,
        Scan(
            1, 6, 31, 16, 2, nseq=nseq, index_dtype=index_dtype, channels_last=True, layout="sliced"
        ),
    )


def test_cu_seqlens_of_no_tokens_at_all(ops, rng):
    check(ops, rng, Scan(1, 6, 0, 16, nseq=3))
    check(ops, rng, Scan(1, 6, 0, 16, nseq=0))


@pytest.mark.core
@pytest.mark.parametrize("index_dtype", (I32, I64), ids=str)
@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
def test_seq_idx(ops, rng, channels_last, index_dtype):
    p = Scan(3, 6, 50, 16, 2, seq_idx=True, index_dtype=index_dtype, channels_last=channels_last)
    check(ops, rng, p)
    check(ops, rng, replace(p, layout="mixed", flags="uint8"))


def test_seq_idx_that_comes_back_starts_a_new_sequence(ops, rng):
    a = make(rng, Scan(1, 4, 9, 8))
    a["seq_idx"] = np.array([[0, 0, 1, 1, 0, 0, -1, 0, 2]])
    want, want_final = reference.selective_scan(**a)
    out, final = rerun(ops, a)
    assert_close(out, want)
    assert_close(final, want_final, "final_states")


@pytest.mark.parametrize("flags", ("bool", "int8", "uint8"))
def test_has_initial_state(ops, rng, flags):
    check(ops, rng, Scan(5, 4, 8, 8, flags=flags))


# States and pools


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_states_in_place(ops, rng, dtype, layout):
    check(
        ops,
        rng,
        Scan(
            3,
            5,
            12,
            16,
            in_place=True,
            dtype={"initial_states": dtype, "final_states": dtype},
            layout=layout,
        ),
    )


@pytest.mark.core
@pytest.mark.parametrize("packing", ("rows", "cu_seqlens", "seq_idx"))
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("pad_slot", [None, 0, 3])
def test_pools(ops, rng, packing, in_place, pad_slot):
    p = Scan(
        4, 5, 13, 16, pool=9, in_place=in_place, pad_slot=pad_slot, flags="int8", index_dtype=I32
    )
    if packing == "cu_seqlens":
        p = replace(p, batch=1, nseq=6)
    check(ops, rng, replace(p, seq_idx=packing == "seq_idx"))
    check(ops, rng, replace(p, seq_idx=packing == "seq_idx", layout="mixed", complex_a=True))


def test_pool_gives_the_bits_of_gather_dense_scatter(ops, rng):
    for p in (Scan(4, 5, 40, 16, pool=11), Scan(1, 5, 40, 16, pool=11, nseq=6, dtype=BF16)):
        a = make(rng, p)
        a["state_indices"] = rng.permutation(11)[: p.sequences]
        pool = blank(rng, a["initial_states"].shape, p.dtype_of("final_states"), "sliced").array
        out, _ = ops.selective_scan(**a, final_states=pool)
        dense = {k: v for k, v in a.items() if k != "state_indices"}
        dense["initial_states"] = a["initial_states"][a["state_indices"]]
        states = np.empty_like(pool[: p.sequences])
        want, _ = ops.selective_scan(**dense, final_states=states)
        assert_same_bits(out, want)
        assert_same_bits(pool[a["state_indices"]], states, "pool")


def test_initial_and_final_states_may_interleave_in_one_buffer(ops, rng):
    a = make(rng, Scan(4, 6, 9, 16))
    want, want_final = reference.selective_scan(**a)
    buffer = normal(rng, (4, 6, 2, 16))
    buffer[:, :, 0] = a["initial_states"]
    a["initial_states"] = buffer[:, :, 0]
    out, _ = ops.selective_scan(**a, final_states=buffer[:, :, 1])
    assert_close(out, want)
    assert_close(buffer[:, :, 1], want_final, "final_states")


def test_a_pool_that_is_only_read_may_be_read_twice(ops, rng):
    a = make(rng, Scan(4, 3, 6, 8, pool=5))
    a["state_indices"] = np.array([2, 2, -1, 2])
    want, _ = reference.selective_scan(**a)
    assert_close(ops.selective_scan(**a), want)


# Results that the library allocates


def test_allocated_results(ops, rng):
    a = make(rng, Scan(2, 5, 7, 8, dtype=BF16))
    out = ops.selective_scan(**a)
    assert out.dtype == BF16 and out.shape == a["x"].shape
    _, final = ops.selective_scan(**a, return_final_states=True)
    assert final.dtype == BF16 and final.shape == (2, 5, 8)
    del a["initial_states"]
    out, final = ops.selective_scan(**a, return_final_states=True)
    assert final.dtype == F32
    assert_close(final, reference.selective_scan(**a)[1], "final_states")
    _, final = ops.selective_scan(
        **make(rng, Scan(complex_a=True, initial=False)), return_final_states=True
    )
    assert final.dtype == C64


# Hard numbers


def hard(rng, **changes):
    """A call of moderate numbers, with some tensors replaced."""
    return {**make(rng, Scan(2, 5, 24, 16, has=("D",), softplus=False)), **changes}


def assert_like_reference(ops, a):
    want, want_final = reference.selective_scan(**a)
    out, final = rerun(ops, a)
    assert_close(out, want)
    assert_close(final, want_final, "final_states")


def test_large_dt_is_its_own_softplus(ops, rng):
    dt = uniform(rng, 15, 60, (2, 5, 24))
    assert_like_reference(
        ops, hard(rng, dt=dt, dt_softplus=True, A=-uniform(rng, 0.001, 0.02, (5, 16)))
    )


def test_decay_that_underflows_is_zero(ops, rng):
    assert_like_reference(
        ops, hard(rng, A=-uniform(rng, 100, 1e6, (5, 16)), dt=uniform(rng, 1, 100, (2, 5, 24)))
    )


def test_gate_saturates_without_nan(ops, rng):
    z = normal(rng, (2, 5, 24)) * np.float32(200)
    assert_like_reference(ops, hard(rng, z=z))


@pytest.mark.core
@pytest.mark.parametrize("angle", (3, 30, 100))
def test_complex_rotation_by_large_angles(ops, rng, angle):
    """dt are powers of two: the product with Im(A) is exact, its sine and cosine are judged."""
    A = (-uniform(rng, 0.05, 0.5, (5, 16)) + 1j * uniform(rng, -angle, angle, (5, 16))).astype(C64)
    a = make(rng, Scan(2, 5, 24, 16, complex_a=True, softplus=False, has=()))
    a.update(A=A, dt=np.exp2(rng.integers(-4, 2, (2, 5, 24))).astype(F32))
    assert_like_reference(ops, a)


# Reproducibility


@pytest.mark.parametrize(
    "p",
    [
        Scan(1, 70, 300, 16), Scan(3, 37, 65, 16, channels_last=True), Scan(1, 5, 200, 64, nseq=7),
        Scan(2, 9, 33, 8, complex_a=True),
    ],
    ids=["wide", "rows", "packed", "complex"],
)
def test_bits_do_not_depend_on_the_number_of_threads(ops, rng, threads, p):
    a = make(rng, p)
    threads(1)
    want = rerun(ops, a)
    for n in (2, 3, 7):
        threads(n)
        assert_same_result(rerun(ops, a), want)


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
def test_batch_invariant_row_has_the_bits_that_it_has_alone(ops, rng, channels_last):
    a = make(
        rng, Scan(5, 19, 70, 16, channels_last=channels_last, options={"batch_invariant": True})
    )
    out, final = rerun(ops, a)
    for row in (0, 3):
        alone = {k: a[k][row : row + 1] for k in ("x", "dt", "B", "C", "z", "initial_states")}
        got, got_final = rerun(ops, a, **alone)
        assert_same_bits(got[0], out[row])
        assert_same_bits(got_final[0], final[row], "final_states")


@pytest.mark.parametrize("channels_last", [False, True], ids=["channels_first", "channels_last"])
def test_packed_sequences_have_the_bits_of_separate_calls(ops, rng, channels_last):
    a = make(
        rng,
        Scan(1, 11, 83, 16, nseq=6, channels_last=channels_last, options={"batch_invariant": True}),
    )
    out, final = rerun(ops, a)
    time = 1 if channels_last else -1
    cu = a["cu_seqlens"]
    for s, (start, end) in enumerate(zip(cu[:-1], cu[1:])):
        one = {k: v for k, v in a.items() if k != "cu_seqlens"}
        for name in ("x", "dt", "B", "C", "z"):
            one[name] = np.take(a[name], np.arange(start, end), time)
        one["initial_states"] = a["initial_states"][s : s + 1]
        got, got_final = rerun(ops, one)
        assert_same_bits(got, np.take(out, np.arange(start, end), time))
        assert_same_bits(got_final[0], final[s], "final_states")


def test_a_call_cut_in_two_equals_the_whole(ops, rng):
    for cut in (0, 1, 31, 64, 99, 100):
        a = make(rng, Scan(2, 5, 100, 16))
        want, want_final = reference.selective_scan(**a)
        parts = [slice(0, cut), slice(cut, 100)]
        states, outs = a["initial_states"], []
        for part in parts:
            piece = {**a, "initial_states": states}
            piece.update({k: a[k][..., part] for k in ("x", "dt", "B", "C", "z")})
            out, states = rerun(ops, piece)
            outs.append(out)
        assert_close(np.concatenate(outs, -1), want)
        assert_close(states, want_final, "final_states")


# NaN stays where it is


def assert_finite_where(mask, array, what):
    assert np.isfinite(array[mask].astype(np.float64)).all(), f"{what}: NaN crossed"


def test_nan_in_a_row_stays_in_that_row(ops, rng):
    a = make(rng, Scan(4, 20, 40, 16))
    clean, clean_final = rerun(ops, a)
    for name in ("x", "dt", "B", "C", "z", "initial_states"):
        dirty = a[name].copy()
        dirty[2] = np.nan
        out, final = rerun(ops, a, **{name: dirty})
        rest = [0, 1, 3]
        assert np.isnan(out[2]).any(), f"{name}: NaN was lost"
        assert_same_bits(out[rest], clean[rest])
        assert_same_bits(final[rest], clean_final[rest], "final_states")


def test_nan_in_a_channel_stays_in_that_channel(ops, rng):
    a = make(rng, Scan(2, 20, 40, 16))
    clean, clean_final = rerun(ops, a)
    for name in ("x", "dt", "z", "initial_states"):
        dirty = a[name].copy()
        dirty[:, 7] = np.nan
        out, final = rerun(ops, a, **{name: dirty})
        rest = np.arange(20) != 7
        assert np.isnan(out[:, 7]).any(), f"{name}: NaN was lost"
        assert_same_bits(out[:, rest], clean[:, rest])
        assert_same_bits(final[:, rest], clean_final[:, rest], "final_states")


@pytest.mark.parametrize("packing", ("cu_seqlens", "seq_idx"))
def test_nan_in_a_sequence_stays_in_that_sequence(ops, rng, packing):
    a = make(rng, Scan(1, 6, 30, 16, nseq=None if packing == "seq_idx" else 3, has=("z",)))
    if packing == "seq_idx":
        a["seq_idx"] = np.repeat([[4, 5, 9]], 10, 1)
    else:
        a["cu_seqlens"] = np.array([0, 10, 20, 30])
    clean, clean_final = rerun(ops, a)
    for name in ("x", "dt", "B", "C", "z"):
        dirty = a[name].copy()
        dirty[..., 10:20] = np.nan
        out, final = rerun(ops, a, **{name: dirty})
        rest = np.r_[0:10, 20:30]
        assert_same_bits(out[..., rest], clean[..., rest])
        last = slice(2, 3) if packing == "cu_seqlens" else slice(0, 1)
        assert_same_bits(final[last], clean_final[last], "final_states")


def test_pad_tokens_are_not_read_and_give_zeros(ops, rng):
    a = make(rng, Scan(2, 6, 30, 16, 2, seq_idx=True))
    pads = a["seq_idx"] < 0
    clean, clean_final = rerun(ops, a)
    dirty = {}
    for name in ("x", "dt", "B", "C", "z"):
        dirty[name] = np.where(
            pads.reshape(2, *[1] * (a[name].ndim - 2), 30), np.float32(np.nan), a[name]
        )
    out, final = rerun(ops, a, **dirty)
    assert_same_bits(out, clean)
    assert_same_bits(final, clean_final, "final_states")
    assert (np.moveaxis(out, 1, 2)[pads] == 0).all()


def test_a_row_of_pads_passes_its_state(ops, rng):
    a = make(rng, Scan(2, 6, 5, 16))
    a["seq_idx"] = np.full((2, 5), -1)
    out, final = rerun(ops, a)
    assert (out == 0).all()
    assert_same_bits(final, a["initial_states"], "final_states")


def test_pad_slots_are_neither_read_nor_written(ops, rng):
    a = make(rng, Scan(1, 6, 30, 16, nseq=5, pool=7))
    a["cu_seqlens"] = np.array([0, 7, 13, 13, 22, 30])
    a["state_indices"] = np.array([3, -1, 5, -1, 0])
    a["x"] = a["x"].copy()
    for start, end in ((7, 13), (13, 22)):
        a["x"][..., start:end] = np.nan
    pool = normal(rng, (7, 6, 16))
    before = pool.copy()
    out, _ = ops.selective_scan(**a, final_states=pool)
    assert (out[..., 7:22] == 0).all()
    assert np.isfinite(out).all()
    assert_same_bits(pool[[1, 2, 4, 6]], before[[1, 2, 4, 6]], "pool")
    assert_same_bits(pool[5], a["initial_states"][5], "state of the sequence without tokens")


def test_a_state_without_flag_is_not_read(ops, rng):
    a = make(rng, Scan(3, 4, 6, 8))
    a["initial_states"] = a["initial_states"].copy()
    a["initial_states"][1] = np.nan
    a["has_initial_state"] = np.array([1, 0, 1], np.int8)
    clean = {**a, "initial_states": np.nan_to_num(a["initial_states"])}
    assert_same_result(rerun(ops, a), rerun(ops, clean))


# Everything at once


@st.composite
def calls(draw):
    packing = draw(st.sampled_from(("rows", "rows", "cu_seqlens", "seq_idx")))
    complex_a = draw(st.booleans())
    ngroups = draw(st.integers(1, 4))
    kinds = ("grouped", "constant", "one group") if ngroups == 1 else ("grouped", "constant")
    initial, final = draw(st.booleans()), draw(st.booleans())
    nseq = draw(st.integers(1, 6)) if packing == "cu_seqlens" else None
    batch = 1 if nseq else draw(st.integers(0, 4))
    pool = (
        (nseq or batch) + draw(st.integers(1, 4))
        if draw(st.booleans()) and (initial or final)
        else None
    )
    dtype = {name: draw(st.sampled_from(FLOATS)) for name in (*TENSORS, "out", "final_states")}
    in_place = initial and final and draw(st.booleans())
    if in_place:
        dtype["final_states"] = dtype["initial_states"]
    return Scan(
        batch=batch,
        dim=ngroups * draw(st.integers(1, 9)),
        seqlen=draw(st.sampled_from((0, 1, 2, 3, 5, 8, 13, 17, 32, 33, 64, 67, 130))),
        dstate=draw(st.sampled_from((1, 2, 5, 8, 16, 17, 24, 48, 64))),
        ngroups=ngroups,
        B_kind=draw(st.sampled_from(kinds)),
        C_kind=draw(st.sampled_from(kinds)),
        complex_a=complex_a,
        interleaved=complex_a and draw(st.booleans()),
        channels_last=draw(st.booleans()),
        has=tuple(n for n in ("D", "z", "dt_bias") if draw(st.booleans())),
        softplus=draw(st.booleans()),
        dt_limit=draw(st.sampled_from((None, None, (0.02, 0.3)))),
        nseq=nseq,
        seq_idx=packing == "seq_idx",
        initial=initial,
        final=final,
        in_place=in_place,
        flags=draw(st.sampled_from((None, "bool", "int8", "uint8"))) if initial else None,
        pool=pool,
        pad_slot=draw(st.sampled_from((None, 0, 1))) if pool else None,
        dtype=dtype,
        index_dtype=draw(st.sampled_from((I32, I64))),
        layout=draw(st.sampled_from(LAYOUTS)),
        options={"batch_invariant": True} if draw(st.booleans()) else {},
    )


@given(calls(), st.integers(0, 2**32 - 1))
def test_random_calls(ops, p, seed):
    check(ops, np.random.default_rng(seed), p)
