# SPDX-License-Identifier: MIT
"""What the tests share: dtypes, the measure of error, and arrays in awkward places of memory."""

import ml_dtypes
import numpy as np

from reference import wide

F32, F16, BF16 = np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)
C64 = np.dtype(np.complex64)
I32, I64 = np.dtype(np.int32), np.dtype(np.int64)
FLOATS = (F32, F16, BF16)
INDICES = (I32, I64)

# Largest error, relative to the largest value of the reference, by the dtype of what is compared.
TOLERANCE = {F32: 2e-5, C64: 2e-5, F16: 2e-3, BF16: 1e-2}


# Comparing


def assert_close(got, want, what="out", dtype=None):
    """Within the tolerance of its dtype (or of `dtype`, if that was rounded to before), no NaN."""
    assert got.shape == want.shape, f"{what}: shape {got.shape}, expected {want.shape}"
    if got.size == 0:
        return
    values = wide(got)
    assert np.isfinite(want).all(), f"{what}: the reference is not finite: the case is badly drawn"
    wrong = ~np.isfinite(values)
    assert not wrong.any(), (
        f"{what}: {wrong.sum()} of {wrong.size} values are not finite, "
        f"the first at {np.argwhere(wrong)[0]}"
    )
    error, scale = np.abs(values - want), np.abs(want).max()
    bound = TOLERANCE[np.dtype(dtype or got.dtype)] * scale
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error.max() <= bound, (
        f"{what}: error {error.max() / scale:.3g} of the largest value {scale:.3g} "
        f"at {tuple(map(int, worst))}: got {values[worst]:.9g}, expected {want[worst]:.9g}"
    )


def raw(array):
    """The bytes of an array, in index order."""
    return np.ascontiguousarray(array).view(np.uint8) if array.size else np.empty(0, np.uint8)


def assert_same_bits(got, want, what="out"):
    assert got.shape == want.shape and got.dtype == want.dtype, (
        f"{what}: {got.dtype}{got.shape}, expected {want.dtype}{want.shape}"
    )
    same = (
        (raw(got) == raw(want)).reshape(-1, got.dtype.itemsize).all(axis=1)
        if got.size
        else np.array([True])
    )
    assert same.all(), (
        f"{what}: {(~same).sum()} of {same.size} elements differ, "
        f"the first at flat index {same.argmin()}"
    )


# Drawing values


def normal(rng, shape, dtype=F32, scale=1.0):
    if np.dtype(dtype) == C64:
        return (normal(rng, shape) + 1j * normal(rng, shape)).astype(C64) * np.float32(scale)
    return (rng.standard_normal(shape, np.float32) * np.float32(scale)).astype(dtype)


def uniform(rng, low, high, shape, dtype=F32):
    return rng.uniform(low, high, shape).astype(np.float32).astype(dtype)


def log_uniform(rng, low, high, shape, dtype=F32):
    return np.exp(rng.uniform(np.log(low), np.log(high), shape)).astype(np.float32).astype(dtype)


def split(rng, total, parts):
    """cu_seqlens of `parts` random sequences, the first one or another empty now and then."""
    cuts = np.sort(rng.integers(0, total + 1, max(parts - 1, 0)))
    return np.concatenate([[0], cuts, [total]]) if parts else np.zeros(1, np.int64)


def runs(rng, batch, seqlen):
    """seq_idx of random runs of tokens, with pads anywhere; in some rows an id comes back."""
    ids = np.empty((batch, seqlen), np.int64)
    for row in range(batch):
        ids[row] = np.cumsum(rng.random(seqlen) < 0.15) + rng.integers(0, 3)
        if rng.random() < 0.3:
            ids[row] %= 3
        ids[row][rng.random(seqlen) < 0.15] = -1 - rng.integers(0, 5)
    return ids


# Placing arrays in memory

LAYOUTS = ("packed", "transposed", "sliced", "negative", "padded", "offset", "mixed")


