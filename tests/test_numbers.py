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


def test_softplus_out_of_range(ops):
    dt = np.array([-np.inf, -1e30, -120, 1e30, np.inf, np.nan], F32)
    x, one = np.ones((1, dt.size, 1), F32), np.ones((dt.size, 1), F32)
    _, state = ops.selective_scan(
        x, column(dt), -one, one, one, dt_softplus=True, return_final_states=True
    )
    np.testing.assert_array_equal(state.reshape(-1), [0, 0, 0, F32.type(1e30), np.inf, np.nan])


def gates():
    return np.concatenate([np.linspace(-85, 100, 20001), [0.0, -0.0, 1e-30, -1e-30]]).astype(F32)


def gated(ops, z):
    """silu(z) by each operation that has it: with D = x = 1, or as the convolution of z with 1."""
    one, x = np.ones((z.size, 1), F32), np.ones((1, z.size, 1), F32)
    yield ops.selective_scan(x, x, -one, 0 * one, 0 * one, D=one[:, 0], z=column(z))
    state = np.zeros((1, z.size, 1), F32)
    zero = np.zeros((1, 1), F32)
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
    finite = np.isfinite(values)
    weight = np.tile(np.array([0, 1], F32), (finite.sum(), 1))
    for layout in ((1, -1, 1), (1, 1, -1)):
        x = values[finite].reshape(layout)
        out = np.zeros(x.shape, dtype)
        ops.causal_conv1d(x, weight[: x.shape[1]], out=out)
        assert_same_values(np.abs(out.reshape(-1)), np.abs(want[finite]))  # -0 + 0 is 0


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
def test_every_16_bit_value_is_read_exactly(ops, dtype):
    values = np.arange(2**16, dtype=np.uint16).view(dtype)
    start = values.reshape(1, -1, 2)
    none, one = np.zeros((1, start.shape[1], 0), F32), np.ones(start.shape[1:], F32)
    final = np.zeros(start.shape, F32)
    ops.selective_scan(none, none, -one, one, one, initial_states=start, final_states=final)
    assert_same_values(final.reshape(-1), values.astype(F32))
