# SPDX-License-Identifier: MIT
"""The short convolution.  It reads its input and writes its output: the ceiling is the machine's
copy from the one to the other.  Its decode step reads and writes the state as well."""

from types import SimpleNamespace

import numpy as np
import ssmk

from .. import peers, reference
from ..ceilings import by_set
from ..method import Case, Ceiling, Job, Peer, dtype_named, empty, normal, relative_error

TOLERANCE = {"fp32": (2e-5, 1e-4), "bf16": (1e-2, 5e-2)}  # of ssmk, of a peer
WIDTH = 4
BATCH, SEQLEN = 4, 2048
UPDATE_BATCH, UPDATE_DIM = 256, 5120


# Prefill


def make_buffers(rng, dim, dtype, channels_last):
    shape = (BATCH, SEQLEN, dim) if channels_last else (BATCH, dim, SEQLEN)
    return SimpleNamespace(
        x=normal(rng, shape, dtype),
        weight=normal(rng, (dim, WIDTH), dtype, 0.5),
        bias=normal(rng, dim, dtype, 0.5),
        out=empty(shape, dtype),
    )


def prefill_peer(sets, channels_last, some, want):
    torch = peers.torch_module()
    functional = torch.nn.functional

    def arguments(b):
        x, weight, bias = (peers.shared(v) for v in (b.x, b.weight, b.bias))
        return (x.transpose(1, 2) if channels_last else x), weight[:, None], bias

    prepared = [arguments(b) for b in sets]

    @torch.inference_mode()
    def run(i):
        x, weight, bias = prepared[i]
        return functional.silu(
            functional.conv1d(x, weight, bias, padding=WIDTH - 1, groups=x.shape[1])[..., :SEQLEN]
        )

    def check():
        got = run(0)
        return relative_error(
            some(peers.to_numpy(got.transpose(1, 2) if channels_last else got)), want
        )

    return Peer("torch conv1d + silu", run, check)


def prepare_prefill(dim, dtype_name, channels_last, context):
    dtype = dtype_named(dtype_name)
    set_bytes = 2 * BATCH * dim * SEQLEN * dtype.itemsize
    sets = context.make_sets(
        set_bytes, lambda: make_buffers(context.rng, dim, dtype, channels_last)
    )
    checked = np.linspace(0, dim - 1, 9).astype(int)  # channels
    some = lambda v: v[..., checked] if channels_last else v[:, checked]
    b = sets[0]
    want, _ = reference.causal_conv1d(
        some(b.x),
        b.weight[checked],
        b.bias[checked],
        activation="silu",
        channels_last=channels_last,
    )

    def run(i):
        b = sets[i]
        ssmk.causal_conv1d(
            b.x, b.weight, b.bias, activation="silu", channels_last=channels_last, out=b.out
        )

    def check():
        sets[0].out.fill(0)
        run(0)
        return relative_error(some(sets[0].out), want)

    return Job(
        sets=len(sets),
        run=run,
        check=check,
        tolerance=TOLERANCE[dtype_name][0],
        peer_tolerance=TOLERANCE[dtype_name][1],
        ceiling=Ceiling(
            "copy of input to output", by_set([context.ceilings.copy(b.out, b.x) for b in sets])
        ),
        amount=set_bytes / 1e9,
        unit="GB/s",
        peer=lambda: prefill_peer(sets, channels_last, some, want),
    )


# Decode


def make_update_buffers(rng, dtype):
    token = (UPDATE_BATCH, UPDATE_DIM)
    return SimpleNamespace(
        x=normal(rng, token, dtype),
        conv_state=normal(rng, (*token, WIDTH - 1), dtype),
        weight=normal(rng, (UPDATE_DIM, WIDTH), dtype, 0.5),
        bias=normal(rng, UPDATE_DIM, dtype, 0.5),
        out=empty(token, dtype),
    )


def update_peer(sets):
    what, function = peers.transformers_function("mamba", "causal_conv1d_update")
    torch = peers.torch_module()

    def arguments(b, rows=slice(None)):
        return peers.shared(b.x[rows])[..., None], peers.shared(b.weight), peers.shared(b.bias)

    prepared = [(peers.shared(b.conv_state), *arguments(b)) for b in sets]

    @torch.inference_mode()
    def run(i):
        state, x, weight, bias = prepared[i]
        return function(x, state, weight, bias, "silu")

    @torch.inference_mode()
    def check():
        b, rows = sets[0], slice(0, 2)
        state = b.conv_state[rows].copy()
        want, pool = reference.causal_conv1d_update(
            b.x[rows], state, b.weight, b.bias, activation="silu"
        )
        tensor = peers.shared(state)
        x, weight, bias = arguments(b, rows)
        got = function(x, tensor, weight, bias, "silu")[..., 0]
        return max(
            relative_error(peers.to_numpy(got), want), relative_error(peers.to_numpy(tensor), pool)
        )

    return Peer(what, run, check)


def prepare_update(dtype_name, context):
    dtype = dtype_named(dtype_name)
    state_bytes = UPDATE_BATCH * UPDATE_DIM * (WIDTH - 1) * dtype.itemsize
    token_bytes = UPDATE_BATCH * UPDATE_DIM * dtype.itemsize
    sets = context.make_sets(
        state_bytes + 2 * token_bytes, lambda: make_update_buffers(context.rng, dtype)
    )

    def run(i):
        b = sets[i]
        ssmk.causal_conv1d_update(b.x, b.conv_state, b.weight, b.bias, activation="silu", out=b.out)

    def check():
        b, rows = sets[0], [0, UPDATE_BATCH // 2, UPDATE_BATCH - 1]
        want, pool = reference.causal_conv1d_update(
            b.x[rows], b.conv_state[rows], b.weight, b.bias, activation="silu"
        )
        run(0)
        return max(relative_error(b.out[rows], want), relative_error(b.conv_state[rows], pool))

    def ceiling(b):
        state = context.ceilings.update(b.conv_state)["as bits"]
        return {
            name: lambda copy=copy: (state(), copy())
            for name, copy in context.ceilings.copy(b.out, b.x).items()
        }

    return Job(
        sets=len(sets),
        run=run,
        check=check,
        tolerance=TOLERANCE[dtype_name][0],
        peer_tolerance=TOLERANCE[dtype_name][1],
        ceiling=Ceiling(
            "read-modify-write of the state, copy of input to output",
            by_set([ceiling(b) for b in sets]),
        ),
        amount=2 * (state_bytes + token_bytes) / 1e9,
        unit="GB/s",
        peer=lambda: update_peer(sets),
    )


def cases():
    prefill = [
        Case(
            "causal_conv1d",
            f"{dtype} {layout}, batch {BATCH}, dim {dim}, seqlen {SEQLEN}",
            lambda context, dim=dim, dtype=dtype, last=last: prepare_prefill(
                dim, dtype, last, context
            ),
            goal_share=0.7,
        )
        for dim in (1536, 5120)
        for dtype in ("fp32", "bf16")
        for layout, last in (("(D, L)", False), ("(L, D)", True))
    ]
    update = [
        Case(
            "causal_conv1d_update",
            f"{dtype}, batch {UPDATE_BATCH}, dim {UPDATE_DIM}, width {WIDTH}",
            lambda context, dtype=dtype: prepare_update(dtype, context),
        )
        for dtype in ("fp32", "bf16")
    ]
    return prefill + update