class Placed:
    """An array inside a larger buffer: the buffer, the view, the bytes around it as they were."""

    def __init__(self, buffer, view, carve):
        self.buffer, self.array = buffer, view
        inside = np.zeros(buffer.shape, bool)
        carve(inside)[...] = True
        self.outside = ~inside
        self.before = buffer[self.outside].copy()

    def assert_gaps_untouched(self, what="out"):
        assert_same_bits(self.buffer[self.outside], self.before, f"{what}: memory around it")


def carver(rng, ndim, layout):
    """How an array is cut out of a buffer: order of axes in memory; step, sign, margin of each."""
    order, step, sign, margin = list(range(ndim)), [1] * ndim, [1] * ndim, [0] * ndim
    if layout == "transposed":
        order = order[::-1]
    elif layout == "sliced":
        step, margin = [2] * ndim, [1] * ndim
    elif layout == "negative":
        sign = [-1] * ndim
    elif layout == "padded":
        margin[-1:] = [3] * min(ndim, 1)
    elif layout == "offset":
        margin[:1] = [1] * min(ndim, 1)
        margin[-1:] = [1] * min(ndim, 1)
    elif layout == "mixed":
        order = list(rng.permutation(ndim))
        step = list(rng.integers(1, 4, ndim))
        sign = list(rng.choice([-1, 1], ndim))
        margin = list(rng.integers(0, 4, ndim))
    elif layout != "packed":
        raise ValueError(layout)
    return order, step, sign, margin


GUARD = 16  # elements before and after every buffer


def place(rng, values, layout="packed"):
    """`values` in a buffer, in the given layout.  Around the elements is noise, NaN among it."""
    values = np.asarray(values)
    order, step, sign, margin = carver(rng, values.ndim, layout)
    extent = [values.shape[axis] * step[axis] + 2 * margin[axis] for axis in order]
    size = int(np.prod(extent, dtype=np.int64))

    def carve(buffer):
        cuts = [slice(margin[i], margin[i] + values.shape[i] * step[i], step[i]) for i in order]
        view = buffer[GUARD : GUARD + size].reshape(extent)[tuple(cuts)]
        return view.transpose(np.argsort(order))[tuple(slice(None, None, s) for s in sign)]

    noise = rng.integers(0, 256, (size + 2 * GUARD) * values.dtype.itemsize, np.uint8)
    buffer = noise.view(values.dtype)
    view = carve(buffer)
    view[...] = values
    return Placed(buffer, view, carve)


def laid(rng, values, layout="packed"):
    """As place(), only the array."""
    return None if values is None else place(rng, values, layout).array


def blank(rng, shape, dtype, layout="packed"):
    """Room for an output, full of NaN."""
    return place(rng, np.full(shape, np.nan, dtype), layout)


def repeated(values, axis, count):
    """`count` copies of the first entry of an axis, with stride 0."""
    first = np.take(values, [0], axis)
    shape = list(first.shape)
    shape[axis] = count
    return np.broadcast_to(first, shape)


class Untouched:
    """Checks that arrays hold afterwards the bytes that they held before."""

    def __init__(self, **arrays):
        self.arrays = {name: a for name, a in arrays.items() if isinstance(a, np.ndarray)}
        self.copies = {name: a.copy() for name, a in self.arrays.items()}

    def check(self):
        for name, array in self.arrays.items():
            assert_same_bits(array, self.copies[name], name)


def written_slots(indices, pad_slot=None):
    """The slots of an index array that are no pads."""
    flat = np.asarray(indices).reshape(-1)
    return flat[(flat >= 0) & (flat != (-1 if pad_slot is None else pad_slot))]


def assert_slots_untouched(pool, before, touched, what):
    """Every slot of a pool that is not in `touched` holds the bytes that it held before."""
    rest = np.setdiff1d(np.arange(len(pool)), touched)
    assert_same_bits(pool[rest], before[rest], f"{what}: slots of no row")
