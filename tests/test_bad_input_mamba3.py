# SPDX-License-Identifier: MIT
"""Calls of state_update with parts of Mamba-3 that cannot work: each is refused by name, and every
byte of memory stays as it was."""

import numpy as np
import pytest

from capi import FLOAT, INT, Call, ffi, lib
from cases import F32, normal
from test_bad_input import assert_refused

B, T, R, H, P, G, N, S, E = 2, 2, 3, 4, 5, 2, 8, 3, 7
# batch, T, rank, nheads, headdim, ngroups, dstate, nangles, entries


def sound(rng):
    """Everything at once but norm_weight's eps and adt, which excludes A."""

    def f(*shape):
        return normal(rng, shape, F32)

    return dict(
        state=f(E, H, P, N), x=f(B, T, H, P), dt=f(B, T, H), A=-np.abs(f(H)), B=f(B, T, R, G, N),
        C=f(B, T, R, G, N), D=f(H), z=f(B, T, H, P), dt_bias=f(H), trap=f(B, T, H),
        angles=f(B, T, H, S), B_bias=f(H, R, N), C_bias=f(H, R, N), mimo_x=f(H, R, P),
        mimo_z=f(H, R, P), mimo_out=f(H, R, P), norm_weight=f(H, P), angle_state=f(E, H, S),
        k_state=f(E, R, H, N), v_state=f(E, H, P), state_indices=np.array([5, 2]),
        num_accepted_tokens=np.array([1, 2]), intermediate_states=f(3, T, H, P, N),
        intermediate_angle_states=f(3, T, H, S), intermediate_k_states=f(3, T, R, H, N),
        intermediate_v_states=f(3, T, H, P), intermediate_indices=np.array([2, 0]),
        out=f(B, T, H, P), dt_softplus=1, norm_eps=1e-5,
    )


SOUND = sound(np.random.default_rng(3))
NEW = (
    "B", "C", "trap", "angles", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_out", "norm_weight",
    "angle_state", "k_state", "v_state", "intermediate_angle_states", "intermediate_k_states",
    "intermediate_v_states", "out",
)
WRITTEN = [n for n in SOUND if n.endswith(("state", "states"))] + ["out"]
EACH = pytest.mark.parametrize("name", NEW)


@pytest.fixture
def sound_call(rng):
    def make(**changes):
        return Call("state_update", **{**sound(rng), **changes})

    return make


def with_adt(call, rng):
    return call.set(A=None, adt=-np.abs(normal(rng, (B, T, H))))


def test_the_sound_call_is_sound(sound_call, rng):
    assert sound_call()() == ("OK", "")
    assert with_adt(sound_call(), rng)() == ("OK", "")


@EACH
def test_wrong_rank(sound_call, name):
    for shape in ((*SOUND[name].shape, 1, 1), (1,), ()):
        call = sound_call()
        call.tensors[name].reshape(shape)
        assert_refused(call, r"\w+: .*shape.*, got")


@EACH
def test_wrong_size_of_an_axis(sound_call, name):
    """Sizes that other tensors share.  Which is wrong cannot be known: the message names one."""
    for axis in range(SOUND[name].ndim):
        array = SOUND[name]
        larger = np.concatenate([array, np.take(array, [0], axis)], axis)
        free = axis == 0 and name.startswith("intermediate")  # rows: of all of them
        if not free:
            assert_refused(sound_call(**{name: larger}), r"\w+: .*, got")
        elif name != "intermediate_states":
            assert_refused(sound_call(**{name: larger}), rf"{name}: shape must be \(rows, .*, got")


@EACH
def test_wrong_dtype(sound_call, name):
    for code, bits in ((FLOAT, 64), (INT, 32)):
        call = sound_call()
        call.tensors[name].c.dtype.code, call.tensors[name].c.dtype.bits = code, bits
        assert_refused(call, rf"{name}: dtype must be .*, got")


