# SPDX-License-Identifier: MIT
"""selective_scan: random well-conditioned calls, and the check of one against the reference."""

from dataclasses import dataclass, field

import numpy as np

import reference
from cases import (
    C64, F32, I64, Placed, Untouched, assert_close, assert_same_bits, assert_slots_untouched, blank,
    laid, log_uniform, normal, place, runs, split, uniform, written_slots,
)

TENSORS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "initial_states")
INDEX_TENSORS = ("cu_seqlens", "seq_idx", "state_indices", "has_initial_state")


@dataclass
class Scan:
    """Sizes and choices of a call; make() draws the values."""

    batch: int = 2
    dim: int = 6
    seqlen: int = 20
    dstate: int = 16
    ngroups: int = 1
    B_kind: str = "grouped"  # grouped | one group | constant
    C_kind: str = "grouped"
    complex_a: bool = False
    interleaved: bool = False  # B and C per token as re, im in turn
    channels_last: bool = False
    has: tuple = ("D", "z", "dt_bias")
    softplus: bool = True
    dt_limit: tuple = None
    nseq: int = None  # cu_seqlens of so many sequences
    seq_idx: bool = False
    initial: bool = True
    final: bool = True
    in_place: bool = False  # final_states is initial_states
    flags: str = None  # has_initial_state: bool | int8 | uint8
    pool: int = None  # slots of a pool, more than there are sequences
    pad_slot: int = None
    dtype: object = F32  # one for all, or a dict by name with this class's default for the rest
    index_dtype: object = I64
    layout: str = "packed"
    options: dict = field(default_factory=dict)  # more arguments of the call

    def dtype_of(self, name):
        if isinstance(self.dtype, dict):
            return np.dtype(self.dtype.get(name, F32))
        return np.dtype(self.dtype)

    @property
    def sequences(self):
        return self.batch if self.nseq is None else self.nseq


def coefficient(rng, p, name, kind):
    """B or C."""
    dtype = p.dtype_of(name)
    last = 1
    if p.complex_a:
        dtype, last = (dtype, 2) if p.interleaved and kind != "constant" else (C64, 1)
    if kind == "constant":
        return normal(rng, (p.dim, p.dstate), dtype)
    groups = (p.ngroups,) if kind == "grouped" else ()
    if p.channels_last:
        shape = (p.batch, p.seqlen, *groups, p.dstate * last)
    else:
        shape = (p.batch, *groups, p.dstate, p.seqlen * last)
    return normal(rng, shape, dtype)


def make(rng, p):
    """The keyword arguments of a call, outputs excepted."""
    shape = (p.batch, p.seqlen, p.dim) if p.channels_last else (p.batch, p.dim, p.seqlen)
    a = {"x": normal(rng, shape, p.dtype_of("x"))}
    if p.softplus:
        a["dt"] = normal(rng, shape, p.dtype_of("dt")) - np.asarray(2, p.dtype_of("dt"))
    else:
        a["dt"] = log_uniform(rng, 0.01, 0.5, shape, p.dtype_of("dt"))
    decay = log_uniform(rng, 0.3, 8, (p.dim, p.dstate))
    if p.complex_a:
        a["A"] = (-decay + 1j * uniform(rng, -20, 20, decay.shape)).astype(C64)
    else:
        a["A"] = (-decay).astype(p.dtype_of("A"))
    a["B"] = coefficient(rng, p, "B", p.B_kind)
    a["C"] = coefficient(rng, p, "C", p.C_kind)
    if "D" in p.has:
        a["D"] = normal(rng, p.dim, p.dtype_of("D"))
    if "z" in p.has:
        a["z"] = normal(rng, shape, p.dtype_of("z"))
    if "dt_bias" in p.has:
        a["dt_bias"] = uniform(rng, 0, 0.5, p.dim, p.dtype_of("dt_bias"))

    state_dtype = C64 if p.complex_a else p.dtype_of("initial_states")
    entries = p.sequences if p.pool is None else p.pool
    if p.initial:
        a["initial_states"] = normal(rng, (entries, p.dim, p.dstate), state_dtype)
    if p.nseq is not None:
        a["cu_seqlens"] = split(rng, p.seqlen, p.nseq).astype(p.index_dtype)
    if p.seq_idx:
        a["seq_idx"] = runs(rng, p.batch, p.seqlen).astype(p.index_dtype)
    if p.flags:
        a["has_initial_state"] = (rng.random(p.sequences) < 0.6).astype(p.flags)
    if p.pool is not None:
        a["state_indices"] = draw_slots(rng, p.sequences, p.pool, p.pad_slot).astype(p.index_dtype)
    for name in a:
        a[name] = laid(rng, a[name], p.layout)
    a.update(dt_softplus=p.softplus, channels_last=p.channels_last, **p.options)
    if p.dt_limit:
        a["dt_limit"] = p.dt_limit
    if p.pad_slot is not None:
        a["pad_slot"] = p.pad_slot
    return a


