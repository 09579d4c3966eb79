# SPDX-License-Identifier: MIT
"""Defects of other implementations of these operations, each a regression test here.

The list was made by reading state-spaces/mamba 2.3.2.post1 and causal-conv1d 1.6.1; the numbers are
its own.  Those of operations that are not built yet come with them.
"""

import numpy as np
import pytest

import cases_conv
import cases_scan
import cases_ssd
import cases_update
import reference
from cases import (
    BF16, F16, F32, FLOATS, assert_close, assert_same_bits, log_uniform, normal, uniform,
)
from cases_ssd import CAPTURED, FINAL, INITIAL, MIMO, SISO, Ssd


@pytest.mark.parametrize("rank", (None, 4))
def test_1_v_state_of_every_packed_sequence_is_its_own_last_x(ops, rng, rank):
    a = cases_ssd.make(rng, Ssd(1, 40, rank=rank, has=MIMO if rank else SISO, nseq=4))
    a["cu_seqlens"] = np.array([0, 7, 8, 8, 40])
    final = cases_ssd.run(ops, a)["final_v_states"]
    assert_same_bits(final[[0, 1, 3]], a["x"][0, [6, 7, 39]], "final_v_states")
    assert_same_bits(final[2], a["initial_v_states"][2], "of the sequence without tokens")


@pytest.mark.parametrize("rank", (None, 4))
@pytest.mark.parametrize("initial", [False, True])
def test_2_sequences_without_tokens_have_states(ops, rng, rank, initial):
    """The initial ones, or zeros; first, last and in a row, beside others, in every dtype."""
    for dtype in FLOATS:
        p = Ssd(
            1, 70, 2, 8, rank=rank, has=MIMO if rank else SISO, nseq=7, initial=initial,
            captures=5, dtype={name: dtype for name in (*INITIAL, *FINAL)},
        )
        a = cases_ssd.make(rng, p)
        a["cu_seqlens"] = np.array([0, 0, 0, 64, 64, 70, 70, 70])[: p.nseq + 1]
        got = cases_ssd.run(ops, a)
        for name, start in zip(FINAL, INITIAL):
            empty = got[name][[0, 1, 3, 5, 6]]
            want = a[start][[0, 1, 3, 5, 6]] if initial else np.zeros_like(empty)
            assert_same_bits(empty, want, name)
        want = cases_ssd.wanted_results(a)
        assert_close(got["out"], want["out"])


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
def test_4_angles_are_accumulated_in_float32_whatever_the_dtypes(ops, rng, dtype):
    """Inputs of 16 bits; the rotation of token 3000 is still that of exact sums."""
    a = cases_ssd.make(rng, Ssd(1, 3000, 2, 8, 16, has=("angles", "trap"), dtype=dtype, adt=True))
    a["initial_angle_states"] = a["initial_angle_states"].astype(F32)
    got = cases_ssd.run(ops, a)
    want = cases_ssd.wanted_results(a)
    assert got["final_angle_states"].dtype == F32
    cases_ssd.assert_angles(
        got["final_angle_states"], want["final_angle_states"], "final_angle_states"
    )
    single = ops.ssd_chunk(**a, out=np.empty(a["x"].shape, F32))
    assert_close(single, want["out"])


def test_7_the_angle_of_prefill_is_reduced_to_one_turn(ops, rng):
    a = cases_ssd.make(rng, Ssd(2, 300, 2, 8, 16, has=("angles",), softplus=False))
    a["dt"] = uniform(rng, 5, 50, a["dt"].shape)
    a["A"] = -uniform(rng, 0.01, 0.1, 2)
    for sign in (1, -1):
        a["angles"] = np.abs(a["angles"]) * np.float32(sign)
        got = cases_ssd.run(ops, a, capture_positions=np.arange(0, 600, 7))
        for name in ("final_angle_states", "captured_angle_states"):
            assert (got[name] >= 0).all() and (got[name] <= np.float32(2 * np.pi)).all()