@EACH
def test_no_data(sound_call, name):
    call = sound_call()
    call.tensors[name].c.data = ffi.NULL
    assert_refused(call, f"{name}: .*NULL")


@pytest.mark.parametrize("name", WRITTEN)
def test_outputs_that_overlap_another_tensor_or_themselves(sound_call, name):
    for other, value in SOUND.items():
        if other == name or not isinstance(value, np.ndarray):
            continue
        call = sound_call()
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
    call = sound_call()
    call.tensors[name].strides[1] = 0
    assert_refused(call, rf"{name}: .*share memory.*got")


# What needs what


def test_decay_comes_from_A_or_from_adt(sound_call, rng):
    assert_refused(sound_call(A=None), "A: is required, got NULL")
    assert_refused(sound_call(adt=normal(rng, (B, T, H))), "A: must not be given together with adt")
    for shape in ((B, H), (B, T, H, P), (B, T, 1), (B, 1, H)):
        assert_refused(with_adt(sound_call(), rng).set(adt=normal(rng, shape)), r"adt: shape .*got")


@pytest.mark.parametrize("name", ("angle_state", "intermediate_angle_states"))
def test_angles_and_their_states_come_together(sound_call, name):
    assert_refused(sound_call(**{name: None}), f"{name}: is required, got NULL")
    others = {"angle_state", "intermediate_angle_states"} - {name}
    call = sound_call(angles=None, **dict.fromkeys(others))
    assert_refused(call, f"{name}: must not be given without angles")


@pytest.mark.parametrize(
    "name", ("k_state", "v_state", "intermediate_k_states", "intermediate_v_states")
)
def test_trap_and_its_states_come_together(sound_call, name):
    assert_refused(sound_call(**{name: None}), f"{name}: is required, got NULL")
    states = {"k_state", "v_state", "intermediate_k_states", "intermediate_v_states"}
    call = sound_call(trap=None, **dict.fromkeys(states - {name}))
    assert_refused(call, f"{name}: must not be given without trap")


@pytest.mark.parametrize("name", ("angle", "k", "v"))
def test_intermediate_states_come_together(sound_call, name):
    """A row goes back to all of its states or to none."""
    none = {f"intermediate_{n}_states": None for n in ("angle", "k", "v") if n != name}
    call = sound_call(
        intermediate_states=None, intermediate_indices=None, num_accepted_tokens=None, **none
    )
    name = f"intermediate_{name}_states"
    assert_refused(call, f"{name}: must not be given without intermediate_states")


def test_parts_that_need_others(sound_call):
    assert_refused(sound_call(z=None), "mimo_z: must not be given without z")
    assert_refused(
        sound_call(mimo_out=None, out=np.zeros((B, T, R, H, P), F32)),
        "norm_weight: must not be given without mimo_out",
    )


def test_out_has_the_axis_of_ranks_or_not(sound_call):
    ranked = np.zeros((B, T, R, H, P), F32)
    assert_refused(sound_call(out=ranked), r"out: shape must be \(batch, T, nheads, headdim\)")
    call = sound_call(mimo_out=None, norm_weight=None)
    assert_refused(call, r"out: shape must be \(batch, T, rank, nheads, headdim\) = .*got")
    assert call.set(out=ranked)() == ("OK", "")


def test_ranks_of_B_and_C(sound_call, rng):
    assert_refused(sound_call(C=normal(rng, (B, T, R - 1, G, N))), r"C: shape must be .*, got")
    assert_refused(sound_call(C=normal(rng, (B, T, G, N))), r"C: .*rank axis.*, got 3")
    none = normal(rng, (B, T, 0, G, N))
    assert_refused(sound_call(B=none, C=none), "B: rank must be at least 1, got 0")


def test_one_dt_a_head_for_angles(sound_call, rng):
    """The rotation is one for all rows of a head."""
    wide = normal(rng, (B, T, H, P))
    assert_refused(sound_call(dt=wide), "dt: must be one value a head with angles")
    assert_refused(
        sound_call(dt_bias=normal(rng, (H, P))), "dt_bias: must be one value a head with angles"
    )
    still = dict(angles=None, angle_state=None, intermediate_angle_states=None)
    assert sound_call(dt=wide, dt_bias=normal(rng, (H, P)), **still)() == ("OK", "")