def draw_slots(rng, rows, entries, pad_slot):
    """Different slots of a pool, some rows pads of either kind."""
    free = np.setdiff1d(np.arange(entries), [] if pad_slot is None else [pad_slot])
    slots = rng.permutation(free)[:rows]
    pads = [-1, -7] if pad_slot is None else [-1, pad_slot]
    return np.where(rng.random(rows) < 0.25, rng.choice(pads, rows), slots)


@dataclass
class Outputs:
    out: Placed
    final: Placed = None


def outputs(rng, p, a):
    """Room for the results: NaN, but random states in slots of a pool that no sequence writes."""
    out = blank(rng, a["x"].shape, p.dtype_of("out"), p.layout)
    if not p.final:
        return Outputs(out)
    entries = p.sequences if p.pool is None else p.pool
    states = np.full(
        (entries, p.dim, p.dstate), np.nan, C64 if p.complex_a else p.dtype_of("final_states")
    )
    if p.pool is not None:
        rest = np.setdiff1d(np.arange(entries), written_slots(a["state_indices"], p.pad_slot))
        states[rest] = normal(rng, (len(rest), p.dim, p.dstate), states.dtype)
    return Outputs(out, place(rng, states, p.layout))


def check(ops, rng, p):
    """Runs one call, compares it with the reference, and returns (arguments, out, final_states)."""
    a = make(rng, p)
    want_options = {k: v for k, v in a.items() if k != "batch_invariant"}
    room = outputs(rng, p, a)
    if p.in_place:
        room.final = place(rng, a["initial_states"], p.layout)
        a["initial_states"] = room.final.array
    final = room.final.array if p.final else None
    before = None if final is None else final.copy()
    if final is not None:
        want_options["final_states"] = final
    want, want_final = reference.selective_scan(**want_options)
    inputs = Untouched(**{k: v for k, v in a.items() if not (p.in_place and k == "initial_states")})

    result = ops.selective_scan(**a, out=room.out.array, final_states=final)

    if p.final:
        assert result[0] is room.out.array and result[1] is final
    else:
        assert result is room.out.array
    assert_close(room.out.array, want, "out")
    room.out.assert_gaps_untouched()
    if final is not None:
        touched = np.arange(p.sequences)
        if p.pool is not None:
            touched = written_slots(a["state_indices"], p.pad_slot)
            assert_slots_untouched(final, before, touched, "final_states")
        assert_close(final[touched], want_final[touched], "final_states")
        room.final.assert_gaps_untouched("final_states")
    inputs.check()
    return a, room.out.array, final


def rerun(ops, a, **changes):
    """out and final states of the same call with other arguments, in fresh arrays."""
    return ops.selective_scan(**{**a, **changes}, return_final_states=True)


def assert_same_result(got, want):
    assert_same_bits(got[0], want[0], "out")
    assert_same_bits(got[1], want[1], "final_states")