MAMBA3 = ("adt", "trap", "angles", "B_bias", "C_bias")


def mamba3(rng, batch=2, T=None, **more):
    """(arguments, states) of a decode call of Mamba-3."""
    p = cases_update.Update(batch, T, **{"parts": MAMBA3, **more})
    return cases_update.make(rng, p), cases_update.copies(cases_update.pools(rng, p, {}))


def check_mamba3(ops, a, states):
    """One call on a copy of the states, against the reference: (out, states afterwards)."""
    want = reference.state_update(**states, **a)
    states = {name: array.copy() for name, array in states.items()}
    out = ops.state_update(**states, **a)
    assert_close(out, want.out)
    for name, array in states.items():
        close = cases_update.assert_angles if name == "angle_state" else assert_close
        close(array, want.states[name], name)
    return out, states


def test_3_decode_of_mamba3_takes_an_axis_of_tokens(ops, rng):
    """(batch, 1, ...) is the call of one token, not another operation."""
    a, states = mamba3(rng, T=1)
    out, after = check_mamba3(ops, a, states)
    one = {k: v[:, 0] if k in cases_update.TOKENS and v is not None else v for k, v in a.items()}
    got, single = check_mamba3(ops, one, states)
    assert_same_bits(got, out[:, 0])
    for name in states:
        assert_same_bits(single[name], after[name], name)


def test_4_angles_are_as_exact_as_float32_whatever_the_inputs(ops, rng):
    """Inputs of bfloat16 do not make the angle one: after 1000 tokens it is still exact."""
    dtypes = dict.fromkeys(("x", "B", "C", "trap", "angles"), BF16)
    a, states = mamba3(rng, 1, 1000, dtype=dtypes, softplus=False, nangles=8)
    _, after = check_mamba3(ops, a, states)
    want = reference.state_update(**states, **a).states["angle_state"]
    off = np.remainder(after["angle_state"] - want + np.pi, 2 * np.pi) - np.pi
    assert np.abs(off).max() < 1e-4


@pytest.mark.parametrize("headdim, dstate", [(64, 128), (64, 64), (32, 32), (16, 128), (96, 128)])
@pytest.mark.parametrize("rank", (1, 4))
def test_5_the_output_of_mamba3_is_whole_for_every_tile(ops, rng, rank, headdim, dstate):
    """A wrong reduction over threads doubled h C."""
    for parts in (MAMBA3, (*MAMBA3, "mimo_x", "mimo_z", "mimo_out")):
        check_mamba3(ops, *mamba3(rng, headdim=headdim, dstate=dstate, rank=rank, parts=parts))


@pytest.mark.parametrize("rank", (1, 2, 4))
def test_6_z_counts_without_mimo_out(ops, rng, rank):
    a, states = mamba3(rng, rank=rank, parts=(*MAMBA3, "mimo_x", "mimo_z"))
    gated, _ = check_mamba3(ops, a, states)
    plain, _ = check_mamba3(ops, {k: v for k, v in a.items() if k not in ("z", "mimo_z")}, states)
    zeta = reference.wide(a["mimo_z"]).swapaxes(0, 1)
    gate = reference.silu(zeta * reference.wide(a["z"])[:, None])
    assert_close(gated, reference.wide(plain) * (gate if rank > 1 else gate[:, 0]))
    assert np.abs(gated - plain).max() > 0.01


def test_6_every_mix_of_dtypes_is_its_own(ops, rng):
    """A kernel chosen without looking at x, z and out was run again for other dtypes."""
    for x in (F32, F16, BF16):
        for z in (F32, BF16):
            for out in (F32, F16):
                p = cases_update.Update(2, parts=MAMBA3, dtype={"x": x, "z": z, "out": out})
                cases_update.check(ops, rng, p)


