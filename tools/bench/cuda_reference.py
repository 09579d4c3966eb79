# SPDX-License-Identifier: MIT
"""What prefill on a GPU is compared with: the formulas of ssmk.h in float64, on the GPU itself.

The step-by-step reference of the tests would take minutes for the sizes that are measured.  This
one takes tokens in chunks, as the kernels do, but every product in float64 and without any reuse.
"""


def rotated(torch, vectors, theta, rotary):
    """Rot(theta) on the last axis of (tokens, rank, nheads, dstate), theta (tokens, nheads, n)."""
    n = theta.shape[-1]
    first = slice(0, n) if rotary == "half" else slice(0, 2 * n, 2)
    half = vectors.shape[-1] // 2
    second = slice(half, half + n) if rotary == "half" else slice(1, 2 * n, 2)
    sine, cosine = torch.sin(theta)[:, None], torch.cos(theta)[:, None]
    turned = vectors.clone()
    turned[..., first] = vectors[..., first] * cosine - vectors[..., second] * sine
    turned[..., second] = vectors[..., first] * sine + vectors[..., second] * cosine
    return turned


def scan(torch, decay, later, now, u, k, q, chunk):
    """(y, last state) of one sequence: y_t = q_t . h_t for every rank of q.

    h_t = sum over s < t of exp(sum of decay after s, up to t) later_s u_s k_s^T + now_t u_t k_t^T;
    the last state counts the last token with `later`, which then has to be what `now` is.
    decay, later, now: (tokens, nheads); u, k, q: (tokens, rank, nheads, headdim or dstate).
    """
    tokens, rank, nheads = u.shape[:3]
    pad = -tokens % chunk
    chunks = (tokens + pad) // chunk

    def split(v):  # zeros behind the end change nothing
        v = torch.cat([v, v.new_zeros(pad, *v.shape[1:])]) if pad else v
        v = v.reshape(chunks, chunk, *v.shape[1:])
        if v.dim() == 3:
            return v.transpose(1, 2)  # (chunks, nheads, chunk)
        return v.permute(0, 3, 1, 2, 4).reshape(chunks, nheads, chunk * rank, -1)

    decay, later, now, u, k, q = map(split, (decay, later, now, u, k, q))
    since = torch.cumsum(decay, -1)
    below = torch.ones(chunk, chunk, dtype=torch.bool, device=u.device).tril(-1)
    weight = since[..., :, None] - since[..., None, :]
    weight = torch.exp(weight.masked_fill(~below, -torch.inf)) * later[..., None, :]
    weight += torch.diag_embed(now)
    scores = (q @ k.mT).view(chunks, nheads, chunk, rank, chunk, rank)
    scores *= weight[:, :, :, None, :, None]
    y = scores.view(chunks, nheads, chunk * rank, chunk * rank) @ u
    del scores, weight

    left = torch.exp(since[..., -1:] - since) * later
    added = (u * left.repeat_interleave(rank, -1)[..., None]).mT @ k
    kept = torch.exp(since[..., -1])[..., None, None]
    state, before = torch.zeros_like(added[0]), torch.empty_like(added)
    for c in range(chunks):
        before[c] = state
        state = kept[c] * state + added[c]
    y += torch.exp(since).repeat_interleave(rank, -1)[..., None] * (q @ before.mT)
    y = y.view(chunks, nheads, chunk, rank, -1).permute(0, 2, 3, 1, 4)
    return y.reshape(chunks * chunk, rank, nheads, -1)[:tokens], state


