# SPDX-License-Identifier: MIT
"""state_update: decode steps of a bf16 model, with layers of Mamba-1, 2 and 3 (headdim 64)."""

import ssmk

from ..cuda import Case, Contender
from ..cuda_peers import Missing, flashinfer_state_update, mamba_ssm_state_update

# heads, groups, dstate, dtype of the state, batches, tokens
HEADS = (
    (80, 1, 128, "bfloat16", (1, 4, 16, 64, 256, 512), 1),
    (80, 1, 128, "float32", (1, 4, 16, 64, 256, 512), 1),
    (128, 8, 128, "bfloat16", (1, 64, 256), 1),
    (80, 1, 128, "bfloat16", (1, 16, 64, 256), 4),
    (80, 1, 128, "float32", (1, 64, 256), 4),
    *((80, 1, n, dtype, (16384 // n,), 1)
      for n in (16, 32, 64, 96, 256) for dtype in ("bfloat16", "float32")),
)
HEADDIM = 64
# dim, dstate, dtype of the state, batches, tokens
CHANNELS = (
    (5120, 16, "float32", (1, 16, 128, 512), 1),
    (5120, 16, "bfloat16", (1, 16, 128, 512), 1),
    (1536, 16, "float32", (128,), 1),
    (1536, 128, "float32", (128,), 1),
    (1536, 16, "bfloat16", (128,), 1),
    (1536, 128, "bfloat16", (128,), 1),
    (5120, 16, "float32", (1, 16, 128, 512), 4),
    (5120, 16, "bfloat16", (1, 16, 128, 512), 4),
)
# Mamba-3: ranks, dtype of the state, tokens, batches
MAMBA3 = tuple(
    (rank, dtype, tokens, (1, 16, 64, 256))
    for rank in (1, 4) for tokens in (1, 4) for dtype in ("bfloat16", "float32")
)
MAMBA3_SIZES = 64, 128, 32  # heads, dstate, angles
TOLERANCE = 2e-2


def cases(context, only):
    for nheads, ngroups, dstate, dtype, batches, tokens in HEADS:
        for batch in batches:
            name = f"state_update {nheads} heads, {ngroups} groups, dstate {dstate}, {dtype} state"
            name += f", {tokens} tokens, batch {batch}"
            if only.search(name):
                shape = (nheads, HEADDIM)
                yield case(context, name, shape, ngroups, dstate, dtype, batch, tokens)
    for dim, dstate, dtype, batches, tokens in CHANNELS:
        for batch in batches:
            name = f"state_update Mamba-1, dim {dim}, dstate {dstate}, {dtype} state"
            name += f", {tokens} tokens, batch {batch}"
            if only.search(name):
                yield case(context, name, (dim,), None, dstate, dtype, batch, tokens)
    for rank, dtype, tokens, batches in MAMBA3:
        for batch in batches:
            name = f"state_update Mamba-3, {MAMBA3_SIZES[0]} heads, "
            name += f"{f'rank {rank}' if rank > 1 else 'SISO'}, {dtype} state"
            name += f", {tokens} tokens, batch {batch}" if tokens > 1 else f", batch {batch}"
            if only.search(name):
                yield mamba3_case(context, name, rank, dtype, batch, tokens)


def expected(torch, state, x, dt, A, B, C, D, z, dt_bias, slots):
    """One or several tokens, in float32, as the formulas stand in ssmk.h."""
    state, rows = state[slots.long()].float(), range(x.shape[1])
    repeats = x.shape[2] // B.shape[2] if B.dim() == 4 else None
    out = []
    for t in rows:
        step = torch.nn.functional.softplus(dt[:, t].float() + dt_bias)
        b, c = B[:, t].float(), C[:, t].float()
        if repeats:  # heads: one step and decay a head
            b, c = b.repeat_interleave(repeats, 1)[:, :, None], c.repeat_interleave(repeats, 1)
            decay, step = torch.exp(step * A)[..., None, None], step[..., None]
            c, skip = c[:, :, None], D[:, None]
        else:
            decay, b, c, skip = torch.exp(step[..., None] * A), b[:, None], c[:, None], D
        now = x[:, t].float()
        state = decay * state + (step * now)[..., None] * b
        gate = torch.nn.functional.silu(z[:, t].float())
        out.append(((state * c).sum(-1) + skip * now) * gate)
    return torch.stack(out, 1)


def case(context, name, shape, ngroups, dstate, dtype, batch, tokens):
    torch = context.torch
    bf16, f32, dtype = torch.bfloat16, torch.float32, getattr(torch, dtype)
    heads = len(shape) == 2
    nheads = shape[0]
    groups = (ngroups,) if heads else ()
    A = -torch.exp(context.normal(*(shape[:1] if heads else (*shape, dstate)), dtype=f32) / 4)
    D, dt_bias = context.normal(nheads, dtype=f32), context.normal(nheads, dtype=f32) / 2 - 2
    items = shape[0] * (shape[1] if heads else 1)
    moved = batch * items * (2 * dstate * dtype.itemsize + 3 * tokens * bf16.itemsize)
    moved += batch * tokens * (2 * (ngroups or 1) * dstate * bf16.itemsize + nheads * f32.itemsize)
    sets = context.sets_for(moved)
    buffers = []
    for _ in range(sets):
        x, z = (context.normal(batch, tokens, *shape, dtype=bf16) for _ in range(2))
        dt = context.normal(batch, tokens, nheads, dtype=f32) / 2
        B, C = (context.normal(batch, tokens, *groups, dstate, dtype=bf16) for _ in range(2))
        state = context.normal(batch, *shape, dstate, dtype=dtype)
        slots = torch.randperm(batch, generator=context.generator, device=context.device)
        buffers.append((state, x, dt, B, C, z, slots.to(torch.int32), torch.empty_like(x)))

    def run(i):
        state, x, dt, B, C, z, slots, out = buffers[i]
        ssmk.state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus=True,
                          state_indices=slots, out=out)

    def error_of(call):
        def error():
            state, x, dt, B, C, z, slots, out = buffers[0]
            want = expected(torch, state, x, dt, A, B, C, D, z, dt_bias, slots)
            got = call(0)
            return context.relative_error(out if got is None else got.reshape(want.shape), want)

        return error

    # Peers read A, dt, D and dt_bias as views expanded over headdim and dstate.
    wide_A = A[:, None, None].expand(*shape, dstate) if heads else A
    wide_D = D[:, None].expand(shape) if heads else D
    wide_bias = dt_bias[:, None].expand(shape) if heads else dt_bias

    def wide_dt(dt):
        return dt[..., None].expand(*dt.shape, shape[1]) if heads else dt

    # No peer, but what a kernel without any arithmetic reaches with slots in this order.
    peers = [context.ceilings.through_slots("through-slots", moved, [b[6] for b in buffers])]
    if tokens == 1:
        try:
            update = mamba_ssm_state_update(context.peers)

            def run_mamba(i):
                state, x, dt, B, C, z, slots, _ = buffers[i]
                return update(state, x[:, 0], wide_dt(dt)[:, 0], wide_A, B[:, 0], C[:, 0], wide_D,
                              z[:, 0], wide_bias, True, slots)

            peers.append(Contender("mamba-ssm", run_mamba, error_of(run_mamba), TOLERANCE))
        except Missing as e:
            peers.append(("mamba-ssm", str(e)))
    else:
        peers.append(("mamba-ssm", "takes one token only"))
    for algorithm in ("auto", "simple", "vertical", "horizontal") if heads else ():
        label = f"FlashInfer {algorithm}"
        if tokens > 1:
            peers.append((label, "not measured with several tokens"))
            continue
        try:
            state, x, dt, B, C, z, slots, out = buffers[0]
            call = flashinfer_state_update(
                context.peers, algorithm, state, x, dt, wide_A, B, C, wide_D, slots)

            def run_flash(i, call=call):
                state, x, dt, B, C, z, slots, out = buffers[i]
                call(state, x[:, 0], wide_dt(dt)[:, 0], wide_A, B[:, 0], C[:, 0], wide_D, z[:, 0],
                     wide_bias, slots, out[:, 0])

            peers.append(Contender(label, run_flash, error_of(run_flash), TOLERANCE))
        except Missing as e:
            peers.append((label, str(e)))
    if not heads:
        peers.append(("FlashInfer", "takes heads only"))
    return Case(name, moved, sets, Contender("ssmk", run, error_of(run), TOLERANCE), peers)


# Mamba-3


def expected_mamba3(torch, states, a, slots):
    """(out, state) in float32, as the formulas stand in ssmk.h."""
    state, theta, key, value = (states[name][slots.long()].float() for name in MAMBA3_STATES)
    nheads, dstate, nangles = MAMBA3_SIZES
    rank = a["B_bias"].shape[1]
    half = a["rotary"] == "half"

    def turned(v):  # (batch, rank, nheads, dstate)
        turned = v.clone()
        first = slice(0, nangles) if half else slice(0, 2 * nangles, 2)
        second = slice(dstate // 2, dstate // 2 + nangles) if half else slice(1, 2 * nangles, 2)
        sine, cosine = torch.sin(theta)[:, None], torch.cos(theta)[:, None]
        turned[..., first] = v[..., first] * cosine - v[..., second] * sine
        turned[..., second] = v[..., first] * sine + v[..., second] * cosine
        return turned

    out = []
    for t in range(a["x"].shape[1]):
        dt = torch.nn.functional.softplus(a["dt"][:, t] + a["dt_bias"])
        decay = torch.exp(a["adt"][:, t])
        now = torch.sigmoid(a["trap"][:, t].float())
        turns = torch.tanh(a["angles"][:, t].float())[:, None] * dt[..., None]
        theta = torch.remainder(theta + torch.pi * turns, 2 * torch.pi)
        b, c = (
            turned(a[name][:, t].float().reshape(-1, rank, 1, dstate)
                   + a[f"{name}_bias"].transpose(0, 1))
            for name in ("B", "C")
        )
        x = a["x"][:, t].float()
        psi = a["mimo_x"] if rank > 1 else torch.ones_like(x[:1, :, None])
        old = torch.einsum("bhrp,brhn->bhpn", psi * value[:, :, None], key)
        new = torch.einsum("bhrp,brhn->bhpn", psi * x[:, :, None], b)
        state = (decay[..., None, None] * (state + ((1 - now) * dt)[..., None, None] * old)
                 + (now * dt)[..., None, None] * new)
        y = torch.einsum("bhpn,brhn->bhrp", state, c)
        y = y + a["D"][:, None, None] * psi * x[:, :, None]
        z = a["z"][:, t].float()[:, :, None]
        y = y * torch.nn.functional.silu(a["mimo_z"] * z if rank > 1 else z)
        out.append((y * a["mimo_out"] if rank > 1 else y).sum(2))
        key, value = b, x
    return torch.stack(out, 1), state


MAMBA3_STATES = ("state", "angle_state", "k_state", "v_state")
MAMBA3_INPUTS = ("x", "z", "B", "C", "dt", "adt", "trap", "angles")


def mamba3_case(context, name, rank, dtype, batch, tokens):
    torch = context.torch
    bf16, f32, dtype = torch.bfloat16, torch.float32, getattr(torch, dtype)
    nheads, dstate, nangles = MAMBA3_SIZES
    items = nheads * HEADDIM
    ranks = (rank,) if rank > 1 else ()
    weights = {
        "D": context.normal(nheads, dtype=f32),
        "dt_bias": context.normal(nheads, dtype=f32) / 2 - 2,
        "B_bias": context.normal(nheads, rank, dstate, dtype=f32),
        "C_bias": context.normal(nheads, rank, dstate, dtype=f32),
        "rotary": "half" if rank > 1 else "interleaved", "dt_softplus": True,
    }
    if rank > 1:
        for part in ("mimo_x", "mimo_z", "mimo_out"):
            weights[part] = context.normal(nheads, rank, HEADDIM, dtype=f32) / rank**0.5
    states = {
        "state": ((batch, nheads, HEADDIM, dstate), dtype),
        "angle_state": ((batch, nheads, nangles), f32),
        "k_state": ((batch, rank, nheads, dstate), bf16),
        "v_state": ((batch, nheads, HEADDIM), bf16),
    }
    shapes = {
        "x": ((nheads, HEADDIM), bf16), "z": ((nheads, HEADDIM), bf16),
        "B": ((*ranks, 1, dstate), bf16), "C": ((*ranks, 1, dstate), bf16),
        "dt": ((nheads,), f32), "adt": ((nheads,), f32), "trap": ((nheads,), bf16),
        "angles": ((nangles,), bf16),
    }
    inputs = {key: ((batch, tokens, *shape), kind) for key, (shape, kind) in shapes.items()}

    def size(shape, kind):
        return torch.Size(shape).numel() * kind.itemsize

    moved = 2 * sum(size(*v) for v in states.values()) + sum(size(*v) for v in inputs.values())
    moved += size(*inputs["x"])  # out
    sets = context.sets_for(moved)
    buffers = []
    for _ in range(sets):
        pool = {key: context.normal(*shape, dtype=kind) for key, (shape, kind) in states.items()}
        pool["angle_state"].abs_()
        a = {key: context.normal(*shape, dtype=kind) for key, (shape, kind) in inputs.items()}
        a["adt"].abs_().neg_()
        a["out"] = torch.empty_like(a["x"])
        slots = torch.randperm(batch, generator=context.generator, device=context.device)
        buffers.append((pool, a, slots.to(torch.int32)))

    def run(i):
        pool, a, slots = buffers[i]
        ssmk.state_update(**pool, **a, **weights, A=None, state_indices=slots)

    def run_dense(i):
        pool, a, slots = buffers[i]
        dense = {key: v.index_select(0, slots) for key, v in pool.items()}
        ssmk.state_update(**dense, **a, **weights, A=None)
        for key, v in dense.items():
            pool[key].index_copy_(0, slots.long(), v)

    def error_of(call):
        def error():
            pool, a, slots = buffers[0]
            want, state = expected_mamba3(torch, pool, {**a, **weights}, slots)
            call(0)
            of_state = context.relative_error(pool["state"][slots.long()], state)
            return max(context.relative_error(a["out"], want), of_state)

        return error

    peers = [Contender("gather+dense+scatter", run_dense, error_of(run_dense), TOLERANCE)]
    return Case(name, moved, sets, Contender("ssmk", run, error_of(run), TOLERANCE), peers)
