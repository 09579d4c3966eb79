# SPDX-License-Identifier: MIT
"""ssd_chunk as Mamba-3: the trapezoid, the rotation, MIMO, the norm; each alone and all at once."""

from dataclasses import replace
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cases import (
    BF16, F16, F32, FLOATS, I32, I64, LAYOUTS, assert_close, assert_same_bits, log_uniform, normal,
    repeated, uniform,
)
from cases_ssd import (
    CAPTURED, FINAL, INITIAL, MAMBA2, MIMO, PARTS, SISO, STATES, TENSORS, TURN, Ssd,
    assert_angles, assert_like_reference, assert_same_results, assert_state, check, make, run,
    starting_from, tokens_of, wanted_results,
)

ROTARY = ("interleaved", "half")
ALL = (*MIMO, "norm_weight")


def siso(*sizes, **more):
    return Ssd(*sizes, **{"has": SISO, "adt": True, **more})


def mimo(batch=2, seqlen=20, nheads=4, headdim=16, dstate=16, ngroups=1, rank=4, **more):
    more = {"has": MIMO, "adt": True, "rotary": "half", **more}
    return Ssd(batch, seqlen, nheads, headdim, dstate, ngroups, rank, **more)


# batch, seqlen, nheads, headdim, dstate, ngroups
SHAPES = [
    (2, 0, 4, 16, 16, 1), (0, 5, 4, 16, 16, 1), (2, 1, 3, 1, 1, 1), (1, 2, 2, 8, 5, 2),
    (1, 63, 2, 64, 128, 1), (1, 64, 3, 48, 64, 1), (2, 65, 2, 80, 16, 2), (1, 127, 4, 8, 96, 2),
    (1, 128, 2, 128, 16, 1), (1, 129, 6, 7, 16, 3), (3, 31, 2, 192, 64, 1), (1, 300, 2, 16, 16, 1),
    (1, 40, 2, 96, 256, 2), (1, 257, 1, 1, 128, 1), (1, 97, 3, 17, 2, 3), (2, 97, 5, 16, 33, 5),
    (9, 3, 8, 16, 16, 4), (1, 35, 2, 5, 520, 1), (1, 70, 9, 8, 16, 1), (2, 40, 34, 8, 16, 2),
    (2, 5, 0, 8, 16, 1), (2, 70, 2, 0, 16, 1), (2, 70, 2, 8, 0, 1),
]