@pytest.mark.parametrize("rotary", ("interleaved", "half"))
def test_7_angles_do_not_grow(ops, rng, rotary):
    a, states = mamba3(rng, 2, softplus=False, rotary=rotary)
    a["dt"] = np.full_like(a["dt"], 1.5)
    a["angles"] = np.full_like(a["angles"], 2)
    a["angles"][1] = -2
    for _ in range(300):
        ops.state_update(**states, **a)
        angles = reference.wide(states["angle_state"])
        assert ((angles >= 0) & (angles < 2 * np.pi)).all()


@pytest.mark.parametrize("heads", [False, True], ids=["mamba1", "mamba2"])
@pytest.mark.parametrize("missing", [("D",), ("dt_bias",), ("D", "dt_bias", "z")], ids=str)
def test_8_state_update_without_D_or_dt_bias(ops, rng, heads, missing):
    has = tuple(n for n in ("D", "z", "dt_bias") if n not in missing)
    cases_update.check(ops, rng, cases_update.Update(3, None, heads, has=has))


def test_8_state_update_offsets_of_int32_indices_do_not_overflow(ops, rng):
    """slot * stride passes 2^31 although both are int32; the memory between is never touched."""
    stride = 2**28
    try:
        memory = np.empty(9 * stride, BF16)
    except MemoryError:
        pytest.skip("this system does not reserve memory that it may not have")
    pool = np.lib.stride_tricks.as_strided(memory, (9, 4, 16), (stride * 2, 16 * 2, 2))
    a = cases_update.make(rng, cases_update.Update(2, None, False, 1, 4, 16))
    for slot in (0, 8):
        pool[slot] = normal(rng, (4, 16), BF16)
    want = reference.state_update(pool[[0, 8]].copy(), **a, state_indices=[1, 0])
    out = ops.state_update(pool, **a, state_indices=np.array([8, 0], np.int32))
    assert_close(out, want.out)
    assert_close(pool[[0, 8]], want.states["state"], "state")


TINY = pytest.mark.parametrize("dt", (-15.0, -17.0, -30.0, -80.0))


@TINY
def test_9_softplus_keeps_small_dt_in_prefill(ops, rng, dt):
    """log(exp(x) + 1) is 17 % off at -15, 0 at -17; the small dt is all there is in the results."""
    a = cases_scan.make(rng, cases_scan.Scan(2, 6, 9, 8, has=(), initial=False))
    a["dt"] = np.full_like(a["dt"], dt)
    want, want_state = reference.selective_scan(**a)
    out, state = ops.selective_scan(**a, return_final_states=True)
    assert_close(out, want)
    assert_close(state, want_state, "final_states")
    assert (state != 0).all()


@TINY
def test_9_softplus_keeps_small_dt_in_decode(ops, rng, dt):
    for heads in (False, True):
        a = cases_update.make(rng, cases_update.Update(2, 3, heads, has=()))
        a["dt"] = np.full_like(a["dt"], dt)
        shape = (2, 4, 8, 16) if heads else (2, 32, 16)
        want = reference.state_update(np.zeros(shape), **a)
        out, state = cases_update.run(ops, a, np.zeros(shape, F32))
        assert_close(out, want.out)
        assert_close(state, want.states["state"], "state")


@TINY
def test_9_softplus_keeps_small_dt_in_chunks(ops, rng, dt):
    a = cases_ssd.make(rng, Ssd(2, 70, 4, 8, has=(), initial=False))
    a["dt"] = np.full_like(a["dt"], dt)
    got, want = cases_ssd.run(ops, a), cases_ssd.wanted_results(a)
    for name in ("out", "final_states"):
        assert_close(got[name], want[name], name)
    assert (got["final_states"] != 0).all()


