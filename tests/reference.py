# SPDX-License-Identifier: MIT
"""The oracle: every operation of ssmk.h as a plain token loop in float64.

Written from the formulas of the header, never from an implementation.  Inputs are taken as they are
stored (rounded to their dtype already), nothing is modified, and results are new arrays in double
precision: states that a call would update in place come back as updated copies.  Vectorised over
channels, heads and dstate; never over time.
"""

from dataclasses import dataclass, field

import numpy as np


# Scalars


def wide(array):
    """The same values in double precision; None stays None."""
    if array is None:
        return None
    array = np.asarray(array)
    return array.astype(np.complex128 if array.dtype.kind == "c" else np.float64)


def softplus(x):
    return np.where(x > 20, x, np.log1p(np.exp(np.minimum(x, 20))))


def sigmoid(x):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def silu(z):
    return z * sigmoid(z)


def step_size(dt, dt_bias, dt_softplus, dt_limit):
    """dt' = clamp(softplus(dt + dt_bias), dt_min, dt_max), each part only if asked for."""
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = softplus(dt)
    if dt_limit is not None and tuple(dt_limit) != (0, 0):
        dt = np.clip(dt, *dt_limit)
    return dt


# Sequences and slots


def sequences(batch, seqlen, cu_seqlens, seq_idx):
    """For each of the nseq states: its row, its real tokens, which of those start from zeros."""
    if cu_seqlens is not None:
        for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:]):
            yield 0, np.arange(start, end), np.zeros(end - start, bool)
    elif seq_idx is not None:
        for row in range(batch):
            tokens = np.flatnonzero(seq_idx[row] >= 0)
            ids = seq_idx[row][tokens]
            yield row, tokens, np.append(False, ids[1:] != ids[:-1])[: len(ids)]
    else:
        for row in range(batch):
            yield row, np.arange(seqlen), np.zeros(seqlen, bool)


def is_pad(slot, pad_slot):
    return slot < 0 or slot == pad_slot


def sequence_slots(nseq, state_indices, pad_slot):
    """The slot of each sequence, None for a pad."""
    if state_indices is None:
        return list(range(nseq))
    return [None if is_pad(slot, pad_slot) else int(slot) for slot in state_indices]


def starts_from_state(sequence, initial_states, has_initial_state):
    return initial_states is not None and (
        has_initial_state is None or bool(has_initial_state[sequence])
    )


def final_room(nseq, shape, final_states, state_indices, dtype=np.float64):
    """A copy of the tensor given, else one entry a sequence; None for a pool that is only read."""
    if final_states is not None:
        return final_states.astype(dtype)
    return np.zeros((nseq, *shape), dtype) if state_indices is None else None


# selective_scan


