# SPDX-License-Identifier: MIT
"""causal_conv1d and its update: random calls, and the check of one call against the reference."""

from dataclasses import dataclass

import numpy as np

import reference
from cases import (
    F32, I64, Untouched, assert_close, assert_same_bits, assert_slots_untouched, blank, laid,
    normal, place, runs, split, wide, written_slots,
)
from cases_scan import draw_slots
from cases_update import FAR


class Dtypes:
    """dtype: one for all, or a dict by name with float32 for the rest."""

    def dtype_of(self, name):
        if isinstance(self.dtype, dict):
            return np.dtype(self.dtype.get(name, F32))
        return np.dtype(self.dtype)


# Prefill


@dataclass
class Conv(Dtypes):
    batch: int = 2
    dim: int = 6
    seqlen: int = 20
    width: int = 4
    state_len: int = None  # None: width - 1
    bias: bool = True
    activation: str = "silu"
    channels_last: bool = False
    nseq: int = None
    seq_idx: bool = False
    initial: bool = True
    final: bool = True
    in_place: bool = False
    flags: str = None
    pool: int = None
    pad_slot: int = None
    dtype: object = F32
    index_dtype: object = I64
    layout: str = "packed"

    @property
    def sequences(self):
        return self.batch if self.nseq is None else self.nseq

    @property
    def state_shape(self):
        entries = self.sequences if self.pool is None else self.pool
        return (entries, self.dim, self.width - 1 if self.state_len is None else self.state_len)


def make(rng, p):
    shape = (p.batch, p.seqlen, p.dim) if p.channels_last else (p.batch, p.dim, p.seqlen)
    a = {
        "x": normal(rng, shape, p.dtype_of("x")),
        "weight": normal(rng, (p.dim, p.width), p.dtype_of("weight")),
    }
    if p.bias:
        a["bias"] = normal(rng, p.dim, p.dtype_of("bias"))
    if p.initial:
        a["initial_states"] = normal(rng, p.state_shape, p.dtype_of("initial_states"))
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
    a.update(activation=p.activation, channels_last=p.channels_last)
    if p.pad_slot is not None:
        a["pad_slot"] = p.pad_slot
    return a


def check(ops, rng, p):
    """Runs one call, compares it with the reference, and returns (arguments, out, final_states)."""
    a = make(rng, p)
    out = blank(rng, a["x"].shape, p.dtype_of("out"), p.layout)
    room = final = None
    touched = np.arange(p.sequences)
    if p.pool is not None:
        touched = written_slots(a["state_indices"], p.pad_slot)
    if p.in_place:
        room = place(rng, a["initial_states"], p.layout)
        final = a["initial_states"] = room.array
    elif p.final:
        states = normal(rng, p.state_shape, p.dtype_of("final_states"))
        states[touched] = np.nan
        room = place(rng, states, p.layout)
        final = room.array
    before = None if final is None else final.copy()
    want, want_final = reference.causal_conv1d(**a, final_states=final)
    inputs = Untouched(**{k: v for k, v in a.items() if not (p.in_place and k == "initial_states")})

    result = ops.causal_conv1d(**a, out=out.array, final_states=final)

    assert (result if final is None else result[0]) is out.array
    assert_close(out.array, want)
    out.assert_gaps_untouched()
    if final is not None:
        assert result[1] is final
        assert_slots_untouched(final, before, touched, "final_states")
        assert_moved(final[touched], want_final[touched], "final_states")
        room.assert_gaps_untouched("final_states")
    inputs.check()
    return a, out.array, final


def assert_moved(states, want, what):
    """Conv states are stored inputs: their only error is the rounding to the state's dtype."""
    assert_same_bits(states, want.astype(np.float32).astype(states.dtype), what)


# Decode


@dataclass
class ConvUpdate(Dtypes):
    batch: int = 3
    T: int = None  # None: x is (batch, dim)
    dim: int = 10
    width: int = 4
    state_len: int = None
    bias: bool = True
    activation: str = "silu"
    channels_last: bool = False
    ring: bool = False  # cache_seqlens
    pool: int = None
    reads: bool = False  # state_indices
    writes: bool = False  # state_indices_out
    pads: float = 0.2
    pad_slot: int = None
    counts: bool = False  # num_tokens
    dtype: object = F32
    index_dtype: object = I64
    layout: str = "packed"

    @property
    def tokens(self):
        return 1 if self.T is None else self.T


def make_update(rng, p):
    """(arguments, where the state lies)."""
    if p.T is None:
        shape = (p.batch, p.dim)
    else:
        shape = (p.batch, p.T, p.dim) if p.channels_last else (p.batch, p.dim, p.T)
    a = {
        "x": normal(rng, shape, p.dtype_of("x")),
        "weight": normal(rng, (p.dim, p.width), p.dtype_of("weight")),
    }
    if p.bias:
        a["bias"] = normal(rng, p.dim, p.dtype_of("bias"))
    state_len = p.width - 1 if p.state_len is None else p.state_len
    entries = p.batch if p.pool is None else p.pool
    if p.ring:
        a["cache_seqlens"] = rng.integers(0, 3 * state_len + 1, p.batch)
    taken = [] if p.reads else np.arange(p.batch)
    free = rng.permutation(
        np.setdiff1d(np.arange(entries), np.append(taken, -1 if p.pad_slot is None else p.pad_slot))
    )
    pads = [-1, -4] if p.pad_slot is None else [-1, p.pad_slot]
    state = normal(rng, (entries, p.dim, state_len), p.dtype_of("conv_state"))
    for name, wanted in (("state_indices", p.reads), ("state_indices_out", p.writes)):
        if wanted:
            mine, free = free[: p.batch].astype(np.int64), free[p.batch :]
            a[name] = np.where(rng.random(p.batch) < p.pads, rng.choice(pads, p.batch), mine)
            if name == "state_indices_out":
                state[mine] = FAR
    if p.counts:
        a["num_tokens"] = rng.integers(0, p.tokens + 1, p.batch)
    for name in ("cache_seqlens", "state_indices", "state_indices_out", "num_tokens"):
        if name in a:
            a[name] = a[name].astype(p.index_dtype)
    for name in a:
        a[name] = laid(rng, a[name], p.layout)
    a.update(activation=p.activation)
    if p.T is not None:
        a["channels_last"] = p.channels_last
    if p.pad_slot is not None:
        a["pad_slot"] = p.pad_slot
    return a, place(rng, state, p.layout)


def check_update(ops, rng, p):
    """Runs one call, compares it with the reference, and returns (arguments, out, conv_state)."""
    a, placed = make_update(rng, p)
    state, before = placed.array, placed.array.copy()
    want, want_state = reference.causal_conv1d_update(conv_state=before, **a)
    out = blank(rng, a["x"].shape, p.dtype_of("out"), p.layout)
    inputs = Untouched(**a)

    result = ops.causal_conv1d_update(a.pop("x"), state, **a, out=out.array)

    assert result is out.array
    assert_close(out.array, want)
    out.assert_gaps_untouched()
    changed = (want_state != wide(before)).any(axis=(1, 2))
    assert_moved(state[changed], want_state[changed], "conv_state")
    assert_same_bits(state[~changed], before[~changed], "conv_state: slots that no row writes")
    placed.assert_gaps_untouched("conv_state")
    inputs.check()
    return a, out.array, state


def run_update(ops, a, state, **more):
    """(out, the state afterwards) of the same arguments on a copy of `state`."""
    state, a = state.copy(), {**a, **more}
    return ops.causal_conv1d_update(a.pop("x"), state, **a), state
