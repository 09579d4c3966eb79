# SPDX-License-Identifier: MIT
"""Calls that cannot work: each is refused with a message that names function, argument, expectation
and what came, and every byte of memory stays as it was."""

import re
import threading

import numpy as np
import pytest

import ssmk
from capi import (
    BOOL, BUILT, COMPLEX, CUDA, FLOAT, HANDLE, INT, METAL, OPERATIONS, ROCM, Call, ffi, lib,
    tensor_fields,
)
from cases import BF16, F32, I32, I64, assert_same_bits, normal

# Sound calls, one an operation, with every tensor that may be given at once.

B, L, D, N, G, E = 2, 5, 6, 4, 3, 7  # batch, seqlen, dim, dstate, ngroups, entries
H, P, T = 3, 4, 2  # nheads, headdim, T
R, S2 = 2, 2  # rank, nangles
W, S = 4, 5  # width, state_len


def sound(operation, rng):
    def f(*shape, dtype=F32):
        return normal(rng, shape, dtype)

    slots = np.array([5, 2])
    if operation == "selective_scan":
        return dict(
            x=f(B, D, L), dt=f(B, D, L), A=-np.abs(f(D, N)), B=f(B, G, N, L), C=f(B, G, N, L),
            D=f(D), z=f(B, D, L), dt_bias=f(D), initial_states=f(E, D, N), final_states=f(E, D, N),
            seq_idx=np.zeros((B, L), I32), state_indices=slots, has_initial_state=np.ones(B, bool),
            out=f(B, D, L), dt_softplus=1,
        )
    if operation == "state_update":
        return dict(
            state=f(E, H, P, N), x=f(B, T, H, P), dt=f(B, T, H), A=-np.abs(f(H)), B=f(B, T, G, N),
            C=f(B, T, G, N), D=f(H), z=f(B, T, H, P), dt_bias=f(H),
            state_indices=np.array([[5, 1], [2, 0]]), state_indices_out=np.array([[3, 4], [6, -1]]),
            num_tokens=np.array([2, 1]), num_accepted_tokens=np.array([1, 2]),
            intermediate_states=f(3, T, H, P, N), intermediate_indices=np.array([2, 0]),
            out=f(B, T, H, P), dt_softplus=1,
        )
    if operation == "causal_conv1d":
        return dict(
            x=f(B, D, L), weight=f(D, W), bias=f(D), initial_states=f(E, D, S),
            final_states=f(E, D, S), seq_idx=np.zeros((B, L), I32), state_indices=slots,
            has_initial_state=np.ones(B, np.int8), out=f(B, D, L), activation=1,
        )
    if operation == "causal_conv1d_update":
        return dict(
            x=f(B, D, T), conv_state=f(E, D, S), weight=f(D, W), bias=f(D),
            cache_seqlens=np.array([3, 11]), state_indices=slots,
            state_indices_out=np.array([1, 6]), num_tokens=np.array([2, 0]), out=f(B, D, T),
            activation=1,
        )
    if operation == "ssd_chunk":
        states = dict(_=(H, P, N), angle_=(H, S2), k_=(R, H, N), v_=(H, P))
        return dict(
            x=f(B, L, H, P), dt=f(B, L, H), A=-np.abs(f(H)), B=f(B, L, R, 1, N),
            C=f(B, L, R, 1, N), D=f(H, P), z=f(B, L, H, P), dt_bias=f(H), trap=f(B, L, H),
            angles=f(B, L, H, S2), B_bias=f(H, R, N), C_bias=f(H, R, N), mimo_x=f(H, R, P),
            mimo_z=f(H, R, P), mimo_out=f(H, R, P), norm_weight=f(H, P),
            **{f"{when}_{k}states".replace("__", "_"): f(E, *shape)
               for when in ("initial", "final") for k, shape in states.items()},
            **{f"captured_{k}states".replace("__", "_"): f(4, *shape)
               for k, shape in states.items()},
            capture_positions=np.array([9, 0, -1, 3]), seq_idx=np.zeros((B, L), I32),
            state_indices=slots, has_initial_state=np.ones(B, bool), out=f(B, L, H, P),
            dt_softplus=1, norm_eps=0.1,
        )  # fmt: skip
    return dict(
        q_nope=f(B, T, H, 64), q_rope=f(B, T, H, 8), codes=rng.integers(0, 2**32, (5, 16, 8), "u4"),
        scales=f(5, 16, 2), biases=f(5, 16, 2), k_rope=f(5, 16, 8),
        page_table=np.array([[3, 0], [1, 4]]), seqlens=np.array([20, 9]), new_latent=f(B, T, 64),
        new_rope=f(B, T, 8), out=f(B, T, H, 64), lse=f(B, T, H),
    )


