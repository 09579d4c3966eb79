# SPDX-License-Identifier: MIT
"""state_update of Mamba-3 against the reference: every part alone and together, all four states;
and what must hold bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from cases import (
    BF16, F16, F32, FLOATS, I32, I64, LAYOUTS, assert_close, assert_same_bits, laid, normal,
    repeated, wide,
)
from cases_update import (
    PARTS, TENSORS, TOKENS, Update, assert_angles, check, copies, make, pools,
)

ROTARY = pytest.mark.parametrize("rotary", ["interleaved", "half"])
# How the layers of the paper use it.
SISO = ("adt", "trap", "angles", "B_bias", "C_bias")
MIMO = (*SISO, "mimo_x", "mimo_z", "mimo_out")
STATES = ("state", "angle_state", "k_state", "v_state")
KEPT = tuple(f"intermediate_{name}s" for name in STATES)


def full(batch=3, T=None, rank=None, nheads=4, headdim=8, dstate=16, ngroups=1, **more):
    parts = PARTS if rank is None or rank == 1 else (*MIMO, "norm_weight")
    more = {"parts": parts, "rotary": "interleaved" if rank is None else "half", **more}
    return Update(batch, T, True, nheads, headdim, dstate, ngroups, rank=rank, **more)


def run(ops, a, states, **more):
    """(out, states afterwards) of a call on copies of the states."""
    states = {name: array.copy() for name, array in states.items()}
    return ops.state_update(**states, **{**a, **more}), states


def rows_of(a, rows):
    return {k: v[rows] if k in TOKENS and v is not None else v for k, v in a.items()}


# Parts


@pytest.mark.core
@pytest.mark.parametrize("T", [None, 3])
@pytest.mark.parametrize("rank", [None, 1, 2, 3, 4])
@pytest.mark.parametrize("part", [(), *((name,) for name in PARTS)], ids=str)
def test_each_part_alone(ops, rng, part, rank, T):
    if part == ("norm_weight",) and rank and rank > 1:
        part = ("norm_weight", "mimo_out")
    check(ops, rng, Update(2, T, rank=rank, ngroups=2, parts=part))


@pytest.mark.parametrize("T", [None, 2])
@pytest.mark.parametrize("part", PARTS)
def test_all_parts_but_one(ops, rng, part, T):
    parts = tuple(name for name in PARTS if name != part)
    check(ops, rng, full(2, T, parts=parts))
    if part != "mimo_out":
        check(ops, rng, full(2, T, 4, parts=parts))


@pytest.mark.core
@ROTARY
@pytest.mark.parametrize("rank", [None, 1, 2, 3, 4, 5, 6, 7, 8, 9])
def test_every_rank(ops, rng, rank, rotary):
    for T in (None, 2):
        check(ops, rng, full(2, T, rank, dstate=32, rotary=rotary))
        check(ops, rng, full(2, T, rank, headdim=5, dstate=19, rotary=rotary))
        check(ops, rng, Update(2, T, rank=rank, parts=SISO, rotary=rotary, has=("z",)))


SHAPES = [
    # batch, nheads, headdim, dstate, ngroups, nangles
    (0, 4, 8, 16, 1, 4), (1, 1, 1, 1, 1, 0), (2, 3, 3, 5, 3, 2), (2, 3, 4, 7, 1, 3),
    (3, 5, 17, 16, 5, 8), (2, 6, 48, 24, 2, 1), (1, 4, 80, 64, 4, 32), (1, 2, 96, 96, 1, 0),
    (4, 8, 64, 128, 2, 32), (1, 2, 64, 128, 1, 64), (1, 2, 5, 256, 1, 37), (2, 2, 3, 1031, 1, 515),
    (1, 1, 255, 16, 1, 7), (1, 2, 300, 5, 1, 1), (1, 2, 100, 256, 1, 64), (1, 2, 20, 1025, 2, 9),
    (1, 3, 33, 48, 3, 17),
]


@pytest.mark.core
@pytest.mark.parametrize("rank", [None, 4])
@pytest.mark.parametrize("T", [None, 1, 3])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_shape(ops, rng, shape, T, rank):
    batch, nheads, headdim, dstate, ngroups, nangles = shape
    check(ops, rng, full(batch, T, rank, nheads, headdim, dstate, ngroups, nangles=nangles))
    rotary = "half" if rank is None else "interleaved"
    check(
        ops, rng,
        full(batch, T, rank, nheads, headdim, dstate, ngroups, nangles=nangles, rotary=rotary),
    )


# Of layers as models have them, for which a backend may have kernels of their own.
USUAL = [(64, 128), (40, 128), (96, 128), (130, 128), (64, 64)]


@pytest.mark.core
@pytest.mark.parametrize("rank", [None, 2, 4])
@pytest.mark.parametrize("T", [None, 3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_usual_layers(ops, rng, dtype, T, rank):
    """Right, and of the bits that strided tensors give."""
    parts = SISO if rank is None else MIMO
    dtypes = dict.fromkeys((*STATES, *KEPT, "x", "z", "B", "C"), dtype)
    for headdim, dstate in USUAL:
        p = Update(3, T, nheads=2, headdim=headdim, dstate=dstate, rank=rank, parts=parts,
                   nangles=dstate // 4, rotary="half" if rank else "interleaved", dtype=dtypes)
        check(ops, rng, replace(p, pool=9, reads=0, writes=0))
        check(ops, rng, replace(p, parts=("trap",), nangles=0, tied=("dt", "D"), keep_state=True))
        check(ops, rng, replace(p, has=(), parts=tuple(n for n in parts if n != "mimo_z")))
        if T:
            check(ops, rng, replace(p, counts=True, intermediate=4, accepted=True))
        a = make(rng, p)
        moved = {
            n: laid(rng, v, "mixed") if isinstance(v, np.ndarray) else v for n, v in a.items()
        }
        strided = {n: s.array for n, s in pools(rng, replace(p, layout="mixed"), {}).items()}
        want, after = run(ops, a, {n: np.ascontiguousarray(s) for n, s in strided.items()})
        assert_same_bits(ops.state_update(**strided, **moved), want)
        for name in STATES:
            assert_same_bits(strided[name], after[name], name)


def bfloat16_layer(rank, T, states, **more):
    """Of a bfloat16 model, for which a backend may have matrix products."""
    dtypes = dict.fromkeys(("x", "z", "B", "C", "trap", "angles", "k_state", "v_state"), BF16)
    dtypes["state"] = states
    more = {"parts": SISO if rank is None else MIMO, "dtype": dtypes, "nangles": 32, **more}
    return Update(4, T, nheads=2, headdim=64, dstate=128, rank=rank, **more)


BFLOAT16_LAYERS = [
    pytest.mark.parametrize("states", (F32, BF16), ids=str),
    pytest.mark.parametrize("T", [None, 2, 3, 4]),
    pytest.mark.parametrize("rank", [None, 4]),
]


def bfloat16_layers(test):
    for mark in BFLOAT16_LAYERS:
        test = mark(test)
    return test


@pytest.mark.core
@ROTARY
@bfloat16_layers
def test_layers_of_a_bfloat16_model(ops, rng, states, T, rank, rotary):
    p = bfloat16_layer(rank, T, states, rotary=rotary)
    check(ops, rng, replace(p, pool=9, reads=0, writes=0, pads=0))
    check(ops, rng, replace(p, nheads=4, pool=9, reads=0, pad_slot=3, ngroups=2, nangles=64))
    check(ops, rng, replace(p, headdim=40, counts=True, pool=9, reads=0, writes=0))
    check(ops, rng, replace(p, headdim=6, ngroups=2, parts=("adt", "trap"), nangles=0, has=()))
    some = tuple(name for name in p.parts if name not in ("adt", "mimo_out"))
    check(ops, rng, replace(p, parts=some, nangles=7, keep_state=True, dt_limit=(0.05, 0.2)))
    check(ops, rng, replace(p, trap_sigmoid=True, softplus=False, dtype={**p.dtype, "out": BF16}))
    weights = dict.fromkeys((*p.parts, "dt", "D", "dt_bias"), BF16)
    check(ops, rng, replace(p, parts=some, dtype={**weights, **p.dtype}, index_dtype=I32, reads=0))


@bfloat16_layers
def test_rows_slots_and_tokens_of_a_bfloat16_model(ops, rng, states, T, rank):
    """The bits are those of each row alone, of other slots, and of fewer tokens."""
    p = bfloat16_layer(rank, T, states)
    a, start = make(rng, p), copies(pools(rng, p, {}))
    want, after = run(ops, a, start)

    for row in (0, 3):
        one = slice(row, row + 1)
        out, alone = run(ops, rows_of(a, one), {n: s[one] for n, s in start.items()})
        assert_same_bits(out[0], want[row])
        for name in STATES:
            assert_same_bits(alone[name][0], after[name][row], name)

    pool = {n: np.concatenate([s, s * 0]) for n, s in start.items()}
    reads, writes = np.array([2, 0, 3, 1]), np.array([7, 4, 5, 6])
    turned = rows_of(a, reads)
    out, moved = run(ops, turned, pool, state_indices=reads, state_indices_out=writes)
    assert_same_bits(out, want[reads])
    for name in STATES:
        assert_same_bits(moved[name][:4], start[name], f"{name}: slots that are only read")
        assert_same_bits(moved[name][writes], after[name][reads], name)

    out, moved = run(ops, turned, pool, state_indices=reads, state_indices_out=writes,
                     num_tokens=np.zeros(4, np.int64))
    assert (out == 0).all()
    for name in STATES:
        assert_same_bits(moved[name][writes], start[name][reads], f"{name}: without tokens")


@pytest.mark.parametrize("T", [2, 4])
@pytest.mark.parametrize("states", (F32, BF16), ids=str)
@pytest.mark.parametrize("rank", [None, 4])
def test_nan_of_a_bfloat16_model_stays_where_it_is(ops, rng, rank, states, T):
    """In its row of the batch, its row of x, and among the tokens that follow."""
    p = bfloat16_layer(rank, T, states)
    a, start = make(rng, p), copies(pools(rng, p, {}))
    clean, clean_after = run(ops, a, start)
    for name in (n for n in TOKENS if a.get(n) is not None):
        dirty = {**a, name: a[name].copy()}
        dirty[name][2, T - 1] = np.nan
        out, after = run(ops, dirty, start)
        assert np.isnan(out[2, T - 1]).any(), f"{name}: NaN was lost"
        assert_same_bits(out[2, : T - 1], clean[2, : T - 1], name)
        out, fewer = run(ops, dirty, start, num_tokens=np.array([T, T, T - 1, T]))
        assert_same_bits(out[2, : T - 1], clean[2, : T - 1], name)
        assert np.isfinite(wide(out)).all()
        for state in STATES:
            rest = [0, 1, 3]
            assert_same_bits(after[state][rest], clean_after[state][rest], state)
            assert np.isfinite(wide(fewer[state])).all(), f"{name} reached {state}"
    dirty = {**a, "x": a["x"].copy()}
    dirty["x"][1, 0, 1, 5] = np.nan
    out, after = run(ops, dirty, start)
    others = np.arange(64) != 5
    assert_same_bits(out[..., others], clean[..., others])
    assert_same_bits(after["state"][:, :, others], clean_after["state"][:, :, others])


@pytest.mark.core
@pytest.mark.parametrize("states", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("rank", [None, 4])
def test_inputs_of_one_dtype_and_states_of_another(ops, rng, rank, dtype, states):
    dtypes = dict.fromkeys((*TENSORS, *PARTS, "out"), dtype)
    dtypes.update(dict.fromkeys((*STATES, *KEPT), states))
    for headdim, dstate in ((16, 64), (9, 19)):
        p = full(2, None, rank, 4, headdim, dstate, dtype=dtypes)
        check(ops, rng, p)
        check(ops, rng, replace(p, T=3, intermediate=2))


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
@pytest.mark.parametrize("name", (*TENSORS, *PARTS, *STATES, *KEPT, "out"))
def test_one_tensor_of_another_dtype(ops, rng, name, dtype):
    parts = tuple(n for n in PARTS if n != "adt" or name != "A")
    for T in (None, 2):
        check(ops, rng, full(2, T, parts=parts, intermediate=2, dtype={name: dtype}))


@pytest.mark.core
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("rank", [None, 2])
def test_every_layout(ops, rng, layout, rank):
    check(ops, rng, full(3, None, rank, 4, 8, 32, 2, layout=layout))
    check(ops, rng, full(2, 3, rank, 3, 5, 17, 3, layout=layout, dtype=BF16, intermediate=2))


@pytest.mark.parametrize("T", [None, 2])
@pytest.mark.parametrize("rank", [None, 1, 4])
def test_forms_of_one_argument(ops, rng, T, rank):
    """Angles for all heads, biases without ranks, D per channel, an A for each state."""
    p = full(2, T, rank, parts=tuple(n for n in PARTS if n != "adt"))
    check(ops, rng, replace(p, shared_angles=True))
    check(ops, rng, replace(p, flat_bias=(rank or 1) == 1, tied=("dt", "A", "dt_bias")))
    check(ops, rng, replace(p, tied=("dt", "D", "dt_bias")))
    check(ops, rng, replace(p, tied=("dt", "D", "dt_bias"), dtype={"A": BF16}, dstate=21))
    check(ops, rng, replace(p, tied=(), parts=("trap", "B_bias")))
    check(ops, rng, replace(p, tied=("A",), parts=("trap", "mimo_x")))


@pytest.mark.core
@pytest.mark.parametrize("has", [(), ("D",), ("z",), ("dt_bias",)], ids=str)
@pytest.mark.parametrize("softplus", [False, True])
@pytest.mark.parametrize("rank", [None, 4])
def test_every_option_absent_or_present(ops, rng, has, softplus, rank):
    parts = (*MIMO, "norm_weight") if "z" in has else (*SISO, "mimo_x", "mimo_out", "norm_weight")
    check(ops, rng, full(2, None, rank, has=has, softplus=softplus, parts=parts))
    # What the ranks give, each on its own axis
    check(ops, rng, full(2, 2, rank, has=has, softplus=softplus, parts=SISO))


@pytest.mark.parametrize("rank", [None, 3])
def test_trap_may_hold_lambda_itself(ops, rng, rank):
    for T in (None, 2):
        check(ops, rng, full(2, T, rank, trap_sigmoid=True))
    p = Update(2, parts=("trap",), trap_sigmoid=True)
    a, states = make(rng, p), copies(pools(rng, p, {}))
    a["trap"] = np.array([[0, 1, 0, 1], [1, 0, 0.5, 0.25]], F32)
    want = reference.state_update(**states, **a)
    out, after = run(ops, a, states)
    assert_close(out, want.out)
    for name in states:
        assert_close(after[name], want.states[name], name)


def test_lambda_of_one_is_mamba2(ops, rng):
    """Then nothing is left of the token before, whatever k and v hold; and no angle turns."""
    p = Update(3, 2, parts=("trap", "angles"), trap_sigmoid=True)
    a, states = make(rng, p), copies(pools(rng, p, {}))
    a["trap"], a["angles"] = np.ones_like(a["trap"]), np.zeros_like(a["angles"])
    states["angle_state"][...] = 0
    plain = {k: v for k, v in a.items() if k not in ("trap", "angles", "trap_sigmoid")}
    want, after = run(ops, plain, {"state": states["state"]})
    out, got = run(ops, a, states)
    assert_close(out, wide(want))
    assert_close(got["state"], wide(after["state"]), "state")


def test_inputs_with_strides_of_zero(ops, rng):
    p = full(3, 2, 4, ngroups=2)
    a, states = make(rng, p), copies(pools(rng, p, {}))
    for name, axis in (
        ("x", 0), ("z", 3), ("B", 2), ("C", 4), ("trap", 2), ("adt", 1), ("angles", 2),
        ("mimo_x", 1), ("mimo_z", 0), ("mimo_out", 2), ("B_bias", 0), ("C_bias", 1),
    ):
        a[name] = repeated(a[name], axis, a[name].shape[axis])
    want = reference.state_update(**states, **a)
    out, after = run(ops, a, states)
    assert_close(out, want.out)
    assert_close(after["k_state"], want.states["k_state"], "k_state")


@pytest.mark.parametrize(
    "limit", [(0.0, float("inf")), (0.05, 0.1), (0.0, 0.08), (-0.1, 0.2)], ids=str
)
@pytest.mark.parametrize("softplus", [False, True])
def test_dt_limit_clamps_after_softplus(ops, rng, limit, softplus):
    parts = tuple(n for n in PARTS if n != "adt")
    check(ops, rng, full(2, 2, parts=parts, softplus=softplus, dt_limit=limit))
    check(ops, rng, full(2, 2, 4, softplus=softplus, dt_limit=limit))


# Angles


@ROTARY
def test_angles_stay_below_a_turn(ops, rng, rotary):
    """Over many tokens, forwards and backwards, and from angles that others have not wrapped."""
    p = Update(2, 50, parts=("angles",), nangles=8, rotary=rotary, softplus=False)
    a, states = make(rng, p), copies(pools(rng, p, {}))
    states["angle_state"][0, 0] = [100, -100, 6.2831855, -1e-9, 0, 7, -0.5, 6.283185]
    want = reference.state_update(**states, **a)
    out, after = run(ops, a, states)
    assert_close(out, want.out)
    assert_angles(after["angle_state"], want.states["angle_state"], "angle_state")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_angles_just_below_a_turn_or_zero_are_stored_in_range(ops, rng, dtype):
    p = Update(1, parts=("angles",), nheads=40, dstate=32, nangles=16, softplus=False, has=())
    a, states = make(rng, p), copies(pools(rng, p, {}))
    start = rng.choice([0.0, 6.283185], (1, 40, 16)).astype(dtype)
    states["angle_state"] = start
    a["dt"] = np.full_like(a["dt"], 1)
    a["angles"] = (rng.choice([-1, 1], a["angles"].shape) * 10 ** rng.uniform(-12, -4, (1, 40, 16)))
    a["angles"] = a["angles"].astype(F32)
    want = reference.state_update(**states, **a)
    _, after = run(ops, a, states)
    assert_angles(after["angle_state"], want.states["angle_state"], "angle_state")


# Slots


@pytest.mark.core
@pytest.mark.parametrize("pad_slot", [None, 0, 5])
@pytest.mark.parametrize("index_dtype", (I32, I64), ids=str)
@pytest.mark.parametrize("rank", [None, 4])
def test_slots_of_pools(ops, rng, rank, pad_slot, index_dtype):
    p = full(
        6, None, rank, pool=20, reads=0, pad_slot=pad_slot, index_dtype=index_dtype, pads=0.3
    )
    check(ops, rng, p)
    check(ops, rng, replace(p, writes=0))
    check(ops, rng, replace(p, writes=0, dtype=dict.fromkeys(STATES, BF16)))
    check(ops, rng, replace(p, writes=0, layout="mixed", T=3))


def test_pools_larger_than_the_batch_without_indices(ops, rng):
    check(ops, rng, full(3, 2, pool=5))
    check(ops, rng, full(3, None, pool=9, writes=0))


@pytest.mark.core
@pytest.mark.parametrize("reads", [None, 0, 4])
@pytest.mark.parametrize("counts", [False, True])
def test_the_states_after_each_token_go_to_slots_of_their_own(ops, rng, reads, counts):
    p = full(4, 3, pool=48, reads=reads, writes=1, counts=counts, accepted=bool(reads), pads=0.3)
    check(ops, rng, p)
    check(ops, rng, replace(p, layout="sliced", dtype=dict.fromkeys(STATES, BF16)))
    check(ops, rng, replace(p, T=1))


def test_accepted_counts_choose_the_slots_to_read(ops, rng):
    check(ops, rng, full(5, 2, pool=40, reads=4, accepted=True))
    check(ops, rng, full(5, None, 4, pool=40, reads=4, writes=0, accepted=True, index_dtype=I32))


def test_a_row_may_write_the_slots_that_it_reads(ops, rng):
    p = full(2, 3)
    a, states = make(rng, p), copies(pools(rng, replace(p, pool=8), {}))
    a["state_indices"] = np.array([[4, 1, 2], [0, 6, 3]])
    a["state_indices_out"] = a["state_indices"]
    a["num_accepted_tokens"] = np.array([2, 3])
    want = reference.state_update(**states, **a)
    out, after = run(ops, a, states)
    assert_close(out, want.out)
    for name in ("state", "k_state", "v_state"):
        assert_close(after[name], want.states[name], name)


@pytest.mark.parametrize("writes", [None, 0])
@pytest.mark.parametrize("rank", [None, 4])
def test_token_counts(ops, rng, rank, writes):
    p = full(6, 4, rank, pool=20, reads=0, writes=writes, counts=True, parts=SISO)
    a, out, _ = check(ops, rng, p)
    for row, n in enumerate(a["num_tokens"]):
        assert (out[row, n:] == 0).all()
    check(ops, rng, replace(p, T=1))


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_no_tokens_of_a_row_copy_its_states_to_the_slot_it_writes(ops, rng, dtype, T):
    p = full(2, T, dstate=32, pool=4, dtype=dict.fromkeys(STATES, dtype))
    a, states = make(rng, p), copies(pools(rng, p, {}))
    a.update(
        state_indices=np.array([0, 1]), state_indices_out=np.array([2, 3]),
        num_tokens=np.array([0, T]),
    )
    out, after = run(ops, a, states)
    for name in STATES:
        assert_same_bits(after[name][2], states[name][0], f"{name}: the written slot")
        assert_same_bits(after[name][:2], states[name][:2], f"{name}: the slots that are read")
    assert (out[0] == 0).all()


@pytest.mark.core
@pytest.mark.parametrize("indices", [False, True])
@pytest.mark.parametrize("accepted", [False, True])
@pytest.mark.parametrize("keep_state", [False, True])
def test_intermediate_states(ops, rng, indices, accepted, keep_state):
    p = full(
        5, 3, pool=12, reads=0, counts=True, intermediate=7, intermediate_indices=indices,
        accepted=accepted, keep_state=keep_state,
    )
    check(ops, rng, p)
    check(ops, rng, replace(p, T=1, rank=4, parts=SISO))
    check(ops, rng, replace(p, T=None, counts=False, rank=3, parts=SISO))
    mixed = dict.fromkeys(KEPT, BF16) | dict.fromkeys(STATES, F16)
    check(ops, rng, replace(p, layout="mixed", dtype=mixed))
    for part in ("trap", "angles"):
        check(ops, rng, replace(p, parts=(part,)))


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("rank", [None, 4])
def test_rejected_tokens_are_rolled_back(ops, rng, rank, T):
    """Verify draft tokens, accept some, go on: the bits of never having seen the rejected ones."""
    p = full(T + 1, T, rank)
    draft, more = make(rng, p), make(rng, p)
    for name in (*PARTS, "D", "dt_bias"):
        if name not in TOKENS:
            more[name] = draft[name]
    states = copies(pools(rng, p, {}))
    kept = copies(pools(rng, replace(p, intermediate=T + 1), {}))
    kept = {name: array for name, array in kept.items() if name in KEPT}
    accepted = np.arange(T + 1)

    drafted = {name: array.copy() for name, array in states.items()}
    ops.state_update(**drafted, **draft, **kept, keep_state=True)
    for name in STATES:
        assert_same_bits(drafted[name], states[name], f"{name} under keep_state")
    out = ops.state_update(**drafted, **more, **kept, num_accepted_tokens=accepted)

    _, once = run(ops, draft, states, num_tokens=accepted)
    want_out, want = run(ops, more, once)
    assert_same_bits(out, want_out)
    for name in STATES:
        assert_same_bits(drafted[name], want[name], name)
    truth = reference.state_update(**states, **draft, num_tokens=accepted)
    truth = reference.state_update(**truth.states, **more)
    assert_close(out, truth.out)
    assert_close(drafted["state"], truth.states["state"], "state")


@pytest.mark.parametrize("T", [None, 3])
def test_keep_state_leaves_all_four_alone(ops, rng, T):
    check(ops, rng, full(4, T, pool=6, reads=0, keep_state=True))
    p = full(3, T, keep_state=True)
    a, states = make(rng, p), copies(pools(rng, p, {}))
    a["state_indices"] = np.array([1, 1, 1])
    want = reference.state_update(**states, **a)
    out, after = run(ops, a, states)
    assert_close(out, want.out)
    for name in STATES:
        assert_same_bits(after[name], states[name], f"{name} under keep_state")


def test_pads_are_neither_read_nor_written(ops, rng):
    for rank, T in ((None, None), (4, 2)):
        p = full(5, T, rank)
        a, states = make(rng, p), copies(pools(rng, replace(p, pool=8), {}))
        a["state_indices"] = np.array([3, -1, 0, 6, -5])
        a["pad_slot"] = 6
        for name in TOKENS:
            if a.get(name) is not None:
                a[name] = a[name].copy()
                a[name][[1, 3, 4]] = np.nan
        for name in STATES:
            states[name][6] = np.nan
        out, after = run(ops, a, states)
        assert (out[[1, 3, 4]] == 0).all()
        assert np.isfinite(out).all()
        for name in STATES:
            rest = [1, 2, 4, 5, 6, 7]
            assert_same_bits(after[name][rest], states[name][rest], f"{name}: slots of pads")


def test_a_pad_to_write_is_a_pad_to_read(ops, rng):
    p = full(3)
    a, states = make(rng, p), copies(pools(rng, replace(p, pool=5), {}))
    a.update(state_indices=np.array([0, 1, 2]), state_indices_out=np.array([3, -1, 4]))
    for name in STATES:
        states[name][1] = np.nan
    out, after = run(ops, a, states)
    assert (out[1] == 0).all() and np.isfinite(out).all()
    for name in STATES:
        assert_same_bits(after[name][:3], states[name][:3], f"{name}: slots that are only read")


@pytest.mark.core
@pytest.mark.parametrize("rank", [None, 3, 4])
@pytest.mark.parametrize("T", [None, 2])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pools_give_the_bits_of_gather_dense_scatter(ops, rng, dtype, T, rank):
    """Whatever the strides of the pools, of the inputs and of out."""
    for dstate in (24, 64):
        p = full(6, T, rank, 3, 5, dstate, pool=11, dtype=dict.fromkeys(STATES, dtype))
        a = make(rng, p)
        states = {n: s.array for n, s in pools(rng, replace(p, layout="mixed"), {}).items()}
        slots = rng.permutation(11)[:6]
        dense = {n: np.ascontiguousarray(s[slots]) for n, s in states.items()}
        want, after = run(ops, a, dense)
        scattered = {n: s.copy() for n, s in states.items()}
        for name in STATES:
            scattered[name][slots] = after[name]
        moved = {
            n: laid(rng, v, "mixed") if isinstance(v, np.ndarray) else v for n, v in a.items()
        }
        out = ops.state_update(**states, **moved, state_indices=slots)
        assert_same_bits(out, want)
        for name in STATES:
            assert_same_bits(states[name], scattered[name], name)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_reading_one_slot_and_writing_another_gives_the_bits_of_in_place(ops, rng, dtype):
    for T in (None, 3):
        p = full(3, T, 4, dstate=64, dtype=dict.fromkeys(STATES, dtype))
        a, states = make(rng, p), copies(pools(rng, replace(p, pool=6), {}))
        want, after = run(ops, a, states)
        a.update(state_indices=np.array([0, 1, 2]), state_indices_out=np.array([5, 3, 4]))
        out, moved = run(ops, a, states)
        assert_same_bits(out, want)
        for name in STATES:
            assert_same_bits(moved[name][:3], states[name][:3], name)
            assert_same_bits(moved[name][[5, 3, 4]], after[name][:3], name)


def test_offsets_of_int32_indices_do_not_overflow(ops, rng):
    """slot * stride passes 2^31 in every pool although both are int32."""
    stride = 2**28
    try:
        memory = np.empty(9 * stride, BF16)
    except MemoryError:
        pytest.skip("this system does not reserve memory that it may not have")
    p = full(2, T=2, rank=2, dtype=dict.fromkeys(STATES, BF16))
    a, start = 0, copies(pools(rng, p, {}))
    states = {}
    for name, array in start.items():
        inner = array.strides[1:]
        states[name] = np.lib.stride_tricks.as_strided(
            memory[a:], (9, *array.shape[1:]), (stride * 2, *inner)
        )
        states[name][[8, 0]] = array
        a += array[0].size
    args = make(rng, p)
    want, after = run(ops, args, start)
    out = ops.state_update(**states, **args, state_indices=np.array([8, 0], np.int32))
    assert_same_bits(out, want)
    for name in STATES:
        assert_same_bits(states[name][[8, 0]], after[name], name)


# Tokens


@pytest.mark.core
@pytest.mark.parametrize("rank", [None, 3, 4])
@pytest.mark.parametrize("tied", [("dt", "D", "dt_bias"), ("dt", "A", "D", "dt_bias")], ids=str)
def test_a_call_of_many_tokens_has_the_bits_of_calls_of_one(ops, rng, rank, tied):
    """With float32 states.  Others are rounded once a call."""
    for dstate in (24, 64):
        parts = tuple(n for n in PARTS if n != "adt")
        p = full(3, 6, rank, dstate=dstate, parts=parts, tied=tied)
        a, states = make(rng, p), copies(pools(rng, p, {}))
        want, after = run(ops, a, states)
        for t in range(6):
            one = {k: v[:, t] if k in TOKENS else v for k, v in a.items()}
            assert_same_bits(ops.state_update(**states, **one), want[:, t])
        for name in STATES:
            assert_same_bits(states[name], after[name], name)


@pytest.mark.parametrize("name", STATES)
def test_states_stay_float32_within_a_call(ops, rng, name):
    """The states of a 16-bit call are those of a float32 call, rounded once.  (Sums of bfloat16
    states may go in another order where dstate is an even number of vectors: 20 is not.)"""
    for T in (None, 4):
        p = full(2, T, 4, dtype={name: BF16}, dstate=20)
        a, states = make(rng, p), copies(pools(rng, p, {}))
        out, after = run(ops, a, states)
        want, precise = run(ops, a, {**states, name: states[name].astype(F32)})
        assert_same_bits(out, want)
        assert_same_bits(after[name], precise[name].astype(BF16), name)


# Reproducibility


@pytest.mark.parametrize("rank", [None, 4])
def test_bits_do_not_depend_on_the_number_of_threads(ops, rng, threads, rank):
    for p in (full(7, None, rank, 8, 64, 64), full(1, 5, rank, 8, 64, 64)):
        a, states = make(rng, p), copies(pools(rng, p, {}))
        threads(1)
        want, after = run(ops, a, states)
        for n in (2, 3, 7):
            threads(n)
            out, got = run(ops, a, states)
            assert_same_bits(out, want)
            for name in STATES:
                assert_same_bits(got[name], after[name], name)


@pytest.mark.parametrize("rank", [None, 3, 4])
@pytest.mark.parametrize("T", [None, 3])
def test_a_row_has_the_bits_that_it_has_alone(ops, rng, T, rank):
    p = full(7, T, rank, 5, 16, 24)
    a, states = make(rng, p), copies(pools(rng, p, {}))
    out, after = run(ops, a, states)
    for row in (0, 4, 6):
        one = slice(row, row + 1)
        got, alone = run(ops, rows_of(a, one), {n: s[one] for n, s in states.items()})
        assert_same_bits(got[0], out[row])
        for name in STATES:
            assert_same_bits(alone[name][0], after[name][row], name)


@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("rank", [None, 3, 4])
def test_nan_in_a_row_stays_in_that_row(ops, rng, rank, poison):
    p = full(5, 2, rank, 4, 8, 24)
    a, states = make(rng, p), copies(pools(rng, p, {}))
    clean, clean_states = run(ops, a, states)
    rest = [0, 1, 3, 4]
    for name in (*(n for n in TOKENS if a.get(n) is not None), *STATES):
        dirty, start = dict(a), {n: s.copy() for n, s in states.items()}
        if name in STATES:
            start[name][2] = poison
        else:
            dirty[name] = a[name].copy()
            dirty[name][2] = poison
        out, after = run(ops, dirty, start)
        if np.isnan(poison):
            assert np.isnan(out[2]).any(), f"{name}: NaN was lost"
        assert_same_bits(out[rest], clean[rest])
        for state in STATES:
            assert_same_bits(after[state][rest], clean_states[state][rest], state)


def test_nan_of_a_head_stays_in_that_head(ops, rng):
    p = full(2, 2, 4, 4, 5, 24, ngroups=4)
    a, states = make(rng, p), copies(pools(rng, p, {}))
    clean, _ = run(ops, a, states)
    for name in STATES:
        start = {n: s.copy() for n, s in states.items()}
        (start[name][:, :, 1] if name == "k_state" else start[name][:, 1])[...] = np.nan
        out, _ = run(ops, a, start)
        assert np.isnan(out[..., 1, :]).all()
        assert_same_bits(out[..., [0, 2, 3], :], clean[..., [0, 2, 3], :])


def test_tokens_past_the_count_are_not_read(ops, rng):
    p = full(3, 4, 4)
    a, states = make(rng, p), copies(pools(rng, p, {}))
    a["num_tokens"] = np.array([0, 2, 4])
    clean, clean_states = run(ops, a, states)
    dirty = dict(a)
    for name in TOKENS:
        if a.get(name) is not None:
            dirty[name] = a[name].copy()
            dirty[name][0] = np.nan
            dirty[name][1, 2:] = np.nan
    out, after = run(ops, dirty, states)
    assert_same_bits(out, clean)
    for name in STATES:
        assert_same_bits(after[name], clean_states[name], name)


def test_infinite_inputs_do_not_meet_the_padding_of_dstate(ops, rng):
    """dstate is no whole number of vectors: the result is what the real states give, +inf."""
    p = Update(1, None, nheads=1, headdim=3, dstate=5, parts=("trap",), rank=1, has=())
    a, states = make(rng, p), copies(pools(rng, p, {}))
    for name in ("B", "C"):
        a[name] = np.abs(a[name])
    states["k_state"] = np.abs(states["k_state"])
    states["v_state"] = np.abs(states["v_state"])
    a["x"] = np.full_like(a["x"], np.inf)
    for rank in (1, 3):
        wide_a = {**a, "B": np.repeat(a["B"], rank, 1), "C": np.repeat(a["C"], rank, 1)}
        start = {**states, "k_state": np.repeat(states["k_state"], rank, 1)}
        out, _ = run(ops, wide_a, start)
        assert (out == np.inf).all()


def test_parts_that_change_nothing_are_mamba2(ops, rng):
    """Biases of 0 and weights of 1, each of which turns to the other kernel."""
    p = Update(3, 2, dstate=24)
    a, state = make(rng, p), normal(rng, (3, 4, 8, 24))
    want, after = run(ops, a, {"state": state})
    zeros, ones = np.zeros((4, 24), F32), np.ones((4, 1, 8), F32)
    for more in ({"B_bias": zeros}, {"C_bias": zeros}, {"mimo_x": ones}, {"mimo_out": ones}):
        out, got = run(ops, a, {"state": state}, **more)
        assert_close(out, wide(want))
        assert_close(got["state"], wide(after["state"]), "state")


# Everything at once


@st.composite
def calls(draw):
    ngroups = draw(st.integers(1, 3))
    batch = draw(st.integers(0, 5))
    T = draw(st.sampled_from((None, None, 1, 2, 5)))
    tokens = T or 1
    reads = draw(st.sampled_from((None, 0, 0, 3)))
    writes = draw(st.sampled_from((None, 0, 1))) if T else draw(st.sampled_from((None, 0)))
    needs = batch * (1 + (reads or 1) + (tokens if writes else 1)) + 2
    intermediate = batch + draw(st.integers(0, 2)) if draw(st.booleans()) else None
    has = tuple(n for n in ("D", "z", "dt_bias") if draw(st.booleans()))
    parts = {n for n in PARTS if draw(st.booleans())}
    rank = draw(st.sampled_from((None, 1, 2, 3, 4, 7, 8)))
    if "z" not in has:
        parts -= {"mimo_z"}
    if (rank or 1) > 1 and "mimo_out" not in parts:
        parts -= {"norm_weight"}
    tied = {n for n in ("A", "D") if draw(st.booleans())} | {"dt", "dt_bias"}
    if "angles" not in parts and draw(st.booleans()):
        tied -= {draw(st.sampled_from(("dt", "dt_bias")))}
    dstate = draw(st.sampled_from((1, 2, 5, 8, 16, 17, 24, 32, 48, 64, 128)))
    names = (*TENSORS, *PARTS, *STATES, *KEPT, "out")
    return Update(
        batch=batch,
        T=T,
        nheads=ngroups * draw(st.integers(1, 3)),
        headdim=draw(st.sampled_from((1, 2, 3, 8, 16, 17))),
        dstate=dstate,
        ngroups=ngroups,
        tied=tuple(tied),
        has=has,
        softplus=draw(st.booleans()),
        dt_limit=draw(st.sampled_from((None, None, (0.02, 0.3)))),
        pool=None if reads is None and writes is None and draw(st.booleans()) else needs,
        reads=reads,
        writes=writes,
        pad_slot=None if reads is None else draw(st.sampled_from((None, 0, 1))),
        counts=T is not None and draw(st.booleans()),
        accepted=bool(reads) or (intermediate is not None and draw(st.booleans())),
        intermediate=intermediate,
        intermediate_indices=draw(st.booleans()),
        keep_state=writes is None and draw(st.sampled_from((False, False, True))),
        dtype={name: draw(st.sampled_from(FLOATS)) for name in names},
        index_dtype=draw(st.sampled_from((I32, I64))),
        layout=draw(st.sampled_from(LAYOUTS)),
        parts=tuple(parts),
        rank=rank,
        nangles=draw(st.integers(0, dstate // 2)),
        shared_angles=draw(st.booleans()),
        flat_bias=(rank or 1) == 1 and draw(st.booleans()),
        rotary=draw(st.sampled_from(("interleaved", "half"))),
        trap_sigmoid=draw(st.booleans()),
    )


@given(calls(), st.integers(0, 2**32 - 1))
def test_random_calls(ops, p, seed):
    check(ops, np.random.default_rng(seed), p)
