# SPDX-License-Identifier: MIT
"""The oracle itself, against formulas written another way: sums over the past, no recurrences."""

import numpy as np
import pytest

import reference
from reference import sigmoid, silu, softplus


def close(got, want):
    np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_scalars():
    assert softplus(np.array(-40.0)) == pytest.approx(np.exp(-40), rel=1e-14)
    assert softplus(np.array(20.5)) == 20.5 and softplus(np.array(1000.0)) == 1000
    close(softplus(np.array([-3.0, 0, 19])), np.log(1 + np.exp([-3.0, 0, 19])))
    close(silu(np.array([-800.0, 0, 2])), [0, 0, 2 / (1 + np.exp(-2))])


@pytest.mark.parametrize("complex_a", [False, True])
def test_selective_scan_is_a_sum_over_the_past(rng, complex_a):
    batch, dim, seqlen, dstate, ngroups = 2, 4, 7, 3, 2
    x, dt, z = rng.normal(size=(3, batch, dim, seqlen))
    A, h0 = -rng.random((dim, dstate)), rng.normal(size=(batch, dim, dstate))
    B, C = rng.normal(size=(2, batch, ngroups, dstate, seqlen))
    if complex_a:
        A, h0 = A + 1j * rng.normal(size=A.shape), h0 + 1j * rng.normal(size=h0.shape)
        B, C = B + 1j * rng.normal(size=B.shape), C - 1j * rng.normal(size=C.shape)
    D, bias = rng.normal(size=(2, dim))
    out, final = reference.selective_scan(
        x, dt, A, B, C, D, z, bias, dt_softplus=True, initial_states=h0
    )
    for b, d, t in np.ndindex(batch, dim, seqlen):
        step = np.log(1 + np.exp(dt[b, d] + bias[d]))
        h = np.exp(A[d] * step[: t + 1].sum()) * h0[b, d]
        for s in range(t + 1):
            h = (
                h
                + np.exp(A[d] * step[s + 1 : t + 1].sum())
                * step[s]
                * x[b, d, s]
                * B[b, d // 2, :, s]
            )
        y = (h * C[b, d // 2, :, t]).sum()
        y = (2 * y.real if complex_a else y) + D[d] * x[b, d, t]
        close(out[b, d, t], y * z[b, d, t] / (1 + np.exp(-z[b, d, t])))
        if t == seqlen - 1:
            close(final[b, d], h)


def test_forms_of_B_and_C_agree(rng):
    x, dt = rng.normal(size=(2, 2, 4, 5))
    A = -rng.random((4, 3)) + 1j * rng.normal(size=(4, 3))
    B, C = rng.normal(size=(2, 2, 1, 3, 5)) + 1j * rng.normal(size=(2, 2, 1, 3, 5))
    want = reference.selective_scan(x, dt, A, B, C)

    def pairs(v):
        return np.stack([v.real, v.imag], -1).reshape(*v.shape[:-1], -1)

    def last(v):
        return np.moveaxis(v, -1, 1)

    for got in (
        reference.selective_scan(x, dt, A, B[:, 0], C),
        reference.selective_scan(x, dt, A, pairs(B), pairs(C[:, 0])),
    ):
        close(got[0], want[0])
        close(got[1], want[1])
    out, final = reference.selective_scan(
        last(x), last(dt), A, last(B), pairs(last(C)), channels_last=True
    )
    close(out, last(want[0]))
    close(final, want[1])
    constant = rng.normal(size=(4, 3)) + 0j
    close(
        reference.selective_scan(x, dt, A, constant, C)[0],
        np.stack(
            [
                reference.selective_scan(
                    x[:, d : d + 1],
                    dt[:, d : d + 1],
                    A[d : d + 1],
                    np.broadcast_to(constant[d][None, None, :, None], B.shape),
                    C,
                )[0][:, 0]
                for d in range(4)
            ],
            1,
        ),
    )


def test_packed_sequences_are_separate_calls(rng):
    x, dt = rng.normal(size=(2, 1, 4, 12))
    A, B, C, h0 = (
        -rng.random((4, 3)), rng.normal(size=(1, 3, 12)), rng.normal(size=(1, 3, 12)),
        rng.normal(size=(3, 4, 3)),
    )
    cu = np.array([0, 5, 5, 12])
    out, final = reference.selective_scan(x, dt, A, B, C, cu_seqlens=cu, initial_states=h0)
    for s in range(3):
        cut = slice(cu[s], cu[s + 1])
        want = reference.selective_scan(
            x[..., cut], dt[..., cut], A, B[..., cut], C[..., cut], initial_states=h0[s : s + 1]
        )
        close(out[..., cut], want[0])
        close(final[s], want[1][0])

    ids = np.array([[7, 7, -1, 7, 2, 2, -3, -1, 9, 9, 9, -1]])
    out, final = reference.selective_scan(x, dt, A, B, C, seq_idx=ids, initial_states=h0[:1])
    for tokens, start in (([0, 1, 3], h0[:1]), ([4, 5], None), ([8, 9, 10], None)):
        want = reference.selective_scan(
            x[..., tokens], dt[..., tokens], A, B[..., tokens], C[..., tokens], initial_states=start
        )
        close(out[..., tokens], want[0])
    close(final, want[1])
    assert (out[..., [2, 6, 7, 11]] == 0).all()


def test_state_update_of_mamba1_is_a_scan(rng):
    x, dt, z = rng.normal(size=(3, 2, 5, 6))
    A, D, bias = -rng.random((6, 3)), rng.normal(size=6), rng.normal(size=6)
    B, C = rng.normal(size=(2, 2, 5, 3, 3))
    h0 = rng.normal(size=(2, 6, 3))
    options = dict(dt_softplus=True, dt_limit=(0.1, 1.0))
    want, final = reference.selective_scan(
        x, dt, A, B, C, D, z, bias, initial_states=h0, channels_last=True, **options
    )
    got = reference.state_update(h0, x, dt, A, B, C, D, z, bias, **options)
    close(got.out, want)
    close(got.states["state"], final)
    one = reference.state_update(
        h0, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, z[:, 0], bias, **options
    )
    close(one.out, want[:, 0])


def test_mamba2_is_mamba1_with_shared_values(rng):
    """Heads of mamba-2 are channels that share dt, A, D and bias."""
    x = rng.normal(size=(2, 5, 4, 3))
    dt = rng.normal(size=(2, 5, 4))
    A, D, bias = -rng.random(4), rng.normal(size=4), rng.normal(size=4)
    B, C = rng.normal(size=(2, 2, 5, 2, 6))
    h0 = rng.normal(size=(2, 4, 3, 6))
    got = reference.state_update(h0, x, dt, A, B, C, D, None, bias, dt_softplus=True)

    def spread(v):
        return np.repeat(v, 3, axis=-1)

    want = reference.state_update(
        h0.reshape(2, 12, 6), x.reshape(2, 5, 12), spread(dt), np.repeat(spread(A)[:, None], 6, 1),
        B, C, spread(D), None, spread(bias), dt_softplus=True,
    )
    close(got.out.reshape(2, 5, 12), want.out)
    close(got.states["state"].reshape(2, 12, 6), want.states["state"])


def test_slots_are_gather_and_scatter(rng):
    pool = rng.normal(size=(6, 4, 3))
    x, dt = rng.normal(size=(2, 3, 2, 4))
    A, B, C = -rng.random((4, 3)), *rng.normal(size=(2, 3, 2, 3))
    read, write = np.array([4, 1, 0]), np.array([5, -1, 0])
    got = reference.state_update(
        pool, x, dt, A, B, C, state_indices=read, state_indices_out=write, num_tokens=[1, 2, 2]
    )
    first = reference.state_update(pool[[4]], x[:1, :1], dt[:1, :1], A, B[:1, :1], C[:1, :1])
    third = reference.state_update(pool[[0]], x[2:], dt[2:], A, B[2:], C[2:])
    close(
        got.out,
        np.stack([np.append(first.out[0], np.zeros((1, 4)), 0), np.zeros((2, 4)), third.out[0]]),
    )
    close(got.states["state"], [third.states["state"][0], *pool[1:5], first.states["state"][0]])


def mamba3(rng, batch, T, rank, nheads, headdim, ngroups, dstate, nangles):
    return dict(
        x=rng.normal(size=(batch, T, nheads, headdim)),
        dt=rng.random((batch, T, nheads)),
        adt=-rng.random((batch, T, nheads)),
        B=rng.normal(size=(batch, T, rank, ngroups, dstate)),
        C=rng.normal(size=(batch, T, rank, ngroups, dstate)),
        D=rng.normal(size=nheads),
        z=rng.normal(size=(batch, T, nheads, headdim)),
        trap=rng.normal(size=(batch, T, nheads)),
        angles=rng.normal(size=(batch, T, nheads, nangles)),
        B_bias=rng.normal(size=(nheads, rank, dstate)),
        C_bias=rng.normal(size=(nheads, rank, dstate)),
        mimo_x=rng.normal(size=(nheads, rank, headdim)),
        mimo_z=rng.normal(size=(nheads, rank, headdim)),
        mimo_out=rng.normal(size=(nheads, rank, headdim)),
    )


@pytest.mark.parametrize("rotary, rank", [("interleaved", 1), ("half", 4)])
def test_mamba3_in_its_attention_form(rng, rotary, rank):
    """Outputs as decayed sums over pairs of tokens (no state but the initial one), for one head."""
    T, P, N, S = 6, 3, 8, 3
    a = mamba3(rng, 1, T, rank, 1, P, 1, N, S)
    h0, k0, v0, theta0 = (
        rng.normal(size=s) for s in ((1, 1, P, N), (1, rank, 1, N), (1, 1, P), (1, 1, S))
    )
    got, final, _ = reference.ssd_chunk(
        **a, rotary=rotary, initial_states=h0, initial_angle_states=theta0, initial_k_states=k0,
        initial_v_states=v0,
    )

    # Rotation as a product of complex numbers
    first = {"interleaved": 2 * np.arange(S), "half": np.arange(S)}[rotary]
    second = first + (1 if rotary == "interleaved" else N // 2)
    theta = theta0[0, 0] + np.cumsum(np.pi * np.tanh(a["angles"][0, :, 0]) * a["dt"][0], axis=0)

    def rotated(v, t):
        w, turned = v.copy(), (v[:, first] + 1j * v[:, second]) * np.exp(1j * theta[t])
        w[:, first], w[:, second] = turned.real, turned.imag
        return w

    q = [rotated(a["C"][0, t, :, 0] + a["C_bias"][0], t) for t in range(T)]
    k = [k0[0, :, 0]] + [rotated(a["B"][0, t, :, 0] + a["B_bias"][0], t) for t in range(T)]
    v = [v0[0, 0]] + [a["x"][0, t, 0] for t in range(T)]
    u = [a["mimo_x"][0] * value for value in v]
    lam, dt, adt = sigmoid(a["trap"][0, :, 0]), a["dt"][0, :, 0], a["adt"][0, :, 0]
    total = np.cumsum(adt)
    for t in range(T):
        h = np.exp(total[t]) * h0[0, 0]
        for s in range(-1, t + 1):  # token s of the past, -1 the one before the call
            weight = 0.0
            if s >= 0:
                weight += lam[s] * dt[s] * np.exp(total[t] - total[s])
            if s < t:  # the other end of the trapezoid of token s + 1
                weight += (
                    (1 - lam[s + 1]) * dt[s + 1] * np.exp(adt[s + 1] + total[t] - total[s + 1])
                )
            h = h + weight * u[s + 1].T @ k[s + 1]
        y = q[t] @ h.T + a["D"][0] * u[t + 1]
        o = y * silu(a["mimo_z"][0] * a["z"][0, t, 0])
        close(got[0, t, 0], (a["mimo_out"][0] * o).sum(0))
    close(final.h[0, 0], h)
    close(final.angle[0, 0], np.mod(theta[-1], 2 * np.pi))
    close(final.k[0, :, 0], k[-1])
    close(final.v[0, 0], v[-1])


def test_mamba3_decode_is_prefill(rng):
    a = mamba3(rng, 2, 5, 2, 4, 3, 2, 6, 2)
    shapes = dict(h=(2, 4, 3, 6), angle=(2, 4, 2), k=(2, 2, 4, 6), v=(2, 4, 3))
    start = {name: rng.normal(size=s) for name, s in shapes.items()}
    captures = np.array([3, -1, 5])
    want, final, captured = reference.ssd_chunk(
        **a, capture_positions=captures, initial_states=start["h"],
        initial_angle_states=start["angle"], initial_k_states=start["k"],
        initial_v_states=start["v"],
    )
    got = reference.state_update(
        start["h"],
        **a,
        angle_state=start["angle"],
        k_state=start["k"],
        v_state=start["v"],
        intermediate_states=np.zeros((2, 5, 4, 3, 6)),
        intermediate_k_states=np.zeros((2, 5, 2, 4, 6)),
    )
    close(got.out, want)
    for name, value in (
        ("state", final.h), ("angle_state", final.angle), ("k_state", final.k),
        ("v_state", final.v),
    ):
        close(got.states[name], value)
    for i, (row, token) in ((0, (0, 3)), (2, (1, 0))):
        close(captured.h[i], got.states["intermediate_states"][row, token])
        close(captured.k[i], got.states["intermediate_k_states"][row, token])


def test_norm_and_rank_vectors(rng):
    a = mamba3(rng, 1, 1, 3, 2, 4, 1, 6, 0)
    norm = rng.normal(size=(2, 4))
    h0 = np.zeros((1, 2, 4, 6))
    args = {k: v for k, v in a.items() if k not in ("angles", "trap", "mimo_out", "z", "mimo_z")}
    y = reference.state_update(h0, **args).out
    assert y.shape == (1, 1, 3, 2, 4)
    u = a["mimo_x"].swapaxes(0, 1) * a["x"][0, 0]
    k = a["B"][0, 0] + a["B_bias"].swapaxes(0, 1)
    q = a["C"][0, 0] + a["C_bias"].swapaxes(0, 1)
    mixed = np.einsum("shn,rhn->rhs", k, q)  # for one token attention without softmax
    close(
        y[0, 0], a["dt"][0, 0, :, None] * np.einsum("rhs,shp->rhp", mixed, u) + a["D"][:, None] * u
    )
    rms = np.sqrt((y**2).mean(-1, keepdims=True) + 1e-3)
    gate = silu(a["mimo_z"].swapaxes(0, 1) * a["z"][0, 0])
    want = (y / rms * norm * gate * a["mimo_out"].swapaxes(0, 1)).sum(2)
    got = reference.state_update(
        h0, **args, z=a["z"], mimo_z=a["mimo_z"], mimo_out=a["mimo_out"], norm_weight=norm,
        norm_eps=1e-3,
    )
    close(got.out, want)


@pytest.mark.parametrize("width", range(2, 9))
def test_convolution_is_numpys(rng, width):
    x, weight, bias = rng.normal(size=(2, 3, 20)), rng.normal(size=(3, width)), rng.normal(size=3)
    start = rng.normal(size=(2, 3, width + 1))
    out, final = reference.causal_conv1d(x, weight, bias, initial_states=start)
    for b, d in np.ndindex(2, 3):
        inputs = np.concatenate([start[b, d], x[b, d]])
        close(out[b, d], np.correlate(inputs, weight[d], "valid")[-20:] + bias[d])
        close(final[b, d], inputs[-width - 1 :])
    close(
        reference.causal_conv1d(x.swapaxes(1, 2), weight, activation="silu", channels_last=True)[
            0
        ].swapaxes(1, 2),
        silu(reference.causal_conv1d(x, weight)[0]),
    )


@pytest.mark.parametrize("ring", [False, True])
def test_convolution_by_tokens_is_the_whole(rng, ring):
    x, weight = rng.normal(size=(2, 3, 20)), rng.normal(size=(3, 4))
    want, final = reference.causal_conv1d(x, weight)
    state, outs = np.zeros((2, 3, 5)), []
    for cut in (slice(0, 1), slice(1, 4), slice(4, 12), slice(12, 20)):
        counts = np.full(2, cut.start) if ring else None
        out, state = reference.causal_conv1d_update(
            x[..., cut], state, weight, cache_seqlens=counts
        )
        outs.append(out)
    close(np.concatenate(outs, -1), want)
    close(np.roll(state, 0 if not ring else -(20 % 5), -1), x[..., -5:])
