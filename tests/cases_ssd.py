# SPDX-License-Identifier: MIT
"""ssd_chunk: random well-conditioned calls, and the check of one against the reference."""

from dataclasses import dataclass, field

import numpy as np

import reference
from cases import (
    BF16, F16, F32, I64, TOLERANCE, Untouched, assert_close, assert_same_bits,
    assert_slots_untouched, blank, laid, log_uniform, normal, place, runs, split, uniform, wide,
    written_slots,
)
from cases_scan import draw_slots

MAMBA2 = ("D", "z", "dt_bias")
SISO = (*MAMBA2, "trap", "angles", "B_bias", "C_bias")
MIMO = (*SISO, "mimo_x", "mimo_z", "mimo_out")
PARTS = ("trap", "angles", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_out", "norm_weight")

TOKEN_TENSORS = ("x", "dt", "adt", "B", "C", "z", "trap", "angles")  # axes 0 and 1 are the tokens
TENSORS = ("x", "dt", "A", "B", "C", *MAMBA2)
STATES = ("", "angle_", "k_", "v_")
INITIAL = tuple(f"initial_{part}states" for part in STATES)
FINAL = tuple(f"final_{part}states" for part in STATES)
CAPTURED = tuple(f"captured_{part}states" for part in STATES)
RESULTS = ("out", *FINAL, *CAPTURED)

TURN = 2 * np.pi


@dataclass
class Ssd:
    """Sizes and choices of a call; make() draws the values."""

    batch: int = 2
    seqlen: int = 20
    nheads: int = 4
    headdim: int = 16
    dstate: int = 16
    ngroups: int = 1
    rank: int = None  # None: B and C have no such axis
    nangles: int = None  # None: half of what there is room for
    has: tuple = MAMBA2
    channel_D: bool = False  # (nheads, headdim)
    adt: bool = False  # instead of A
    head_angles: bool = True  # else one set for all heads
    plain_biases: bool = False  # (nheads, dstate)
    rotary: str = "interleaved"
    trap_sigmoid: bool = False
    softplus: bool = True
    dt_limit: tuple = None
    nseq: int = None  # cu_seqlens of so many sequences
    seq_idx: bool = False
    initial: object = True  # or some of STATES
    final: object = True
    captures: int = 0
    captured: object = True
    in_place: bool = False  # the final states are the initial ones
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

    @property
    def entries(self):
        return self.sequences if self.pool is None else self.pool

    @property
    def ranks(self):
        return 1 if self.rank is None else self.rank

    @property
    def angle_count(self):
        return max(self.dstate // 4, min(self.dstate // 2, 1)) if self.nangles is None else (
            self.nangles
        )

    @property
    def out_shape(self):
        apart = () if self.ranks == 1 or "mimo_out" in self.has else (self.ranks,)
        return (self.batch, self.seqlen, *apart, self.nheads, self.headdim)

    def state_shapes(self):
        """Of the states that the call's parts have, by their place in STATES."""
        shapes = {"": (self.nheads, self.headdim, self.dstate)}
        if "angles" in self.has:
            shapes["angle_"] = (self.nheads, self.angle_count)
        if "trap" in self.has:
            shapes["k_"] = (self.ranks, self.nheads, self.dstate)
            shapes["v_"] = (self.nheads, self.headdim)
        return shapes

    def wanted(self, choice):
        """Those of state_shapes() that `initial`, `final` or `captured` asks for."""
        shapes = self.state_shapes()
        return [part for part in shapes if choice is True or choice and part in choice]


def make(rng, p):
    """The keyword arguments of a call, outputs excepted."""
    tokens, heads = (p.batch, p.seqlen), (p.batch, p.seqlen, p.nheads)
    a = {"x": normal(rng, (*heads, p.headdim), p.dtype_of("x")), "A": None}
    if p.softplus:
        a["dt"] = normal(rng, heads, p.dtype_of("dt")) - np.asarray(2, p.dtype_of("dt"))
    else:
        a["dt"] = log_uniform(rng, 0.01, 0.5, heads, p.dtype_of("dt"))
    if p.adt:
        a["adt"] = -log_uniform(rng, 0.003, 3, heads, p.dtype_of("adt"))
    else:
        a["A"] = -log_uniform(rng, 0.3, 8, p.nheads, p.dtype_of("A"))
    ranks = () if p.rank is None else (p.rank,)
    for name in ("B", "C"):
        a[name] = normal(rng, (*tokens, *ranks, p.ngroups, p.dstate), p.dtype_of(name))
    shapes = {
        "D": (p.nheads, p.headdim) if p.channel_D else (p.nheads,),
        "z": a["x"].shape,
        "trap": heads,
        "angles": (*tokens, *((p.nheads,) if p.head_angles else ()), p.angle_count),
        **dict.fromkeys(
            ("B_bias", "C_bias"), (p.nheads, *(() if p.plain_biases else (p.ranks,)), p.dstate)
        ),
        **dict.fromkeys(("mimo_x", "mimo_z", "mimo_out"), (p.nheads, p.ranks, p.headdim)),
        "norm_weight": (p.nheads, p.headdim),
    }
    for name, shape in shapes.items():
        if name in p.has:
            a[name] = normal(rng, shape, p.dtype_of(name))
    if "dt_bias" in p.has:
        a["dt_bias"] = uniform(rng, 0, 0.5, p.nheads, p.dtype_of("dt_bias"))
    if "trap" in p.has and p.trap_sigmoid:
        a["trap"] = uniform(rng, 0, 1, heads, p.dtype_of("trap"))

    shapes = p.state_shapes()
    for part in p.wanted(p.initial):
        name = f"initial_{part}states"
        draw = angles_drawn if part == "angle_" else normal
        a[name] = draw(rng, (p.entries, *shapes[part]), p.dtype_of(name))
    a.update(indices(rng, p, bool(p.wanted(p.initial))))
    for name in a:
        a[name] = laid(rng, a[name], p.layout)
    a.update(dt_softplus=p.softplus, rotary=p.rotary, **p.options)
    if "norm_weight" in p.has:
        a.setdefault("norm_eps", 0.1)
    if "trap" in p.has and p.trap_sigmoid:
        a["trap_sigmoid"] = True
    if p.dt_limit:
        a["dt_limit"] = p.dt_limit
    if p.pad_slot is not None:
        a["pad_slot"] = p.pad_slot
    return a


def angles_drawn(rng, shape, dtype=F32):
    return uniform(rng, 0, TURN, shape, dtype)


def indices(rng, p, with_initial):
    a = {}
    if p.nseq is not None:
        a["cu_seqlens"] = split(rng, p.seqlen, p.nseq).astype(p.index_dtype)
    if p.seq_idx:
        a["seq_idx"] = runs(rng, p.batch, p.seqlen).astype(p.index_dtype)
    if p.flags and with_initial:
        a["has_initial_state"] = (rng.random(p.sequences) < 0.6).astype(p.flags)
    if p.pool is not None:
        a["state_indices"] = draw_slots(rng, p.sequences, p.pool, p.pad_slot).astype(p.index_dtype)
    if p.captures:
        positions = rng.integers(0, max(p.batch * p.seqlen, 1), p.captures)
        skip = (rng.random(p.captures) < 0.2) | (p.batch * p.seqlen == 0)
        positions = np.where(skip, -1 - rng.integers(0, 9, p.captures), positions)
        a["capture_positions"] = positions.astype(p.index_dtype)
    return a


def real_tokens(a):
    """(batch, seqlen): the tokens that are read at all."""
    batch, seqlen = a["x"].shape[:2]
    real = np.zeros((batch, seqlen), bool)
    spans = list(reference.sequences(batch, seqlen, a.get("cu_seqlens"), a.get("seq_idx")))
    slots = reference.sequence_slots(len(spans), a.get("state_indices"), a.get("pad_slot"))
    for slot, (row, tokens, _) in zip(slots, spans):
        real[row, tokens] = slot is not None
    return real


def written_captures(a):
    """Which capture positions are those of a real token."""
    positions = np.asarray(a["capture_positions"])
    real = real_tokens(a).reshape(-1)
    return np.array([0 <= p and bool(real[p]) for p in positions], bool)


def outputs(rng, p, a):
    """Room for the results, by name: NaN, but random states where none may be written."""
    room = {"out": blank(rng, p.out_shape, p.dtype_of("out"), p.layout)}
    shapes = p.state_shapes()
    for part in p.wanted(p.final):
        name = f"final_{part}states"
        values = np.full((p.entries, *shapes[part]), np.nan, p.dtype_of(name))
        if p.pool is not None:
            rest = np.setdiff1d(np.arange(p.entries), written_slots(a["state_indices"], p.pad_slot))
            values[rest] = normal(rng, (len(rest), *shapes[part]), values.dtype)
        if p.in_place and f"initial_{part}states" in a:
            values = a[f"initial_{part}states"]
        room[name] = place(rng, values, p.layout)
        if p.in_place and f"initial_{part}states" in a:
            a[f"initial_{part}states"] = room[name].array
    if "capture_positions" in a:
        for part in p.wanted(p.captured):
            name = f"captured_{part}states"
            values = normal(rng, (p.captures, *shapes[part]), p.dtype_of(name))
            room[name] = place(rng, values, p.layout)
    return room


def assert_angles(got, want, what):
    """Close on the circle, and reduced to one turn."""
    if got.size == 0:
        return
    values = wide(got)
    assert np.isfinite(values).all(), f"{what}: not finite"
    turn = TURN * (1 + TOLERANCE[got.dtype])
    assert (values >= 0).all() and (values <= turn).all(), f"{what}: not reduced to [0, 2 pi)"
    error = np.abs(np.mod(values - want + np.pi, TURN) - np.pi)
    bound = TOLERANCE[got.dtype] * TURN
    assert error.max() <= bound, f"{what}: {error.max():.3g} rad off, bound {bound:.3g}"


def assert_state(got, want, what, dtype=None):
    if "angle" in what:
        assert_angles(got, want, what)
    else:
        h = what in ("final_states", "captured_states")
        assert_close(got, want, what, dtype if h else None)


def rounded_to(ops, a):
    """What the factors of products are rounded to before they are multiplied: on tensor cores the
    dtype of the inputs.  None: nothing is; the states are then as exact as their own dtype."""
    x, B = a["x"], a["B"]
    rank = B.shape[2] if B.ndim == 5 else 1
    on_tensor_cores = (
        str(getattr(ops, "device", "")).startswith("cuda") and x.dtype in (F16, BF16)
        and x.dtype == B.dtype == a["C"].dtype and a.get("seq_idx") is None
        and x.shape[-1] % 16 == 0 and B.shape[-1] % 16 == 0 and B.shape[-1] <= 128
        and rank in (1, 2, 4, 8) and (a.get("angles") is None or a["angles"].shape[-1] % 8 == 0)
    )  # fmt: skip
    return x.dtype if on_tensor_cores else None


def wanted_results(a, **given):
    """What the reference says, by the names of the results."""
    options = {k: v for k, v in a.items() if k not in ("batch_invariant", "chunk_size")}
    out, final, captured = reference.ssd_chunk(**options, **given)
    want = {"out": out}
    for names, state in ((FINAL, final), (CAPTURED, captured)):
        want.update(zip(names, (state.h, state.angle, state.k, state.v)))
    return {name: value for name, value in want.items() if value is not None}


def check(ops, rng, p):
    """Runs one call, compares it with the reference, and returns (arguments, results by name)."""
    a = make(rng, p)
    room = outputs(rng, p, a)
    arrays = {name: placed.array for name, placed in room.items()}
    before = {name: array.copy() for name, array in arrays.items()}
    finals = {name: before[name] for name in FINAL if name in before}
    want = wanted_results(a, **(finals if p.pool is not None else {}))
    written = [name for name in INITIAL if name in a and p.in_place]
    inputs = Untouched(**{k: v for k, v in a.items() if k not in written})

    result = ops.ssd_chunk(**a, **arrays)

    results = result if isinstance(result, tuple) else (result,)
    assert len(results) == len(arrays)
    assert all(got is arrays[name] for name, got in zip(arrays, results))
    assert_close(arrays["out"], want["out"], "out")
    assert (arrays["out"][~real_tokens(a)] == 0).all(), "out: pads are not 0"
    touched = np.arange(p.sequences)
    if p.pool is not None:
        touched = written_slots(a["state_indices"], p.pad_slot)
    for name in finals:
        assert_slots_untouched(arrays[name], before[name], touched, name)
        assert_state(arrays[name][touched], want[name][touched], name, rounded_to(ops, a))
    for name in CAPTURED:
        if name in arrays:
            mask = written_captures(a)
            assert_same_bits(arrays[name][~mask], before[name][~mask], f"{name}: not captured")
            assert_state(arrays[name][mask], want[name][mask], name, rounded_to(ops, a))
    for name, placed in room.items():
        placed.assert_gaps_untouched(name)
    inputs.check()
    return a, arrays


def run(ops, a, **changes):
    """The results by name of the same call with other arguments, in fresh arrays."""
    a = {**a, **changes}
    names = ["out", "final_states"]
    names += ["final_angle_states"] * (a.get("angles") is not None)
    names += ["final_k_states", "final_v_states"] * (a.get("trap") is not None)
    if a.get("capture_positions") is not None:
        p = shape_of(a)
        for part, shape in p.items():
            names.append(f"captured_{part}states")
            a[names[-1]] = np.full((len(a["capture_positions"]), *shape), np.nan, F32)
    return dict(zip(names, ops.ssd_chunk(**a, return_final_states=True)))


def shape_of(a):
    """The shapes of the states of a call, by their place in STATES."""
    nheads, headdim = a["x"].shape[2:]
    rank, dstate = (a["B"].shape[2] if a["B"].ndim == 5 else 1), a["B"].shape[-1]
    shapes = {"": (nheads, headdim, dstate)}
    if a.get("angles") is not None:
        shapes["angle_"] = (nheads, a["angles"].shape[-1])
    if a.get("trap") is not None:
        shapes.update(k_=(rank, nheads, dstate), v_=(nheads, headdim))
    return shapes


def assert_like_reference(ops, a, **options):
    got, want = run(ops, a, **options), wanted_results(a)
    for name, value in got.items():
        if name == "out":
            assert_close(value, want[name], name)
        else:
            assert_state(value, want[name], name, rounded_to(ops, a))
    return got


def assert_same_results(got, want, pick=lambda value: value):
    assert got.keys() == want.keys()
    for name in want:
        assert_same_bits(pick(got[name]), pick(want[name]), name)


def tokens_of(a, row, start, end):
    """The arguments of some tokens of one row, all that is per token cut; states are left out."""
    skip = (*INITIAL, "cu_seqlens", "seq_idx", "state_indices", "has_initial_state", "pad_slot")
    piece = {k: v for k, v in a.items() if k not in (*skip, "capture_positions")}
    for name in TOKEN_TENSORS:
        if a.get(name) is not None:
            piece[name] = a[name][row : row + 1, start:end]
    return piece


def starting_from(results, prefix="final"):
    """The initial states that continue after results."""
    return {
        f"initial_{part}states": results[f"{prefix}_{part}states"]
        for part in STATES
        if f"{prefix}_{part}states" in results
    }