def test_9_softplus_over_its_whole_range(ops, rng):
    """The state after one token from zero, with x = B = 1, is dt' itself: each one is judged."""
    dt = np.concatenate(
        [np.linspace(-85, 60, 4001), 20 + np.linspace(-1e-4, 1e-4, 41), [-1e-30, 0.0]]
    ).astype(F32)
    one = np.ones((1, dt.size, 1), F32)
    coefficient = np.ones((dt.size, 1), F32)
    _, state = ops.selective_scan(
        one, dt.reshape(one.shape), -coefficient, coefficient, coefficient, dt_softplus=True,
        return_final_states=True,
    )
    want = reference.softplus(dt.astype(np.float64))
    assert (np.abs(state.reshape(-1) / want - 1) < 1e-6).all()
    state = np.zeros((1, dt.size, 1), F32)
    ops.state_update(
        state, one[..., 0], dt[None], -coefficient, one[:, 0], one[:, 0], dt_softplus=True
    )
    assert (np.abs(state.reshape(-1) / want - 1) < 1e-6).all()


@pytest.mark.parametrize("complex_a", [False, True])
@pytest.mark.parametrize("C_kind", ("grouped", "constant"))
def test_10_final_state_of_constant_B_holds_B(ops, rng, complex_a, C_kind):
    p = cases_scan.Scan(
        2, 6, 9, 8, B_kind="constant", C_kind=C_kind, complex_a=complex_a, initial=False
    )
    a = cases_scan.make(rng, p)
    _, once = ops.selective_scan(**a, return_final_states=True)
    _, twice = ops.selective_scan(**{**a, "B": a["B"] * 2}, return_final_states=True)
    assert_close(once, reference.selective_scan(**a)[1], "final_states")
    assert_close(twice, 2 * reference.wide(once), "final_states")


@pytest.mark.parametrize("chunk_size", (0, 16, 64, 256))
def test_12_states_of_packed_sequences_hold_their_initial_states(ops, rng, chunk_size):
    """Also of a sequence that lives within the first chunk, or begins where a chunk does."""
    for has in (cases_ssd.MAMBA2, SISO):
        p = Ssd(1, 200, 2, 8, has=has, nseq=5, options={"chunk_size": chunk_size})
        a = cases_ssd.make(rng, p)
        a["cu_seqlens"] = np.array([0, 5, 16, 64, 128, 200])
        a["A"] = np.full(2, -0.001, F32)  # what was there in the beginning is there in the end
        got, want = cases_ssd.run(ops, a), cases_ssd.wanted_results(a)
        for name in want:
            if name in got:
                cases_ssd.assert_state(got[name], want[name], name)
        without = cases_ssd.run(ops, {k: v for k, v in a.items() if k not in INITIAL})
        difference = np.abs(got["final_states"] - without["final_states"]).max(axis=(1, 2, 3))
        assert (difference > 0.5).all()


@pytest.mark.parametrize("has", (cases_ssd.MAMBA2, SISO), ids=("mamba2", "mamba3"))
@pytest.mark.parametrize("chunk_size", (0, 4))
def test_13_pads_reach_nothing_in_chunks(ops, rng, has, chunk_size):
    """They do not see each other either: their outputs are zeros, not those of a sequence of
    pads."""
    ids = np.array([[-1, 0, 0, -1, 1, 1, -1, -1, 1, 0, -1], [-1] * 11])
    a = cases_ssd.make(rng, Ssd(2, 11, has=has, options={"chunk_size": chunk_size}))
    a["seq_idx"], a["capture_positions"] = ids, np.array([0, 1, 3, 5, 7, 9, 10, 11, 21])
    want = cases_ssd.run(ops, a)
    pads = ids < 0
    for poison in (np.nan, np.inf, 1e30):
        dirty = {}
        for name in cases_ssd.TOKEN_TENSORS:
            if a.get(name) is not None:
                dirty[name] = a[name].copy()
                dirty[name][pads] = poison
        got = cases_ssd.run(ops, a, **dirty)
        cases_ssd.assert_same_results(got, want)
        assert (got["out"][pads] == 0).all()
        for name in CAPTURED:
            if name in got:
                assert np.isnan(got[name][[0, 2, 4, 6, 7, 8]]).all(), f"{name}: a pad's state"
        for name, start in zip(FINAL, INITIAL):
            if name in got:
                assert_same_bits(got[name][1], a[start][1], f"{name} of the row of pads")


