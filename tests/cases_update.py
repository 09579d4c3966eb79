# SPDX-License-Identifier: MIT
"""state_update: random well-conditioned calls, and the check of one against the reference."""

from dataclasses import dataclass, field

import numpy as np

import reference
from cases import (
    F32, I64, Untouched, assert_close, assert_same_bits, blank, laid, log_uniform, normal, place,
    uniform, wide,
)

TENSORS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias", "state")
# Of Mamba-3: what a call may have of it, and the states that go with that.
PARTS = (
    "adt", "trap", "angles", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_out", "norm_weight",
)
STATES = ("state", "angle_state", "k_state", "v_state")
# Arguments that belong to a token of a row.
TOKENS = ("x", "dt", "B", "C", "z", "adt", "trap", "angles")

# What lies in slots that a call writes without reading them: a value that cannot hide.
FAR = 3e4


@dataclass
class Update:
    """Sizes and choices of a call; make() draws the values."""

    batch: int = 3
    T: int = None  # None: x has no T axis
    heads: bool = True  # Mamba-2; else Mamba-1 with dim = nheads * headdim
    nheads: int = 4
    headdim: int = 8
    dstate: int = 16
    ngroups: int = 1
    tied: tuple = ("dt", "A", "D", "dt_bias")  # with heads: one value per head
    group_axis: bool = True  # Mamba-1: B and C with an axis of groups
    has: tuple = ("D", "z", "dt_bias")
    softplus: bool = True
    dt_limit: tuple = None
    pool: int = None  # slots; None: batch
    reads: int = None  # None: no state_indices; 0: (batch,); K: (batch, K)
    writes: int = None  # None: no state_indices_out; 0: (batch,); 1: (batch, T)
    pads: float = 0.2  # how many of the slots are pads
    pad_slot: int = None
    counts: bool = False  # num_tokens
    accepted: bool = False  # num_accepted_tokens
    intermediate: int = None  # rows of intermediate_states; None: none
    intermediate_indices: bool = False
    keep_state: bool = False
    dtype: object = F32
    index_dtype: object = I64
    layout: str = "packed"
    options: dict = field(default_factory=dict)
    parts: tuple = ()  # of PARTS; then it is Mamba-3
    rank: int = None  # None: B and C have no axis of ranks
    nangles: int = 3
    shared_angles: bool = False  # one set for all heads
    flat_bias: bool = False  # B_bias and C_bias without the axis of ranks
    rotary: str = "interleaved"
    trap_sigmoid: bool = False

    def dtype_of(self, name):
        if isinstance(self.dtype, dict):
            return np.dtype(self.dtype.get(name, F32))
        return np.dtype(self.dtype)

    @property
    def tokens(self):
        return 1 if self.T is None else self.T

    @property
    def channels(self):
        """The axes of x after batch and T."""
        return (self.nheads, self.headdim) if self.heads else (self.nheads * self.headdim,)

    @property
    def states(self):
        """{name: axes after that of the slots} of the states that the call updates."""
        axes = {"state": (*self.channels, self.dstate)}
        if "angles" in self.parts:
            axes["angle_state"] = (self.nheads, self.nangles)
        if "trap" in self.parts:
            axes["k_state"] = (self.rank or 1, self.nheads, self.dstate)
            axes["v_state"] = (self.nheads, self.headdim)
        return axes

    @property
    def out_shape(self):
        time = () if self.T is None else (self.T,)
        ranks = (self.rank,) if (self.rank or 1) > 1 and "mimo_out" not in self.parts else ()
        return (self.batch, *time, *ranks, *self.channels)


