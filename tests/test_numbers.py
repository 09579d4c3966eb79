# SPDX-License-Identifier: MIT
"""Elementary functions and conversions over their range, seen through calls that show nothing else.

The tests of the operations judge errors against the largest value; here each one counts.
"""

import numpy as np
import pytest

import reference
from cases import BF16, C64, F16, F32

pytestmark = pytest.mark.core

def assert_exponential(got, want, exponent):
    """float32 rounds the exponent: its result is off by as many units as the exponent is large."""
    error = np.abs(got.reshape(-1) - want) / np.abs(want)
    bound = 3e-7 + 1.2e-7 * np.abs(exponent)
    worst = np.argmax(error / bound)
    assert error[worst] <= bound[worst], f"error {error[worst]:.3g} of exp({exponent[worst]})"


def column(values):
    """One channel a value: (1, dim, 1)."""
    return np.asarray(values, F32).reshape(1, -1, 1)


def heads_of_one(ops, dt, A, start=None, x=0.0, B=0.0, **options):
    """The state after one token of heads with one number each."""
    n = dt.size
    tokens = np.full((1, 1, n, 1), x, F32), dt.reshape(1, 1, n), np.broadcast_to(F32.type(A), n)
    coefficient = np.full((1, 1, 1, 1), B, F32)
    if start is not None:
        options["initial_states"] = start.reshape(1, n, 1, 1)
    results = ops.ssd_chunk(*tokens, coefficient, coefficient, return_final_states=True, **options)
    return results[1]


def one_token(ops, dt, A, start, **options):
    """The state exp(dt A) start, of a token that adds nothing, by prefill and by decode."""
    dt = column(dt)
    zero, none = np.zeros_like(dt), np.zeros((dt.shape[1], 1), A.dtype)
    _, state = ops.selective_scan(
        zero, dt, A, none, none, initial_states=start, return_final_states=True, **options
    )
    yield state
    if A.dtype == F32:
        state = start.copy()
        ops.state_update(
            state, zero[..., 0], dt[..., 0], A, zero[:, :1, 0], zero[:, :1, 0], **options
        )
        yield state
        assert (A == 1).all()
        yield heads_of_one(ops, dt, 1, start, **options)


def test_exponential(ops):
    dt = np.concatenate([np.linspace(-87, 88, 20001), np.linspace(-1e-3, 1e-3, 401), [0.0]]).astype(
        F32
    )
    for state in one_token(ops, dt, np.ones((dt.size, 1), F32), np.ones((1, dt.size, 1), F32)):
        assert_exponential(state, np.exp(dt.astype(np.float64)), dt)


def test_exponential_out_of_range(ops):
    dt = np.array([-1e30, -200, -104, 89, 1000, np.nan], F32)
    for state in one_token(ops, dt, np.ones((dt.size, 1), F32), np.ones((1, dt.size, 1), F32)):
        np.testing.assert_array_equal(
            state.reshape(-1), [0, 0, 0, np.inf, np.inf, np.nan]
        )


def test_exponential_of_small_results_is_small(ops):
    """Below the normal range a result may lose bits or be 0: less than 2^-126 off, all told."""
    dt = np.linspace(-104, -87, 4001).astype(F32)
    for state in one_token(ops, dt, np.ones((dt.size, 1), F32), np.ones((1, dt.size, 1), F32)):
        assert (np.abs(state.reshape(-1) - np.exp(dt.astype(np.float64))) <= 2.0**-126).all()


def test_complex_exponential(ops):
    dt = np.concatenate([np.linspace(-100, 100, 20001), np.arange(-60, 61) * np.pi / 4]).astype(F32)
    angle = dt.astype(np.float64)
    (state,) = one_token(ops, dt, np.full((dt.size, 1), 1j, C64), np.ones((1, dt.size, 1), C64))
    assert_exponential(state, np.exp(1j * angle), dt)
    damped = np.linspace(-60, 0, dt.size).astype(F32)
    (state,) = one_token(
        ops, np.ones(dt.size), (damped + 1j * dt).astype(C64).reshape(-1, 1),
        np.ones((1, dt.size, 1), C64),
    )
    want = np.exp(damped.astype(np.float64) + 1j * angle)
    assert_exponential(state, want, np.abs(damped) + np.abs(dt))


