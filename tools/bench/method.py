# SPDX-License-Identifier: MIT
"""How things are timed.

Contenders take turns in short slices until each has had its share of the time: what disturbs the
machine disturbs all of them.  Each call works on the next of several sets of buffers that together
are larger than the caches.  Where calls are short, the first of a slice only hands threads over.
The best time is what the code can do; the median over the turns of the ratio of two contenders says
how steady that is.
"""

import statistics
import time
from dataclasses import dataclass, field
from typing import Callable, Optional

import numpy as np

SLICE = 0.02  # seconds of one turn, unless a single call takes longer
LEAST = 3  # turns that each contender gets however long they take
ALIGNMENT = 64
CACHES = 4  # buffers are this many times the last-level cache


class Skip(Exception):
    """A case or a peer that cannot run here; the message says why, in one line."""


class Wrong(Exception):
    """A result that differs from the reference: nothing is timed before it is right."""


# Buffers


def empty(shape, dtype):
    """An array that starts on a cache line, and whose pages are there before anything is timed."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    raw = np.empty(size + ALIGNMENT, np.uint8)
    raw.fill(0)
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + size].view(dtype).reshape(shape)


def normal(rng, shape, dtype, scale=1.0, shift=0.0):
    """Fresh normal numbers, made in pieces so that they need no second array of the size."""
    array = empty(shape, dtype)
    flat = array.reshape(-1)
    for start in range(0, flat.size, 1 << 18):
        piece = flat[start : start + (1 << 18)]
        piece[:] = rng.standard_normal(piece.size, np.float32) * np.float32(scale) + np.float32(
            shift
        )
    return array


def dtype_named(name):
    if name == "bf16":
        try:
            import ml_dtypes
        except ImportError:
            raise Skip("bfloat16 in NumPy needs ml_dtypes: pip install ssmk[bench]") from None
        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype({"fp32": np.float32, "fp16": np.float16}[name])


@dataclass
class Context:
    """What cases are made from."""

    rng: np.random.Generator
    ceilings: object
    cache: int  # bytes of last-level cache
    memory: int  # bytes that the buffers of one case may take

    def at_least(self, row_bytes):
        """How many rows, a power of two, make a buffer that no cache holds."""
        rows = -(-CACHES * self.cache // row_bytes)
        return 1 << (rows - 1).bit_length()

    def make_sets(self, set_bytes, make):
        """Sets of buffers, at least two, that together are no cache's."""
        count = max(2, -(-CACHES * self.cache // set_bytes))
        if count * set_bytes > self.memory:
            raise Skip(
                f"needs {count * set_bytes / 1e9:.1f} GB of memory for buffers that no cache holds"
            )
        return [make() for _ in range(count)]


# Cases


@dataclass
class Ceiling:
    """What a case cannot do without; its time is `scale` times that of the best variant."""

    what: str
    variants: dict  # name -> call(set number)
    scale: float = 1.0


@dataclass
class Peer:
    what: str
    run: Callable
    check: Callable  # -> error against the reference, relative to the largest value


@dataclass
class Job:
    """A case with its buffers made."""

    sets: int
    run: Callable  # call(set number)
    check: Callable  # -> error
    tolerance: float
    peer_tolerance: float
    ceiling: Ceiling
    amount: float  # of work in a call,
    unit: str  # such as GB for bytes
    peer: Callable = None  # -> Peer, or raises Skip


@dataclass
class Case:
    family: str
    name: str
    prepare: Callable  # (Context) -> Job
    goal_share: Optional[float] = None
    goal_peer: Optional[float] = None

    @property
    def title(self):
        return f"{self.family}/{self.name}"


# Errors


def relative_error(got, want):
    """The largest difference, relative to the largest value; infinite where one is no number."""
    difference = np.max(np.abs(np.asarray(got).astype(np.float64) - want), initial=0.0)
    largest = np.max(np.abs(want), initial=0.0)
    return float(difference / largest) if np.isfinite(difference) else float("inf")


def must_be_right(who, error, tolerance):
    if not error <= tolerance:
        raise Wrong(f"{who}: error {error:.1e} of the largest value, allowed {tolerance:.0e}")
    return error


# Time


@dataclass
class Times:
    turns: list = field(default_factory=list)  # the best of each turn
    calls: list = field(default_factory=list)

    @property
    def best(self):
        return min(self.calls)

    @property
    def median(self):
        return statistics.median(self.calls)


def ratio(over, under):
    """Median over the turns of how many times `under`'s time `over`'s was."""
    return statistics.median(a / b for a, b in zip(over.turns, under.turns))


def timed(run, index):
    start = time.perf_counter()
    run(index)
    return time.perf_counter() - start


def take_turns(contenders, sets, budget):
    """{name: Times} of {name: call(set number)}; `budget` seconds in all, shared evenly."""
    results = {name: Times() for name in contenders}
    estimate = {name: timed(run, 0) for name, run in contenders.items()}
    spent = dict.fromkeys(contenders, 0.0)
    next_set = dict.fromkeys(contenders, 1)
    active = list(contenders)
    while active:
        for name in active:
            calls = max(1, min(64, int(SLICE / max(estimate[name], 1e-6))))
            hand_over = calls >= LEAST
            turn = []
            for _ in range(calls + hand_over):
                turn.append(timed(contenders[name], next_set[name] % sets))
                next_set[name] += 1
            spent[name] += sum(turn)
            turn = turn[hand_over:]
            estimate[name] = min(turn)
            results[name].turns.append(min(turn))
            results[name].calls += turn
        active = [
            name
            for name in active
            if len(results[name].turns) < LEAST or spent[name] < budget / len(contenders)
        ]
    return results


def measure(case, context, budget):
    """One case, as JSON: checked, timed beside its ceiling and its peer, and checked again."""
    job = case.prepare(context)
    error = must_be_right("ssmk", job.check(), job.tolerance)
    peer, absent = None, None
    if job.peer is not None:
        try:
            peer = job.peer()
            must_be_right(peer.what, peer.check(), job.peer_tolerance)
        except Skip as reason:
            absent = str(reason)
        except Wrong as reason:  # it does something else, or not well enough: no peer
            peer, absent = None, str(reason)

    variants = job.ceiling.variants
    contenders = {"ssmk": job.run, **{f"ceiling {name}": run for name, run in variants.items()}}
    if peer:
        contenders["peer"] = peer.run
    times = take_turns(contenders, job.sets, budget)
    must_be_right("ssmk, after timing", job.check(), job.tolerance)

    ours = times["ssmk"]
    variant = min(variants, key=lambda name: times[f"ceiling {name}"].best)
    ceiling = times[f"ceiling {variant}"]
    row = {
        "family": case.family,
        "name": case.name,
        "seconds": ours.best,
        "median_seconds": ours.median,
        "calls": len(ours.calls),
        "amount": job.amount,
        "unit": job.unit,
        "error": error,
        "ceiling": {
            "what": job.ceiling.what,
            "variant": variant,
            "seconds": ceiling.best * job.ceiling.scale,
            "share": ceiling.best * job.ceiling.scale / ours.best,
            "median_share": ratio(ceiling, ours) * job.ceiling.scale,
            "goal": case.goal_share,
        },
    }
    if peer:
        theirs = times["peer"]
        row["peer"] = {
            "what": peer.what,
            "seconds": theirs.best,
            "calls": len(theirs.calls),
            "times": theirs.best / ours.best,
            "median_times": ratio(theirs, ours),
            "goal": case.goal_peer,
        }
    elif absent:
        row["peer"] = {"what": None, "absent": absent, "goal": case.goal_peer}
    return row
