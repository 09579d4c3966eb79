# SPDX-License-Identifier: MIT
"""Decode.  It must read and write the state, and no step is faster than that: the ceiling is the
machine's in-place read-modify-write on the very same memory, larger than the caches."""

from types import SimpleNamespace
from typing import Callable, NamedTuple

import numpy as np
import ssmk

from .. import peers, reference
from ..ceilings import by_set
from ..method import Case, Ceiling, Job, Peer, dtype_named, empty, normal, relative_error

TOLERANCE = {"fp32": (2e-5, 1e-4), "bf16": (1e-2, 5e-2)}  # of ssmk, of a peer
GOAL = 0.8


def mamba1_buffers(rng, batch, dtype):
    dim, dstate = 5120, 16
    token = lambda scale=1.0: normal(rng, (batch, dim), dtype, scale)
    return SimpleNamespace(
        state=normal(rng, (batch, dim, dstate), dtype),
        x=token(),
        dt=token(0.5),
        z=token(),
        A=-np.tile(np.arange(1, dstate + 1, dtype=np.float32), (dim, 1)),
        B=normal(rng, (batch, dstate), dtype),
        C=normal(rng, (batch, dstate), dtype),
        D=normal(rng, dim, np.float32),
        dt_bias=normal(rng, dim, np.float32, 0.5, -4.0),
        out=empty((batch, dim), dtype),
    )


def mamba2_buffers(rng, batch, dtype):
    nheads, headdim, dstate, ngroups = 80, 64, 128, 1
    return SimpleNamespace(
        state=normal(rng, (batch, nheads, headdim, dstate), dtype),
        x=normal(rng, (batch, nheads, headdim), dtype),
        dt=normal(rng, (batch, nheads), dtype, 0.5),
        z=None,
        A=-1 - 15 * rng.random(nheads, np.float32),
        B=normal(rng, (batch, ngroups, dstate), dtype),
        C=normal(rng, (batch, ngroups, dstate), dtype),
        D=normal(rng, nheads, np.float32),
        dt_bias=normal(rng, nheads, np.float32, 0.5, -4.0),
        out=empty((batch, nheads, headdim), dtype),
    )


def mamba3_buffers(rng, batch, dtype, rank):
    nheads, headdim, dstate, ngroups, nangles = 32, 64, 128, 1, 32
    per_rank = (nheads, rank, headdim)
    mimo = rank > 1
    return SimpleNamespace(
        rank=rank,
        state=normal(rng, (batch, nheads, headdim, dstate), dtype),
        angle_state=np.mod(normal(rng, (batch, nheads, nangles), np.float32), 6.28),
        k_state=normal(rng, (batch, rank, nheads, dstate), dtype),
        v_state=normal(rng, (batch, nheads, headdim), dtype),
        x=normal(rng, (batch, nheads, headdim), dtype),
        dt=0.01 + 0.1 * rng.random((batch, nheads), np.float32),
        adt=-0.01 - rng.random((batch, nheads), np.float32),
        z=normal(rng, (batch, nheads, headdim), dtype),
        B=normal(rng, (batch, rank, ngroups, dstate), dtype),
        C=normal(rng, (batch, rank, ngroups, dstate), dtype),
        D=normal(rng, nheads, np.float32),
        trap=normal(rng, (batch, nheads), dtype),
        angles=normal(rng, (batch, nangles), dtype),
        B_bias=normal(rng, (nheads, rank, dstate), np.float32),
        C_bias=normal(rng, (nheads, rank, dstate), np.float32),
        mimo_x=normal(rng, per_rank, np.float32) if mimo else None,
        mimo_z=normal(rng, per_rank, np.float32) if mimo else None,
        mimo_out=normal(rng, per_rank, np.float32) if mimo else None,
        out=empty((batch, nheads, headdim), dtype),
    )


def mamba3_arguments(b, rows=slice(None)):
    """Arguments after the states, of some rows of the batch."""
    tokens = ("x", "dt", "adt", "z", "B", "C", "trap", "angles")
    weights = ("D", "B_bias", "C_bias", "mimo_x", "mimo_z", "mimo_out")
    return dict(
        {name: getattr(b, name)[rows] for name in tokens},
        A=None,
        **{name: getattr(b, name) for name in weights},
        rotary="half" if b.rank > 1 else "interleaved",
    )


MAMBA3_STATES = ("state", "angle_state", "k_state", "v_state")


def weights_and_tokens(b, rows=slice(None)):
    """Arguments after the state, of some rows of the batch."""
    return dict(
        x=b.x[rows],
        dt=b.dt[rows],
        A=b.A,
        B=b.B[rows],
        C=b.C[rows],
        D=b.D,
        z=None if b.z is None else b.z[rows],
        dt_bias=b.dt_bias,
    )


def as_they_are(arguments):
    return arguments


def spread_over_heads(arguments):
    """transformers wants what is one number per head spread over headdim and dstate."""
    a = arguments
    headdim, dstate = a["x"].shape[-1], a["B"].shape[-1]
    spread = lambda v: v[..., None].expand(*v.shape, headdim)
    return dict(
        a,
        dt=spread(a["dt"]),
        D=spread(a["D"]),
        dt_bias=spread(a["dt_bias"]),
        A=spread(a["A"])[..., None].expand(-1, -1, dstate),
    )


