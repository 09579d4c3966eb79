# SPDX-License-Identifier: MIT
"""Mamba-2 and Mamba-3 prefill.  A token adds x B^T to a head's state and multiplies that by C: two
multiply-adds an element of the state, and as many for every rank of a MIMO layer.  The ceiling is
the time of those alone at the machine's rate in registers; the products within a chunk, the decays
and the rotations are work of the method, and not counted."""

from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import ssmk

from .. import peers, reference
from ..ceilings import by_set
from ..method import Case, Ceiling, Job, Peer, dtype_named, empty, normal, relative_error

TOLERANCE = {"fp32": (2e-5, 1e-3), "bf16": (1e-2, 5e-2)}  # of ssmk, of a peer
BATCH, SEQLEN, HEADS, HEADDIM, DSTATE, GROUPS = 1, 2048, 24, 64, 128, 1
GOALS = {("fp32", False): 0.5, ("fp32", True): 0.35}
PEER_CHUNK = 256  # the chunk_size of transformers' Mamba2Config
CHECKED = np.array([0, HEADS // 2, HEADS - 1])  # heads

BY_TOKEN = ("x", "dt", "adt", "z", "trap", "angles")  # with heads on axis 2
BY_HEAD = ("A", "D", "dt_bias", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_out")


class Model(NamedTuple):
    shape: str
    rank: int = 0  # 0: Mamba-2
    rotary: str = "interleaved"


MODELS = {
    "mamba2": Model(f"{HEADS} x {HEADDIM}, dstate {DSTATE}, seqlen {SEQLEN}"),
    "mamba3 siso": Model(f"{HEADS} x {HEADDIM}, dstate {DSTATE}, seqlen {SEQLEN}", 1),
    "mamba3 mimo": Model(
        f"rank 4, {HEADS} x {HEADDIM}, dstate {DSTATE}, seqlen {SEQLEN}", 4, "half"
    ),
}


def make_buffers(rng, model, dtype):
    """Weights and steps as a fresh model has them; those that a layer keeps in float32 are."""
    values, tokens = (BATCH, SEQLEN, HEADS, HEADDIM), (BATCH, SEQLEN, HEADS)
    ranks = (model.rank,) if model.rank > 1 else ()
    projection = (BATCH, SEQLEN, *ranks, GROUPS, DSTATE)
    b = SimpleNamespace(
        x=normal(rng, values, dtype),
        dt=normal(rng, tokens, dtype, 0.5),
        A=-1 - 15 * rng.random(HEADS, np.float32),
        B=normal(rng, projection, dtype),
        C=normal(rng, projection, dtype),
        D=normal(rng, HEADS, np.float32),
        dt_bias=normal(rng, HEADS, np.float32, 0.5, -4.0),
        out=empty(values, dtype),
        final_states=empty((BATCH, HEADS, HEADDIM, DSTATE), np.float32),
    )
    if model.rank:
        bias, projected = (HEADS, model.rank, DSTATE), (HEADS, model.rank, HEADDIM)
        b.z = normal(rng, values, dtype)
        b.A, b.adt = None, normal(rng, tokens, np.float32)
        b.adt[...] = -0.02 * np.exp(b.adt)
        b.trap = normal(rng, tokens, dtype)
        # A quarter of dstate is turned, by the same angles in all heads.
        b.angles = np.broadcast_to(
            normal(rng, (BATCH, SEQLEN, 1, DSTATE // 4), dtype), (*tokens, DSTATE // 4)
        )
        b.B_bias = normal(rng, bias, np.float32, 0.1, 1.0)
        b.C_bias = normal(rng, bias, np.float32, 0.1, 1.0)
    if model.rank > 1:
        share = 1 / model.rank
        b.mimo_x = normal(rng, projected, np.float32, 0.1, share)
        b.mimo_z = normal(rng, projected, np.float32, 0.1, 1.0)
        b.mimo_out = normal(rng, projected, np.float32, 0.1, share)
    return b


def arguments(b, model):
    given = {name: v for name, v in vars(b).items() if name not in ("out", "final_states")}
    return dict(given, dt_softplus=True, rotary=model.rotary)


def wanted(b, model):
    """The reference's output and final states for the checked heads."""
    some = {}
    for name, v in arguments(b, model).items():
        if v is not None and name in BY_TOKEN:
            v = v[:, :, CHECKED]
        elif v is not None and name in BY_HEAD:
            v = v[CHECKED]
        some[name] = v
    out, final, _ = reference.ssd_chunk(**some)
    return out, final.h


def compare(out, states, want):
    return max(relative_error(out[:, :, CHECKED], want[0]),
               relative_error(states[:, CHECKED], want[1]))  # fmt: skip


def make_peer(sets, want):
    what, function = peers.transformers_function("mamba2", "mamba2_chunk_scan")
    torch = peers.torch_module()

    def given(b):
        names = ("x", "dt", "A", "B", "C", "D", "dt_bias")
        tensors = {name: peers.shared(getattr(b, name)) for name in names}
        hidden_states = tensors.pop("x")
        return dict(
            tensors, hidden_states=hidden_states, chunk_size=PEER_CHUNK, dt_softplus=True,
            return_final_states=True,
        )  # fmt: skip

    prepared = [given(b) for b in sets]

    @torch.inference_mode()
    def run(i):
        return function(**prepared[i])

    def check():
        out, states = run(0)
        return compare(peers.to_numpy(out), peers.to_numpy(states), want)

    return Peer(what, run, check)


def prepare(name, dtype_name, context):
    model, dtype = MODELS[name], dtype_named(dtype_name)
    set_bytes = (3 if model.rank else 2) * BATCH * SEQLEN * HEADS * HEADDIM * dtype.itemsize
    sets = context.make_sets(set_bytes, lambda: make_buffers(context.rng, model, dtype))
    want = wanted(sets[0], model)
    prepared = [arguments(b, model) for b in sets]

    def run(i):
        ssmk.ssd_chunk(**prepared[i], out=sets[i].out, final_states=sets[i].final_states)

    def check():
        b = sets[0]
        b.out.fill(0)
        b.final_states.fill(0)
        run(0)
        return compare(b.out, b.final_states, want)

    multiply_adds = 2 * BATCH * SEQLEN * HEADS * HEADDIM * DSTATE * max(model.rank, 1)
    variants = context.ceilings.multiply_add()
    measured = next(iter(variants.values()))()
    return Job(
        sets=len(sets),
        run=run,
        check=check,
        tolerance=TOLERANCE[dtype_name][0],
        peer_tolerance=TOLERANCE[dtype_name][1],
        ceiling=Ceiling(
            "the state's multiply-adds alone",
            by_set([variants] * len(sets)),
            multiply_adds / measured,
        ),
        amount=2 * multiply_adds / 1e9,
        unit="GFLOP/s",
        peer=None if model.rank else lambda: make_peer(sets, want),
    )


def cases():
    return [
        Case(
            "ssd_chunk",
            f"{name} {dtype}, {model.shape}",
            lambda context, name=name, dtype=dtype: prepare(name, dtype, context),
            goal_share=GOALS.get((dtype, bool(model.rank))),
            goal_peer=None if model.rank else 10.0,
        )
        for name, model in MODELS.items()
        for dtype in ("fp32", "bf16")
    ]