def test_more_angles_than_pairs(sound_call, rng):
    more = N // 2 + 1
    call = sound_call(
        angles=normal(rng, (B, T, H, more)), angle_state=normal(rng, (E, H, more)),
        intermediate_angle_states=normal(rng, (3, T, H, more)),
    )
    assert_refused(call, "angles: nangles must be at most dstate / 2, got 5")


@pytest.mark.parametrize("rotary", (-1, 2, 2**31 - 1))
def test_pairings_that_are_none(sound_call, rotary):
    assert_refused(sound_call(rotary=rotary), f"rotary: must be .*, got {rotary}")


@pytest.mark.parametrize("slots", (E - 1, E + 1))
@pytest.mark.parametrize("name", ("angle_state", "k_state", "v_state"))
def test_pools_of_other_sizes(sound_call, rng, name, slots):
    pool = normal(rng, (slots, *SOUND[name].shape[1:]))
    assert_refused(sound_call(**{name: pool}), rf"{name}: shape must be \(entries, .*, got")


@pytest.mark.parametrize(
    "name",
    ("adt", "trap", "angles", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_out", "norm_weight"),
)
def test_parts_of_mamba3_need_heads(rng, name):
    def f(*shape):
        return normal(rng, shape)

    fields = dict(
        x=f(4, 3), dt=f(4, 3), A=-np.ones((3, 2), F32), B=f(4, 2), C=f(4, 2), state=f(4, 3, 2),
        out=f(4, 3),
    )
    fields[name] = f(4, 3)
    if name == "adt":
        fields["A"] = None
    assert_refused(Call("state_update", **fields), f"{name}: must not be given without heads")


@pytest.mark.parametrize("name", ("angle_state", "k_state", "v_state"))
def test_states_of_mamba3_need_their_parts(rng, name):
    f = lambda *shape: normal(rng, shape)  # noqa: E731
    fields = dict(
        x=f(4, 3), dt=f(4, 3), A=-np.ones((3, 2), F32), B=f(4, 2), C=f(4, 2), state=f(4, 3, 2),
        out=f(4, 3),
    )
    call = Call("state_update", **fields, **{name: f(4, 3)})
    assert_refused(call, f"{name}: must not be given without (angles|trap)")


# Workspace


@pytest.mark.parametrize("T, headdim, dstate", [(1, 4, 9000), (2, 64, 600), (2, 300, 256)])
def test_states_beyond_the_stack_want_a_workspace(rng, T, headdim, dstate):
    def f(*shape):
        return normal(rng, shape)

    call = Call(
        "state_update", state=f(2, 1, headdim, dstate), x=f(2, T, 1, headdim), dt=f(2, T, 1),
        A=-np.ones(1, F32), B=f(2, T, 1, dstate), C=f(2, T, 1, dstate), C_bias=f(1, dstate),
        out=f(2, T, 1, headdim), dt_softplus=1,
    )
    status, message, size = call.workspace()
    assert status == "OK" and size > 0, message
    assert_refused(call, f"workspace: .*{size}.*got 0", "OUT_OF_MEMORY")
    call.with_workspace()
    assert call.args.workspace_bytes == size and call() == ("OK", "")
    guard = np.full(64, 0xA5, np.uint8)
    room = np.concatenate([np.zeros(size + 64, np.uint8), guard])
    start = -room.ctypes.data % 64
    room[start + size :] = 0xA5
    call.set(workspace=ffi.cast("void *", room.ctypes.data + start), workspace_bytes=size)
    assert call() == ("OK", "")
    assert (room[start + size :] == 0xA5).all(), "written beyond the workspace"
    assert lib.ssmk_state_update(call.args) == 0