REQUIRED = {
    "selective_scan": ("x", "dt", "A", "B", "C", "out"),
    "ssd_chunk": ("x", "dt", "B", "C", "out"),
    "state_update": ("state", "x", "dt", "A", "B", "C", "out"),
    "causal_conv1d": ("x", "weight", "out"),
    "causal_conv1d_update": ("x", "conv_state", "weight", "out"),
    "mla_decode": (
        "q_nope", "q_rope", "codes", "scales", "biases", "k_rope", "new_rope", "seqlens", "out"
    ),
}
WRITTEN = {
    "selective_scan": ("out", "final_states"),
    "ssd_chunk": (
        "out", "final_states", "final_angle_states", "final_k_states", "final_v_states",
        "captured_states", "captured_angle_states", "captured_k_states", "captured_v_states",
    ),
    "state_update": ("out", "state", "intermediate_states"),
    "causal_conv1d": ("out", "final_states"),
    "causal_conv1d_update": ("out", "conv_state"),
    "mla_decode": ("out", "lse", "codes", "scales", "biases", "k_rope"),
}
FIRST = {
    "selective_scan": "x", "ssd_chunk": "x", "state_update": "state", "causal_conv1d": "x",
    "causal_conv1d_update": "x", "mla_decode": "q_nope",
}
INDEX = (
    "seq_idx", "cu_seqlens", "state_indices", "state_indices_out", "num_tokens",
    "num_accepted_tokens", "intermediate_indices", "cache_seqlens", "capture_positions",
)

SOUND = {operation: sound(operation, np.random.default_rng(3)) for operation in OPERATIONS}
TENSORS = [
    (op, name) for op in BUILT for name, value in SOUND[op].items() if isinstance(value, np.ndarray)
]
OUTPUTS = [(op, name) for op in BUILT for name in WRITTEN[op]]


@pytest.fixture
def sound_call(rng):
    """sound_call(operation, **changes): the sound call with some fields replaced."""

    def make(operation, **changes):
        return Call(operation, **{**sound(operation, rng), **changes}).with_workspace()

    return make


def memory_of(tensor):
    """All bytes of the buffer that a tensor is part of."""
    array = tensor.array
    while array.base is not None:
        array = array.base
    return array.tobytes()


def assert_refused(call, pattern, status="INVALID_ARGUMENT"):
    """The call is refused with such a message, and changes no byte of any of its tensors."""
    before = {name: memory_of(tensor) for name, tensor in call.tensors.items()}
    got, message = call()
    assert got == status, f"expected {status}, got {got}: {message}"
    assert re.search(rf"^{call.operation}: {pattern}", message), message
    for name, tensor in call.tensors.items():
        assert memory_of(tensor) == before[name], (
            f"{name} was written by a call that failed: {message}"
        )


@pytest.mark.parametrize("operation", BUILT)
def test_the_sound_calls_are_sound(sound_call, operation):
    status, message = sound_call(operation)()
    assert status == "OK", message


# Of state_update; test_bad_input_mamba3.py has their refusals.
MAMBA3 = (
    "adt", "trap", "angles", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_out", "norm_weight",
    "angle_state", "k_state", "v_state",
)


# The struct


@pytest.mark.parametrize("operation", OPERATIONS)
def test_no_struct(operation):
    status = getattr(lib, f"ssmk_{operation}")(ffi.NULL)
    assert status == 1
    assert (
        ffi.string(lib.ssmk_last_error())
        .decode()
        .startswith(f"{operation}: args: must not be NULL")
    )


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("size", (0, 1, 7, 12, 2**63, 2**64 - 1))
def test_sizes_that_no_version_has(rng, operation, size):
    call = Call(operation, **sound(operation, rng))
    call.args.size = size
    assert_refused(call, rf"args: size must be .*, got {size}")