def scan_coefficients(B, dim, complex_a, channels_last):
    """B or C as a function of (row, token), giving (dim, dstate)."""
    B = wide(B)
    if B.ndim == 2:
        return lambda row, token: B
    if complex_a and B.dtype.kind != "c":
        B = B[..., 0::2] + 1j * B[..., 1::2]
    if B.ndim == 3:
        B = np.expand_dims(B, 2 if channels_last else 1)
    if not channels_last:
        B = np.moveaxis(B, -1, 1)
    return lambda row, token: np.repeat(B[row, token], dim // B.shape[2], axis=0)


def selective_scan(
    x, dt, A, B, C, D=None, z=None, dt_bias=None, *, dt_softplus=False, dt_limit=None,
    channels_last=False, initial_states=None, final_states=None, cu_seqlens=None, seq_idx=None,
    state_indices=None, has_initial_state=None, pad_slot=None,
):
    """(out, final_states): with state_indices the pool given, the slots of the call replaced."""
    x, dt, A, D, z, dt_bias, initial_states, final_states = map(
        wide, (x, dt, A, D, z, dt_bias, initial_states, final_states)
    )
    if channels_last:
        x, dt = x.swapaxes(1, 2), dt.swapaxes(1, 2)
        z = None if z is None else z.swapaxes(1, 2)
    batch, dim, seqlen = x.shape
    complex_a = A.dtype.kind == "c"
    B_at = scan_coefficients(B, dim, complex_a, channels_last)
    C_at = scan_coefficients(C, dim, complex_a, channels_last)
    dt = step_size(dt, None if dt_bias is None else dt_bias[:, None], dt_softplus, dt_limit)

    spans = list(sequences(batch, seqlen, cu_seqlens, seq_idx))
    final = final_room(len(spans), A.shape, final_states, state_indices, A.dtype)
    slots = sequence_slots(len(spans), state_indices, pad_slot)
    out = np.zeros((batch, dim, seqlen))
    for s, (row, tokens, fresh) in enumerate(spans):
        if slots[s] is None:
            continue
        h = np.zeros(A.shape, A.dtype)
        if starts_from_state(s, initial_states, has_initial_state):
            h = initial_states[slots[s]]
        for t, restart in zip(tokens, fresh):
            if restart:
                h = np.zeros_like(h)
            step = dt[row, :, t, None]
            h = np.exp(step * A) * h + step * x[row, :, t, None] * B_at(row, t)
            y = np.sum(h * C_at(row, t), axis=1)
            y = 2 * y.real if complex_a else y
            if D is not None:
                y = y + D * x[row, :, t]
            out[row, :, t] = y if z is None else y * silu(z[row, :, t])
        if final is not None:
            final[slots[s]] = h
    return (out.swapaxes(1, 2) if channels_last else out), final


# Mamba-1, 2 and 3: one token


@dataclass
class Weights:
    """What stays from token to token, all axes present: r rank, h heads, p headdim, n dstate."""

    A: np.ndarray = None  # (h, p | 1, n | 1)
    D: np.ndarray = None  # (h, p | 1)
    dt_bias: np.ndarray = None  # (h, p | 1)
    dt_softplus: bool = False
    dt_limit: tuple = None
    B_bias: np.ndarray = None  # (h, r, n)
    C_bias: np.ndarray = None  # (h, r, n)
    mimo_x: np.ndarray = None  # (h, r, p)
    mimo_z: np.ndarray = None  # (h, r, p)
    mimo_out: np.ndarray = None  # (h, r, p)
    norm_weight: np.ndarray = None  # (h, p)
    norm_eps: float = 0.0
    rotary: str = "interleaved"
    trap_sigmoid: bool = False


@dataclass
class State:
    """What is carried from token to token."""

    h: np.ndarray  # (h, p, n)
    angle: np.ndarray = None  # (h, nangles)
    k: np.ndarray = None  # (r, h, n)
    v: np.ndarray = None  # (h, p)


@dataclass
class Token:
    """One token of one row; fields that the model lacks are None."""

    x: np.ndarray  # (h, p)
    dt: np.ndarray  # (h, p | 1)
    B: np.ndarray  # (r, g, n)
    C: np.ndarray  # (r, g, n)
    adt: np.ndarray = None  # (h,)
    z: np.ndarray = None  # (h, p)
    trap: np.ndarray = None  # (h,)
    angles: np.ndarray = None  # (h, nangles)


def rotate(vectors, theta, rotary):
    """Rot(theta) on the last axis of (r, h, n), theta (h, nangles)."""
    j = np.arange(theta.shape[-1])
    a, b = (2 * j, 2 * j + 1) if rotary == "interleaved" else (j, j + vectors.shape[-1] // 2)
    cos, sin = np.cos(theta), np.sin(theta)
    rotated = vectors.copy()
    rotated[..., a] = vectors[..., a] * cos - vectors[..., b] * sin
    rotated[..., b] = vectors[..., a] * sin + vectors[..., b] * cos
    return rotated


def mamba_token(w, token, state):
    """The output of one token, (r, h, p), or (h, p) with mimo_out or rank 1; the state after it."""
    nheads, headdim = token.x.shape
    rank, ngroups, _ = token.B.shape
    dt = step_size(token.dt, w.dt_bias, w.dt_softplus, w.dt_limit)
    decay = np.exp(token.adt[:, None, None] if token.adt is not None else dt[..., None] * w.A)

    # Keys and queries, per head
    k, q = (np.repeat(v, nheads // ngroups, axis=1) for v in (token.B, token.C))
    if w.B_bias is not None:
        k = k + w.B_bias.swapaxes(0, 1)
    if w.C_bias is not None:
        q = q + w.C_bias.swapaxes(0, 1)
    theta = state.angle
    if token.angles is not None:
        theta = np.mod(theta + np.pi * np.tanh(token.angles) * dt[:, :1], 2 * np.pi)
        k, q = rotate(k, theta, w.rotary), rotate(q, theta, w.rotary)

    # The state
    psi = np.ones((rank, nheads, headdim)) if w.mimo_x is None else w.mimo_x.swapaxes(0, 1)
    u = psi * token.x
    write = np.einsum("rhp,rhn->hpn", dt * u, k)
    if token.trap is None:
        h = decay * state.h + write
    else:
        lam = (token.trap if w.trap_sigmoid else sigmoid(token.trap))[:, None, None]
        before = np.einsum("rhp,rhn->hpn", dt * psi * state.v, state.k)
        h = decay * state.h + (1 - lam) * decay * before + lam * write

    # The output
    y = np.einsum("hpn,rhn->rhp", h, q)
    if w.D is not None:
        y = y + w.D * u
    if w.norm_weight is not None:
        y = y / np.sqrt(np.mean(y * y, axis=-1, keepdims=True) + w.norm_eps) * w.norm_weight
    if token.z is not None:
        zeta = 1 if w.mimo_z is None else w.mimo_z.swapaxes(0, 1)
        y = y * silu(zeta * token.z)
    if w.mimo_out is not None:
        y = np.sum(w.mimo_out.swapaxes(0, 1) * y, axis=0)
    elif rank == 1:
        y = y[0]
    return y, State(
        h, theta, k if token.trap is not None else None, token.x if token.trap is not None else None
    )


def per_head(vector):
    """(nheads,) -> (nheads, 1); (nheads, headdim) as it is."""
    return vector[:, None] if vector is not None and vector.ndim == 1 else vector


def with_rank(bias):
    """(nheads, dstate) -> (nheads, 1, dstate)."""
    return bias[:, None] if bias is not None and bias.ndim == 2 else bias


def pick(array, *index):
    return None if array is None else array[index]


# state_update


@dataclass
class Updated:
    out: np.ndarray
    states: dict = field(default_factory=dict)  # by the names of the arguments


def state_update(
    state, x, dt, A=None, B=None, C=None, D=None, z=None, dt_bias=None, *, adt=None,
    dt_softplus=False, dt_limit=None, trap=None, angles=None, B_bias=None, C_bias=None, mimo_x=None,
    mimo_z=None, mimo_out=None, norm_weight=None, norm_eps=0.0, rotary="interleaved",
    trap_sigmoid=False, angle_state=None, k_state=None, v_state=None, state_indices=None,
    state_indices_out=None, num_tokens=None, num_accepted_tokens=None, intermediate_states=None,
    intermediate_angle_states=None, intermediate_k_states=None, intermediate_v_states=None,
    intermediate_indices=None, keep_state=False, pad_slot=None,
):
    """out, and copies of all pools and intermediate states as the call leaves them."""
    pools = [wide(p) for p in (state, angle_state, k_state, v_state)]
    kept = [intermediate_states, intermediate_angle_states, intermediate_k_states]
    kept = [wide(p) for p in (*kept, intermediate_v_states)]
    x, dt, adt, B, C, z, trap, angles = map(wide, (x, dt, adt, B, C, z, trap, angles))
    A, D, dt_bias, B_bias, C_bias = map(wide, (A, D, dt_bias, B_bias, C_bias))
    mimo_x, mimo_z, mimo_out, norm_weight = map(wide, (mimo_x, mimo_z, mimo_out, norm_weight))

    # Mamba-1 is the case of headdim 1: give it that axis.
    headless = pools[0].ndim == 3
    if headless:
        pools[0] = pools[0][:, :, None]
        kept[0] = None if kept[0] is None else kept[0][:, :, :, None]
        A = A[:, None]
        x = x[..., None]
        z = None if z is None else z[..., None]
    # One token is the case of T = 1, one rank of rank = 1.
    single = x.ndim == 3
    if single:
        x, dt, adt, B, C, z, trap, angles = (
            pick(v, slice(None), None) for v in (x, dt, adt, B, C, z, trap, angles)
        )
    if headless and B.ndim == 3:
        B = B[:, :, None]
    if headless and C.ndim == 3:
        C = C[:, :, None]
    B, C = (v[:, :, None] if v.ndim == 4 else v for v in (B, C))
    dt = dt[..., None] if dt.ndim == 3 else dt
    if A is not None and A.ndim == 1:
        A = A[:, None, None]
    if angles is not None and angles.ndim == 3:
        angles = np.repeat(angles[:, :, None], x.shape[2], axis=2)
    weights = Weights(
        A, per_head(D), per_head(dt_bias), dt_softplus, dt_limit, with_rank(B_bias),
        with_rank(C_bias), mimo_x, mimo_z, mimo_out, norm_weight, norm_eps, rotary, trap_sigmoid,
    )

    batch, T, nheads, headdim = x.shape
    rank = B.shape[2]
    out = np.zeros(
        (batch, T, nheads, headdim)
        if rank == 1 or mimo_out is not None
        else (batch, T, rank, nheads, headdim)
    )
    pools_before, kept_before = (
        [None if p is None else p.copy() for p in pools],
        [None if p is None else p.copy() for p in kept],
    )
    per_token_reads = state_indices is not None and np.ndim(state_indices) == 2
    per_token_writes = state_indices_out is not None and np.ndim(state_indices_out) == 2

    def store(buffers, index, current):
        for buffer, value in zip(buffers, (current.h, current.angle, current.k, current.v)):
            if buffer is not None:
                buffer[index] = value

    for row in range(batch):
        accepted = 0 if num_accepted_tokens is None else int(num_accepted_tokens[row])
        if per_token_reads:
            read = int(state_indices[row][max(accepted, 1) - 1])
        else:
            read = row if state_indices is None else int(state_indices[row])
        write = (
            read if state_indices_out is None or per_token_writes else int(state_indices_out[row])
        )
        if state_indices is not None and is_pad(read, pad_slot):
            continue
        if state_indices_out is not None and not per_token_writes and is_pad(write, pad_slot):
            continue

        # Where the row starts
        current = State(*(pick(p, read) for p in pools_before))
        keep_row = row if intermediate_indices is None else int(intermediate_indices[row])
        keeps = keep_row >= 0
        if intermediate_states is not None and not per_token_reads and accepted > 0 and keeps:
            current = State(*(pick(p, keep_row, accepted - 1) for p in kept_before))

        for t in range(T if num_tokens is None else int(num_tokens[row])):
            token = Token(
                x[row, t],
                dt[row, t],
                B[row, t],
                C[row, t],
                *(pick(v, row, t) for v in (adt, z, trap, angles)),
            )
            out[row, t], current = mamba_token(weights, token, current)
            if keeps:
                store(kept, (keep_row, t), current)
            if (
                per_token_writes
                and not keep_state
                and not is_pad(state_indices_out[row][t], pad_slot)
            ):
                store(pools, int(state_indices_out[row][t]), current)
        if not per_token_writes and not keep_state:
            store(pools, write, current)

    if single:
        out = out[:, 0]
    if headless:
        out = out[..., 0]
        pools[0] = pools[0][:, :, 0]
        kept[0] = None if kept[0] is None else kept[0][:, :, :, 0]
    names = (
        "state", "angle_state", "k_state", "v_state", "intermediate_states",
        "intermediate_angle_states", "intermediate_k_states", "intermediate_v_states",
    )
    return Updated(out, {name: pool for name, pool in zip(names, pools + kept) if pool is not None})


# ssd_chunk


def ssd_chunk(
    x, dt, A=None, B=None, C=None, D=None, z=None, dt_bias=None, *, adt=None, dt_softplus=False,
    dt_limit=None, trap=None, angles=None, B_bias=None, C_bias=None, mimo_x=None, mimo_z=None,
    mimo_out=None, norm_weight=None, norm_eps=0.0, rotary="interleaved", trap_sigmoid=False,
    initial_states=None, initial_angle_states=None, initial_k_states=None, initial_v_states=None,
    final_states=None, final_angle_states=None, final_k_states=None, final_v_states=None,
    cu_seqlens=None, seq_idx=None, state_indices=None, has_initial_state=None,
    capture_positions=None, pad_slot=None,
):
    """(out, final State, captured State): over sequences (pools with state_indices), captures."""
    x, dt, adt, B, C, z, trap, angles = map(wide, (x, dt, adt, B, C, z, trap, angles))
    A, D, dt_bias, B_bias, C_bias = map(wide, (A, D, dt_bias, B_bias, C_bias))
    mimo_x, mimo_z, mimo_out, norm_weight = map(wide, (mimo_x, mimo_z, mimo_out, norm_weight))
    initial = [initial_states, initial_angle_states, initial_k_states, initial_v_states]
    given = [final_states, final_angle_states, final_k_states, final_v_states]
    initial, given = ([wide(p) for p in states] for states in (initial, given))
    batch, seqlen, nheads, headdim = x.shape
    B, C = (v[:, :, None] if v.ndim == 4 else v for v in (B, C))
    rank, dstate = B.shape[2], B.shape[-1]
    if angles is not None and angles.ndim == 3:
        angles = np.repeat(angles[:, :, None], nheads, axis=2)
    weights = Weights(
        None if A is None else A[:, None, None], per_head(D), per_head(dt_bias), dt_softplus,
        dt_limit, with_rank(B_bias), with_rank(C_bias), mimo_x, mimo_z, mimo_out, norm_weight,
        norm_eps, rotary, trap_sigmoid,
    )

    # Which states there are, and zeros of their shapes
    shapes = [
        (nheads, headdim, dstate),
        None if angles is None else (nheads, angles.shape[-1]),
        None if trap is None else (rank, nheads, dstate),
        None if trap is None else (nheads, headdim),
    ]
    zero = State(*(None if shape is None else np.zeros(shape) for shape in shapes))
    spans = list(sequences(batch, seqlen, cu_seqlens, seq_idx))
    final = [
        None if shape is None else final_room(len(spans), shape, pool, state_indices)
        for pool, shape in zip(given, shapes)
    ]
    positions = [] if capture_positions is None else [int(p) for p in capture_positions]
    captured = [None if shape is None else np.zeros((len(positions), *shape)) for shape in shapes]

    slots = sequence_slots(len(spans), state_indices, pad_slot)
    out = np.zeros(
        (batch, seqlen, nheads, headdim)
        if rank == 1 or mimo_out is not None
        else (batch, seqlen, rank, nheads, headdim)
    )
    for s, (row, tokens, fresh) in enumerate(spans):
        if slots[s] is None:
            continue
        current = zero
        if has_initial_state is None or has_initial_state[s]:
            current = State(
                *(
                    pick(pool, slots[s]) if pool is not None else start
                    for pool, start in zip(initial, (zero.h, zero.angle, zero.k, zero.v))
                )
            )
        for t, restart in zip(tokens, fresh):
            if restart:
                current = zero
            token = Token(
                x[row, t],
                dt[row, t][:, None],
                B[row, t],
                C[row, t],
                *(pick(v, row, t) for v in (adt, z, trap, angles)),
            )
            out[row, t], current = mamba_token(weights, token, current)
            for i, position in enumerate(positions):
                if position == row * seqlen + t:
                    for buffer, value in zip(
                        captured, (current.h, current.angle, current.k, current.v)
                    ):
                        if buffer is not None:
                            buffer[i] = value
        for buffer, value in zip(final, (current.h, current.angle, current.k, current.v)):
            if buffer is not None:
                buffer[slots[s]] = value
    return out, State(*final), State(*captured)


# causal_conv1d


def convolve(window, weight, bias, activation):
    """One output token from the inputs up to it, newest last: (dim, at least width) -> (dim,)."""
    y = np.sum(weight * window[:, -weight.shape[1] :], axis=1)
    if bias is not None:
        y = y + bias
    return silu(y) if activation == "silu" else y


def convolve_labelled(out, x, ids, history, weight, bias, activation):
    """A row cut up by ids: taps go by position, and one on another id or on a pad counts 0.

    Returns what a token right after the last real one, of its sequence, would find before it.
    """
    ids = np.asarray(ids)
    if (ids < 0).all():
        return history
    labels = np.full(history.shape[1], ids[ids >= 0][0])
    for t, label in enumerate(ids):
        window = np.concatenate([history, x[:, t, None]], axis=1)
        labels = np.append(labels, label)
        if label >= 0:
            seen = np.where(labels == label, window, 0)
            out[:, t] = convolve(seen, weight, bias, activation)
            after = seen[:, 1:]
        history, labels = window[:, 1:], labels[1:]
    return after


def causal_conv1d(
    x, weight, bias=None, *, activation=None, channels_last=False, initial_states=None,
    final_states=None, cu_seqlens=None, seq_idx=None, state_indices=None, has_initial_state=None,
    pad_slot=None,
):
    """(out, final_states): with state_indices the pool given, the slots of the call replaced."""
    x, weight, bias, initial_states, final_states = map(
        wide, (x, weight, bias, initial_states, final_states)
    )
    if channels_last:
        x = x.swapaxes(1, 2)
    batch, dim, seqlen = x.shape
    width = weight.shape[1]
    state_len = width - 1
    for states in (initial_states, final_states):
        state_len = state_len if states is None else states.shape[-1]

    spans = list(sequences(batch, seqlen, cu_seqlens, seq_idx))
    final = final_room(len(spans), (dim, state_len), final_states, state_indices)
    slots = sequence_slots(len(spans), state_indices, pad_slot)
    out = np.zeros((batch, dim, seqlen))
    for s, (row, tokens, _) in enumerate(spans):
        if slots[s] is None:
            continue
        history = np.zeros((dim, state_len))
        if starts_from_state(s, initial_states, has_initial_state):
            history = initial_states[slots[s]]
        if seq_idx is None:
            for t in tokens:
                window = np.concatenate([history, x[row, :, t, None]], axis=1)
                out[row, :, t] = convolve(window, weight, bias, activation)
                history = window[:, 1:]
        else:
            taps = (weight, bias, activation)
            history = convolve_labelled(out[row], x[row], seq_idx[row], history, *taps)
        if final is not None:
            final[slots[s]] = history
    return (out.swapaxes(1, 2) if channels_last else out), final


def causal_conv1d_update(
    x, conv_state, weight, bias=None, *, activation=None, cache_seqlens=None, state_indices=None,
    state_indices_out=None, num_tokens=None, channels_last=False, pad_slot=None,
):
    """(out, conv_state)."""
    x, weight, bias, before = map(wide, (x, weight, bias, conv_state))
    pool = before.copy()
    single = x.ndim == 2
    if single:
        x = x[:, :, None]
    elif channels_last:
        x = x.swapaxes(1, 2)
    batch, dim, T = x.shape
    width, state_len = weight.shape[1], pool.shape[-1]
    out = np.zeros((batch, dim, T))
    for row in range(batch):
        read = row if state_indices is None else int(state_indices[row])
        write = read if state_indices_out is None else int(state_indices_out[row])
        if state_indices is not None and is_pad(read, pad_slot):
            continue
        if state_indices_out is not None and is_pad(write, pad_slot):
            continue
        tokens = T if num_tokens is None else int(num_tokens[row])
        state = before[read].copy()
        if cache_seqlens is None:
            history = state
        else:
            count = int(cache_seqlens[row])
            history = state[:, (count - (width - 1) + np.arange(width - 1)) % state_len]
        for t in range(tokens):
            window = np.concatenate([history, x[row, :, t, None]], axis=1)
            out[row, :, t] = convolve(window, weight, bias, activation)
            history = window[:, 1:]
            if cache_seqlens is not None:
                state[:, (count + t) % state_len] = x[row, :, t]
        pool[write] = history if cache_seqlens is None else state
    if single:
        out = out[:, :, 0]
    elif channels_last:
        out = out.swapaxes(1, 2)
    return out, pool


# mla_decode


def quantize(values, group):
    """(codes, scales, biases) of 4-bit affine groups of the last axis, in float32 step by step.

    `values` are float32; scales and biases are unrounded, codes are made with them as such.
    """
    f = np.float32
    *rows, width = values.shape
    w = np.asarray(values, f).reshape(*rows, width // group, group)
    least, most = w.min(-1), w.max(-1)
    with np.errstate(all="ignore"):
        scale = np.maximum((most - least) / f(15), f(1e-7))
        from_below = np.abs(least) > np.abs(most)
        scale = np.where(from_below, scale, -scale)
        edge = np.where(from_below, least, most)
        steps = np.rint(edge / scale)
        scale = np.where(steps != 0, edge / steps, scale)
        bias = np.where(steps != 0, edge, f(0))
        q = np.rint((w - bias[..., None]) / scale[..., None])
    q = np.clip(np.nan_to_num(q, nan=0), 0, 15).astype(np.uint32).reshape(*rows, width // 8, 8)
    codes = (q << (4 * np.arange(8, dtype=np.uint32))).sum(-1, dtype=np.uint32)
    return codes, scale.astype(f), bias.astype(f)


def dequantize(codes, scales, biases):
    """code * scale + bias in double precision."""
    q = (codes[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
    *rows, words = codes.shape
    q = q.reshape(*rows, scales.shape[-1], 8 * words // scales.shape[-1]).astype(np.float64)
    values = q * wide(scales)[..., None] + wide(biases)[..., None]
    return values.reshape(*rows, 8 * words)


@dataclass
class Decoded:
    out: np.ndarray
    lse: np.ndarray
    cache: dict = field(default_factory=dict)  # by name: the tensors after an append


def mla_decode(
    q_nope, seqlens, *, q_rope=None, latent=None, codes=None, scales=None, biases=None,
    k_rope=None, page_table=None, new_latent=None, new_rope=None, softmax_scale=None,
):
    """A Decoded; the cache in it has the dtypes that it came in."""
    cache = {
        name: array.copy()
        for name, array in (
            ("latent", latent), ("codes", codes), ("scales", scales), ("biases", biases),
            ("k_rope", k_rope),
        )
        if array is not None
    }
    single = q_nope.ndim == 3
    if single:
        q_nope, q_rope, new_latent, new_rope = (
            None if a is None else a[:, None] for a in (q_nope, q_rope, new_latent, new_rope)
        )
    batch, T, nheads, width = q_nope.shape
    page_size = next(iter(cache.values())).shape[1]

    def places(row, positions):
        """Indices of the first two axes of the cache."""
        if page_table is None:
            return np.full(len(positions), row), positions
        return np.asarray(page_table[row])[positions // page_size], positions % page_size

    if new_latent is not None:
        for row in range(batch):
            at = places(row, np.arange(int(seqlens[row]) - T, int(seqlens[row])))
            if latent is not None:
                cache["latent"][at] = new_latent[row].astype(latent.dtype)
            else:
                group = width // scales.shape[-1]
                made = quantize(new_latent[row].astype(np.float32), group)
                for name, values in zip(("codes", "scales", "biases"), made):
                    with np.errstate(over="ignore"):
                        cache[name][at] = values.astype(cache[name].dtype)
            if k_rope is not None:
                cache["k_rope"][at] = new_rope[row].astype(k_rope.dtype)

    scale = softmax_scale
    if not scale:
        scale = 1 / np.sqrt(width + (0 if q_rope is None else q_rope.shape[-1]))
    out, lse = np.zeros(q_nope.shape), np.full(q_nope.shape[:-1], -np.inf)
    for row in range(batch):
        at = places(row, np.arange(int(seqlens[row])))
        if latent is not None:
            values = wide(cache["latent"][at])
        else:
            values = dequantize(*(cache[name][at] for name in ("codes", "scales", "biases")))
        for t in range(T):
            seen = max(int(seqlens[row]) - T + t + 1, 0)
            if seen == 0:
                continue
            scores = wide(q_nope[row, t]) @ values[:seen].T
            if q_rope is not None:
                scores += wide(q_rope[row, t]) @ wide(cache["k_rope"][at])[:seen].T
            scores *= scale
            most = scores.max(-1, keepdims=True)
            p = np.exp(scores - most)
            total = p.sum(-1, keepdims=True)
            out[row, t] = p / total @ values[:seen]
            lse[row, t] = (most + np.log(total))[:, 0]
    if single:
        out, lse = out[:, 0], lse[:, 0]
    return Decoded(out, lse, cache)
