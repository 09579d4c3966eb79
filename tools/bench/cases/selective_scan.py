# SPDX-License-Identifier: MIT
"""Mamba-1 prefill.  One exponential per token, channel and state is what it cannot do without: the
ceiling is the time that those alone take in registers and L1."""

from types import SimpleNamespace

import numpy as np
import ssmk

from .. import peers, reference
from ..ceilings import by_set
from ..method import Case, Ceiling, Job, Peer, dtype_named, empty, normal, relative_error

TOLERANCE = {"fp32": (2e-5, 1e-3), "bf16": (1e-2, 5e-2)}  # of ssmk, of a peer
BATCH, DIM, SEQLEN, DSTATE = 1, 1536, 2048, 16
CHECKED = np.linspace(0, DIM - 1, 9).astype(int)  # channels


def make_buffers(rng, dtype, channels_last):
    shape = (BATCH, SEQLEN, DIM) if channels_last else (BATCH, DIM, SEQLEN)
    projection = (BATCH, SEQLEN, DSTATE) if channels_last else (BATCH, DSTATE, SEQLEN)
    # A and the steps as a fresh model has them: A = -1 .. -dstate, dt' from a few thousandths to a
    # tenth.
    return SimpleNamespace(
        x=normal(rng, shape, dtype),
        dt=normal(rng, shape, dtype, 0.5),
        z=normal(rng, shape, dtype),
        A=-np.tile(np.arange(1, DSTATE + 1, dtype=np.float32), (DIM, 1)),
        B=normal(rng, projection, dtype),
        C=normal(rng, projection, dtype),
        D=normal(rng, DIM, np.float32),
        dt_bias=normal(rng, DIM, np.float32, 0.5, -4.0),
        out=empty(shape, dtype),
    )


def wanted(b, channels_last):
    """The reference's output for the checked channels."""
    some = lambda v: v[..., CHECKED] if channels_last else v[:, CHECKED]
    out, _ = reference.selective_scan(
        some(b.x),
        some(b.dt),
        b.A[CHECKED],
        b.B,
        b.C,
        b.D[CHECKED],
        some(b.z),
        b.dt_bias[CHECKED],
        dt_softplus=True,
        channels_last=channels_last,
    )
    return out


def make_peer(sets, channels_last, want):
    what, function = peers.transformers_function("mamba", "mamba_selective_scan")
    torch = peers.torch_module()

    def arguments(b):
        tensors = {name: peers.shared(v) for name, v in vars(b).items() if name != "out"}
        if channels_last:
            # As transformers itself does: it takes views of (batch, seqlen, dim) tensors.
            for name in ("x", "dt", "z", "B", "C"):
                tensors[name] = tensors[name].transpose(1, 2)
        return dict(
            hidden_states=tensors["x"],
            dt=tensors["dt"],
            A=tensors["A"],
            B=tensors["B"],
            C=tensors["C"],
            D=tensors["D"],
            z=tensors["z"],
            delta_bias=tensors["dt_bias"],
            delta_softplus=True,
        )

    prepared = [arguments(b) for b in sets]

    @torch.inference_mode()
    def run(i):
        return function(**prepared[i])

    def check():
        got = peers.to_numpy(run(0)[:, CHECKED])
        return relative_error(got.swapaxes(1, 2) if channels_last else got, want)

    return Peer(what, run, check)


def prepare(dtype_name, channels_last, context):
    dtype = dtype_named(dtype_name)
    set_bytes = 4 * BATCH * DIM * SEQLEN * dtype.itemsize
    sets = context.make_sets(set_bytes, lambda: make_buffers(context.rng, dtype, channels_last))
    want = wanted(sets[0], channels_last)

    def run(i):
        b = sets[i]
        ssmk.selective_scan(
            b.x,
            b.dt,
            b.A,
            b.B,
            b.C,
            b.D,
            b.z,
            b.dt_bias,
            dt_softplus=True,
            channels_last=channels_last,
            out=b.out,
        )

    def check():
        out = sets[0].out
        out.fill(0)
        run(0)
        return relative_error(out[..., CHECKED] if channels_last else out[:, CHECKED], want)

    exponentials = BATCH * DIM * SEQLEN * DSTATE
    variants = context.ceilings.exponential()
    measured = next(iter(variants.values()))()
    return Job(
        sets=len(sets),
        run=run,
        check=check,
        tolerance=TOLERANCE[dtype_name][0],
        peer_tolerance=TOLERANCE[dtype_name][1],
        ceiling=Ceiling(
            "its exponentials alone", by_set([variants] * len(sets)), exponentials / measured
        ),
        amount=exponentials / 1e9,
        unit="Gexp/s",
        peer=lambda: make_peer(sets, channels_last, want),
    )


def cases():
    return [
        Case(
            "selective_scan",
            f"{dtype} {layout}, dim {DIM}, dstate {DSTATE}, seqlen {SEQLEN}",
            lambda context, dtype=dtype, last=last: prepare(dtype, last, context),
            goal_share=0.3,
            goal_peer=40.0,
        )
        for dtype in ("fp32", "bf16")
        for layout, last in (("(D, L)", False), ("(L, D)", True))
    ]
