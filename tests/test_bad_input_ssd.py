# SPDX-License-Identifier: MIT
"""ssd_chunk: calls that cannot work for reasons of its own.  What all operations refuse alike is in
test_bad_input.py."""

import numpy as np
import pytest

import ssmk
from capi import Call, ffi
from cases import BF16, F32, I32, assert_same_bits, normal
from cases_ssd import CAPTURED, FINAL, INITIAL, MIMO, SISO, Ssd, make
from test_bad_input import (
    E, H, L, N, P, R, S2, B, assert_refused, sound, sound_call,
)  # fmt: skip

__all__ = ["sound_call"]  # a fixture


@pytest.fixture
def call(sound_call):
    return sound_call("ssd_chunk")


# A and adt


def test_neither_A_nor_adt(call):
    assert_refused(call.set(A=None), "A: .*adt.*neither")


def test_both_A_and_adt(call, rng):
    assert_refused(call.set(adt=normal(rng, (B, L, H))), "adt: must not be given .*A")


@pytest.mark.parametrize("shape", [(B, L), (B, L, H, P), (B, L + 1, H), (B, L, H + 1), (H,)])
def test_shapes_of_adt(call, rng, shape):
    assert_refused(call.set(A=None, adt=normal(rng, shape)), "adt: shape must be .*, got")


@pytest.mark.parametrize("shape", [(H, P), (1,), (H, P, N)])
def test_A_is_one_number_a_head(call, rng, shape):
    assert_refused(call.set(A=normal(rng, shape)), "A: shape must be .*, got")


# B and C


def test_groups_that_do_not_divide(rng):
    for groups in (2, 0, 6):
        fields = {**sound("ssd_chunk", rng), "B": normal(rng, (B, L, R, groups, N)),
                  "C": normal(rng, (B, L, R, groups, N))}  # fmt: skip
        pattern = f"B: .*ngroups.*nheads = {H}, got {groups}"
        assert_refused(Call("ssd_chunk", **fields), pattern)


@pytest.mark.parametrize("name, other", [("B", "C"), ("C", "B")])
def test_ranks_that_disagree(call, rng, name, other):
    """One with a rank axis and one without, or of another length."""
    assert_refused(call.set(**{name: normal(rng, (B, L, 1, N))}), "[BC]: .*, got")
    call.set(**{name: normal(rng, (B, L, R + 1, 1, N))})
    assert_refused(call, "[BC]: .*, got")


def test_rank_1_with_and_without_its_axis(rng):
    a = make(rng, Ssd(1, 9, rank=1))
    plain = a["B"][:, :, 0]
    want = ssmk.ssd_chunk(**a)
    assert_same_bits(ssmk.ssd_chunk(**{**a, "B": plain}), want)
    assert_same_bits(ssmk.ssd_chunk(**{**a, "B": plain, "C": a["C"][:, :, 0]}), want)


def test_no_ranks(call, rng):
    none = {name: normal(rng, (B, L, 0, 1, N)) for name in ("B", "C")}
    assert_refused(call.set(**none), r"\w+: .*rank.*, got")


# Mamba-3


@pytest.mark.parametrize("name", ("B_bias", "C_bias"))
@pytest.mark.parametrize("shape", [(H, N), (R, H, N), (H, R, N + 1), (N,), (H, 1, R, N)], ids=str)
def test_shapes_of_biases(call, rng, name, shape):
    """(nheads, dstate) is for rank 1 only."""
    assert_refused(call.set(**{name: normal(rng, shape)}), f"{name}: shape must be .*, got")


@pytest.mark.parametrize("name", ("mimo_x", "mimo_z", "mimo_out"))
@pytest.mark.parametrize("shape", [(H, P), (R, H, P), (H, R + 1, P), (H, R, P, 1)], ids=str)
def test_shapes_of_projections(call, rng, name, shape):
    assert_refused(call.set(**{name: normal(rng, shape)}), f"{name}: shape must be .*, got")