def test_softplus(ops):
    """With x = B = 1 and a zero state the new state is dt' itself."""
    dt = np.concatenate(
        [np.linspace(-87, 60, 20001), 20 + np.linspace(-1e-4, 1e-4, 41), [-1e-30, 0.0]]
    ).astype(F32)
    x, one = np.ones((1, dt.size, 1), F32), np.ones((dt.size, 1), F32)
    want = reference.softplus(dt.astype(np.float64))
    _, state = ops.selective_scan(
        x, column(dt), -one, one, one, dt_softplus=True, return_final_states=True
    )
    np.testing.assert_allclose(state.reshape(-1), want, rtol=1e-6)
    state = np.zeros((1, dt.size, 1), F32)
    ops.state_update(state, x[..., 0], dt[None], -one, x[:, :1, 0], x[:, :1, 0], dt_softplus=True)
    np.testing.assert_allclose(state.reshape(-1), want, rtol=1e-6)
    state = heads_of_one(ops, dt, -1, x=1, B=1, dt_softplus=True)
    np.testing.assert_allclose(state.reshape(-1), want, rtol=1e-6)


def test_softplus_out_of_range(ops):
    dt = np.array([-np.inf, -1e30, -120, 1e30, np.inf, np.nan], F32)
    x, one = np.ones((1, dt.size, 1), F32), np.ones((dt.size, 1), F32)
    _, state = ops.selective_scan(
        x, column(dt), -one, one, one, dt_softplus=True, return_final_states=True
    )
    np.testing.assert_array_equal(state.reshape(-1), [0, 0, 0, F32.type(1e30), np.inf, np.nan])
    state = heads_of_one(ops, dt, -1, x=1, B=1, dt_softplus=True)
    np.testing.assert_array_equal(state.reshape(-1), [0, 0, 0, F32.type(1e30), np.inf, np.nan])


def test_both_ends_of_the_trapezoid(ops):
    """lambda from x = B = 1, and 1 - lambda from the token before: each keeps its small values."""
    logit = np.concatenate([np.linspace(-85, 85, 20001), [0.0, 1e-20, -1e-20]]).astype(F32)
    want = reference.sigmoid(logit.astype(np.float64))
    other = reference.sigmoid(-logit.astype(np.float64))
    one, trap = np.ones(logit.size, F32), logit.reshape(1, 1, -1)
    state = heads_of_one(ops, one, 0, x=1, B=1, trap=trap)
    assert_exponential(state, want, logit)
    before = {
        "initial_k_states": one.reshape(1, 1, -1, 1), "initial_v_states": one.reshape(1, -1, 1),
    }
    state = heads_of_one(ops, one, 0, trap=trap, **before)
    assert_exponential(state, other, logit)
    inside = np.linspace(0, 1, 1001).astype(F32)
    options = dict(trap=inside.reshape(1, 1, -1), trap_sigmoid=True)
    one = np.ones(inside.size, F32)
    np.testing.assert_array_equal(heads_of_one(ops, one, 0, x=1, B=1, **options).ravel(), inside)


def rotated(ops, angles, start, half, dt=1.0):
    """The final angles, and the key (1, 0) turned by them, one pair a head."""
    n = angles.size
    zero = np.zeros((1, 1, n, 1), F32)
    B = np.array([1, 0], F32).reshape(1, 1, 1, 2)
    result = ops.ssd_chunk(
        zero, np.full((1, 1, n), dt, F32), np.zeros(n, F32), B, B, trap=zero[..., 0],
        angles=angles.reshape(1, 1, n, 1), initial_angle_states=start.reshape(1, n, 1),
        rotary="half" if half else "interleaved", return_final_states=True,
    )
    return result[2].reshape(-1), result[3].reshape(-1, 2)