@pytest.mark.parametrize("operation", BUILT)
def test_struct_that_ends_before_a_required_tensor(sound_call, operation):
    call = sound_call(operation)
    call.args.size = 8
    assert_refused(call, r"\w+: is required, got NULL")


def copy_into_room(call, extra):
    """The struct of a call at the start of a longer piece of memory."""
    size = ffi.sizeof(call.type)
    room = ffi.new("uint64_t[]", (size + extra) // 8)
    ffi.memmove(room, call.args, size)
    return room, ffi.cast(f"ssmk_{call.operation}_args *", room)


@pytest.mark.parametrize("operation", BUILT)
def test_struct_of_an_older_caller(operation):
    """It ends before `flags`; what stands behind it is not the library's to read."""
    older, same = (
        Call(operation, **sound(operation, np.random.default_rng(1))).with_workspace()
        for _ in range(2)
    )
    older.args.size = ffi.offsetof(older.type, "flags")
    older.args.flags = 2**64 - 1
    assert older() == same() == ("OK", "")
    for name in WRITTEN[operation]:
        assert_same_bits(older.tensors[name].array, same.tensors[name].array, name)


@pytest.mark.parametrize("operation", BUILT)
def test_struct_of_a_newer_caller(sound_call, operation):
    call = sound_call(operation)
    room, args = copy_into_room(call, 40)
    args.size = ffi.sizeof(call.type) + 40
    assert call(args)[0] == "OK"
    room[len(room) - 1] = 1
    before = call.tensors["out"].array.copy()
    status, message = call(args)
    assert status == "INVALID_ARGUMENT" and message.startswith(
        f"{operation}: args: a field beyond the"
    ), message
    assert (call.tensors["out"].array == before).all()


@pytest.mark.parametrize("operation", BUILT)
def test_unknown_flags(sound_call, operation):
    assert_refused(
        sound_call(operation).set(flags=1 << 40), r"flags: must be .*, got 0x10000000000"
    )


# Tensors


@pytest.mark.parametrize(
    "operation, name", [(op, name) for op in REQUIRED for name in REQUIRED[op]]
)
def test_missing_tensor(sound_call, operation, name):
    assert_refused(sound_call(operation).set(**{name: None}), f"{name}: is required, got NULL")


@pytest.mark.parametrize("operation, name", TENSORS)
def test_wrong_rank(sound_call, operation, name):
    for change in (lambda shape: [*shape, 1, 1, 1], lambda shape: [1], lambda shape: []):
        call = sound_call(operation)
        tensor = call.tensors[name]
        shape = change(tensor.array.shape)
        if len(shape) == tensor.array.ndim:
            continue
        tensor.reshape(shape)
        assert_refused(call, r"\w+: .*(shape|rank|axes|axis|dtype).*, got")


@pytest.mark.parametrize("operation, name", TENSORS)
def test_wrong_size_of_an_axis(sound_call, operation, name):
    """Sizes that other tensors share.  Which is wrong cannot be known: the message names one."""
    free = {
        ("selective_scan", "initial_states"): [0], ("selective_scan", "final_states"): [0],
        ("state_update", "state"): [0], ("state_update", "intermediate_states"): [0],
        ("state_update", "state_indices"): [1], ("causal_conv1d", "initial_states"): [0],
        ("causal_conv1d", "final_states"): [0], ("causal_conv1d_update", "conv_state"): [0, 2],
        ("causal_conv1d", "weight"): [1], ("causal_conv1d_update", "weight"): [1],
        ("mla_decode", "page_table"): [1],
    }
    array = SOUND[operation][name]
    for axis in set(range(array.ndim)) - set(free.get((operation, name), [])):
        larger = np.concatenate([array, np.take(array, [0], axis)], axis)
        assert_refused(sound_call(operation).set(**{name: larger}), r"\w+: .*, got")


@pytest.mark.parametrize("operation, name", TENSORS)
@pytest.mark.parametrize(
    "code, bits, lanes",
    [
        (FLOAT, 64, 1), (INT, 16, 1), (HANDLE, 64, 1), (FLOAT, 32, 4), (FLOAT, 24, 1),
        (COMPLEX, 128, 1), (BOOL, 1, 1), (200, 32, 1), (8, 8, 1),
    ],
)
def test_wrong_dtype(sound_call, operation, name, code, bits, lanes):
    call = sound_call(operation)
    dtype = call.tensors[name].c.dtype
    dtype.code, dtype.bits, dtype.lanes = code, bits, lanes
    assert_refused(call, rf"{name}: dtype must be .*, got")


@pytest.mark.parametrize("operation, name", TENSORS)
def test_floats_for_indices_and_indices_for_floats(sound_call, operation, name):
    call = sound_call(operation)
    dtype = call.tensors[name].c.dtype
    dtype.code, dtype.bits = (FLOAT, 32) if dtype.code != FLOAT else (INT, 32)
    assert_refused(call, rf"{name}: dtype must be .*, got")


def test_complex_states_of_a_real_scan_and_the_reverse(sound_call, rng):
    states = normal(rng, (E, D, N), np.complex64)
    assert_refused(
        sound_call("selective_scan").set(initial_states=states),
        "initial_states: dtype must be .*, got complex64",
    )
    call = sound_call("selective_scan").set(
        A=normal(rng, (D, N), np.complex64), B=normal(rng, (D, N), np.complex64),
        C=normal(rng, (D, N), np.complex64),
    )
    assert_refused(call, "initial_states: dtype must be complex64, got float32")


def test_real_constant_of_a_complex_scan(sound_call, rng):
    call = sound_call("selective_scan").set(
        A=normal(rng, (D, N), np.complex64), B=normal(rng, (D, N))
    )
    assert_refused(call, "B: dtype must be complex64, got float32")


@pytest.mark.parametrize("operation, name", TENSORS)
@pytest.mark.parametrize("device", (CUDA, METAL, ROCM, 77))
def test_tensors_on_two_devices(sound_call, operation, name, device):
    """If the first tensor that is looked at is elsewhere, that backend is what is missing."""
    call = sound_call(operation)
    call.tensors[name].c.device.device_type = device
    if name == FIRST[operation] and device == CUDA and ssmk.backend_built("cuda"):
        assert_refused(call, rf"\w+: must be on the device of {name} \(cuda:0\), got cpu:0")
    elif name == FIRST[operation]:
        assert_refused(call, rf"{name}: .*backend", "UNSUPPORTED")
    else:
        assert_refused(
            call, rf"{name}: must be on the device of {FIRST[operation]} \(cpu:0\), got "
        )


@pytest.mark.parametrize("operation", BUILT)
@pytest.mark.parametrize("device", (CUDA, METAL, ROCM, 77))
def test_backend_that_is_not_built(sound_call, operation, device):
    if device == CUDA and ssmk.backend_built("cuda"):
        pytest.skip("this build has a CUDA backend: tests/test_cuda.py")
    call = sound_call(operation)
    for tensor in call.tensors.values():
        tensor.c.device.device_type = device
    assert_refused(call, r"\w+: .*backend", "UNSUPPORTED")


@pytest.mark.parametrize("operation, name", TENSORS)
def test_no_data(sound_call, operation, name):
    call = sound_call(operation)
    call.tensors[name].c.data = ffi.NULL
    assert_refused(call, f"{name}: .*NULL")


@pytest.mark.parametrize("operation", BUILT)
def test_no_data_is_fine_where_there_are_no_elements(sound_call, operation):
    call = sound_call(operation)
    optional = [
        name
        for name in call.tensors
        if name in INDEX
        or name in ("has_initial_state", "intermediate_states")
        or name.startswith("captured_")
    ]
    for name in optional:
        call.set(**{name: None})
    for name, tensor in call.tensors.items():
        batch = tensor.array.shape[0] == B and name not in ("A", "D", "weight", "bias", "dt_bias")
        states = name.startswith(("initial_", "final_"))
        if batch or states:
            tensor.reshape((0, *tensor.array.shape[1:]))
            tensor.c.data = ffi.NULL
    status, message = call()
    assert status == "OK", message


@pytest.mark.parametrize("operation, name", TENSORS)
def test_data_between_items(sound_call, operation, name):
    call = sound_call(operation)
    tensor = call.tensors[name]
    if tensor.array.itemsize == 1:
        return
    room = np.zeros(tensor.array.nbytes + 8, np.uint8)
    tensor.array = room
    tensor.c.data = ffi.cast("void *", room.ctypes.data + 1)
    assert_refused(call, f"{name}: .*align.*, got")


@pytest.mark.parametrize("operation, name", TENSORS)
def test_shapes_that_are_none(sound_call, operation, name):
    call = sound_call(operation)
    call.tensors[name].c.shape = ffi.NULL
    assert_refused(call, rf"{name}: .*shape")
    for ndim in (-1, 9, 33, -(2**31)):
        call = sound_call(operation)
        call.tensors[name].reshape([1] * 64)
        call.tensors[name].c.ndim = ndim
        assert_refused(call, rf"{name}: .*got")
    call = sound_call(operation)
    call.tensors[name].shape[0] = -3
    assert_refused(call, r"\w+: .*got")


@pytest.mark.parametrize("operation", BUILT)
def test_sizes_whose_product_is_no_number(sound_call, operation):
    call = sound_call(operation)
    for tensor in call.tensors.values():
        tensor.reshape(
            [2**40 if n == B else n for n in tensor.array.shape],
            [2**40 if n == B else 0 for n in tensor.array.shape],
        )
    assert_refused(call, r"\w+: .*got")


# Outputs that touch what they must not


@pytest.mark.parametrize("operation, name", OUTPUTS)
def test_outputs_whose_elements_share_memory(sound_call, operation, name):
    for axis in range(SOUND[operation][name].ndim):
        if SOUND[operation][name].shape[axis] < 2:
            continue
        call = sound_call(operation)
        call.tensors[name].strides[axis] = 0
        assert_refused(call, rf"{name}: .*share memory.*got")
    call = sound_call(operation)  # two axes of one stride
    call.tensors[name].strides[0] = call.tensors[name].strides[1]
    assert_refused(call, rf"{name}: .*share memory.*got")


@pytest.mark.parametrize("operation, name", OUTPUTS)
def test_outputs_that_overlap_another_tensor(sound_call, operation, name):
    for other, value in SOUND[operation].items():
        if other == name or not isinstance(value, np.ndarray):
            continue
        call = sound_call(operation)
        a, b = call.tensors[name], call.tensors[other]
        room = np.zeros(a.array.nbytes + b.array.nbytes, np.uint8)
        room[: a.array.nbytes] = a.array.view(np.uint8).reshape(-1)
        shift = (a.array.nbytes - 1) // b.array.itemsize * b.array.itemsize
        room[shift : shift + b.array.nbytes] = b.array.view(np.uint8).reshape(-1)
        a.array = b.array = room
        a.c.data = ffi.cast("void *", room.ctypes.data)
        b.c.data = ffi.cast("void *", room.ctypes.data)
        b.c.byte_offset = shift
        assert_refused(call, rf"({name}|{other}): .*(share memory|overlap).*")


@pytest.mark.parametrize("operation", ("selective_scan", "ssd_chunk", "causal_conv1d"))
def test_final_states_that_are_almost_the_initial_ones(sound_call, operation):
    call = sound_call(operation)
    states = call.tensors["initial_states"]
    shifted = np.zeros((E + 1, *states.array.shape[1:]), F32)
    call.set(initial_states=shifted[:E], final_states=shifted[1:])
    assert_refused(call, r"final_states: .*initial_states")
    assert call.set(final_states=shifted[:E])()[0] == "OK"
    half = shifted[:E].view(BF16)[..., : states.array.shape[-1]]
    assert_refused(call.set(final_states=half), r"final_states: .*initial_states")


def test_outputs_that_interleave_are_welcome(sound_call, rng):
    buffer = normal(rng, (B, D, 2, L))
    call = sound_call("selective_scan").set(x=buffer[:, :, 0], out=buffer[:, :, 1])
    assert call()[0] == "OK"
    every_other = normal(rng, (B, D, 2 * L))
    call = sound_call("selective_scan").set(x=every_other[..., ::2], out=every_other[..., 1::2])
    assert call()[0] == "OK"


# Values


@pytest.mark.parametrize("operation", ("selective_scan", "ssd_chunk", "causal_conv1d"))
@pytest.mark.parametrize(
    "cu",
    ([1, 3, 5], [0, 4, 3, 5], [0, 3, 4], [0, 3, 6], [0, -1, 5], [-1, 2, 5], [5], [0], []),
    ids=str,
)
@pytest.mark.parametrize("dtype", (I32, I64), ids=str)
def test_cu_seqlens_that_cut_nothing_up(rng, operation, cu, dtype):
    fields = {
        k: v[:1] if k in ("x", "dt", "B", "C", "z", "trap", "angles", "out") else v
        for k, v in sound(operation, rng).items()
        if k not in INDEX and not k.endswith(("_states", "_state"))
    }
    call = Call(operation, **fields, cu_seqlens=np.array(cu, dtype))
    assert_refused(call, "cu_seqlens: .*, got")


@pytest.mark.parametrize("operation", ("selective_scan", "ssd_chunk", "causal_conv1d"))
def test_packed_in_two_ways_or_in_rows(sound_call, operation):
    cu = np.array([0, L])
    assert_refused(
        sound_call(operation).set(cu_seqlens=cu), "(seq_idx|cu_seqlens): .*(seq_idx|cu_seqlens)"
    )
    assert_refused(
        sound_call(operation).set(cu_seqlens=cu, seq_idx=None), "cu_seqlens: .*batch.*, got 2"
    )


INDEX_ERRORS = [
    ("selective_scan", "state_indices", [5, E], "entries = 7, got 7"),
    ("selective_scan", "state_indices", [5, 2**62], "entries = 7"),
    ("selective_scan", "state_indices", [5, 5], "got slot 5"),
    ("ssd_chunk", "state_indices", [5, E], "entries = 7, got 7"),
    ("ssd_chunk", "state_indices", [5, 2**62], "entries = 7"),
    ("ssd_chunk", "state_indices", [5, 5], "got slot 5"),
    ("ssd_chunk", "capture_positions", [0, B * L, 1, 2], "below batch . seqlen, got 10"),
    ("ssd_chunk", "capture_positions", [0, 1, 1, 2**63 - 1], "got 9223372036854775807"),
    ("causal_conv1d", "state_indices", [E, 1], "entries = 7, got 7"),
    ("causal_conv1d", "state_indices", [1, 1], "got slot 1"),
    ("causal_conv1d_update", "state_indices", [0, E], "entries = 7, got 7"),
    ("causal_conv1d_update", "state_indices_out", [0, E], "entries = 7, got 7"),
    ("causal_conv1d_update", "state_indices_out", [4, 4], "got slot 4"),
    ("causal_conv1d_update", "state_indices_out", [2, 1], "got slot 2"),
    ("causal_conv1d_update", "num_tokens", [T + 1, 0], "0 to T, got 3"),
    ("causal_conv1d_update", "num_tokens", [0, -1], "0 to T, got -1"),
    ("causal_conv1d_update", "cache_seqlens", [0, -1], "at least 0, got -1"),
    ("causal_conv1d_update", "cache_seqlens", [2**63 - 1, 0], "got 9223372036854775807"),
    ("state_update", "state_indices", [[E, 1], [2, 0]], "entries = 7, got 7"),
    ("state_update", "state_indices_out", [[3, 4], [6, E]], "entries = 7, got 7"),
    ("state_update", "state_indices_out", [[3, 4], [4, -1]], "got slot 4"),
    ("state_update", "state_indices_out", [[3, 0], [6, -1]], "got slot 0"),
    ("state_update", "num_tokens", [T + 1, 0], "0 to T, got 3"),
    ("state_update", "num_tokens", [0, -1], "0 to T, got -1"),
    ("state_update", "num_accepted_tokens", [3, 0], "got 3"),
    ("state_update", "num_accepted_tokens", [0, -1], "got -1"),
    ("state_update", "intermediate_indices", [0, 3], "= 3, got 3"),
    ("state_update", "intermediate_indices", [1, 1], "got (slot|row) 1"),
]


@pytest.mark.parametrize("operation, name, values, expected", INDEX_ERRORS)
def test_indices_past_their_range_or_twice(sound_call, operation, name, values, expected):
    assert_refused(sound_call(operation).set(**{name: np.array(values)}), f"{name}: .*{expected}")


def test_duplicate_slots_among_very_many(rng):
    rows = 1000
    slots = rng.permutation(rows)
    slots[7] = slots[901]
    fields = dict(
        x=normal(rng, (rows, 3)), conv_state=normal(rng, (rows, 3, 3)), weight=normal(rng, (3, 4)),
        out=normal(rng, (rows, 3)),
    )
    assert_refused(
        Call("causal_conv1d_update", **fields, state_indices=slots),
        f"state_indices: .*got slot {slots[7]} in rows",
    )


def test_a_pool_smaller_than_the_batch(rng):
    fields = dict(
        x=normal(rng, (4, 3)), conv_state=normal(rng, (3, 3, 3)), weight=normal(rng, (3, 4)),
        out=normal(rng, (4, 3)),
    )
    assert_refused(
        Call("causal_conv1d_update", **fields), "conv_state: .*batch = 4.*got entries = 3"
    )
    fields = dict(
        x=normal(rng, (4, 3)), dt=normal(rng, (4, 3)), A=-np.ones((3, 2), F32),
        B=normal(rng, (4, 2)), C=normal(rng, (4, 2)), state=normal(rng, (3, 3, 2)),
        out=normal(rng, (4, 3)),
    )
    assert_refused(Call("state_update", **fields), "state: .*batch = 4.*got entries = 3")


@pytest.mark.parametrize("operation", ("selective_scan", "ssd_chunk", "state_update"))
@pytest.mark.parametrize("low, high", [(0.5, 0.1), (np.nan, 1.0), (0.0, np.nan)])
def test_limits_of_dt_that_leave_nothing(sound_call, operation, low, high):
    assert_refused(sound_call(operation).set(dt_min=low, dt_max=high), "dt_min: .*got")


@pytest.mark.parametrize("operation", ("causal_conv1d", "causal_conv1d_update"))
def test_widths_activations_and_states_of_a_convolution(sound_call, rng, operation):
    for width in (0, 1, 9):
        assert_refused(
            sound_call(operation).set(weight=normal(rng, (D, width))),
            f"weight: .*2 to 8, got {width}",
        )
    states = ("conv_state",) if operation.endswith("update") else ("initial_states", "final_states")
    short = {name: normal(rng, (E, D, 2)) for name in states}
    assert_refused(sound_call(operation).set(**short), f"({'|'.join(states)}): .*3, got 2")
    for activation in (2, -1, 2**31 - 1):
        assert_refused(
            sound_call(operation).set(activation=activation),
            f"activation: must be .*, got {activation}",
        )


def test_groups_that_do_not_divide(sound_call, rng):
    for groups in (4, 0, 12):
        call = sound_call("selective_scan").set(
            B=normal(rng, (B, groups, N, L)), C=normal(rng, (B, groups, N, L))
        )
        assert_refused(call, f"B: .*ngroups.*dim = 6, got {groups}")
        call = sound_call("state_update").set(
            B=normal(rng, (B, T, groups, N)), C=normal(rng, (B, T, groups, N))
        )
        assert_refused(call, f"B: .*ngroups.*nheads = 3, got {groups}")


def test_states_that_index_nothing(sound_call):
    call = sound_call("selective_scan").set(
        initial_states=None, final_states=None, has_initial_state=None
    )
    assert_refused(call, "state_indices: ")


def test_counts_that_choose_nothing(sound_call):
    call = sound_call("state_update").set(
        state_indices=np.array([5, 2]), intermediate_states=None, intermediate_indices=None
    )
    assert_refused(call, "num_accepted_tokens: ")
    assert_refused(
        sound_call("state_update").set(num_accepted_tokens=None), "num_accepted_tokens: is required"
    )


@pytest.mark.parametrize("operation", ("state_update", "mla_decode"))
def test_reserved_fields(sound_call, operation):
    assert_refused(sound_call(operation).set(reserved=1), "reserved: must be 0, got 1")


# Workspace


@pytest.mark.parametrize("operation", BUILT)
def test_workspace_is_told_without_data(sound_call, operation):
    call = sound_call(operation)
    with_data = call.workspace()
    assert with_data[0] == "OK"
    for tensor in call.tensors.values():
        tensor.c.data = ffi.NULL
    assert call.workspace() == with_data
    first = FIRST[operation]
    status, message, size = call.set(**{first: None}).workspace()
    assert (
        status == "INVALID_ARGUMENT"
        and size == 2**64 - 1
        and message.startswith(f"{operation}: {first}: is required")
    )
    assert getattr(lib, f"ssmk_{operation}_workspace")(call.args, ffi.NULL) == 1
    assert getattr(lib, f"ssmk_{operation}_workspace")(ffi.NULL, ffi.new("uint64_t *")) == 1


@pytest.mark.parametrize("operation", BUILT)
def test_workspace_too_small(rng, operation):
    call = Call(operation, **sound(operation, rng))
    size = call.workspace()[2]
    if size == 0:
        assert call()[0] == "OK"
    else:
        assert_refused(call, f"workspace: .*{size}.*got 0", "OUT_OF_MEMORY")


# From Python


def update_arguments(rng):
    a = sound("state_update", rng)
    return {
        k: v
        for k, v in a.items()
        if k in ("state", "x", "dt", "A", "B", "C", "state_indices", "num_accepted_tokens")
    }


def test_python_raises_what_c_answers(rng):
    a = update_arguments(rng)
    with pytest.raises(
        ValueError,
        match=r"^state_update: B: shape must be \(batch, T, ngroups, dstate\) = \(.*4\), got",
    ):
        ssmk.state_update(**{**a, "B": a["B"][..., :3]})


def test_python_refuses_outputs_that_are_read_only(rng):
    a = update_arguments(rng)
    out = normal(rng, a["x"].shape)
    out.flags.writeable = False
    before = a["state"].copy()
    with pytest.raises((ValueError, BufferError), match=r"state_update: out: .*read-only"):
        ssmk.state_update(**a, out=out)
    assert (a["state"] == before).all()
    a["state"].flags.writeable = False
    with pytest.raises((ValueError, BufferError), match=r"state_update: state: .*read-only"):
        ssmk.state_update(**a)
    assert (a["state"] == before).all()


def test_python_refuses_what_is_no_tensor(rng):
    a = update_arguments(rng)
    for wrong in ([1.0, 2.0, 3.0], "x", 3, object()):
        with pytest.raises((TypeError, ValueError), match="A"):
            ssmk.state_update(**{**a, "A": wrong})
    with pytest.raises(TypeError):
        ssmk.state_update(**a, no_such_argument=1)
    with pytest.raises(ValueError, match="float64"):
        ssmk.state_update(**{**a, "x": a["x"].astype(np.float64)})
    with pytest.raises(ValueError, match="activation"):
        ssmk.causal_conv1d(normal(rng, (1, 2, 3)), normal(rng, (2, 4)), activation="gelu")


def test_python_does_not_guess_a_pool(rng):
    a = {
        k: v
        for k, v in sound("selective_scan", rng).items()
        if k not in ("out", "final_states", "dt_softplus")
    }
    with pytest.raises(ValueError, match="final_states"):
        ssmk.selective_scan(**a, return_final_states=True)


# The last error


def test_the_last_error_belongs_to_its_thread(sound_call):
    sound_call("causal_conv1d").set(x=None)()
    mine = ffi.string(lib.ssmk_last_error())
    seen = []

    def other():
        seen.append(ffi.string(lib.ssmk_last_error()))
        ssmk_call = Call("state_update")
        seen.append(ssmk_call()[1].encode())

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert seen[0] == b"" and seen[1].startswith(b"state_update: ")
    assert ffi.string(lib.ssmk_last_error()) == mine


def test_names_of_statuses():
    names = [ffi.string(lib.ssmk_status_name(status)).decode() for status in range(5)]
    assert names == [
        "SSMK_OK", "SSMK_INVALID_ARGUMENT", "SSMK_UNSUPPORTED", "SSMK_DEVICE_ERROR",
        "SSMK_OUT_OF_MEMORY",
    ]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_every_tensor_of_the_struct_is_known_to_these_tests(operation):
    """A field that is added to the header wants its own refusals here."""
    known = {name for name, value in SOUND[operation].items() if isinstance(value, np.ndarray)}
    known |= (
        {"cu_seqlens", "latent"} | set(MAMBA3) | {f"intermediate_{n}_states" for n in ("angle", "k", "v")}
    )
    if operation in BUILT:
        assert set(tensor_fields(operation)) <= known
