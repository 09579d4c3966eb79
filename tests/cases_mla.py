# SPDX-License-Identifier: MIT
"""mla_decode: random well-conditioned calls, and the check of one against the reference."""

from dataclasses import dataclass

import numpy as np

import reference
from cases import (
    F32, I64, TOLERANCE, Untouched, assert_close, assert_same_bits, blank, laid, normal, place,
)

QUANTISED = ("codes", "scales", "biases")
CACHE = ("latent", *QUANTISED, "k_rope")
FORMS = ("latent", "codes")
U32 = np.dtype(np.uint32)


@dataclass
class Mla:
    """Sizes and choices of a call; make() draws the values."""

    batch: int = 3
    T: int = None  # None: no T axis
    nheads: int = 4
    latent: int = 64
    rope: int = 16  # 0: none
    group: int = 32  # 0: the cache holds floats
    capacity: int = 80  # positions of a row; in pages a multiple of page_size
    seqlens: tuple = None  # None: random
    page_size: int = None  # None: dense
    spare: int = 3  # pages that no row uses
    append: bool = False
    softmax_scale: float = None
    dtype: object = F32
    index_dtype: object = I64
    layout: str = "packed"
    sharpness: float = 1.0  # of the scores

    def dtype_of(self, name):
        if isinstance(self.dtype, dict):
            return np.dtype(self.dtype.get(name, F32))
        return np.dtype(self.dtype)

    @property
    def tokens(self):
        return 1 if self.T is None else self.T

    @property
    def time(self):
        return () if self.T is None else (self.T,)


def draw_latents(rng, shape):
    """What a latent looks like: channels of different size and mean."""
    channels = shape[-1]
    return normal(rng, shape) * rng.uniform(0.3, 2, channels).astype(F32) + normal(
        rng, channels, scale=0.3
    )


def quantised(values, group, p):
    codes, scales, biases = reference.quantize(values, group)
    return {
        "codes": codes, "scales": scales.astype(p.dtype_of("scales")),
        "biases": biases.astype(p.dtype_of("biases")),
    }


def make_cache(rng, p):
    """The cache tensors by name, noise in all places, pages that no row uses among them."""
    if p.page_size is None:
        rows, positions = p.batch, p.capacity
    else:
        rows, positions = p.batch * (p.capacity // p.page_size) + p.spare, p.page_size
    values = draw_latents(rng, (rows, positions, p.latent))
    if p.group:
        cache = quantised(values, p.group, p)
    else:
        cache = {"latent": values.astype(p.dtype_of("latent"))}
    if p.rope:
        cache["k_rope"] = normal(rng, (rows, positions, p.rope), p.dtype_of("k_rope"))
    return cache


def make(rng, p):
    """(arguments besides the cache and out, {name: Placed} of the cache)."""
    a = {"q_nope": normal(rng, (p.batch, *p.time, p.nheads, p.latent), p.dtype_of("q_nope"))}
    a["q_nope"] *= np.asarray(p.sharpness, a["q_nope"].dtype)
    if p.rope:
        a["q_rope"] = normal(rng, (p.batch, *p.time, p.nheads, p.rope), p.dtype_of("q_rope"))
    if p.seqlens is None:
        least = p.tokens if p.append else 0
        seqlens = rng.integers(least, p.capacity + 1, p.batch)
    else:
        seqlens = np.resize(p.seqlens, p.batch)
    a["seqlens"] = seqlens.astype(p.index_dtype)
    if p.page_size is not None:
        count = p.capacity // p.page_size
        pages = rng.permutation(p.batch * count + p.spare)[: p.batch * count]
        a["page_table"] = pages.reshape(p.batch, count).astype(p.index_dtype)
        for row, seqlen in enumerate(seqlens):  # what the row does not use is not read
            a["page_table"][row, -(-seqlen // p.page_size) :] = rng.choice([-1, 10**6])
    if p.append:
        new = draw_latents(rng, (p.batch, *p.time, p.latent))
        a["new_latent"] = new.astype(p.dtype_of("new_latent"))
        if p.rope:
            a["new_rope"] = normal(rng, (p.batch, *p.time, p.rope), p.dtype_of("new_rope"))
    a = {name: laid(rng, array, p.layout) for name, array in a.items()}
    if p.softmax_scale is not None:
        a["softmax_scale"] = p.softmax_scale
    placed = {name: place(rng, array, p.layout) for name, array in make_cache(rng, p).items()}
    return a, placed


def arrays_of(placed):
    return {name: one.array for name, one in placed.items()}


def assert_decoded(out, lse, want, dtype=None):
    assert_close(out, want.out, "out", dtype)
    nothing = np.isneginf(want.lse)
    assert np.isneginf(lse[nothing]).all() and (out[nothing] == 0).all()
    error = np.abs(lse[~nothing] - want.lse[~nothing])
    bound = TOLERANCE[F32] * max(1, np.abs(want.lse[~nothing]).max(initial=0))
    assert error.max(initial=0) <= bound, f"lse: error {error.max()}, allowed {bound}"


def check(ops, rng, p, **more):
    """Runs one call, compares it with the reference, and returns (arguments, cache, out, lse)."""
    a, placed = make(rng, p)
    cache = arrays_of(placed)
    before = {name: array.copy() for name, array in cache.items()}
    want = reference.mla_decode(**a, **before)
    out = blank(rng, a["q_nope"].shape, p.dtype_of("out"), p.layout)
    lse = blank(rng, a["q_nope"].shape[:-1], F32, p.layout)
    inputs = Untouched(**a)

    result = ops.mla_decode(**a, **cache, out=out.array, lse=lse.array, **more)

    assert result[0] is out.array and result[1] is lse.array
    assert_decoded(out.array, lse.array, want)
    out.assert_gaps_untouched()
    lse.assert_gaps_untouched("lse")
    inputs.check()
    for name, array in cache.items():  # the cache afterwards is known to the bit
        assert_same_bits(array, want.cache[name], name)
        placed[name].assert_gaps_untouched(name)
    return a, cache, out.array, lse.array


def run(ops, a, cache, **more):
    """(out, lse, the cache afterwards) of a call on a copy of the cache."""
    cache = {name: array.copy() for name, array in cache.items()}
    out, lse = ops.mla_decode(**{**a, **more}, **cache, return_lse=True)
    return out, lse, cache


def assert_same_run(got, want):
    assert_same_bits(got[0], want[0], "out")
    assert_same_bits(got[1], want[1], "lse")
    for name, array in want[2].items():
        assert_same_bits(got[2][name], array, name)