@pytest.mark.parametrize("half", [False, True], ids=["interleaved", "half"])
def test_angles(ops, half):
    """pi tanh(angle), small ones to the last bits; negative ones a turn further."""
    angles = np.concatenate(
        [np.linspace(-12, 12, 20001), np.linspace(-0.7, 0.7, 4001), 10.0 ** np.arange(-30, 0), [0.0]]
    ).astype(F32)
    want = np.pi * np.tanh(angles.astype(np.float64))
    got, key = rotated(ops, angles, np.zeros_like(angles), half)
    positive = angles >= 0
    np.testing.assert_allclose(got[positive], want[positive], rtol=4e-7)
    error = got[~positive] - (want[~positive] + 2 * np.pi)
    assert (np.abs(error - 2 * np.pi * np.round(error / (2 * np.pi))) < 1e-6).all()
    assert (got >= 0).all() and (got <= F32.type(2 * np.pi)).all()
    np.testing.assert_allclose(key, np.stack([np.cos(want), np.sin(want)], 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("half", [False, True], ids=["interleaved", "half"])
def test_sines_and_cosines(ops, half):
    """Without a step the key is turned by the angle that is there; zeros of both stay exact."""
    start = np.concatenate([np.linspace(0, 6.2831, 40001), np.arange(8) * np.pi / 4]).astype(F32)
    got, key = rotated(ops, np.zeros_like(start), start, half)
    np.testing.assert_array_equal(got, start)
    wide = start.astype(np.float64)
    np.testing.assert_allclose(key, np.stack([np.cos(wide), np.sin(wide)], 1), rtol=0, atol=2e-7)


def test_angles_out_of_range(ops):
    angles = np.array([np.inf, -np.inf, 1e30, -1e30, np.nan], F32)
    got, key = rotated(ops, angles, np.zeros_like(angles), False)
    np.testing.assert_allclose(got, [np.pi, np.pi, np.pi, np.pi, np.nan], rtol=1e-6)
    assert np.isnan(key[4]).all() and np.isfinite(key[:4]).all()


def gates():
    return np.concatenate([np.linspace(-85, 100, 20001), [0.0, -0.0, 1e-30, -1e-30]]).astype(F32)


def gated(ops, z):
    """silu(z) by each operation that has it: with D = x = 1, or as the convolution of z with 1."""
    one, x = np.ones((z.size, 1), F32), np.ones((1, z.size, 1), F32)
    yield ops.selective_scan(x, x, -one, 0 * one, 0 * one, D=one[:, 0], z=column(z))
    state = np.zeros((1, z.size, 1), F32)
    zero = np.zeros((1, 1), F32)
    heads, tokens = np.ones((1, 1, z.size, 1), F32), np.ones((1, 1, z.size), F32)
    nothing = np.zeros((1, 1, 1, 1), F32)
    yield ops.ssd_chunk(
        heads, tokens, -one[:, 0], nothing, nothing, D=one[:, 0], z=z.reshape(heads.shape)
    )
    yield ops.state_update(state, x[..., 0], x[..., 0], -one, zero, zero, D=one[:, 0], z=z[None])
    weight = np.concatenate([0 * one, one], 1)
    yield ops.causal_conv1d(column(z), weight, activation="silu")
    yield ops.causal_conv1d(z.reshape(1, 1, -1), weight[:1], activation="silu")
    yield ops.causal_conv1d_update(
        z[None], np.zeros((1, z.size, 1), F32), weight, activation="silu"
    )


def test_silu(ops):
    z = gates()
    some = z != 0
    for out in gated(ops, z):
        out = out.reshape(-1)
        assert_exponential(out[some], reference.silu(z[some].astype(np.float64)), z[some])
        assert (out[~some] == 0).all()


def test_silu_out_of_range(ops):
    z = np.array([-1e30, -200, 1e30, np.nan], F32)
    for out in gated(ops, z):
        np.testing.assert_array_equal(out.reshape(-1), [0, 0, F32.type(1e30), np.nan])


# Conversions


def patterns(rng):
    """float32 of every kind: random bits, halfway cases of both 16-bit dtypes, ends of range."""
    bits = rng.integers(0, 2**32, 40000, np.uint32)
    halves = []
    for kept in (16, 13):  # bits that are dropped
        base = (bits >> kept) << kept
        halves += [
            base | (1 << (kept - 1)), base | ((1 << (kept - 1)) - 1),
            base | ((1 << (kept - 1)) + 1),
        ]
    small = (rng.integers(0, 2**28, 20000) + (95 << 23)).astype(
        np.uint32
    )  # about fp16's subnormals
    values = np.concatenate([bits, *halves, small, small | np.uint32(1 << 31)]).view(F32)
    ends = [
        0.0, -0.0, 65504, 65519.996, 65520, 65536, -65520, 2.0**-24, 2.0**-25, 1.5 * 2.0**-25,
        3.4e38, np.inf, -np.inf, np.nan,
    ]
    return np.concatenate([values, np.array(ends, F32)])


def assert_same_values(got, want):
    """The same bits, any NaN for a NaN."""
    nan = np.isnan(want.astype(F32))
    assert (np.isnan(got.astype(F32)) == nan).all()
    size = f"u{got.dtype.itemsize}"
    wrong = (got.view(size) != want.view(size)) & ~nan
    assert not wrong.any(), f"{wrong.sum()} wrong, as {got[wrong][0]} for {want[wrong][0]}"


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
def test_rounding_is_to_nearest_even(ops, rng, dtype):
    """States of a call without tokens, and convolved inputs, are only converted."""
    values = patterns(rng)
    with np.errstate(over="ignore", invalid="ignore"):
        want = values.astype(dtype)
    start = values.reshape(1, -1, 2)
    final = np.zeros(start.shape, dtype)
    none = np.zeros((1, start.shape[1], 0), F32)
    one = np.ones(start.shape[1:], F32)
    ops.selective_scan(none, none, -one, one, one, initial_states=start, final_states=final)
    assert_same_values(final.reshape(-1), want)
    assert_same_values(through_prefill(ops, values, dtype), want)
    finite = np.isfinite(values)
    weight = np.tile(np.array([0, 1], F32), (finite.sum(), 1))
    for layout in ((1, -1, 1), (1, 1, -1)):
        x = values[finite].reshape(layout)
        out = np.zeros(x.shape, dtype)
        ops.causal_conv1d(x, weight[: x.shape[1]], out=out)
        assert_same_values(np.abs(out.reshape(-1)), np.abs(want[finite]))  # -0 + 0 is 0


def through_prefill(ops, values, dtype):
    """States that a call without tokens passes on, in another dtype."""
    heads = values.reshape(1, -1, 1, 2)
    n = heads.shape[1]
    x, dt, B = np.zeros((1, 0, n, 1), F32), np.zeros((1, 0, n), F32), np.zeros((1, 0, 1, 2), F32)
    final = np.zeros(heads.shape, dtype)
    ops.ssd_chunk(x, dt, np.zeros(n, F32), B, B, initial_states=heads, final_states=final)
    return final.reshape(-1)


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
def test_every_16_bit_value_is_read_exactly(ops, dtype):
    values = np.arange(2**16, dtype=np.uint16).view(dtype)
    start = values.reshape(1, -1, 2)
    none, one = np.zeros((1, start.shape[1], 0), F32), np.ones(start.shape[1:], F32)
    final = np.zeros(start.shape, F32)
    ops.selective_scan(none, none, -one, one, one, initial_states=start, final_states=final)
    assert_same_values(final.reshape(-1), values.astype(F32))
    assert_same_values(through_prefill(ops, values, F32), values.astype(F32))