def make(rng, p):
    """The keyword arguments of a call, out excepted."""
    time = () if p.T is None else (p.T,)
    channels = p.channels
    per_head = {
        name: channels[:1] if p.heads and name in p.tied else channels
        for name in ("dt", "A", "D", "dt_bias")
    }
    a = {"x": normal(rng, (p.batch, *time, *channels), p.dtype_of("x"))}
    shape = (p.batch, *time, *per_head["dt"])
    if p.softplus:
        a["dt"] = normal(rng, shape, p.dtype_of("dt")) - np.asarray(2, p.dtype_of("dt"))
    else:
        a["dt"] = log_uniform(rng, 0.01, 0.5, shape, p.dtype_of("dt"))
    shape = per_head["A"] if p.heads and "A" in p.tied else (*channels, p.dstate)
    a["A"] = -log_uniform(rng, 0.3, 8, shape, p.dtype_of("A"))
    groups = (p.ngroups,) if p.heads or p.group_axis else ()
    ranks = () if p.rank is None else (p.rank,)
    for name in ("B", "C"):
        a[name] = normal(rng, (p.batch, *time, *ranks, *groups, p.dstate), p.dtype_of(name))
    if "D" in p.has:
        a["D"] = normal(rng, per_head["D"], p.dtype_of("D"))
    if "z" in p.has:
        a["z"] = normal(rng, a["x"].shape, p.dtype_of("z"))
    if "dt_bias" in p.has:
        a["dt_bias"] = uniform(rng, 0, 0.5, per_head["dt_bias"], p.dtype_of("dt_bias"))
    a.update(mamba3(rng, p, (p.batch, *time)))
    a.update(slots(rng, p))
    for name, value in a.items():
        if isinstance(value, np.ndarray):
            a[name] = laid(rng, value, p.layout)
    a.update(dt_softplus=p.softplus, **p.options)
    if p.dt_limit:
        a["dt_limit"] = p.dt_limit
    if p.pad_slot is not None:
        a["pad_slot"] = p.pad_slot
    if p.keep_state:
        a["keep_state"] = True
    return a


def mamba3(rng, p, tokens):
    """The arguments of p.parts, and the switches that go with them."""
    rank = p.rank or 1
    per_rank = (p.nheads, rank, p.headdim)
    bias = (p.nheads, p.dstate) if p.flat_bias else (p.nheads, rank, p.dstate)
    heads = () if p.shared_angles else (p.nheads,)
    shapes = {
        "adt": (*tokens, p.nheads), "trap": (*tokens, p.nheads),
        "angles": (*tokens, *heads, p.nangles), "B_bias": bias, "C_bias": bias,
        "mimo_x": per_rank, "mimo_z": per_rank, "mimo_out": per_rank,
        "norm_weight": (p.nheads, p.headdim),
    }
    a = {name: normal(rng, shapes[name], p.dtype_of(name)) for name in PARTS if name in p.parts}
    if "adt" in a:
        a["adt"] = -log_uniform(rng, 0.01, 3, a["adt"].shape, p.dtype_of("adt"))
        a["A"] = None
    if "trap" in a and p.trap_sigmoid:
        a["trap"] = uniform(rng, 0, 1, a["trap"].shape, p.dtype_of("trap"))
    if p.trap_sigmoid:
        a["trap_sigmoid"] = True
    if "norm_weight" in a:
        a["norm_eps"] = 0.1  # a vector near 0 must not decide about its sign
    if p.rotary != "interleaved":
        a["rotary"] = p.rotary
    return a


def entries_of(p):
    return p.batch if p.pool is None else p.pool


def with_pads(rng, p, indices):
    pads = [-1, -9] if p.pad_slot is None else [-1, p.pad_slot]
    return np.where(rng.random(indices.shape) < p.pads, rng.choice(pads, indices.shape), indices)