class Model(NamedTuple):
    shape: str
    state: int  # elements of one row's
    buffers: Callable
    peer: tuple  # model and function in transformers
    peer_arguments: Callable


MODELS = {
    "mamba2": Model(
        "80 x 64, dstate 128",
        80 * 64 * 128,
        mamba2_buffers,
        ("mamba2", "mamba2_selective_state_update"),
        spread_over_heads,
    ),
    "mamba1": Model(
        "dim 5120, dstate 16",
        5120 * 16,
        mamba1_buffers,
        ("mamba", "mamba_selective_state_update"),
        as_they_are,
    ),
}


def make_peer(model, sets):
    what, function = peers.transformers_function(*model.peer)
    torch = peers.torch_module()

    def arguments(b, rows=slice(None)):
        given = model.peer_arguments(
            {
                name: None if v is None else peers.shared(v)
                for name, v in weights_and_tokens(b, rows).items()
            }
        )
        return dict(given, hidden_states=given.pop("x"))

    prepared = [(peers.shared(b.state), arguments(b)) for b in sets]

    @torch.inference_mode()
    def run(i):
        state, given = prepared[i]
        return function(state, dt_softplus=True, **given)

    @torch.inference_mode()
    def check():
        rows = slice(0, 2)
        state = sets[0].state[rows].copy()
        want = reference.state_update(state, dt_softplus=True, **weights_and_tokens(sets[0], rows))
        tensor = peers.shared(state)
        got = function(tensor, dt_softplus=True, **arguments(sets[0], rows))
        return max(
            relative_error(peers.to_numpy(got), want.out),
            relative_error(peers.to_numpy(tensor), want.states["state"]),
        )

    return Peer(what, run, check)


def prepare(model, dtype_name, context):
    dtype = dtype_named(dtype_name)
    row = model.state * dtype.itemsize
    batch = context.at_least(row)
    # x, dt, z and out together are a quarter of Mamba-1's state, and less of Mamba-2's.
    sets = context.make_sets(
        int(1.25 * batch * row), lambda: model.buffers(context.rng, batch, dtype)
    )

    def run(i):
        b = sets[i]
        ssmk.state_update(
            b.state, b.x, b.dt, b.A, b.B, b.C, b.D, b.z, b.dt_bias, dt_softplus=True, out=b.out
        )

    def check():
        b, rows = sets[0], [0, batch // 2, batch - 1]
        want = reference.state_update(
            b.state[rows], dt_softplus=True, **weights_and_tokens(b, rows)
        )
        run(0)
        return max(
            relative_error(b.out[rows], want.out),
            relative_error(b.state[rows], want.states["state"]),
        )

    variants = by_set([context.ceilings.update(b.state) for b in sets])
    return Job(
        sets=len(sets),
        run=run,
        check=check,
        tolerance=TOLERANCE[dtype_name][0],
        peer_tolerance=TOLERANCE[dtype_name][1],
        ceiling=Ceiling("in-place read-modify-write of the state", variants),
        amount=2 * sets[0].state.nbytes / 1e9,
        unit="GB/s",
        peer=lambda: make_peer(model, sets),
    )


def prepare_mamba3(rank, dtype_name, context):
    dtype = dtype_named(dtype_name)
    row = 32 * 64 * 128 * dtype.itemsize
    batch = context.at_least(row)
    sets = context.make_sets(
        int(1.25 * batch * row), lambda: mamba3_buffers(context.rng, batch, dtype, rank)
    )
    calls = [
        dict(
            {name: getattr(b, name) for name in MAMBA3_STATES}, **mamba3_arguments(b), out=b.out
        )
        for b in sets
    ]

    def check():
        b, rows = sets[0], [0, batch // 2, batch - 1]
        states = {name: getattr(b, name)[rows] for name in MAMBA3_STATES}
        want = reference.state_update(**states, **mamba3_arguments(b, rows))
        ssmk.state_update(**calls[0])
        return max(
            relative_error(b.out[rows], want.out),
            *(
                relative_error(getattr(b, name)[rows], want.states[name])
                for name in ("state", "k_state", "v_state")
            ),
        )

    return Job(
        sets=len(sets),
        run=lambda i: ssmk.state_update(**calls[i]),
        check=check,
        tolerance=TOLERANCE[dtype_name][0],
        peer_tolerance=TOLERANCE[dtype_name][1],
        ceiling=Ceiling(
            "in-place read-modify-write of the state",
            by_set([context.ceilings.update(b.state) for b in sets]),
        ),
        amount=2 * sets[0].state.nbytes / 1e9,
        unit="GB/s",
    )


def cases():
    return [
        Case(
            "state_update",
            f"{name} {dtype}, {model.shape}",
            lambda context, model=model, dtype=dtype: prepare(model, dtype, context),
            goal_share=GOAL,
        )
        for name, model in MODELS.items()
        for dtype in ("fp32", "bf16")
    ] + [
        Case(
            "state_update",
            f"mamba3 {kind} {dtype}, 32 x 64, dstate 128",
            lambda context, rank=rank, dtype=dtype: prepare_mamba3(rank, dtype, context),
        )
        for kind, rank in (("SISO", 1), ("rank 4", 4))
        for dtype in ("fp32", "bf16")
    ]