def test_13_pads_reach_nothing(ops, rng):
    """A pad, whatever it holds, gives 0 and changes neither another token's output nor a state."""
    ids = np.array([[-1, 0, 0, -1, 1, 1, -1, -1], [-1] * 8])
    a = cases_scan.make(rng, cases_scan.Scan(2, 6, 8, 8))
    a["seq_idx"] = ids
    c = cases_conv.make(rng, cases_conv.Conv(2, 6, 8))
    c["seq_idx"] = ids
    real = ids[0] >= 0
    for poison in (np.nan, np.inf, 1e30):
        for operation, args, names in (
            (ops.selective_scan, a, ("x", "dt", "B", "C", "z")),
            (ops.causal_conv1d, c, ("x",)),
        ):
            want = operation(**args, return_final_states=True)
            dirty = {}
            for name in names:
                dirty[name] = args[name].copy()
                dirty[name][0, ..., ~real] = poison
                dirty[name][1] = poison
            out, states = operation(**{**args, **dirty}, return_final_states=True)
            assert_same_bits(out, want[0])
            assert_same_bits(states, want[1], "final_states")
            assert (out[0][:, ~real] == 0).all() and (out[1] == 0).all()
            assert_same_bits(states[1], args["initial_states"][1], "state of the row of pads")


def test_15_limits_of_dt_hold_in_decode_as_in_prefill(ops, rng):
    a = cases_scan.make(rng, cases_scan.Scan(3, 6, 1, 8, channels_last=True, dt_limit=(0.3, 0.4)))
    out, final = ops.selective_scan(**a, return_final_states=True)
    state = a["initial_states"].copy()
    one = {
        k: v[:, 0] if k in ("x", "dt", "B", "C", "z") else v
        for k, v in a.items()
        if k not in ("initial_states", "channels_last")
    }
    got = ops.state_update(state, **one)
    assert_close(got, reference.wide(out)[:, 0])
    assert_close(state, reference.wide(final), "state")
    unlimited = ops.state_update(a["initial_states"].copy(), **{**one, "dt_limit": None})
    assert np.abs(unlimited - got).max() > 0.01


def test_15_limits_of_dt_hold_in_decode_as_in_chunks(ops, rng):
    a = cases_ssd.make(rng, Ssd(3, 1, dt_limit=(0.3, 0.4)))
    result = cases_ssd.run(ops, a)
    one = {k: v for k, v in a.items() if k not in ("initial_states", "rotary")}
    state = a["initial_states"].copy()
    got = ops.state_update(state, **one)
    assert_close(got, reference.wide(result["out"]))
    assert_close(state, reference.wide(result["final_states"]), "state")
    unlimited = cases_ssd.run(ops, {**a, "dt_limit": None})["out"]
    assert np.abs(unlimited - result["out"]).max() > 0.01


def test_15_negative_dt_is_not_clamped_unless_asked(ops, rng):
    """The default there is a limit of 0, always applied; here none is."""
    a = cases_ssd.make(rng, Ssd(2, 70, softplus=False, has=(), initial=False))
    a["dt"] = -np.abs(a["dt"])
    a["A"] = -uniform(rng, 0.001, 0.1, 4)
    got, want = cases_ssd.run(ops, a), cases_ssd.wanted_results(a)
    assert_close(got["out"], want["out"])
    assert (got["out"] != 0).any()


