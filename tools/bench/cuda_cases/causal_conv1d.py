# SPDX-License-Identifier: MIT
"""causal_conv1d_update: a bf16 model's decode step, width 4, slots of a pool, silu and bias."""

import ssmk

from ..cuda import Case, Contender
from ..cuda_peers import Missing, causal_conv1d_update

WIDTH = 4
DIM = 5376  # channels of a Mamba-2 layer of 80 heads of 64, with B and C of one group of 128
BATCHES = (1, 4, 16, 64, 256, 1024)
# name, dtype of the state, inputs that it keeps, how it lies
STATES = (
    ("bf16 by channel", "bfloat16", 3, "channel"),
    ("bf16 by input", "bfloat16", 3, "input"),
    ("fp32 by channel", "float32", 4, "channel"),
)
TOLERANCE = 2e-2


def cases(context, only):
    for name, dtype, length, order in STATES:
        for batch in BATCHES:
            full = f"causal_conv1d_update {name}, batch {batch}"
            if only.search(full):
                yield case(context, full, getattr(context.torch, dtype), length, order, batch)
    full = "causal_conv1d_update bf16 by channel, 4 tokens, batch 64"
    if only.search(full):
        yield case(context, full, context.torch.bfloat16, 3, "channel", 64, tokens=4)


def case(context, name, dtype, length, order, batch, tokens=1):
    torch = context.torch
    bf16 = torch.bfloat16
    weight, bias = context.normal(DIM, WIDTH, dtype=bf16), context.normal(DIM, dtype=bf16)
    moved = batch * DIM * (2 * length * dtype.itemsize + tokens * 2 * bf16.itemsize)
    moved += DIM * (WIDTH + 1) * bf16.itemsize
    sets = context.sets_for(moved)
    shape = (batch, DIM) if tokens == 1 else (batch, tokens, DIM)
    buffers = []
    for _ in range(sets):
        state = context.normal(batch, DIM, length, dtype=dtype)
        if order == "input":
            state = state.swapaxes(1, 2).contiguous().swapaxes(1, 2)
        slots = torch.randperm(batch, generator=context.generator, device=context.device)
        x = context.normal(*shape, dtype=bf16)
        buffers.append((state, x, slots.to(torch.int32), torch.empty_like(x)))
    last = {} if tokens == 1 else {"channels_last": True}

    def run(i):
        state, x, slots, out = buffers[i]
        ssmk.causal_conv1d_update(
            x, state, weight, bias, activation="silu", state_indices=slots, out=out, **last
        )

    def want():
        state, x, slots, _ = buffers[0]
        x = x.reshape(batch, tokens, DIM).swapaxes(1, 2)
        window = torch.cat([state[slots.long()].float(), x.float()], -1)
        window = window[..., -(WIDTH - 1 + tokens):]
        out = torch.nn.functional.conv1d(window, weight.float()[:, None], bias.float(), groups=DIM)
        return torch.nn.functional.silu(out).swapaxes(1, 2).reshape(shape)

    def error():
        expected = want()
        run(0)
        return context.relative_error(buffers[0][3], expected)

    peers = []
    try:
        if dtype != bf16:
            raise Missing("takes one dtype only")
        if order == "input":
            raise Missing("takes states channel by channel only")
        update = causal_conv1d_update(context.peers)

        def run_peer(i):
            state, x, slots, out = buffers[i]
            channels_first = x if tokens == 1 else x.swapaxes(1, 2)
            return update(channels_first, state, weight, bias, "silu", None, slots)

        def peer_error():
            expected = want()
            got = run_peer(0)
            return context.relative_error(got if tokens == 1 else got.swapaxes(1, 2), expected)

        peers.append(Contender("causal-conv1d", run_peer, peer_error, TOLERANCE))
    except Missing as e:
        peers.append(("causal-conv1d", str(e)))
    return Case(name, moved, sets, Contender("ssmk", run, error, TOLERANCE), peers)