@pytest.mark.core
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_of_siso(ops, rng, shape):
    p = siso(*shape)
    check(ops, rng, p)
    check(ops, rng, replace(p, rotary="half", rank=1, nangles=shape[4] // 2))


@pytest.mark.core
@pytest.mark.parametrize("rank", (2, 4))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape_of_mimo(ops, rng, shape, rank):
    check(ops, rng, mimo(*shape, rank))


@pytest.mark.core
@pytest.mark.parametrize("rank", range(1, 9))
@pytest.mark.parametrize("rotary", ROTARY)
def test_every_rank(ops, rng, rank, rotary):
    check(ops, rng, mimo(2, 70, 4, 16, 32, 2, rank, rotary=rotary, captures=5))
    has = tuple(part for part in MIMO if part != "mimo_out")
    check(ops, rng, mimo(2, 40, 4, 16, 32, 2, rank, rotary=rotary, captures=5, has=has))


def test_a_rank_of_many(ops, rng):
    check(ops, rng, mimo(1, 70, 2, 8, 16, 1, 19))
    has = tuple(part for part in MIMO if part != "mimo_out")
    check(ops, rng, mimo(1, 70, 2, 8, 16, 1, 33, has=has))


# The parts


def valid(has, rank):
    """Whether the header allows these parts together."""
    if "mimo_z" in has and "z" not in has:
        return False
    return rank == 1 or "norm_weight" not in has or "mimo_out" in has


@pytest.mark.core
@pytest.mark.parametrize("rank", (None, 3))
@pytest.mark.parametrize("part", PARTS)
def test_each_part_alone(ops, rng, part, rank):
    for others in ((), MAMBA2):
        has = (*others, part)
        if valid(has, rank or 1):
            check(ops, rng, Ssd(2, 70, 4, 16, 16, 2, rank, has=has, captures=4))
            check(ops, rng, Ssd(2, 70, 4, 16, 16, 2, rank, has=has, adt=True, softplus=False))


@pytest.mark.parametrize("rank", (None, 3))
@pytest.mark.parametrize("pair", list(combinations(PARTS, 2)), ids=str)
def test_two_parts(ops, rng, pair, rank):
    has = (*MAMBA2, *pair)
    if not valid(has, rank or 1):
        has = (*has, "mimo_out")
    check(ops, rng, Ssd(1, 67, 2, 8, 16, 1, rank, has=has))


@pytest.mark.core
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("rank", (None, 3))
def test_all_parts_but_one(ops, rng, part, rank):
    has = tuple(name for name in ALL if name != part)
    if not valid(has, rank or 1):
        has = tuple(name for name in has if name != "norm_weight")
    check(ops, rng, Ssd(2, 70, 4, 16, 16, 2, rank, has=has, adt=True, captures=4))


@pytest.mark.core
@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("rank", (None, 1, 2, 5))
def test_all_parts_together(ops, rng, rank, rotary):
    for softplus in (False, True):
        p = Ssd(2, 130, 4, 24, 32, 2, rank, has=ALL, rotary=rotary, softplus=softplus, captures=5)
        check(ops, rng, replace(p, channel_D=softplus))
        check(ops, rng, replace(p, adt=True, trap_sigmoid=True, head_angles=False))


@pytest.mark.parametrize("has", (SISO, MIMO), ids=("siso", "mimo"))
@pytest.mark.parametrize("missing", [("z", "mimo_z"), ("D",), ("dt_bias",), ("D", "z", "mimo_z")])
def test_without_the_parts_of_mamba2(ops, rng, has, missing):
    rank = 3 if has is MIMO else None
    has = tuple(name for name in has if name not in missing)
    check(ops, rng, Ssd(2, 70, 4, 16, 16, 2, rank, has=has, adt=True))


@pytest.mark.core
@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("head_angles", [False, True])
@pytest.mark.parametrize("dstate, nangles", [
    (16, 0), (16, 1), (16, 3), (16, 8), (64, 16), (64, 17), (64, 32), (128, 33), (128, 64), (5, 2),
    (7, 3), (33, 16), (2, 1), (1, 0), (256, 128), (80, 20),
])  # fmt: skip
def test_every_number_of_angles(ops, rng, dstate, nangles, head_angles, rotary):
    p = Ssd(
        1, 67, 4, 8, dstate, 2, has=("angles", "trap"), nangles=nangles, head_angles=head_angles,
        rotary=rotary,
    )
    check(ops, rng, p)
    check(ops, rng, replace(p, rank=2))


@pytest.mark.core
@pytest.mark.parametrize("has", (("trap",), ("trap", "mimo_x", "mimo_out", "z", "mimo_z"), ALL),
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("nheads, ngroups", [(9, 1), (17, 1), (34, 2), (24, 8), (33, 3)])
def test_many_heads_of_a_group(ops, rng, nheads, ngroups, has):
    """Heads that share B and C may share their products, if no part tells them apart."""
    for rank in (1, 2):
        check(ops, rng, Ssd(1, 70, nheads, 16, 16, ngroups, rank, has=has, nseq=2, captures=2))


@pytest.mark.parametrize("has", [("B_bias",), ("C_bias",), ("B_bias", "C_bias", "angles")], ids=str)
@pytest.mark.parametrize("rank", (None, 1))
def test_biases_without_a_rank_axis(ops, rng, has, rank):
    check(ops, rng, Ssd(2, 70, 4, 16, 16, 2, rank, has=has, plain_biases=True))


@pytest.mark.parametrize("trap_sigmoid", [False, True])
@pytest.mark.parametrize("limit", [None, (0.05, 0.1)], ids=str)
def test_trap_is_a_logit_or_lambda_itself(ops, rng, trap_sigmoid, limit):
    p = siso(2, 70, trap_sigmoid=trap_sigmoid, dt_limit=limit, has=(*MAMBA2, "trap"))
    check(ops, rng, p)
    check(ops, rng, replace(p, adt=False))
    a = make(rng, p)
    lam = np.where(rng.random(a["trap"].shape) < 0.5, 0, 1).astype(F32)  # Euler ahead, or back
    a["trap"] = lam if trap_sigmoid else np.where(lam > 0, 200, -200).astype(F32)
    assert_like_reference(ops, a)


def test_lambda_of_one_is_the_call_without_trap(ops, rng):
    a = make(rng, siso(2, 70, trap_sigmoid=True, has=(*MAMBA2, "trap", "angles")))
    a["trap"] = np.ones_like(a["trap"])
    plain = {k: v for k, v in a.items() if k not in (*INITIAL[2:], "trap", "trap_sigmoid")}
    got, want = run(ops, a), wanted_results(plain)
    assert_close(got["out"], want["out"])
    assert_close(got["final_states"], want["final_states"], "final_states")


@pytest.mark.parametrize("norm_eps", (1e-6, 1e-5, 1.0))
@pytest.mark.parametrize("rank", (None, 4))
def test_norm_eps(ops, rng, norm_eps, rank):
    has = (*MIMO, "norm_weight") if rank else (*SISO, "norm_weight")
    check(ops, rng, Ssd(2, 70, 3, 64, 16, rank=rank, has=has, options={"norm_eps": norm_eps}))


def test_norm_of_a_zero_output_is_zero(ops, rng):
    a = make(rng, Ssd(1, 70, has=("norm_weight",), initial=False))
    a["C"] = np.zeros_like(a["C"])
    assert (run(ops, a)["out"] == 0).all()


def test_norm_of_headdims_that_fill_no_vector(ops, rng):
    for headdim in (1, 3, 7, 15, 17, 31, 33, 65):
        check(ops, rng, Ssd(2, 20, 2, headdim, 16, has=("norm_weight", "z", "D")))
        check(ops, rng, mimo(2, 20, 2, headdim, 16, 1, 2, has=ALL))


# Dtypes, layouts


@pytest.mark.core
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rank", (None, 4))
def test_one_dtype_throughout(ops, rng, dtype, rank):
    has = MIMO if rank else SISO
    check(ops, rng, Ssd(2, 70, 4, 64, 64, 1, rank, has=has, adt=True, dtype=dtype, captures=3))


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
@pytest.mark.parametrize("name", (*TENSORS, "adt", *PARTS, *INITIAL, "out", *FINAL, *CAPTURED))
def test_one_tensor_of_another_dtype(ops, rng, name, dtype):
    p = mimo(1, 70, 4, 16, 32, 2, 2, has=ALL, adt=name != "A", captures=3, dtype={name: dtype})
    check(ops, rng, p)


@pytest.mark.core
@pytest.mark.parametrize("rotary", ROTARY)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(ops, rng, layout, rotary):
    check(ops, rng, mimo(2, 40, 4, 16, 32, 2, 3, has=ALL, layout=layout, captures=4, rotary=rotary))
    p = siso(2, 21, 3, 7, 6, 1, layout=layout, captures=4, dtype=BF16, rotary=rotary)
    check(ops, rng, replace(p, head_angles=False, plain_biases=True, channel_D=True))
    has = tuple(part for part in MIMO if part != "mimo_out")
    check(ops, rng, mimo(2, 21, 2, 8, 16, 1, 2, has=has, layout=layout, dtype=F16))


def test_strides_of_zero_are_read_as_written(ops, rng):
    a = make(rng, mimo(3, 70, 6, 8, 16, 2, 2, has=ALL))
    for name, axis, count in (
        ("x", 2, 6), ("dt", 1, 70), ("adt", 2, 6), ("B", 2, 2), ("C", 3, 2), ("D", 0, 6),
        ("z", 1, 70), ("trap", 0, 3), ("angles", 2, 6), ("B_bias", 1, 2), ("C_bias", 2, 16),
        ("mimo_x", 0, 6), ("mimo_z", 1, 2), ("mimo_out", 2, 8), ("norm_weight", 1, 8),
        ("initial_states", 0, 3), ("initial_angle_states", 1, 6), ("initial_k_states", 1, 2),
        ("initial_v_states", 2, 8),
    ):  # fmt: skip
        a[name] = repeated(a[name], axis, count)
    assert_like_reference(ops, a)


@pytest.mark.core
@pytest.mark.parametrize("chunk_size", (1, 2, 7, 16, 64, 100, 256, 4096, 2**31 - 1))
def test_chunk_size_changes_only_rounding(ops, rng, chunk_size):
    options = {"chunk_size": chunk_size}
    check(ops, rng, siso(2, 150, 3, 16, 32, captures=5, options=options))
    check(ops, rng, mimo(1, 150, 4, 16, 32, 2, 3, nseq=4, captures=5, options=options))


# Sequences


@pytest.mark.parametrize("rank", (None, 3))
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_sequences_without_tokens_pass_all_four_states(ops, rng, dtype, rank):
    has = MIMO if rank else SISO
    a = make(rng, Ssd(1, 5, rank=rank, has=has, nseq=4, dtype=dict.fromkeys(INITIAL, dtype)))
    a["cu_seqlens"] = np.array([0, 0, 5, 5, 5])
    got = run(ops, a)
    for final, initial in zip(FINAL, INITIAL):
        assert_same_bits(got[final][[0, 2, 3]], a[initial][[0, 2, 3]], final)
    a["has_initial_state"] = np.array([True, True, False, True])
    got = run(ops, a)
    for final, initial in zip(FINAL, INITIAL):
        assert (got[final][2] == 0).all(), final
        assert_same_bits(got[final][[0, 3]], a[initial][[0, 3]], final)


def test_no_tokens_without_initial_states_give_zeros(ops, rng):
    got = run(ops, make(rng, siso(2, 0, initial=False)))
    assert all((got[name] == 0).all() for name in FINAL)
    got = run(ops, {**make(rng, mimo(1, 9, nseq=3, initial=False)),
                    "cu_seqlens": np.array([0, 0, 9, 9])})  # fmt: skip
    assert all((got[name][[0, 2]] == 0).all() for name in FINAL)


@pytest.mark.core
@pytest.mark.parametrize("rank", (None, 3))
@pytest.mark.parametrize("index_dtype", (I32, I64), ids=str)
@pytest.mark.parametrize("nseq", (1, 2, 5, 40))
def test_cu_seqlens(ops, rng, nseq, index_dtype, rank):
    p = Ssd(
        1, 231, 4, 8, 16, 2, rank, has=MIMO if rank else SISO, adt=True, nseq=nseq,
        index_dtype=index_dtype, flags="bool", captures=9,
    )
    check(ops, rng, p)
    check(ops, rng, replace(p, layout="sliced"))


def test_sequences_whose_ends_are_the_ends_of_chunks(ops, rng):
    for chunk_size in (0, 16, 32, 64, 128):
        for p in (siso(1, 400, 2, 8, nseq=6), mimo(1, 400, 2, 8, rank=2, nseq=6)):
            a = make(rng, replace(p, options={"chunk_size": chunk_size}))
            a["cu_seqlens"] = np.array([0, 64, 128, 144, 145, 272, 400])
            assert_like_reference(ops, a)


@pytest.mark.core
@pytest.mark.parametrize("rank", (None, 3))
@pytest.mark.parametrize("index_dtype", (I32, I64), ids=str)
def test_seq_idx(ops, rng, index_dtype, rank):
    """Pads between tokens of a sequence: the trapezoid reaches over them to the last real one."""
    p = Ssd(
        3, 150, 4, 8, 16, 2, rank, has=MIMO if rank else SISO, adt=True, seq_idx=True,
        index_dtype=index_dtype, captures=9,
    )
    check(ops, rng, p)
    check(ops, rng, replace(p, layout="mixed", flags="uint8"))


def test_seq_idx_by_hand(ops, rng):
    for p in (siso(1, 12), mimo(1, 12, rank=2)):
        a = make(rng, p)
        a["seq_idx"] = np.array([[-1, 0, -1, -2, 0, 1, -1, 1, 0, 0, -1, -1]])
        assert_like_reference(ops, a)
        a["seq_idx"] = np.array([[3, 3, 3, 3, 3, 3, 2, 3, 2, 3, 2, 2]])
        assert_like_reference(ops, a)


def test_seq_idx_of_long_runs(ops, rng):
    for p in (siso(2, 700, 2, 8), mimo(2, 700, 2, 8, rank=2)):
        a = make(rng, p)
        a["seq_idx"] = np.array(
            [np.repeat([-1, 3, -2, 3, 8, 8], [100, 150, 200, 50, 100, 100]),
             np.repeat([0, 7, -1, -5, 2, -1], [1, 299, 100, 100, 1, 199])]
        )  # fmt: skip
        assert_like_reference(ops, a)


@pytest.mark.parametrize("flags", ("bool", "int8", "uint8"))
def test_has_initial_state_is_for_all_four(ops, rng, flags):
    check(ops, rng, siso(5, 8, flags=flags))
    check(ops, rng, mimo(5, 8, flags=flags))


# States


@pytest.mark.parametrize("rank", (None, 3))
@pytest.mark.parametrize("given", [c for n in range(5) for c in combinations(STATES, n)], ids=str)
def test_any_of_the_initial_and_final_states(ops, rng, given, rank):
    """Those not given start from zeros; those not wanted are not written."""
    has = MIMO if rank else SISO
    rest = tuple(part for part in STATES if part not in given)
    for final in (given, rest):
        p = Ssd(
            2, 70, 2, 8, 16, 1, rank, has=has, initial=given, final=final, captures=3,
            captured=rest or True,
        )
        check(ops, rng, p)


@pytest.mark.parametrize("final", (("angle_",), ("k_",), ("v_",), ("k_", "v_")), ids=str)
def test_pools_of_some_of_the_states(ops, rng, final):
    check(ops, rng, siso(4, 30, pool=7, initial=("", "k_"), final=final))
    check(ops, rng, mimo(1, 60, nseq=4, pool=7, initial=("angle_",), final=final, flags="bool"))
    check(ops, rng, siso(4, 30, pool=7, initial=False, final=final))
    check(ops, rng, siso(4, 30, pool=7, initial=("v_",), final=False))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_states_in_place(ops, rng, dtype, layout):
    dtypes = dict.fromkeys((*INITIAL, *FINAL), dtype)
    check(ops, rng, siso(3, 70, in_place=True, dtype=dtypes, layout=layout))
    check(ops, rng, mimo(3, 70, in_place=True, dtype=dtypes, layout=layout))


@pytest.mark.core
@pytest.mark.parametrize("packing", ("rows", "cu_seqlens", "seq_idx"))
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("pad_slot", [None, 0, 3])
def test_pools(ops, rng, packing, in_place, pad_slot):
    for p in (siso(4, 73, 3, 8), mimo(4, 73, 3, 8, rank=2)):
        p = replace(
            p, pool=9, in_place=in_place, pad_slot=pad_slot, flags="int8", index_dtype=I32,
            captures=6,
        )
        if packing == "cu_seqlens":
            p = replace(p, batch=1, nseq=6)
        check(ops, rng, replace(p, seq_idx=packing == "seq_idx"))
        check(ops, rng, replace(p, seq_idx=packing == "seq_idx", layout="mixed"))


def test_allocated_results(ops, rng):
    a = make(rng, mimo(2, 7, dtype=BF16))
    got = run(ops, a)
    assert got["out"].dtype == BF16 and got["out"].shape == a["x"].shape
    for final, initial in zip(FINAL, INITIAL):
        assert got[final].dtype == BF16 and got[final].shape == a[initial].shape
        del a[initial]
    del a["mimo_out"]
    got = run(ops, a)
    assert got["out"].dtype == BF16 and got["out"].shape == (2, 7, 4, 4, 16)
    want = wanted_results(a)
    for final in FINAL:
        assert got[final].dtype == F32
        assert_state(got[final], want[final], final)


# Captured states


@pytest.mark.core
@pytest.mark.parametrize("rank", (None, 3))
@pytest.mark.parametrize("index_dtype", (I32, I64), ids=str)
def test_captures_anywhere(ops, rng, index_dtype, rank):
    """The states as decode would find them: without the half of the trapezoid still to come."""
    a = make(rng, Ssd(2, 150, 3, 8, 16, 1, rank, has=MIMO if rank else SISO, adt=True))
    positions = [299, 0, 149, 150, -1, 63, 64, 65, 127, 128, 0, 299, 214, -5, 16, 15, 31, 32, 299]
    a["capture_positions"] = np.array(positions, index_dtype)
    want, got = wanted_results(a), run(ops, a)
    kept = a["capture_positions"] >= 0
    for name in CAPTURED:
        assert np.isnan(got[name][~kept]).all()
        assert_state(got[name][kept], want[name][kept], name)
        assert_same_bits(got[name][10], got[name][1], name)
        assert_same_bits(got[name][18], got[name][0], name)


@pytest.mark.parametrize("rank", (None, 2))
def test_captures_are_the_final_states_of_the_cut_sequence(ops, rng, rank):
    """And a call that starts from them goes on as the whole did."""
    a = make(rng, Ssd(2, 200, 2, 8, 16, 1, rank, has=MIMO if rank else SISO))
    positions = np.array([0, 1, 62, 63, 64, 100, 199, 200, 263, 398])
    got, want = run(ops, a, capture_positions=positions), wanted_results(a)
    for i, position in enumerate(positions):
        row, token = divmod(int(position), 200)
        start = {name: a[name][row : row + 1] for name in INITIAL}
        cut = run(ops, {**tokens_of(a, row, 0, token + 1), **start})
        for final, captured in zip(FINAL, CAPTURED):
            assert_state(got[captured][i], cut[final][0].astype(float), captured)
        states = {k: v[i : i + 1] for k, v in got.items() if k in CAPTURED}
        rest = run(ops, {**tokens_of(a, row, token + 1, 200), **starting_from(states, "captured")})
        if token < 199:
            assert_close(rest["out"][0], want["out"][row, token + 1 :])
        for name in FINAL:
            assert_state(rest[name][0], want[name][row], name)


@pytest.mark.parametrize("part", STATES)
def test_some_captured_states_only(ops, rng, part):
    check(ops, rng, siso(2, 70, captures=6, captured=(part,)))
    check(ops, rng, mimo(2, 70, captures=6, captured=(part,), final=False))


def test_captures_on_pads_are_left_alone(ops, rng):
    a = make(rng, mimo(2, 8, rank=2))
    a["seq_idx"] = np.array([[-1, 0, -1, 0, 1, -1, -1, 1], [-1] * 8])
    a["capture_positions"] = np.array([0, 2, 3, 5, 6, 8, 15, 7, 1])
    want, got = wanted_results(a), run(ops, a)
    for name in CAPTURED:
        assert np.isnan(got[name][[0, 1, 3, 4, 5, 6]]).all()
        assert_state(got[name][[2, 7, 8]], want[name][[2, 7, 8]], name)


# Cutting up


@pytest.mark.core
@pytest.mark.parametrize("p", (siso(2, 140, 3, 8, 16), mimo(2, 140, 3, 8, 16, 1, 3)),
                         ids=("siso", "mimo"))  # fmt: skip
def test_a_call_cut_in_two_equals_the_whole(ops, rng, p):
    a = make(rng, p)
    want = wanted_results(a)
    for cut in (0, 1, 2, 31, 63, 64, 65, 100, 127, 128, 129, 139, 140):
        row = cut % 2
        outs, states = [], {name: a[name][row : row + 1] for name in INITIAL}
        for start, end in ((0, cut), (cut, 140)):
            got = run(ops, {**tokens_of(a, row, start, end), **states})
            outs.append(got["out"])
            states = starting_from(got)
        assert_close(np.concatenate(outs, 1)[0], want["out"][row])
        for name in FINAL:
            assert_state(got[name][0], want[name][row], name)


def test_a_call_cut_into_single_tokens_equals_the_whole(ops, rng):
    for p in (siso(1, 50, 2, 8), mimo(1, 50, 2, 8, rank=2)):
        a = make(rng, p)
        want, outs, states = wanted_results(a), [], {name: a[name] for name in INITIAL}
        for t in range(50):
            got = run(ops, {**tokens_of(a, 0, t, t + 1), **states})
            outs.append(got["out"])
            states = starting_from(got)
        assert_close(np.concatenate(outs, 1), want["out"])
        for name in FINAL:
            assert_state(got[name], want[name], name)


# Hard numbers


@pytest.mark.core
@pytest.mark.parametrize("rank", (None, 2))
def test_rotation_of_long_sequences_does_not_drift(ops, rng, rank):
    """4096 steps of angles that float32 would lose sight of; decays slow enough to see them."""
    p = Ssd(
        1, 4096, 2, 8, 16, 1, rank, has=("angles", "trap"), adt=True, softplus=False, nangles=8,
        captures=3,
    )
    a = make(rng, p)
    a["dt"] = uniform(rng, 0.5, 1, a["dt"].shape)
    a["angles"] = uniform(rng, 0.5, 3, a["angles"].shape)  # all one way
    a["adt"] = -log_uniform(rng, 1e-3, 1e-2, a["adt"].shape)
    a["capture_positions"] = np.array([4095, 4000, 2048])
    got, want = run(ops, a), wanted_results(a)
    assert_close(got["out"], want["out"])
    for name in (*FINAL, *CAPTURED):
        assert_state(got[name], want[name], name)
    # Of 4096 roundings of tanh() dt' the sum is some 1e-5.
    assert drift(got, want) < 5e-5
    # Where tanh() is 1 and dt' exact, nothing but the sum itself is rounded.
    a["angles"] = np.where(a["angles"] < 2.5, 30, -30).astype(F32)
    a["dt"] = (rng.integers(1, 1024, a["dt"].shape) / 1024).astype(F32)
    got, want = run(ops, a), wanted_results(a)
    assert_close(got["out"], want["out"])
    assert drift(got, want) < 1e-6


def drift(got, want):
    """How far the final angles are off, in radians."""
    error = got["final_angle_states"] - want["final_angle_states"]
    return np.abs(np.mod(error + np.pi, TURN) - np.pi).max()


@pytest.mark.core
def test_large_steps_turn_many_times(ops, rng):
    """The angle moves by up to millions of turns a token, and float32 knows by how many."""
    a = make(rng, Ssd(1, 70, 2, 8, 16, has=("angles",), softplus=False, adt=True, nangles=8))
    a["adt"] = -uniform(rng, 0.5, 3, a["adt"].shape)
    for largest in (10, 100, 1000, 2**22, 2**24):
        # Products that float32 holds exactly, but for the rounding of tanh() itself.
        a["dt"] = rng.integers(1, largest, a["dt"].shape).astype(F32)
        a["angles"] = np.where(rng.random(a["angles"].shape) < 0.5, 30, -30).astype(F32)
        got, want = run(ops, a), wanted_results(a)
        assert_angles(got["final_angle_states"], want["final_angle_states"], "final_angle_states")
        assert_close(got["out"], want["out"])


def test_saturated_angles(ops, rng):
    for value in (50, -50, 3e38, 1e-30, 0.0):
        a = make(rng, siso(1, 70))
        a["angles"] = np.full_like(a["angles"], value)
        assert_like_reference(ops, a)


def test_angle_states_outside_of_one_turn_are_reduced(ops, rng):
    a = make(rng, siso(2, 20))
    a["initial_angle_states"] = uniform(rng, -40, 40, a["initial_angle_states"].shape)
    assert_like_reference(ops, a)
    a["initial_angle_states"] *= 1000
    assert_like_reference(ops, a)


def test_angle_states_pass_as_they_are_where_there_are_no_tokens(ops, rng):
    """Also those that no call of ours would have left, and the last ones before a whole turn."""
    a = make(rng, siso(2, 5, nangles=8))
    odd = np.array([7, -1, -0.0, 1e6, 6.2831855, 6.283185, 6.2831845, 1e-38], F32)
    a["initial_angle_states"] = np.broadcast_to(odd, (2, 4, 8))
    a["seq_idx"] = np.full((2, 5), -1)
    got = run(ops, a)["final_angle_states"]
    assert_same_bits(got, np.ascontiguousarray(a["initial_angle_states"]))
    none = {**tokens_of(a, 0, 0, 0), "cu_seqlens": np.array([0, 0, 0])}
    got = run(ops, none, **{name: a[name] for name in INITIAL})["final_angle_states"]
    assert_same_bits(got, np.ascontiguousarray(a["initial_angle_states"]))


@pytest.mark.core
@pytest.mark.parametrize("rank", (None, 2))
def test_decays_that_forget_everything(ops, rng, rank):
    """The trapezoid's far end is scaled by the decay too, and vanishes with it."""
    has = MIMO if rank else SISO
    for forget in (-1000, -100, -3e38, -np.inf):
        a = make(rng, Ssd(2, 150, 4, 8, 16, 1, rank, has=has, adt=True))
        a["adt"][0, 70, :2] = forget
        a["adt"][1, [0, 63, 64, 149], 1:] = forget
        assert_like_reference(ops, a)
    a["adt"] = np.full_like(a["adt"], -1000)
    assert_like_reference(ops, a)


@pytest.mark.core
@pytest.mark.parametrize("step", (0.5, 1.5, 3, 10, 60))
def test_sums_of_log_decays_in_the_hundreds(ops, rng, step):
    for p in (siso(2, 300, 2, 8), mimo(2, 300, 2, 8, rank=2)):
        a = make(rng, p)
        a["adt"] = -uniform(rng, step / 2, step, a["adt"].shape)
        assert_like_reference(ops, a)


@pytest.mark.core
def test_growing_states_are_computed_as_written(ops, rng):
    for p in (siso(2, 150, 2, 8), mimo(2, 150, 2, 8, rank=2)):
        a = make(rng, replace(p, softplus=False))
        a["adt"] = uniform(rng, -0.3, 0.3, a["adt"].shape)
        assert_like_reference(ops, a)
        a["adt"][:, 60] = 40
        a["adt"][:, 61] = -40
        assert_like_reference(ops, a)
        a = make(rng, replace(p, softplus=False, adt=False))
        a["A"], a["dt"] = uniform(rng, 0.1, 1, 2), uniform(rng, 0.001, 0.1, a["dt"].shape)
        assert_like_reference(ops, a)


def test_long_sequences_are_as_exact_as_short_ones(ops, rng):
    for p in (siso(1, 4096, 2, 8, 16), mimo(1, 2048, 2, 8, 16, 1, 2)):
        a = make(rng, p)
        a["adt"] = -log_uniform(rng, 1e-4, 1e-2, a["adt"].shape)
        assert_like_reference(ops, a)


# Reproducibility


KINDS = {
    "wide": siso(1, 300, 6, 32, 32, captures=7),
    "mimo": mimo(2, 200, 4, 32, 32, 2, 4, captures=7),
    "apart": mimo(2, 70, 4, 32, 32, 2, 4, has=MIMO[:-1]),
    "packed": siso(1, 300, 3, 16, 64, nseq=7),
    "labelled": mimo(2, 200, 3, 16, 64, rank=2, seq_idx=True),
    "one head": siso(1, 1000, 1, 64, 64),
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


@pytest.mark.parametrize("rank", (None, 3))
def test_batch_invariant_row_has_the_bits_that_it_has_alone(ops, rng, rank):
    options = {"batch_invariant": True}
    a = make(rng, Ssd(5, 170, 3, 16, 32, 1, rank, has=MIMO if rank else SISO, options=options))
    want = run(ops, a)
    for row in (0, 3):
        start = {name: a[name][row : row + 1] for name in INITIAL}
        got = run(ops, {**tokens_of(a, row, 0, 170), **start})
        for name in want:
            assert_same_bits(got[name][0], want[name][row], name)


@pytest.mark.parametrize("rank", (None, 3))
def test_packed_sequences_have_the_bits_of_separate_calls(ops, rng, rank):
    options = {"batch_invariant": True}
    has = MIMO if rank else SISO
    a = make(rng, Ssd(1, 283, 3, 16, 32, 1, rank, has=has, nseq=6, options=options))
    want, cu = run(ops, a), a["cu_seqlens"]
    for s, (start, end) in enumerate(zip(cu[:-1], cu[1:])):
        states = {name: a[name][s : s + 1] for name in INITIAL}
        got = run(ops, {**tokens_of(a, 0, start, end), **states})
        assert_same_bits(got["out"], want["out"][:, start:end])
        for name in FINAL:
            assert_same_bits(got[name][0], want[name][s], name)


# NaN stays where it is

PER_TOKEN = ("x", "dt", "adt", "B", "C", "z", "trap", "angles")


@pytest.mark.parametrize("poison", (np.nan, np.inf), ids=str)
def test_nan_in_a_row_stays_in_that_row(ops, rng, poison):
    rest = [0, 1, 3]
    for p in (siso(4, 100, 3, 16, 16), mimo(4, 100, 3, 16, 16, 1, 2, has=ALL)):
        a = make(rng, p)
        clean = run(ops, a)
        for name in (*PER_TOKEN, *INITIAL):
            dirty = a[name].copy()
            dirty[2] = poison
            got = run(ops, a, **{name: dirty})
            if np.isnan(poison):
                assert np.isnan(got["out"][2]).any(), f"{name}: NaN was lost"
            assert_same_results(got, clean, lambda value: value[rest])


@pytest.mark.parametrize("poison", (np.nan, np.inf), ids=str)
def test_nan_in_a_head_stays_in_that_head(ops, rng, poison):
    rest = np.arange(5) != 3
    for p in (siso(2, 100, 5, 16, 16), mimo(2, 100, 5, 16, 16, 1, 2, has=ALL)):
        a = make(rng, p)
        clean = run(ops, a)
        heads = {
            **dict.fromkeys(("x", "dt", "adt", "z", "trap", "angles"), 2),
            **dict.fromkeys(("D", "dt_bias", "B_bias", "C_bias"), 0),
            **dict.fromkeys(("mimo_x", "mimo_z", "mimo_out", "norm_weight"), 0),
            **dict.fromkeys(INITIAL, 1),
            "initial_k_states": 2,
        }
        for name, axis in heads.items():
            if name not in a:
                continue
            dirty = a[name].copy()
            dirty.swapaxes(0, axis)[3] = poison
            got = run(ops, a, **{name: dirty})
            if np.isnan(poison):
                assert np.isnan(got["out"].swapaxes(0, 2)[3]).any(), f"{name}: NaN was lost"
            for result, axis in (("out", 2), *((f, 2 if "k_" in f else 1) for f in FINAL)):
                assert_same_bits(
                    got[result].swapaxes(0, axis)[rest], clean[result].swapaxes(0, axis)[rest],
                    f"{result} after {poison} in {name}",
                )


@pytest.mark.core
@pytest.mark.parametrize("poison", (np.nan, np.inf, -np.inf), ids=str)
@pytest.mark.parametrize("token", (1, 17, 63, 64, 100, 149))
def test_a_later_token_never_reaches_earlier_outputs(ops, rng, token, poison):
    """dt and trap of a token weigh the input of the one before it, in its own output only."""
    capture = np.array([token - 1])
    for p in (siso(1, 150, 2, 16, 16), mimo(1, 150, 2, 16, 16, 1, 2, has=ALL)):
        a = make(rng, p)
        clean, cut = run(ops, a), run(ops, a, capture_positions=capture)
        for name in PER_TOKEN:
            dirty = a[name].copy()
            dirty[:, token:] = poison
            got = run(ops, a, **{name: dirty})  # a capture may end a chunk
            assert_same_bits(got["out"][:, :token], clean["out"][:, :token], name)
            got = run(ops, a, **{name: dirty}, capture_positions=capture)
            assert_same_bits(got["out"][:, :token], cut["out"][:, :token], name)
            for captured in CAPTURED:
                assert_same_bits(got[captured], cut[captured], f"{captured}, {name}")


@pytest.mark.core
@pytest.mark.parametrize("packing", ("cu_seqlens", "seq_idx"))
@pytest.mark.parametrize("poison", (np.nan, np.inf), ids=str)
def test_nan_in_a_sequence_stays_in_that_sequence(ops, rng, packing, poison):
    rest = np.r_[0:30, 60:90]
    for p in (siso(1, 90, 3, 8), mimo(1, 90, 3, 8, rank=2, has=ALL)):
        a = make(rng, replace(p, nseq=None if packing == "seq_idx" else 3))
        if packing == "seq_idx":
            a["seq_idx"] = np.repeat([[4, 5, 9]], 30, 1)
        else:
            a["cu_seqlens"] = np.array([0, 30, 60, 90])
        clean = run(ops, a)
        for name in PER_TOKEN:
            dirty = a[name].copy()
            dirty[:, 30:60] = poison
            got = run(ops, a, **{name: dirty})
            assert_same_bits(got["out"][:, rest], clean["out"][:, rest], name)
            last = slice(2, 3) if packing == "cu_seqlens" else slice(0, 1)
            for final in FINAL:
                assert_same_bits(got[final][last], clean[final][last], f"{final}, {name}")


@pytest.mark.parametrize("state", INITIAL)
def test_nan_initial_state_reaches_the_first_sequence_only(ops, rng, state):
    for poison in (np.nan, np.inf):
        a = make(rng, siso(1, 90))
        a["seq_idx"] = np.repeat([[-1, 4, 5]], 30, 1)
        clean = run(ops, a)
        got = run(ops, a, **{state: np.full_like(a[state], poison)})
        assert not np.isfinite(got["out"][:, 30:60]).all()
        rest = np.r_[0:30, 60:90]
        assert_same_bits(got["out"][:, rest], clean["out"][:, rest])
        for name in FINAL:
            assert_same_bits(got[name], clean[name], name)


@pytest.mark.core
@pytest.mark.parametrize("poison", (np.nan, np.inf), ids=str)
def test_pad_tokens_are_not_read_and_give_zeros(ops, rng, poison):
    for p in (siso(2, 130, 4, 8, 16, 2), mimo(2, 130, 4, 8, 16, 2, 2, has=MIMO[:-1])):
        a = make(rng, replace(p, seq_idx=True))
        pads = a["seq_idx"] < 0
        clean, dirty = run(ops, a), {}
        for name in PER_TOKEN:
            dirty[name] = a[name].copy()
            dirty[name][pads] = poison
        got = run(ops, a, **dirty)
        assert_same_results(got, clean)
        assert (got["out"][pads] == 0).all()


def test_a_row_of_pads_passes_its_states(ops, rng):
    for p in (siso(2, 5), mimo(2, 5)):
        a = make(rng, p)
        a["seq_idx"] = np.full((2, 5), -1)
        got = run(ops, a)
        assert (got["out"] == 0).all()
        for final, initial in zip(FINAL, INITIAL):
            assert_same_bits(got[final], a[initial], final)


def test_pad_slots_are_neither_read_nor_written(ops, rng):
    a = make(rng, mimo(1, 130, nseq=5, pool=7, rank=2))
    a["cu_seqlens"] = np.array([0, 37, 63, 63, 92, 130])
    a["state_indices"] = np.array([3, -1, 5, -1, 0])
    for name in PER_TOKEN:
        a[name] = a[name].copy()
        a[name][:, 37:92] = np.nan
    pools = {name: normal(rng, a[i].shape) for name, i in zip(FINAL, INITIAL)}
    before = {name: pool.copy() for name, pool in pools.items()}
    out = ops.ssd_chunk(**a, **pools)[0]
    assert (out[:, 37:92] == 0).all() and np.isfinite(out).all()
    for final, initial in zip(FINAL, INITIAL):
        assert_same_bits(pools[final][[1, 2, 4, 6]], before[final][[1, 2, 4, 6]], final)
        assert_same_bits(pools[final][5], a[initial][5], final)


def test_states_without_flag_are_not_read(ops, rng):
    a = make(rng, mimo(3, 70, rank=2))
    a["has_initial_state"] = np.array([1, 0, 1], np.int8)
    want = run(ops, a)
    for name in INITIAL:
        a[name] = a[name].copy()
        a[name][1] = np.nan
    assert_same_results(run(ops, a), want)


# Everything at once


@st.composite
def calls(draw):
    packing = draw(st.sampled_from(("rows", "rows", "cu_seqlens", "seq_idx")))
    ngroups = draw(st.sampled_from((1, 1, 2, 3)))
    rank = draw(st.sampled_from((None, None, 1, 2, 3, 4, 5, 8)))
    dstate = draw(st.sampled_from((1, 2, 5, 8, 16, 17, 24, 48, 64)))
    has = tuple(name for name in ALL if draw(st.booleans()))
    if "z" not in has:
        has = tuple(name for name in has if name != "mimo_z")
    if (rank or 1) > 1 and "mimo_out" not in has:
        has = tuple(name for name in has if name != "norm_weight")
    some = st.sampled_from((True, True, False, ("", "k_"), ("angle_", "v_"), ("v_",)))
    p = Ssd(
        nheads=ngroups * draw(st.integers(1, 3)),
        seqlen=draw(st.sampled_from((0, 1, 2, 3, 8, 17, 32, 33, 63, 64, 65, 67, 130))),
        headdim=draw(st.sampled_from((1, 2, 5, 8, 16, 17, 24, 40, 64))),
        dstate=dstate,
        ngroups=ngroups,
        rank=rank,
        nangles=draw(st.integers(0, dstate // 2)),
        has=has,
        channel_D=draw(st.booleans()),
        adt=draw(st.booleans()),
        head_angles=draw(st.booleans()),
        plain_biases=(rank or 1) == 1 and draw(st.booleans()),
        rotary=draw(st.sampled_from(ROTARY)),
        trap_sigmoid=draw(st.booleans()),
        softplus=draw(st.booleans()),
        dt_limit=draw(st.sampled_from((None, None, (0.02, 0.3)))),
        nseq=draw(st.integers(1, 6)) if packing == "cu_seqlens" else None,
        seq_idx=packing == "seq_idx",
        initial=draw(some),
        final=draw(some),
        captures=draw(st.sampled_from((0, 0, 1, 5))),
        captured=draw(st.sampled_from((True, ("",), ("angle_", "k_", "v_")))),
        index_dtype=draw(st.sampled_from((I32, I64))),
        layout=draw(st.sampled_from(LAYOUTS)),
        options={
            "chunk_size": draw(st.sampled_from((0, 0, 1, 16, 50, 128))),
            "batch_invariant": draw(st.booleans()),
        },
    )
    batch = 1 if p.nseq else draw(st.integers(0, 3))
    p = replace(p, batch=batch)
    initial, final = p.wanted(p.initial), p.wanted(p.final)
    if (initial or final) and draw(st.booleans()):
        pool = p.sequences + draw(st.integers(1, 4))
        p = replace(p, pool=pool, pad_slot=draw(st.sampled_from((None, 0, 1))))
    names = (*TENSORS, "adt", *PARTS, "out", *INITIAL, *FINAL, *CAPTURED)
    dtype = {name: draw(st.sampled_from(FLOATS)) for name in names}
    in_place = bool(initial and final) and draw(st.booleans())
    if in_place:
        dtype.update({f: dtype[i] for f, i in zip(FINAL, INITIAL)})
    if initial:
        p = replace(p, flags=draw(st.sampled_from((None, "bool", "int8", "uint8"))))
    if not p.wanted(p.captured):
        p = replace(p, captures=0)
    return replace(p, dtype=dtype, in_place=in_place)


@given(calls(), st.integers(0, 2**32 - 1))
def test_random_calls(ops, p, seed):
    check(ops, np.random.default_rng(seed), p)