@pytest.mark.parametrize("chunk_size", (0, 16, 128))
@pytest.mark.parametrize("rank", (None, 1, 4))
def test_16_growing_states_are_computed_as_written_in_chunks(ops, rng, rank, chunk_size):
    """Exponents that others cut off at 0: within a chunk, between chunks, of the trapezoid."""
    has = ("D",) if rank is None else SISO if rank == 1 else MIMO
    options = {"chunk_size": chunk_size}
    a = cases_ssd.make(rng, Ssd(2, 150, 2, 8, rank=rank, has=has, softplus=False, options=options))
    a["A"] = log_uniform(rng, 0.1, 1, 2)
    a["dt"] = uniform(rng, 0.001, 0.1, a["dt"].shape)
    got, want = cases_ssd.run(ops, a), cases_ssd.wanted_results(a)
    for name in got:
        cases_ssd.assert_state(got[name], want[name], name)
    a["A"], a["adt"] = None, uniform(rng, -0.5, 0.5, a["dt"].shape)
    got, want = cases_ssd.run(ops, a), cases_ssd.wanted_results(a)
    for name in got:
        cases_ssd.assert_state(got[name], want[name], name)


# What others leave untested (18): groups other than 1, rows shorter than a chunk, float16, no
# tokens, states of packed rows, a rotation of all of dstate; each value judged.


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("seqlen", (0, 1, 5, 63, 64, 65, 193))
@pytest.mark.parametrize("has, rank", [(cases_ssd.MAMBA2, None), (SISO, None), (MIMO, 4)],
                         ids=("mamba2", "siso", "mimo"))  # fmt: skip
def test_18_values_of_prefill_are_tested(ops, rng, has, rank, seqlen, dtype):
    p = Ssd(1, seqlen, 6, 24, 48, 3, rank, 24, has=has, adt="trap" in has, dtype=dtype, nseq=3)
    cases_ssd.check(ops, rng, p)


@pytest.mark.parametrize("has, rank", [(cases_ssd.MAMBA2, None), (SISO, None), (MIMO, 4)],
                         ids=("mamba2", "siso", "mimo"))  # fmt: skip
def test_18_prefill_is_the_recurrence_to_float32(ops, rng, has, rank):
    """Layers of real size; tokens at the end of a long row are as exact as those at the start."""
    a = cases_ssd.make(rng, Ssd(1, 700, 2, 64, 128, 1, rank, has=has, adt="trap" in has))
    got, want = cases_ssd.run(ops, a), cases_ssd.wanted_results(a)
    for part in (slice(0, 64), slice(64, 640), slice(640, 700)):
        assert_close(got["out"][:, part], want["out"][:, part])
    for name in got:
        cases_ssd.assert_state(got[name], want[name], name)


@pytest.mark.parametrize("complex_a", [False, True])
def test_16_growing_states_are_computed_as_written_in_prefill(ops, rng, complex_a):
    a = cases_scan.make(
        rng, cases_scan.Scan(2, 6, 30, 8, complex_a=complex_a, softplus=False, has=("D", "z"))
    )
    a["A"] = (-a["A"]).astype(a["A"].dtype)
    a["dt"] = uniform(rng, 0.001, 0.1, a["dt"].shape)
    want, want_final = reference.selective_scan(**a)
    out, final = ops.selective_scan(**a, return_final_states=True)
    assert_close(out, want)
    assert_close(final, want_final, "final_states")


@pytest.mark.parametrize("heads", [False, True], ids=["mamba1", "mamba2"])
def test_16_growing_states_are_computed_as_written_in_decode(ops, rng, heads):
    p = cases_update.Update(2, 4, heads)
    a, state = cases_update.make(rng, p), cases_update.pools(rng, p, {})["state"].array
    a["A"] = -a["A"]
    want = reference.state_update(state, **a)
    out, state = cases_update.run(ops, a, state)
    assert_close(out, want.out)
    assert_close(state, want.states["state"], "state")


def test_15_limits_of_dt_hold_in_decode_of_mamba3(ops, rng):
    """They reach the decay, the angle and what is written."""
    parts = ("trap", "angles")
    a, states = mamba3(rng, parts=parts, dt_limit=(0.3, 0.4), T=3)
    out, after = check_mamba3(ops, a, states)
    free, unlimited = check_mamba3(ops, {**a, "dt_limit": None}, states)
    assert np.abs(out - free).max() > 0.01
    assert np.abs(after["angle_state"] - unlimited["angle_state"]).max() > 0.01


