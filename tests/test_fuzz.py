# SPDX-License-Identifier: MIT
"""Random argument structs to every entry point.

Most are near-sound calls with a few faults, some are noise throughout.  Every tensor lies within an
arena, so whatever the library accepts is legal.  A call must come back with a status of the enum; a
call that fails changes no byte, and one that works none outside the tensors that it may write.
"""

import numpy as np
import pytest

from capi import (
    BFLOAT, BOOL, COMPLEX, CUDA, FLOAT, INT, OPERATIONS, STATUS, UINT, Call, ffi, scalar_fields,
    tensor_fields,
)

CALLS = 2500

# Axes of each tensor by name.  A call takes one column throughout, where there are several.
STATES = {
    "cu_seqlens": ["c"], "seq_idx": ["b l"], "state_indices": ["s"], "has_initial_state": ["s"],
}
SHAPES = {
    "selective_scan": {  # channels first; the same with constant B, C; channels last
        **dict.fromkeys(("x", "dt", "z", "out"), ["b d l", "b d l", "b l d"]),
        "A": ["d n"],
        **dict.fromkeys(("B", "C"), ["b g n l", "d n", "b l n"]),
        **dict.fromkeys(("D", "dt_bias"), ["d"]),
        **dict.fromkeys(("initial_states", "final_states"), ["s d n"]),
        **STATES,
    },
    # with heads and tokens, with heads, neither; Mamba-3 with tokens, without them and mimo_out
    "state_update": {
        "state": ["e h p n", "e h p n", "e h n", "e h p n", "e h p n"],
        **dict.fromkeys(("x", "z"), ["b t h p", "b h p", "b h", "b t h p", "b h p"]),
        "out": ["b t h p", "b h p", "b h", "b t h p", "b m h p"],
        "dt": ["b t h", "b h p", "b h", "b t h", "b h"],
        "A": ["h", "h p n", "h n", "h", "h"],
        **dict.fromkeys(("B", "C"), ["b t g n", "b g n", "b n", "b t m g n", "b m g n"]),
        **dict.fromkeys(("D", "dt_bias"), ["h", "h p", "h", "h", "h"]),
        **dict.fromkeys(("state_indices", "state_indices_out"), ["b t", "b", "b", "b t", "b"]),
        "intermediate_states": ["e t h p n", "e 1 h p n", "e 1 h n", "e t h p n", "e 1 h p n"],
        **dict.fromkeys(("num_tokens", "num_accepted_tokens", "intermediate_indices"), ["b"]),
        **dict.fromkeys(("adt", "trap"), ["b t h", "b h", "b h", "b t h", "b h"]),
        "angles": ["b t h q", "b h q", "b h q", "b t h q", "b q"],
        **dict.fromkeys(("B_bias", "C_bias"), ["h n", "h n", "h n", "h m n"]),
        **dict.fromkeys(("mimo_x", "mimo_z", "mimo_out"), ["h 1 p", "h 1 p", "h 1 p", "h m p"]),
        "norm_weight": ["h p"],
        "angle_state": ["e h q"],
        "k_state": ["e 1 h n", "e 1 h n", "e 1 h n", "e m h n"],
        "v_state": ["e h p"],
        "intermediate_angle_states": ["e t h q", "e 1 h q", "e 1 h q", "e t h q", "e 1 h q"],
        "intermediate_k_states": [
            "e t 1 h n", "e 1 1 h n", "e 1 1 h n", "e t m h n", "e 1 m h n"
        ],
        "intermediate_v_states": ["e t h p", "e 1 h p", "e 1 h p", "e t h p", "e 1 h p"],
    },
    "causal_conv1d": {
        **dict.fromkeys(("x", "out"), ["b d l", "b d l", "b l d"]),
        "weight": ["d w"],
        "bias": ["d"],
        **dict.fromkeys(("initial_states", "final_states"), ["s d k"]),
        **STATES,
    },
    "causal_conv1d_update": {
        **dict.fromkeys(("x", "out"), ["b d t", "b d", "b t d"]),
        "conv_state": ["e d k"],
        "weight": ["d w"],
        "bias": ["d"],
        **dict.fromkeys(
            ("state_indices", "state_indices_out", "cache_seqlens", "num_tokens"), ["b"]
        ),
    },
    "ssd_chunk": {  # Mamba-2; Mamba-3 with ranks; with angles for all heads, and one rank
        **dict.fromkeys(("x", "z"), ["b l h p"]),
        **dict.fromkeys(("dt", "adt", "trap"), ["b l h"]),
        **dict.fromkeys(("A", "dt_bias"), ["h"]),
        **dict.fromkeys(("B", "C"), ["b l g n", "b l m g n", "b l g n"]),
        "D": ["h", "h p", "h"],
        "angles": ["b l h q", "b l h q", "b l q"],
        **dict.fromkeys(("B_bias", "C_bias"), ["h n", "h m n", "h 1 n"]),
        **dict.fromkeys(("mimo_x", "mimo_z", "mimo_out"), ["h 1 p", "h m p", "h 1 p"]),
        "norm_weight": ["h p"],
        **dict.fromkeys(("initial_states", "final_states"), ["s h p n"]),
        **dict.fromkeys(("initial_angle_states", "final_angle_states"), ["s h q"]),
        **dict.fromkeys(("initial_k_states", "final_k_states"), ["s 1 h n", "s m h n", "s 1 h n"]),
        **dict.fromkeys(("initial_v_states", "final_v_states"), ["s h p"]),
        "capture_positions": ["i"],
        "captured_states": ["i h p n"],
        "captured_angle_states": ["i h q"],
        "captured_k_states": ["i 1 h n", "i m h n", "i 1 h n"],
        "captured_v_states": ["i h p"],
        "out": ["b l h p", "b l m h p", "b l h p"],
        **STATES,
    },
    "mla_decode": {  # codes in pages, with tokens; dense codes; dense floats
        **dict.fromkeys(("q_nope", "out"), ["b t h L", "b t h L", "b h L"]),
        "q_rope": ["b t h r", "b t h r", "b h r"],
        "lse": ["b t h", "b t h", "b h"],
        "new_latent": ["b t L", "b t L", "b L"],
        "new_rope": ["b t r", "b t r", "b r"],
        "latent": [None, None, "b S L"],
        "codes": ["e S W", "b S W", None],
        **dict.fromkeys(("scales", "biases"), ["e S G", "b S G", None]),
        "k_rope": ["e S r", "b S r", "b S r"],
        "page_table": ["b u", None, None],
        "seqlens": ["b"],
    },
}
REQUIRED = {
    "x", "dt", "A", "B", "C", "out", "state", "weight", "conv_state", "q_nope", "latent", "codes",
    "scales", "biases", "page_table", "seqlens",
}
# What state_update takes only together with others; and where it has no reason to be absent.
PARTS = {
    "adt": (), "trap": (), "angles": (), "B_bias": (), "C_bias": (), "mimo_x": (),
    "mimo_z": ("z",), "mimo_out": (), "norm_weight": (),
}
STATES_OF = {
    "angle_state": ("angles",), "k_state": ("trap",), "v_state": ("trap",),
    "intermediate_angle_states": ("angles", "intermediate_states"),
    "intermediate_k_states": ("trap", "intermediate_states"),
    "intermediate_v_states": ("trap", "intermediate_states"),
}
INTEGERS = {
    "state_indices", "state_indices_out", "num_tokens", "num_accepted_tokens",
    "intermediate_indices", "cu_seqlens", "seq_idx", "cache_seqlens", "capture_positions",
    "page_table", "seqlens",
}
DTYPES = [
    (FLOAT, 32), (FLOAT, 16), (BFLOAT, 16), (COMPLEX, 64), (INT, 32), (INT, 64), (INT, 8),
    (UINT, 8), (BOOL, 8), (UINT, 32), (FLOAT, 64), (INT, 16),
]