def test_more_angles_than_pairs(call, rng):
    call.set(angles=normal(rng, (B, L, H, N // 2 + 1)))
    for name in (*INITIAL, *FINAL, *CAPTURED):
        if "angle" in name:
            call.set(**{name: normal(rng, (4 if "capt" in name else E, H, N // 2 + 1))})
    assert_refused(call, "angles: nangles must be at most dstate / 2.*, got 3")


@pytest.mark.parametrize("shape", [(B, L), (B, L, H, S2, 1), (B, L, S2 + 1), (B, L, 1, S2)])
def test_shapes_of_angles(call, rng, shape):
    assert_refused(call.set(angles=normal(rng, shape)), r"\w+: .*, got")


@pytest.mark.parametrize("rotary", (-1, 2, 2**31 - 1, -(2**31)))
def test_rotary_that_is_none(call, rotary):
    assert_refused(call.set(rotary=rotary), f"rotary: must be .*, got {rotary}")


def test_rotary_is_checked_without_angles_too(rng):
    fields = {k: sound("ssd_chunk", rng)[k] for k in ("x", "dt", "A", "B", "C", "mimo_out", "out")}
    assert_refused(Call("ssd_chunk", **fields, rotary=7), "rotary: must be .*, got 7")


def test_a_norm_of_apart_ranks(call, rng):
    call.set(mimo_out=None, out=normal(rng, (B, L, R, H, P)))
    assert_refused(call, "norm_weight: .*mimo_out")
    assert call.set(norm_weight=None)()[0] == "OK"


def test_a_gate_that_scales_nothing(call):
    assert_refused(call.set(z=None), "mimo_z: must not be given .*z")


@pytest.mark.parametrize("shape", [(B, L, R, H, P), (B, R, L, H, P), (B, L, H), (B, L, H, P + 1)])
def test_shapes_of_out(call, rng, shape):
    assert_refused(call.set(out=normal(rng, shape)), "out: shape must be .*, got")


def test_out_of_apart_ranks(call, rng):
    call.set(mimo_out=None, norm_weight=None)
    assert_refused(call, r"out: shape must be \(batch, seqlen, rank, nheads, headdim\) = .*, got")
    assert_refused(call.set(out=normal(rng, (B, L, H, R, P))), "out: shape must be .*, got")
    assert call.set(out=normal(rng, (B, L, R, H, P)))()[0] == "OK"


@pytest.mark.parametrize("part, kinds", [("angles", ("angle",)), ("trap", ("k", "v"))])
@pytest.mark.parametrize("when", ("initial", "final", "captured"))
def test_states_of_parts_that_are_not_there(call, part, kinds, when):
    call.set(**{part: None})
    for other in {"initial", "final", "captured"} - {when}:
        call.set(**{f"{other}_{kind}_states": None for kind in kinds})
    for kind in kinds:
        assert_refused(call, f"{when}_{kind}_states: must not be given without {part}")
        call.set(**{f"{when}_{kind}_states": None})
    assert call()[0] == "OK"


@pytest.mark.parametrize("name", (*INITIAL, *FINAL, *CAPTURED))
def test_shapes_of_states(rng, name):
    fields = sound("ssd_chunk", rng)
    for axis in range(fields[name].ndim):
        longer = np.concatenate([fields[name], np.take(fields[name], [0], axis)], axis)
        assert_refused(Call("ssd_chunk", **{**fields, name: longer}), r"\w+: .*, got")


@pytest.mark.parametrize("name", (*INITIAL, *FINAL))
def test_states_without_indices_are_one_a_sequence(rng, name):
    fields = sound("ssd_chunk", rng)
    for other in (*INITIAL, *FINAL, "state_indices", "has_initial_state"):
        states = fields.pop(other)
        if other == name:
            wrong = states
    call = Call("ssd_chunk", **fields, **{name: wrong})
    assert_refused(call, f"{name}: shape must be .*, got")
    assert call.set(**{name: wrong[:B].copy()}).with_workspace()()[0] == "OK"


# Captures


def test_captures_of_nothing(call):
    call.set(**dict.fromkeys(CAPTURED))
    assert_refused(call, "capture_positions: must not be given .*captured")


@pytest.mark.parametrize("name", CAPTURED)
def test_captures_from_nowhere(call, name):
    call.set(capture_positions=None, **dict.fromkeys(set(CAPTURED) - {name}))
    assert_refused(call, "capture_positions: is required")


@pytest.mark.parametrize("values", ([B * L, 0, 0, 0], [0, 0, 0, 2**31 - 1]), ids=str)
def test_captures_past_the_last_token(call, values):
    position = max(values)
    call.set(capture_positions=np.array(values, I32))
    assert_refused(call, f"capture_positions: must be below batch .*, got {position}")


def test_captures_of_no_tokens(rng):
    fields = {
        k: v[:, :0] if k in ("x", "dt", "B", "C", "z", "trap", "angles", "out", "seq_idx") else v
        for k, v in sound("ssd_chunk", rng).items()
    }
    call = Call("ssd_chunk", **{**fields, "capture_positions": np.array([-1, -1, 0, -1])})
    assert_refused(call, "capture_positions: .*, got 0")
    call.set(capture_positions=np.array([-1, -1, -9, -1]))
    assert call.with_workspace()()[0] == "OK"


# Scalars


@pytest.mark.parametrize("chunk_size", (-1, -(2**31)))
def test_chunk_sizes_that_are_none(call, chunk_size):
    assert_refused(call.set(chunk_size=chunk_size), f"chunk_size: .*, got {chunk_size}")


@pytest.mark.parametrize("flags", (4, 16, 1 << 63))
def test_flags_of_other_operations(call, flags):
    assert_refused(call.set(flags=flags), "flags: must be .*, got 0x")


def test_every_flag_of_its_own(call):
    assert call.set(flags=1 | 2 | 8, pad_slot=6)()[0] == "OK"


# Sequences


def test_flags_without_initial_states(call):
    call.set(**dict.fromkeys(INITIAL))
    assert_refused(call, "has_initial_state: must not be given without initial_states")


def test_indices_of_no_states(call):
    call.set(has_initial_state=None, **dict.fromkeys((*INITIAL, *FINAL)))
    assert_refused(call, "state_indices: must not be given without ")


@pytest.mark.parametrize("name", (*INITIAL, *FINAL))
def test_flags_and_indices_are_sound_with_any_one_state(rng, name):
    fields = sound("ssd_chunk", rng)
    for other in (*INITIAL, *FINAL):
        if other != name:
            fields.pop(other)
    if name in FINAL:
        fields.pop("has_initial_state")
    status, message = Call("ssd_chunk", **fields).with_workspace()()
    assert status == "OK", message


@pytest.mark.parametrize("final", FINAL)
def test_a_slot_written_twice(rng, final):
    fields = sound("ssd_chunk", rng)
    for other in FINAL:
        if other != final:
            fields.pop(other)
    fields["state_indices"] = np.array([3, 3])
    assert_refused(Call("ssd_chunk", **fields), "state_indices: .*got slot 3 in rows 0 and 1")


# Shared memory


@pytest.mark.parametrize("initial, final", list(zip(INITIAL, FINAL)))
def test_each_state_may_be_updated_in_place(call, rng, initial, final):
    states = call.tensors[initial].array
    assert call.set(**{final: states})()[0] == "OK"
    shifted = np.zeros((E + 1, *states.shape[1:]), F32)
    call.set(**{initial: shifted[:E], final: shifted[1:]})
    assert_refused(call, f"{final}: .*{initial}")


def test_all_four_states_in_place(call):
    for initial, final in zip(INITIAL, FINAL):
        call.set(**{final: call.tensors[initial].array})
    assert call()[0] == "OK"


@pytest.mark.parametrize("initial, final", [
    ("initial_k_states", "final_states"), ("initial_states", "final_k_states"),
    ("initial_angle_states", "final_v_states"), ("initial_v_states", "final_angle_states"),
])  # fmt: skip
def test_states_of_different_kinds_are_not_one_tensor(rng, initial, final):
    """Although their shapes agree: nheads, rank and headdim are 2, nangles too."""
    fields = dict(
        x=normal(rng, (B, L, 2, 2)), dt=normal(rng, (B, L, 2)), A=-np.ones(2, F32),
        B=normal(rng, (B, L, 2, 1, 4)), C=normal(rng, (B, L, 2, 1, 4)), trap=normal(rng, (B, L, 2)),
        angles=normal(rng, (B, L, 2, 2)), out=normal(rng, (B, L, 2, 2, 2)),
    )
    shape = (B, 2, 2, 4) if "k_" in initial + final else (B, 2, 2)
    states = normal(rng, shape)
    call = Call("ssd_chunk", **fields, **{initial: states, final: states.copy()}).with_workspace()
    assert call()[0] == "OK"
    assert_refused(call.set(**{final: states}), f"({initial}|{final}): .*share memory")
    # The same beside the states that may be one.
    own = FINAL[INITIAL.index(initial)]
    assert_refused(call.set(**{own: states.copy()}), f"({initial}|{final}): .*share memory")


def test_captures_are_outputs_like_others(call):
    for name in CAPTURED:
        final = call.tensors[name.replace("captured", "final")].array
        before = call.tensors[name].array
        assert_refused(call.set(**{name: final[:4]}), r"\w+: .*share memory")
        call.set(**{name: before})
    assert call()[0] == "OK"


# Workspace


CASES = {
    "mamba2": Ssd(2, 130, 4, 16, 32, 2),
    "packed": Ssd(1, 130, 4, nseq=5),
    "siso": Ssd(2, 130, 4, 16, 32, has=SISO),
    "mimo": Ssd(2, 130, 4, 7, 5, 1, 3, has=(*MIMO, "norm_weight")),
    "small": Ssd(1, 1, 1, 1, 1),
}


def ready(rng, p):
    """The call of a case, without a workspace; its outputs by name."""
    a = make(rng, p)
    a.pop("rotary")
    a = {k: int(v) if isinstance(v, bool) else v for k, v in a.items()}
    room = {"out": np.zeros(p.out_shape, F32)}
    for part, shape in p.state_shapes().items():
        room[f"final_{part}states"] = np.zeros((p.entries, *shape), F32)
    return Call("ssd_chunk", **a, **room), room


@pytest.mark.parametrize("p", CASES.values(), ids=CASES)
def test_workspace_of_every_wrong_size_and_place(rng, p):
    call, _ = ready(rng, p)
    size = call.workspace()[2]
    assert 0 < size < 2**32
    memory = np.zeros(size + 128, np.uint8)
    start = -(-memory.ctypes.data // 64) * 64
    call.set(workspace=ffi.cast("void *", start))
    for too_small in (0, 1, size // 2, size - 1):
        call.set(workspace_bytes=too_small)
        assert_refused(call, f"workspace: .*{size}.*got {too_small}", "OUT_OF_MEMORY")
    call.set(workspace=ffi.NULL, workspace_bytes=size)
    assert_refused(call, f"workspace: .*{size}.*got 0", "OUT_OF_MEMORY")
    for off in (1, 4, 32, 63):
        call.set(workspace=ffi.cast("void *", start + off), workspace_bytes=size)
        assert_refused(call, "workspace: must be aligned to 64 bytes, got")
    assert call.set(workspace=ffi.cast("void *", start))()[0] == "OK"


@pytest.mark.parametrize("p", CASES.values(), ids=CASES)
def test_workspace_is_not_read_before_it_is_written_nor_left(rng, p):
    """Whatever lies in it, the results are the same; what lies around it stays."""
    call, room = ready(rng, p)
    size = call.workspace()[2]
    results = []
    for fill in (0, 0xFF, 0x7F):  # zeros; NaN; large numbers, or NaN
        memory = np.full(size + 256, fill, np.uint8)
        start = -(-(memory.ctypes.data + 64) // 64) * 64
        call.set(workspace=ffi.cast("void *", start), workspace_bytes=size)
        assert call()[0] == "OK"
        first = start - memory.ctypes.data
        assert (memory[:first] == fill).all() and (memory[first + size :] == fill).all()
        results.append({name: array.copy() for name, array in room.items()})
    for name in room:
        assert np.isfinite(results[0][name]).all()
        for other in results[1:]:
            assert_same_bits(other[name], results[0][name], name)


def test_a_workspace_larger_than_needed_changes_nothing(rng):
    call, room = ready(rng, CASES["siso"])
    call.with_workspace()()
    want = {name: array.copy() for name, array in room.items()}
    memory = np.full(2**24, 0xFF, np.uint8)
    start = -(-memory.ctypes.data // 64) * 64
    call.set(workspace=ffi.cast("void *", start), workspace_bytes=2**24 - 64)
    assert call()[0] == "OK"
    for name in room:
        assert_same_bits(room[name], want[name], name)


def test_workspace_for_other_numbers_of_threads(rng, threads):
    """That of more threads serves fewer; that of fewer is refused, or does for all."""
    p = Ssd(3, 130, 8, 16, 16)
    call, room = ready(rng, p)
    threads(1)
    assert call.with_workspace()() == ("OK", "")
    want = {name: array.copy() for name, array in room.items()}
    for asked, called in ((8, 1), (8, 3), (3, 2), (1, 8), (2, 3)):
        threads(asked)
        size = call.workspace()[2]
        memory = np.full(size + 256, 0xFF, np.uint8)
        start = -(-(memory.ctypes.data + 64) // 64) * 64
        call.set(workspace=ffi.cast("void *", start), workspace_bytes=size)
        threads(called)
        for array in room.values():
            array[...] = np.nan
        status, message = call()
        end = start - memory.ctypes.data + size
        assert (memory[end:] == 0xFF).all()
        if asked < called and status == "OUT_OF_MEMORY":
            assert message.startswith("ssd_chunk: workspace: ")
            continue
        assert status == "OK", message
        for name in room:
            assert_same_bits(room[name], want[name], name)


def test_workspace_does_not_grow_with_the_sequence(rng):
    """It holds chunks and states, one of each a thread."""
    sizes = [ready(rng, Ssd(4, seqlen, 4, 16, 16))[0].workspace()[2] for seqlen in (256, 4096)]
    assert sizes[0] == sizes[1]


# From Python


def test_python_raises_what_c_answers(rng):
    a = make(rng, Ssd(1, 5, has=SISO))
    with pytest.raises(ValueError, match=r"^ssd_chunk: C: shape must be .*, got"):
        ssmk.ssd_chunk(**{**a, "B": a["B"][..., :3]})
    with pytest.raises(ValueError, match="^ssd_chunk: .*rotary"):
        ssmk.ssd_chunk(**{**a, "rotary": "pairs"})
    with pytest.raises(ValueError, match="^ssd_chunk: adt: must not be given together with A"):
        ssmk.ssd_chunk(**a, adt=a["dt"])
    with pytest.raises(ValueError, match="^ssd_chunk: A: one of A and adt"):
        ssmk.ssd_chunk(**{**a, "A": None})
    with pytest.raises(ValueError, match="^ssd_chunk: .*final_states.*state_indices"):
        ssmk.ssd_chunk(**a, state_indices=np.array([0]), return_final_states=True)
    with pytest.raises(ValueError, match="^ssd_chunk: capture_positions: "):
        ssmk.ssd_chunk(**a, capture_positions=np.array([1]))
    with pytest.raises(TypeError):
        ssmk.ssd_chunk(**a, chunk="64")


def test_python_refuses_states_that_are_read_only(rng):
    a = make(rng, Ssd(1, 5, has=SISO))
    final = np.zeros((1, 4, 16, 16), BF16)
    final.flags.writeable = False
    with pytest.raises((ValueError, BufferError), match=r"ssd_chunk: final_states: .*read-only"):
        ssmk.ssd_chunk(**a, final_states=final)