@pytest.mark.parametrize("rank", (None, 3, 4))
def test_16_growing_states_are_computed_as_written_in_decode_of_mamba3(ops, rng, rank):
    a, states = mamba3(rng, T=4, rank=rank, parts=("trap", "angles"))
    check_mamba3(ops, {**a, "A": -a["A"]}, states)
    b, states = mamba3(rng, T=4, rank=rank)
    check_mamba3(ops, {**b, "adt": -b["adt"]}, states)


# Where the references disagree with one another


@pytest.mark.parametrize("pad", (-1, 3))
def test_pad_rows_give_zeros_not_the_output_of_a_zero_state(ops, rng, pad):
    """With D and z: what a zero state would give is D x silu(z)."""
    for heads in (False, True):
        a = cases_update.make(rng, cases_update.Update(3, 2, heads))
        a["state_indices"] = np.array([0, pad, 2])
        state = normal(rng, (4, 4, 8, 16) if heads else (4, 32, 16))
        out, after = cases_update.run(ops, a, state, pad_slot=3)
        assert (out[1] == 0).all() and (out[[0, 2]] != 0).any()
        assert_same_bits(after[[1, 3]], state[[1, 3]], "slots of nobody")
    c, placed = cases_conv.make_update(rng, cases_conv.ConvUpdate(3, 2, pool=4))
    c["state_indices"] = np.array([0, pad, 2])
    out, after = cases_conv.run_update(ops, c, placed.array, pad_slot=3)
    assert (out[1] == 0).all() and (out[[0, 2]] != 0).any()
    assert_same_bits(after[[1, 3]], placed.array[[1, 3]], "slots of nobody")


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
def test_output_of_mamba3_comes_from_the_unrounded_states(ops, rng, dtype):
    """The bits of a 16-bit state are not in the output: rounding comes after it."""
    for T in (None, 5):
        dtypes = dict.fromkeys(("state", "k_state", "v_state"), dtype)
        a, states = mamba3(rng, T=T, dtype=dtypes, dstate=20)  # no even number of vectors
        precise = {name: array.astype(F32) for name, array in states.items()}
        want = ops.state_update(**precise, **a)
        assert_same_bits(ops.state_update(**states, **a), want)
        for name in states:
            rounded = precise[name].astype(states[name].dtype)
            assert_same_bits(states[name], rounded, name)


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
def test_output_comes_from_the_unrounded_state(ops, rng, dtype):
    """x is below the state's rounding: the stored state does not change, the output shows it."""
    for heads in (False, True):
        p = cases_update.Update(2, None, heads, has=(), softplus=False)
        a = cases_update.make(rng, p)
        shape = (2, 4, 8, 16) if heads else (2, 32, 16)
        state = np.ones(shape, dtype)
        a["A"] = np.zeros_like(a["A"])
        a["dt"] = np.ones_like(a["dt"])
        a["x"] = np.full_like(a["x"], 1e-4)
        a["B"], a["C"] = np.ones_like(a["B"]), np.ones_like(a["C"])
        out, after = cases_update.run(ops, a, state)
        assert_same_bits(after, state, "state")
        np.testing.assert_allclose(out, 16 * 1.0001, rtol=1e-6)
        wide = {**a, "x": np.broadcast_to(a["x"][:, None], (2, 5, *a["x"].shape[1:]))}
        wide["dt"] = np.broadcast_to(a["dt"][:, None], (2, 5, *a["dt"].shape[1:]))
        for name in ("B", "C"):
            wide[name] = np.broadcast_to(a[name][:, None], (2, 5, *a[name].shape[1:]))
        out, _ = cases_update.run(ops, wide, state)
        np.testing.assert_allclose(out[:, 4], 16 * 1.0005, rtol=1e-6)


