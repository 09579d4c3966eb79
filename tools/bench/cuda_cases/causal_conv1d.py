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
# The same with several tokens (channels_last or not), with a ring of inputs, with an odd number of
# channels: what is beside the packed layouts of one token
MORE = (
    ("bf16 by channel, 4 tokens", "channel", (1, 16, 64, 256), dict(tokens=4)),
    ("bf16 by input, 4 tokens", "input", (64,), dict(tokens=4)),
    ("bf16 by channel, 4 tokens side by side", "channel", (64,), dict(tokens=4, last=False)),
    ("bf16 by channel, 3 tokens side by side", "channel", (64,), dict(tokens=3, last=False)),
    ("bf16 ring of 8", "ring", (1, 64), {}),
    ("bf16 ring of 8, 4 tokens", "ring", (64,), dict(tokens=4)),
    ("bf16 by channel, odd channels", "channel", (1, 64, 256), dict(dim=DIM + 1)),
)
TOLERANCE = 2e-2


def cases(context, only):
    for name, dtype, length, order in STATES:
        for batch in BATCHES:
            full = f"causal_conv1d_update {name}, batch {batch}"
            if only.search(full):
                yield case(context, full, getattr(context.torch, dtype), length, order, batch)
    for name, order, batches, more in MORE:
        for batch in batches:
            full = f"causal_conv1d_update {name}, batch {batch}"
            if only.search(full):
                length = 8 if order == "ring" else 3
                yield case(context, full, context.torch.bfloat16, length, order, batch, **more)


def case(context, name, dtype, length, order, batch, tokens=1, last=True, dim=DIM):
    torch = context.torch
    bf16 = torch.bfloat16
    weight, bias = context.normal(dim, WIDTH, dtype=bf16), context.normal(dim, dtype=bf16)
    kept = WIDTH - 1 + tokens if order == "ring" else 2 * length  # inputs read and written
    moved = batch * dim * (kept * dtype.itemsize + tokens * 2 * bf16.itemsize)
    moved += dim * (WIDTH + 1) * bf16.itemsize
    sets = context.sets_for(moved)
    shape = (batch, dim) if tokens == 1 else (batch, tokens, dim) if last else (batch, dim, tokens)
    buffers = []
    for _ in range(sets):
        state = context.normal(batch, dim, length, dtype=dtype)
        if order == "input":
            state = state.swapaxes(1, 2).contiguous().swapaxes(1, 2)
        slots = torch.randperm(batch, generator=context.generator, device=context.device)
        x = context.normal(*shape, dtype=bf16)
        buffers.append((state, x, slots.to(torch.int32), torch.empty_like(x)))
    more = {} if tokens == 1 else {"channels_last": last}
    lens = None
    if order == "ring":
        lens = torch.randint(0, 1000, (batch,), generator=context.generator, device=context.device)
        lens = more["cache_seqlens"] = lens.to(torch.int32)

    def channels_first(x):
        return x if tokens == 1 or not last else x.swapaxes(1, 2)

    def run(i):
        state, x, slots, out = buffers[i]
        ssmk.causal_conv1d_update(
            x, state, weight, bias, activation="silu", state_indices=slots, out=out, **more
        )

    def want():
        state, x, slots, _ = buffers[0]
        x = x[..., None] if tokens == 1 else channels_first(x)
        before = state[slots.long()].float()
        if lens is not None:  # the inputs in order, the newest last
            order_of = (lens.long()[:, None] + torch.arange(length, device=x.device)) % length
            before = before.gather(2, order_of[:, None].expand(-1, dim, -1))
        window = torch.cat([before, x.float()], -1)[..., -(WIDTH - 1 + tokens):]
        out = torch.nn.functional.conv1d(window, weight.float()[:, None], bias.float(), groups=dim)
        out = torch.nn.functional.silu(out)
        return out[..., 0] if tokens == 1 else channels_first(out)

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
            return update(channels_first(x), state, weight, bias, "silu", lens, slots)

        def peer_error():
            expected = want()
            return context.relative_error(channels_first(run_peer(0)), expected)

        peers.append(Contender("causal-conv1d", run_peer, peer_error, TOLERANCE))
    except Missing as e:
        peers.append(("causal-conv1d", str(e)))
    return Case(name, moved, sets, Contender("ssmk", run, error, TOLERANCE), peers)