def slots(rng, p):
    """The index tensors: no slot is written by one row and touched by another."""
    a = {}
    taken = np.arange(p.batch) if p.reads is None else np.arange(0)
    free = np.setdiff1d(
        np.arange(entries_of(p)), np.append(taken, -1 if p.pad_slot is None else p.pad_slot)
    )
    free = rng.permutation(free)
    if p.reads is not None:
        shape = (p.batch, p.reads) if p.reads else (p.batch,)
        count = int(np.prod(shape))
        a["state_indices"] = with_pads(rng, p, free[:count].reshape(shape))
        free = free[count:]
    if p.writes is not None:
        shape = (p.batch, p.tokens) if p.writes else (p.batch,)
        a["state_indices_out"] = with_pads(rng, p, free[: int(np.prod(shape))].reshape(shape))
    if p.counts:
        a["num_tokens"] = rng.integers(0, p.tokens + 1, p.batch)
    if p.accepted:
        most = p.reads if p.reads else p.tokens
        a["num_accepted_tokens"] = rng.integers(0, most + 1, p.batch)
    if p.intermediate is not None and p.intermediate_indices:
        rows = rng.permutation(p.intermediate)[: p.batch]
        a["intermediate_indices"] = np.where(rng.random(p.batch) < p.pads, -3, rows)
        if p.accepted:  # a row without intermediate states has none to go back to
            a["num_accepted_tokens"] *= a["intermediate_indices"] >= 0
    return {name: index.astype(p.index_dtype) for name, index in a.items()}


def pools(rng, p, a):
    """The tensors that the call updates in place, by name."""

    def drawn(name, shape):
        if "angle" in name:
            return uniform(rng, 0, 6.2, shape, p.dtype_of(name))
        return normal(rng, shape, p.dtype_of(name))

    placed = {}
    for name, shape in p.states.items():
        pool = drawn(name, (entries_of(p), *shape))
        if "state_indices_out" in a:
            written = a["state_indices_out"]
            pool[written[written >= 0]] = FAR
        placed[name] = place(rng, pool, p.layout)
    for name, shape in p.states.items():
        if p.intermediate is not None:
            name = f"intermediate_{name}s"
            kept = drawn(name, (p.intermediate, p.tokens, *shape))
            placed[name] = place(rng, kept, p.layout)
    return placed


def check(ops, rng, p):
    """Runs one call, compares it with the reference, and returns (arguments, out, pools)."""
    a = make(rng, p)
    placed = pools(rng, p, a)
    arrays = {name: buffer.array for name, buffer in placed.items()}
    before = {name: array.copy() for name, array in arrays.items()}
    want = reference.state_update(**before, **a)
    out = blank(rng, p.out_shape, p.dtype_of("out"), p.layout)
    inputs = Untouched(**a)

    result = ops.state_update(**arrays, **a, out=out.array)

    assert result is out.array
    assert_close(out.array, want.out, "out")
    out.assert_gaps_untouched()
    for name, array in arrays.items():
        assert_pool(array, before[name], want.states[name], name)
        placed[name].assert_gaps_untouched(name)
    inputs.check()
    return a, out.array, arrays


def assert_pool(pool, before, want, name):
    """States that the call changes are close to the reference; all other bytes are as before."""
    axes = 2 if name.startswith("intermediate") else 1
    changed = (want != wide(before)).any(axis=tuple(range(axes, want.ndim)))
    if "angle" in name:
        assert_angles(pool[changed], want[changed], name)
    else:
        assert_close(pool[changed], want[changed], name)
    assert_same_bits(pool[~changed], before[~changed], f"{name}: slots that no row writes")


def assert_angles(got, want, name):
    """In [0, 2 pi), and close: just below 2 pi is close to 0."""
    assert ((wide(got) >= 0) & (wide(got) < 2 * np.pi)).all(), f"{name}: an angle is out of range"
    turns = np.round((wide(got) - want) / (2 * np.pi))
    assert_close(got, want + turns * 2 * np.pi, name)


def copies(placed):
    """The arrays of pools() packed, to be written by one call more."""
    return {name: np.array(buffer.array) for name, buffer in placed.items()}


def run(ops, a, state, **more):
    """(out, the state afterwards) of the same arguments on a copy of `state`."""
    state = state.copy()
    return ops.state_update(state, **{**a, **more}), state