def test_states_of_prefill_are_rounded_once(ops, rng):
    for dtype in (F16, BF16):
        for has, rank in ((cases_ssd.MAMBA2, None), (MIMO, 2)):
            p = Ssd(2, 130, 2, 8, rank=rank, has=has, captures=3)
            a = cases_ssd.make(rng, p)
            a["capture_positions"] = np.array([5, 63, 200])
            precise = cases_ssd.run(ops, a)
            rooms = {
                name: np.zeros(array.shape, dtype)
                for name, array in precise.items() if name != "out"
            }  # fmt: skip
            ops.ssd_chunk(**a, **rooms)
            for name, room in rooms.items():
                assert_same_bits(room, precise[name].astype(dtype), name)


def test_final_states_are_rounded_once(ops, rng):
    """To nearest even: the states of a 16-bit call are those of a float32 call, rounded."""
    for dtype in (F16, BF16):
        a = cases_scan.make(rng, cases_scan.Scan(2, 6, 30, 16))
        final = np.empty(a["initial_states"].shape, dtype)
        ops.selective_scan(**a, final_states=final)
        _, precise = ops.selective_scan(**a, return_final_states=True)
        assert_same_bits(final, precise.astype(dtype), "final_states")
        p = cases_update.Update(2, 3)
        u, state = (
            cases_update.make(rng, p),
            cases_update.pools(rng, p, {})["state"].array.astype(dtype),
        )
        _, after = cases_update.run(ops, u, state)
        _, precise = cases_update.run(ops, u, state.astype(F32))
        assert_same_bits(after, precise.astype(dtype), "state")


def test_a_packed_border_selects_it_does_not_multiply(ops, rng):
    """0 x NaN is NaN: a state cleared by multiplication carries NaN into the next sequence."""
    for poison in (np.nan, np.inf):
        a = cases_scan.make(rng, cases_scan.Scan(1, 6, 12, 8))
        a["seq_idx"] = np.repeat([[0, 1]], 6, 1)
        a["initial_states"] = np.full_like(a["initial_states"], poison)
        out, final = ops.selective_scan(**a, return_final_states=True)
        assert np.isfinite(out[..., 6:]).all() and np.isfinite(final).all()
        c = cases_conv.make(rng, cases_conv.Conv(1, 6, 12))
        c["seq_idx"] = a["seq_idx"]
        c["x"] = c["x"].copy()
        c["x"][..., :6] = poison
        out, final = ops.causal_conv1d(**c, return_final_states=True)
        assert np.isfinite(out[..., 6:]).all() and np.isfinite(final).all()
        s = cases_ssd.make(rng, Ssd(1, 12, has=SISO))
        s["seq_idx"] = a["seq_idx"]
        for name in INITIAL:
            s[name] = np.full_like(s[name], poison)
        got = cases_ssd.run(ops, s)
        assert np.isfinite(got.pop("out")[:, 6:]).all()
        assert all(np.isfinite(states).all() for states in got.values())


def test_a_row_without_initial_state_selects_it_does_not_multiply(ops, rng):
    for operation, a in (
        (ops.selective_scan, cases_scan.make(rng, cases_scan.Scan(3, 6, 5, 8))),
        (ops.causal_conv1d, cases_conv.make(rng, cases_conv.Conv(3, 6, 5))),
    ):
        a["initial_states"] = np.full_like(a["initial_states"], np.nan)
        a["has_initial_state"] = np.zeros(3, bool)
        out, final = operation(**a, return_final_states=True)
        assert np.isfinite(out).all() and np.isfinite(final).all()
    s = cases_ssd.make(rng, Ssd(3, 5, has=SISO))
    for name in INITIAL:
        s[name] = np.full_like(s[name], np.nan)
    got = cases_ssd.run(ops, s, has_initial_state=np.zeros(3, bool))
    assert all(np.isfinite(array).all() for array in got.values())
