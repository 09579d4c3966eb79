# SPDX-License-Identifier: MIT
"""mla_decode: calls that cannot work, beyond what test_bad_input.py asks of every operation."""

import numpy as np
import pytest

import ssmk
from capi import Call, Tensor, ffi
from cases import BF16, F32, I32, normal
from test_bad_input import B, H, T, assert_refused, sound


@pytest.fixture
def call(rng):
    """call(**changes): the sound call (pages of 4-bit codes, an append) with fields replaced."""
    return lambda **changes: Call(
        "mla_decode", **{**sound("mla_decode", rng), **changes}
    ).with_workspace()


@pytest.fixture
def floats(rng):
    """The same with a dense cache of floats, which is only read."""

    def make(**changes):
        fields = sound("mla_decode", rng)
        for name in ("codes", "scales", "biases", "page_table", "new_latent", "new_rope"):
            del fields[name]
        fields.update(latent=normal(rng, (B, 20, 64)), k_rope=normal(rng, (B, 20, 8)))
        return Call("mla_decode", **{**fields, **changes}).with_workspace()

    return make


def test_the_other_sound_call_is_sound(floats):
    assert floats()() == ("OK", "")


# One form of the cache


def test_two_forms_of_the_cache_or_none(call, floats, rng):
    latent = normal(rng, (5, 16, 64))
    assert_refused(call().set(latent=latent), "codes: must not be given together with latent")
    for name in ("scales", "biases"):
        tensor = normal(rng, (B, 20, 2))
        assert_refused(floats().set(**{name: tensor}), f"{name}: must not be given together")
    assert_refused(floats().set(latent=None), "latent: or codes, scales and biases .*, got NULL")


def test_parts_that_come_alone(floats, call, rng):
    assert_refused(floats().set(k_rope=None), "k_rope: is required")
    assert_refused(floats().set(q_rope=None), "q_rope: is required")
    assert_refused(floats().set(new_rope=normal(rng, (B, T, 8))), "new_rope: .*without new_latent")
    assert_refused(
        call().set(q_rope=None, k_rope=None), "new_rope: must not be given without k_rope"
    )


# Shapes


@pytest.mark.parametrize("dtype", (np.int32, np.int64, np.float32, np.uint8), ids=str)
def test_codes_are_uint32(call, dtype):
    codes = np.zeros((5, 16, 8), dtype)
    assert_refused(call().set(codes=codes), "codes: dtype must be uint32, got")


def test_lse_is_float32(floats, rng):
    lse = normal(rng, (B, T, H), BF16)
    assert_refused(floats().set(lse=lse), "lse: dtype must be float32, got bfloat16")


@pytest.mark.parametrize("groups", (0, 1, 3, 4, 64))
def test_groups_that_are_none(call, rng, groups):
    """latent 64: two groups of 32 or one of 64."""
    wrong = normal(rng, (5, 16, groups))
    if groups == 1:
        assert call(scales=wrong, biases=wrong.copy())()[0] == "OK"
    else:
        fields = dict(scales=wrong, biases=wrong.copy())
        pattern = rf"scales: .*latent = 64 and group 32, 64 or 128, got {groups}"
        assert_refused(call().set(**fields), pattern)
    assert_refused(call().set(biases=normal(rng, (5, 16, 4))), "biases: shape .*got")


def test_a_latent_that_no_codes_have(rng):
    fields = dict(
        q_nope=normal(rng, (1, 2, 36)), codes=np.zeros((1, 4, 4), np.uint32),
        scales=normal(rng, (1, 4, 1)), biases=normal(rng, (1, 4, 1)), seqlens=np.array([3]),
        out=normal(rng, (1, 2, 36)),
    )
    assert_refused(Call("mla_decode", **fields), "q_nope: latent must be a multiple of 8.*got 36")


def test_a_latent_of_nothing(rng):
    fields = dict(
        q_nope=normal(rng, (1, 2, 0)), latent=normal(rng, (1, 4, 0)), seqlens=np.array([3]),
        out=normal(rng, (1, 2, 0)),
    )
    assert_refused(Call("mla_decode", **fields), "q_nope: latent must be at least 1, got 0")


@pytest.mark.parametrize("page_size", (1, 2, 8, 15, 17, 24, 48))
def test_pages_of_a_size_that_is_no_power_of_two(call, rng, page_size):
    fields = dict(
        codes=np.zeros((5, page_size, 8), np.uint32), scales=normal(rng, (5, page_size, 2)),
        biases=normal(rng, (5, page_size, 2)), k_rope=normal(rng, (5, page_size, 8)),
    )
    assert_refused(
        call().set(**fields), f"codes: page_size must be a power of two .*16, got {page_size}"
    )


def test_a_time_axis_in_some_tensors_only(call, floats, rng):
    assert_refused(floats().set(q_rope=normal(rng, (B, H, 8))), "q_rope: shape must be .*T")
    assert_refused(floats().set(out=normal(rng, (B, H, 64))), "out: shape must be .*T")
    assert_refused(floats().set(lse=normal(rng, (B, H))), "lse: shape must be .*T")
    assert_refused(call().set(new_latent=normal(rng, (B, 64))), "new_latent: shape must be .*T")
    assert_refused(floats().set(q_nope=normal(rng, (B, 64))), r"q_nope: shape must be .*\[T,\]")


# Values


@pytest.mark.parametrize("dtype", (np.int32, np.int64), ids=str)
@pytest.mark.parametrize("value", (-1, 21, 2**31 - 1))
def test_lengths_out_of_range(floats, dtype, value):
    assert_refused(
        floats().set(seqlens=np.array([4, value], dtype)), f"seqlens: must be 0 to .*got {value}"
    )


