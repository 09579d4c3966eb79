# SPDX-License-Identifier: MIT
"""The machine's own rates, from the native loops (native/ceilings.cc).

The loops run at the best instruction-set level of the machine even where SSMK_ISA holds the library
to a lower one: a ceiling is the machine's.  Where there are several ways to do a thing all of them
run, and the best one counts.
"""

import ctypes
from pathlib import Path

import numpy as np

from . import method

BEST_LEVEL = 0
ROUNDS = 20000  # of 1024 exponentials, or of 12 vector multiply-adds: a few milliseconds


class Ceilings:
    """Loops as calls on arrays, by name of the variant."""

    def __init__(self):
        path = Path(__file__).with_name("_ceilings.so")
        self._library = ctypes.CDLL(str(path))
        self._library.bench_level.restype = ctypes.c_char_p
        for name in ("multiply_add", "exponential", "bare_exponential"):
            getattr(self._library, f"bench_{name}").restype = ctypes.c_int64
        self.level = self._library.bench_level(BEST_LEVEL).decode()

    def set_threads(self, threads):
        self._library.bench_set_threads(threads)

    def _over(self, name, *arrays):
        """A call of a loop over whole arrays of one size."""
        function = getattr(self._library, f"bench_{name}")
        pointers = [ctypes.c_void_p(array.ctypes.data) for array in arrays]
        size = ctypes.c_int64(arrays[0].nbytes)
        return lambda: function(BEST_LEVEL, *pointers, size)

    def _arithmetic(self, name, rounds):
        function = getattr(self._library, f"bench_{name}")
        return lambda: function(BEST_LEVEL, ctypes.c_int64(rounds))

    # Each gives {variant: call()}; an array's size is a multiple of 4 bytes, and it starts on a
    # cache line.

    def update(self, array):
        """In place: as numbers of the array's dtype, or blind to what the bits mean."""
        loops = {2: "update_bf16", 4: "update_f32"}
        return {
            "as numbers": self._over(loops[array.itemsize], array),
            "as bits": self._over("update_bits", array),
        }

    def copy(self, to, source):
        return {
            "plain stores": self._over("copy", to, source),
            "streaming stores": self._over("copy_streaming", to, source),
            "memcpy": self._over("copy_library", to, source),
        }

    def read(self, array):
        return {"": self._over("read", array)}

    def exponential(self, rounds=ROUNDS):
        return {
            "ssmk's": self._arithmetic("exponential", rounds),
            "bare": self._arithmetic("bare_exponential", rounds),
        }

    def multiply_add(self, rounds=50 * ROUNDS):
        return {"": self._arithmetic("multiply_add", rounds)}


def by_set(variants_of_set):
    """[{variant: call()}, one for each set of buffers] -> {variant: call(set number)}."""

    def pick(name):
        calls = [variants[name] for variants in variants_of_set]
        return lambda i: calls[i]()

    return {name: pick(name) for name in variants_of_set[0]}


def measure(ceilings, context, threads, budget):
    """The table of rates, as JSON: each on one thread and on all."""
    rng, size = context.rng, method.CACHES * context.cache
    numbers = method.normal(rng, size // 4, method.dtype_named("fp32"))
    # The bits of bfloat16 numbers from 0.5 to 2: NumPy need not know the type.
    halves = method.empty(size // 2, "u2")
    halves[:] = np.resize(rng.integers(0x3F00, 0x4000, 1 << 20, "u2"), halves.size)
    target = method.empty(size // 4, method.dtype_named("fp32"))
    measured = [
        ("in-place read-modify-write, fp32", "GB/s", 2 * size / 1e9, ceilings.update(numbers)),
        ("in-place read-modify-write, bf16", "GB/s", 2 * size / 1e9, ceilings.update(halves)),
        ("copy", "GB/s", 2 * size / 1e9, ceilings.copy(target, numbers)),
        ("read", "GB/s", size / 1e9, ceilings.read(numbers)),
        ("fp32 multiply-add", "GFLOP/s", None, ceilings.multiply_add()),
        ("exponentials", "G/s", None, ceilings.exponential()),
    ]
    rows = []
    for what, unit, amount, variants in measured:
        row = {"what": what, "unit": unit, "rates": {}}
        for count in sorted({1, threads}):
            ceilings.set_threads(count)
            work = amount
            if work is None:
                operations = next(iter(variants.values()))()
                work = operations * (2 if unit == "GFLOP/s" else 1) / 1e9
            times = method.take_turns(by_set([variants]), 1, budget)
            best = min(times, key=lambda name: times[name].best)
            row["rates"][str(count)] = work / times[best].best
            row["variant"] = best
        rows.append(row)
    ceilings.set_threads(threads)
    return rows