def sequence(torch, x, dt, A, B, C, D, z, dt_bias, adt, dt_softplus, trap, angles, rotary, B_bias,
             C_bias, mimo_x, mimo_z, mimo_out, chunk):
    """(out, final states by name) of one sequence; tensors as in ssd_chunk without batch."""
    nheads = x.shape[1]
    B, C = (v[:, None] if v.dim() == 3 else v for v in (B, C))
    rank, ngroups = B.shape[1:3]
    k, q = (v.repeat_interleave(nheads // ngroups, 2) for v in (B, C))
    k = k if B_bias is None else k + B_bias.transpose(0, 1)
    q = q if C_bias is None else q + C_bias.transpose(0, 1)
    dt = dt if dt_bias is None else dt + dt_bias
    dt = torch.nn.functional.softplus(dt, threshold=700) if dt_softplus else dt
    final = {}
    if angles is not None:
        angles = angles[:, None] if angles.dim() == 2 else angles
        theta = torch.cumsum(torch.pi * torch.tanh(angles) * dt[..., None], 0)
        theta = torch.remainder(theta, 2 * torch.pi)
        k, q = (rotated(torch, v, theta, rotary) for v in (k, q))
        final["angle_states"] = theta[-1]
    psi = x.new_ones(1, rank, nheads, 1) if mimo_x is None else mimo_x.transpose(0, 1)[None]
    u = psi * x[:, None]
    now = later = dt
    if trap is not None:
        trap = torch.sigmoid(trap)
        now, moved = trap * dt, (1 - trap) * dt
        later = now + torch.cat([moved[1:], torch.zeros_like(moved[:1])])
        final["k_states"], final["v_states"] = k[-1], x[-1]
    y, final["states"] = scan(torch, dt * A if adt is None else adt, later, now, u, k, q, chunk)
    if D is not None:
        y += (D if D.dim() == 2 else D[:, None]) * u
    if z is not None:
        zeta = 1 if mimo_z is None else mimo_z.transpose(0, 1)
        y *= torch.nn.functional.silu(zeta * z[:, None])
    if mimo_out is not None:
        y = (y * mimo_out.transpose(0, 1)).sum(1)
    return y[:, 0] if y.dim() == 4 and rank == 1 else y, final


BY_TOKEN = ("x", "dt", "adt", "B", "C", "z", "trap", "angles")


def ssd_chunk(torch, x, dt, A, B, C, D=None, z=None, dt_bias=None, *, adt=None, dt_softplus=False,
              trap=None, angles=None, rotary="interleaved", B_bias=None, C_bias=None, mimo_x=None,
              mimo_z=None, mimo_out=None, cu_seqlens=None, chunk=64):
    """(out, {"states": .., and with Mamba-3 "angle_states", "k_states", "v_states"}) in float64,
    of what ssmk.ssd_chunk takes by these names; `chunk` changes no more than rounding."""
    given = dict(x=x, dt=dt, A=A, B=B, C=C, D=D, z=z, dt_bias=dt_bias, adt=adt, trap=trap,
                 angles=angles, B_bias=B_bias, C_bias=C_bias, mimo_x=mimo_x, mimo_z=mimo_z,
                 mimo_out=mimo_out)
    spans = [(row, slice(None)) for row in range(x.shape[0])]
    if cu_seqlens is not None:
        ends = cu_seqlens.tolist()
        spans = [(0, slice(*pair)) for pair in zip(ends, ends[1:])]
    out, final = None, {}
    for s, (row, tokens) in enumerate(spans):
        wide = {
            name: v if v is None else (v[row, tokens] if name in BY_TOKEN else v).double()
            for name, v in given.items()
        }
        y, states = sequence(torch, **wide, dt_softplus=dt_softplus, rotary=rotary, chunk=chunk)
        if out is None:
            out = y.new_empty(*x.shape[:2], *y.shape[1:])
            final = {name: v.new_empty(len(spans), *v.shape) for name, v in states.items()}
        out[row, tokens] = y
        for name, v in states.items():
            final[name][s] = v
    return out, final


def errors(got, want):
    """The largest difference over the largest value, and both as root mean squares."""
    difference = got.double() - want
    return {
        "max": float(difference.abs().max() / want.abs().max()),
        "rms": float(difference.square().mean().sqrt() / want.square().mean().sqrt()),
    }