@pytest.mark.parametrize("value", (-1, 0, 1, 33, 2**62))
def test_lengths_out_of_range_of_an_append(call, value):
    assert_refused(
        call().set(seqlens=np.array([value, 9])), f"seqlens: must be T to .*got {value}"
    )


@pytest.mark.parametrize("page", (-1, 5, 2**31 - 1))
def test_pages_out_of_range(call, page):
    table = np.array([[3, 0], [page, 4]], I32)
    assert_refused(call().set(page_table=table), f"page_table: .*pages - 1 = 4, got {page}")
    table = np.array([[3, 0], [1, page]], I32)  # a page that its row does not reach
    assert call(page_table=table)() == ("OK", "")


@pytest.mark.parametrize("table", ([[3, 0], [0, 4]], [[3, 3], [1, 4]], [[1, 0], [1, 4]]), ids=str)
def test_pages_that_are_written_and_used_elsewhere(call, table):
    """Row 0 writes its second page, row 1 its first."""
    assert_refused(
        call().set(page_table=np.array(table)), "page_table: a page that a row writes .*got page"
    )
    fields = dict(page_table=np.array(table), new_latent=None, new_rope=None)
    assert call(**fields)() == ("OK", "")


def test_pages_that_are_read_by_all_and_written_by_none(call):
    fields = dict(page_table=np.array([[3, 0], [3, 4]]), seqlens=np.array([20, 32]))
    assert call(**fields)() == ("OK", "")


def test_a_written_page_among_very_many(rng):
    rows, pages = 50, 40
    table = rng.permutation(rows * pages).reshape(rows, pages)
    table[31, 3] = table[7, pages - 1]
    fields = dict(
        q_nope=normal(rng, (rows, 1, 8)), latent=normal(rng, (rows * pages, 16, 8)),
        new_latent=normal(rng, (rows, 8)), seqlens=np.full(rows, 16 * pages),
        out=normal(rng, (rows, 1, 8)), page_table=table,
    )
    call = Call("mla_decode", **fields).with_workspace()
    assert_refused(call, f"page_table: .*got page {table[31, 3]} again as page")


@pytest.mark.parametrize("scale", (np.inf, -np.inf, np.nan))
def test_scales_that_are_no_numbers(floats, scale):
    assert_refused(floats().set(softmax_scale=scale), "softmax_scale: must be finite, got")


@pytest.mark.parametrize("flag", (2, 4, 8, 3))
def test_flags_of_other_operations(floats, flag):
    assert_refused(floats().set(flags=flag), "flags: must be .*got")
    assert floats(flags=1)() == ("OK", "")


# Memory


def test_a_cache_that_is_read_may_share_memory(floats, rng):
    """Latent and rope as two slices of one tensor, rows that are one: all fine without an append,
    and slices that touch no common byte with one."""
    both = normal(rng, (B, 20, 72))
    fields = dict(latent=both[..., :64], k_rope=both[..., 64:])
    assert floats(**fields)() == ("OK", "")
    new = dict(new_latent=normal(rng, (B, T, 64)), new_rope=normal(rng, (B, T, 8)))
    assert floats(**fields, **new)() == ("OK", "")
    same = dict(latent=both[..., :64], k_rope=both[..., :8])
    assert floats(**same)() == ("OK", "")
    assert_refused(floats(**same).set(**new), "(latent|k_rope): .*share memory")


def asked_for(shapes, **fields):
    """(status, bytes) of the workspace of a call of these shapes, of which there is no data."""
    call = Call("mla_decode", **fields)
    for name, shape in shapes.items():
        tensor = Tensor(np.zeros(1, np.int64 if name == "seqlens" else F32))
        tensor.reshape(shape, [0] * len(shape))
        tensor.c.data = ffi.NULL
        call.set(**{name: tensor})
    status, _, size = call.workspace()
    return status, size


def test_workspace_sizes_that_no_machine_has():
    """Products beyond 64 bits: more than anyone has, and no wrapped-around few."""
    huge = (2**20, 2**20, 2**10)
    shapes = dict(q_nope=huge, latent=huge, seqlens=(2**20,), out=huge)
    status, size = asked_for(shapes)
    assert status == "OK" and size > 2**52


@pytest.mark.parametrize("flags", (0, 1))
def test_the_workspace_of_a_large_model_is_moderate(flags):
    """A batch of 64 rows of up to 128 K tokens, 128 heads."""
    query = (64, 128, 512)
    shapes = dict(q_nope=query, latent=(64, 2**17, 512), seqlens=(64,), out=query)
    status, size = asked_for(shapes, flags=flags)
    assert status == "OK" and 2**20 < size < (2**26 if flags == 0 else 2**28), size


def test_python_raises(rng):
    q, seqlens = normal(rng, (1, 2, 32)), np.array([3])
    latent = normal(rng, (1, 4, 32))
    with pytest.raises(ValueError, match="^mla_decode: latent: or codes, scales and biases"):
        ssmk.mla_decode(q, seqlens)
    with pytest.raises(ValueError, match="^mla_decode: seqlens: dtype must be int32 or int64"):
        ssmk.mla_decode(q, seqlens.astype(F32), latent=latent)
    with pytest.raises(ValueError, match="^mla_decode: k_rope: is required"):
        ssmk.mla_decode(q, seqlens, latent=latent, q_rope=q)
