# SPDX-License-Identifier: MIT
"""Decode over a latent cache of 4-bit codes.  It must read the cache once and multiply every value
with every head twice: the ceilings are the machine's rates of both."""

from types import SimpleNamespace

import numpy as np
import ssmk

from .. import peers, reference
from ..ceilings import by_set
from ..method import Case, Ceiling, Job, Peer, dtype_named, empty, normal, relative_error

TOLERANCE = (1e-2, 5e-2)  # of ssmk, of a peer: results in bf16
LATENT, ROPE, GROUP = 512, 64, 64
MULTIPLY_ADD_ROUNDS = 100000


def make_buffers(rng, batch, seqlen, nheads):
    bf16 = dtype_named("bf16")
    codes = empty((batch, seqlen, LATENT // 8), np.uint32)
    codes[...] = rng.integers(0, 2**32, codes.shape, np.uint32)
    groups = (batch, seqlen, LATENT // GROUP)
    return SimpleNamespace(
        q_nope=normal(rng, (batch, nheads, LATENT), bf16, 0.5),
        q_rope=normal(rng, (batch, nheads, ROPE), bf16),
        codes=codes,
        # Values of about -1 to 1; some of the scales are negative, as MLX makes them.
        scales=normal(rng, groups, bf16, 0.1),
        biases=normal(rng, groups, bf16, 0.5),
        k_rope=normal(rng, (batch, seqlen, ROPE), bf16),
        seqlens=np.full(batch, seqlen),
        out=empty((batch, nheads, LATENT), bf16),
    )


def inputs(b):
    return {name: array for name, array in vars(b).items() if name != "out"}


def cache_bytes(b):
    return sum(array.nbytes for array in (b.codes, b.scales, b.biases, b.k_rope))


def make_peer(sets, want):
    torch = peers.torch_module()
    shifts = torch.arange(8, dtype=torch.int32) * 4

    def attend(q_nope, q_rope, codes, scales, biases, k_rope):
        """In float32 throughout, as torch multiplies fastest on the CPU."""
        q = (codes[..., None] >> shifts) & 15
        q = q.view(*scales.shape, GROUP).float()
        values = torch.addcmul(biases.float()[..., None], q, scales.float()[..., None])
        values = values.view(*codes.shape[:2], LATENT)
        scores = torch.matmul(q_nope.float(), values.transpose(1, 2))
        scores = scores + torch.matmul(q_rope.float(), k_rope.float().transpose(1, 2))
        p = torch.softmax(scores * (LATENT + ROPE) ** -0.5, -1)
        return torch.matmul(p, values).to(q_nope.dtype)

    def tensors(b):
        given = {
            name: peers.shared(array)
            for name, array in inputs(b).items()
            if name not in ("seqlens", "codes")
        }
        return dict(given, codes=peers.shared(b.codes.view(np.int32)))

    prepared = [tensors(b) for b in sets]

    @torch.inference_mode()
    def run(i):
        return attend(**prepared[i])

    return Peer(
        "torch: dequantise, matmul, softmax, matmul",
        run,
        lambda: relative_error(peers.to_numpy(run(0)), want),
    )


def arithmetic(context, sets, products):
    variants = context.ceilings.multiply_add(MULTIPLY_ADD_ROUNDS)
    in_loop = next(iter(variants.values()))()
    return Ceiling(
        "its multiply-adds alone", by_set([variants] * len(sets)), products / in_loop
    )


def reading(context, sets, _):
    variants = by_set([context.ceilings.read(b.codes) for b in sets])
    return Ceiling(
        "reading the cache alone", variants, cache_bytes(sets[0]) / sets[0].codes.nbytes
    )


def prepare(batch, seqlen, nheads, ceiling, context):
    row = seqlen * (LATENT // 2 + 2 * 2 * (LATENT // GROUP) + 2 * ROPE)
    sets = context.make_sets(batch * row, lambda: make_buffers(context.rng, batch, seqlen, nheads))
    want = reference.mla_decode(**inputs(sets[0])).out

    def run(i):
        b = sets[i]
        ssmk.mla_decode(**inputs(b), out=b.out)

    def check():
        sets[0].out.fill(0)
        run(0)
        return relative_error(sets[0].out, want)

    products = batch * seqlen * nheads * (2 * LATENT + ROPE)
    return Job(
        sets=len(sets),
        run=run,
        check=check,
        tolerance=TOLERANCE[0],
        peer_tolerance=TOLERANCE[1],
        ceiling=ceiling(context, sets, products),
        amount=2 * products / 1e9,
        unit="GFLOP/s",
        peer=lambda: make_peer(sets, want),
    )


def cases():
    """With 16 heads and more the arithmetic binds; how far reading is from that is shown too."""
    shapes = ((4, 8192, 16), (1, 32768, 16), (1, 8192, 128))
    return [
        Case(
            family,
            f"int4, batch {batch}, {seqlen} tokens, {nheads} heads, {LATENT} + {ROPE}",
            lambda context, sizes=(batch, seqlen, nheads), ceiling=ceiling: prepare(
                *sizes, ceiling, context
            ),
            goal_share=goal,
        )
        for family, ceiling, goal, some in (
            ("mla_decode", arithmetic, 0.4, shapes),
            ("mla_decode_read", reading, None, ((4, 8192, 16), (4, 8192, 1))),
        )
        for batch, seqlen, nheads in some
    ]