FLOAT_BYTES, INDEX_BYTES = 1 << 17, 1 << 12


class Arena:
    """The memory that all tensors lie in: floats of moderate size, then small indices."""

    def __init__(self, rng):
        floats = rng.standard_normal(FLOAT_BYTES // 4, np.float32)
        self.memory = np.zeros(FLOAT_BYTES + 2 * INDEX_BYTES, np.uint8)
        self.memory[:FLOAT_BYTES] = floats.view(np.uint8)
        small = np.arange(-2, 6)
        i32, i64 = self.memory[FLOAT_BYTES:].reshape(2, INDEX_BYTES)
        i32[...] = rng.choice(small, INDEX_BYTES // 4).astype(np.int32).view(np.uint8)
        i64[...] = rng.choice(small, INDEX_BYTES // 8).astype(np.int64).view(np.uint8)
        self.fresh, self.clean = self.memory.copy(), self.memory.copy()
        self.address = self.memory.ctypes.data

    def region(self, code, bits):
        """(first byte, bytes) where values of such a dtype lie."""
        if (code, bits) == (UINT, 32):
            return 0, FLOAT_BYTES
        if code in (INT, UINT) and bits == 64:
            return FLOAT_BYTES + INDEX_BYTES, INDEX_BYTES
        if code in (INT, UINT, BOOL):
            return FLOAT_BYTES, INDEX_BYTES
        return 0, FLOAT_BYTES


# Parts that are refused without another one, and the decay that is refused beside A.
NEEDS = {
    "mimo_z": "z", "captured_states": "capture_positions",
    **{f"{when}_{kind}_states": part for when in ("initial", "final", "captured")
       for kind, part in (("angle", "angles"), ("k", "trap"), ("v", "trap"))},
}  # fmt: skip


class Fuzz:
    def __init__(self, operation, seed):
        self.rng = np.random.default_rng(seed)
        self.operation = operation
        self.arena = Arena(self.rng)
        self.names = tensor_fields(operation)
        self.scalars = scalar_fields(operation)

    def chance(self, probability):
        return self.rng.random() < probability

    def pick(self, values):
        return values[self.rng.integers(len(values))]

    def one(self):
        """(call, {tensor: indices of its bytes in the arena})."""
        rng = self.rng
        self.arena.memory[...] = self.arena.fresh
        size = {axis: int(rng.integers(1, 5)) for axis in "bdlnthpkm"}
        size.update(e=int(rng.integers(6, 12)), w=int(rng.integers(2, 6)), g=1)
        size.update(q=int(rng.integers(size["n"] // 2 + 1)), i=int(rng.integers(1, 4)))
        size["k"] += size["w"] - 1
        size.update(L=64, W=8, G=int(rng.integers(1, 3)), S=16, r=size["d"])
        size["u"] = int(rng.integers(1, 3))
        if self.chance(0.1):
            size[self.pick(list(size))] = 0
        packed = "cu_seqlens" in self.names and self.chance(0.2)
        pooled = self.chance(0.3)
        if packed:
            size["b"] = 1
        sequences = int(rng.integers(1, 5)) if packed else size["b"]
        size["c"] = sequences + 1
        noise = self.pick([0, 0, 0, 0, 0, 0.05, 0.05, 0.05, 0.3, 1])
        column = int(rng.integers(5 if self.operation == "state_update" else 3))
        if column == 4:  # of one rank out has no axis
            size["m"] += 1
        chosen = {name: self.chance(0.5) for name in ("rope", "append")}
        chosen = {
            "q_rope": chosen["rope"], "k_rope": chosen["rope"], "new_latent": chosen["append"],
            "new_rope": chosen["rope"] and chosen["append"],
        }
        call, bytes_of = Call(self.operation), {}
        for name in self.names:
            columns = SHAPES[self.operation].get(name)
            known = columns and columns[min(column, len(columns) - 1)]
            if name in ("cu_seqlens", "seq_idx"):
                likely = packed if name == "cu_seqlens" else 0 if packed else 0.2
            elif name in ("state_indices", "has_initial_state") and "cu_seqlens" in self.names:
                likely = pooled and any(other.startswith("initial_") for other in bytes_of)
            elif self.operation == "ssd_chunk":
                likely = self.likely_in_prefill(name, bytes_of, column)
            elif self.operation == "state_update" and name in PARTS:
                likely = 0.002 if column < 3 else self.part(name, column, call.tensors)
            elif self.operation == "state_update" and name in STATES_OF:
                likely = all(other in call.tensors for other in STATES_OF[name])
            elif name == "A" and self.operation == "state_update":
                likely = self.chance(0.7) or column < 3
            elif columns and not known:  # not in such a call
                likely = 0.002
            elif name in chosen:
                likely = chosen[name]
            else:
                likely = 1 if name in REQUIRED else 0.3 if known else 0.002
            if not self.chance(0.5 if self.chance(noise) else likely):
                continue
            pool = pooled and name.startswith(("initial_", "final_"))
            size["s"] = size["e"] if pool else sequences
            axes = known.split() if known else []
            if name == "out" and "mimo_out" in bytes_of:
                axes = [axis for axis in axes if axis != "m"]
            shape = [size.get(axis, 1) for axis in axes]
            if not known or self.chance(noise):
                shape = [int(n) for n in rng.integers(0, 5, rng.integers(0, 7))]
            dtype = self.pick(DTYPES) if self.chance(noise) else self.plausible(name)
            self.place(call, name, shape, dtype, bytes_of)
            if name in INTEGERS and name in bytes_of and not self.chance(noise):
                self.write_indices(call, name, size)
        if pooled and "initial_states" in bytes_of and self.chance(0.3):  # in place
            call.args.final_states = call.args.initial_states
            bytes_of["final_states"] = bytes_of["initial_states"]
        self.fill_scalars(call, noise, column)
        self.arena.clean[...] = self.arena.memory
        return call, bytes_of

    def likely_in_prefill(self, name, bytes_of, column):
        if name in ("A", "adt"):
            return 0.7 if name == "A" else "A" not in bytes_of
        if name in REQUIRED:
            return 1
        if name in NEEDS and NEEDS[name] not in bytes_of:
            return 0
        if name == "norm_weight" and column == 1 and "mimo_out" not in bytes_of:
            return 0
        if name.startswith("captured_"):
            return "capture_positions" in bytes_of and (0.5 if name != "captured_states" else 0.95)
        return 0.4

    def part(self, name, column, given):
        """How likely a call of Mamba-3 has that part of it."""
        if name == "adt":
            return "A" not in given
        if name == "mimo_out":
            return column == 3
        if name == "norm_weight" and column == 4:
            return 0.002
        return 0.5 if all(other in given for other in PARTS[name]) else 0.002

    def write_indices(self, call, name, size):
        """Sensible values where an index tensor lies."""
        c, (shape, strides) = call.tensors[name]
        shape = [shape[k] for k in range(c.ndim)]
        if c.strides == ffi.NULL or c.dtype.bits < 32:
            return
        dtype = np.dtype(f"i{c.dtype.bits // 8}")
        first = int(ffi.cast("uintptr_t", c.data)) + c.byte_offset - self.arena.address
        view = np.ndarray(
            shape,
            dtype,
            self.arena.memory,
            first,
            [strides[k] * dtype.itemsize for k in range(c.ndim)],
        )
        count = view.size
        if name == "cu_seqlens":
            values = np.append(
                np.sort(np.append(0, self.rng.integers(0, size["l"] + 1, max(count - 2, 0)))),
                size["l"],
            )[:count]
        elif name in ("state_indices", "state_indices_out", "intermediate_indices"):
            values = self.rng.permutation(
                np.arange(-2, size["e"] + 3)
                if self.chance(0.1)
                else np.arange(max(size["e"], count))
            )
        elif name == "capture_positions":
            values = self.rng.integers(-1, max(size["b"] * size["l"], 0), count)
        elif name.startswith("num_"):
            values = self.rng.integers(0, size["t"] + 1, count)
        elif name == "page_table":
            values = self.rng.permutation(max(size["e"], count))
        elif name == "seqlens":
            least = 0 if self.chance(0.1) else min(size["t"], size["S"])
            values = self.rng.integers(least, size["S"] + 1, count)
        else:
            values = self.rng.integers(-1 if name == "seq_idx" else 0, 3, count)
        view[...] = np.resize(values, view.shape)

    def plausible(self, name):
        if name in ("codes", "lse"):
            return (UINT, 32) if name == "codes" else (FLOAT, 32)
        if name == "has_initial_state":
            return self.pick([(BOOL, 8), (INT, 8), (UINT, 8)])
        if name in INTEGERS:
            return self.pick([(INT, 32), (INT, 64)])
        return self.pick([(FLOAT, 32), (FLOAT, 32), (FLOAT, 16), (BFLOAT, 16)])

    def place(self, call, name, shape, dtype, bytes_of):
        """A tensor somewhere in the region of its dtype, with strides that stay inside it."""
        code, bits = dtype
        start, room = self.arena.region(code, bits)
        item, rng = bits // 8, self.rng
        compact = [int(np.prod(shape[k + 1 :])) for k in range(len(shape))]
        strides = list(compact)
        style = self.pick(["compact", "compact", "null", "order", "sliced", "negative"])
        if self.chance(0.03):
            style = "wild"
        if style == "order":
            order = rng.permutation(len(shape))
            step = 1
            for axis in order:
                strides[axis], step = step, step * max(shape[axis], 1)
        elif style == "sliced":
            strides = [2 * s for s in strides]
        elif style == "negative":
            strides = [-s if self.chance(0.5) else s for s in strides]
        elif style == "wild":
            strides = [int(s) for s in rng.integers(-9, 10, len(shape))]
        used = compact if style == "null" else strides
        low = sum((n - 1) * s for n, s in zip(shape, used) if s < 0 and n > 0)
        high = sum((n - 1) * s for n, s in zip(shape, used) if s > 0 and n > 0)
        empty = 0 in shape
        extent = 0 if empty else (high - low + 1) * item
        if extent > room:
            return
        slots = (room - extent) // item
        first = (
            int(rng.integers(slots + 1)) if self.chance(0.8) else min(int(rng.integers(40)), slots)
        )
        origin = start + (first - (0 if empty else low)) * item
        offset = int(rng.integers(0, 4)) * item if self.chance(0.2) else 0

        c = ffi.new("DLTensor *")
        keep = ffi.new("int64_t[]", shape or (0,)), ffi.new("int64_t[]", strides or (0,))
        c.data = ffi.cast("void *", self.arena.address + origin - offset)
        c.byte_offset = offset
        c.ndim, c.shape, c.strides = len(shape), keep[0], ffi.NULL if style == "null" else keep[1]
        c.dtype.code, c.dtype.bits, c.dtype.lanes = code, bits, 1
        c.device.device_type = CUDA if self.chance(0.003) else 1
        call.set(**{name: c})
        call.tensors[name] = c, keep
        if self.chance(0.003):
            c.data = ffi.NULL
        elif not empty:
            elements = np.zeros(1, np.int64)
            for n, s in zip(shape, used):
                elements = np.add.outer(elements, np.arange(n) * s * item).reshape(-1)
            bytes_of[name] = np.unique(np.add.outer(elements + origin, np.arange(item)))

    def fill_scalars(self, call, noise, column):
        for name in self.scalars:
            if name == "flags":
                known = [0, 1] if self.operation == "mla_decode" else [0, 0, 0, 1, 2, 3, 4, 6, 8]
                value = (
                    self.pick(known)
                    if not self.chance(noise)
                    else int(self.rng.integers(2**63))
                )
            elif name == "channels_last":
                value = int(column == 2) if not self.chance(noise) else 1
            elif name in ("workspace_bytes", "reserved"):
                value = 0
            elif name in ("dt_min", "dt_max", "norm_eps", "softmax_scale"):
                value = (
                    0.0
                    if not self.chance(noise)
                    else float(self.pick([0.0, 0.1, -1.0, np.inf, -np.inf, np.nan]))
                )
            elif self.chance(noise):
                value = int(self.pick([-1, 0, 1, 2, 7, 2**31 - 1, -(2**31)]))
            else:
                value = int(self.rng.integers(2))
            setattr(call.args, name, value)
        if self.chance(0.05):
            call.args.size = int(self.rng.integers(1, ffi.sizeof(call.type) // 8 + 1)) * 8


def scratch_for(call, keep):
    """A workspace of the size that the library names, if it names one."""
    status, _, size = call.workspace()
    if status == "OK" and size and ffi.sizeof(call.type) == call.args.size:
        keep.append(np.zeros(size + 64, np.uint8))
        call.args.workspace = ffi.cast("void *", -(-keep[-1].ctypes.data // 64) * 64)
        call.args.workspace_bytes = size
    return status


WRITES = {
    "selective_scan": ("out", "final_states"),
    "state_update": (
        "out", "state", "angle_state", "k_state", "v_state", "intermediate_states",
        "intermediate_angle_states", "intermediate_k_states", "intermediate_v_states",
    ),
    "causal_conv1d": ("out", "final_states"),
    "causal_conv1d_update": ("out", "conv_state"),
    "ssd_chunk": (
        "out", "final_states", "final_angle_states", "final_k_states", "final_v_states",
        "captured_states", "captured_angle_states", "captured_k_states", "captured_v_states",
    ),
    "mla_decode": ("latent", "codes", "scales", "biases", "k_rope", "out", "lse"),
}


def writes(call):
    """The tensors that a call may write: without new tokens no cache is among them."""
    if call.operation == "mla_decode" and not (call.args.new_latent and given(call, "new_latent")):
        return "out", "lse"
    return WRITES[call.operation]


@pytest.mark.parametrize("seed", (0, 1))
@pytest.mark.parametrize("operation", OPERATIONS)
def test_random_structs(operation, seed):
    fuzz = Fuzz(operation, [seed, *operation.encode()])
    arena, answers = fuzz.arena, dict.fromkeys(STATUS.values(), 0)
    for number in range(CALLS // 2):
        call, bytes_of = fuzz.one()
        keep = []
        asked = scratch_for(call, keep)
        status, message = call()
        where = f"struct {number}: {status} {message}"
        answers[status] += 1
        if status == "OK":
            assert asked == "OK", where
            allowed = [
                bytes_of[name]
                for name in writes(call)
                if name in bytes_of and getattr(call.args, name)
            ]
            check_outputs(call, bytes_of, where)
            inside = np.zeros(len(arena.memory), bool)
            for indices in allowed:
                inside[indices] = True
            assert (arena.memory == arena.clean)[~inside].all(), (
                f"bytes outside the outputs changed; {where}"
            )
        else:
            assert message.startswith(f"{operation}: "), where
            assert (arena.memory == arena.clean).all(), f"bytes changed; {where}"
            check_overlap_is_real(call, bytes_of, message, where)
    # The generator is worth something only if both kinds come up.
    assert answers["OK"] > CALLS // 40, answers
    assert answers["INVALID_ARGUMENT"] > CALLS // 40, answers


def given(call, name):
    """Within the size that the struct claims."""
    return ffi.offsetof(call.type, name) < call.args.size


def check_outputs(call, bytes_of, where):
    """No accepted output shares a byte with another tensor (but final with initial states)."""
    names = [name for name in bytes_of if given(call, name)]
    for name in set(writes(call)) & set(names):
        for other in names:
            if other != name and name != other.replace("initial_", "final_"):
                assert np.intersect1d(bytes_of[name], bytes_of[other]).size == 0, (
                    f"{name} overlaps {other}; {where}"
                )


def check_overlap_is_real(call, bytes_of, message, where):
    """Who is refused for shared memory does share some."""
    if "must not share memory with" in message:
        name = message.split(": ")[1]
        other = message.split("must not share memory with ")[1].split(",")[0]
        assert np.intersect1d(bytes_of[name], bytes_of[other]).size, where
