# SPDX-License-Identifier: MIT
"""What a call from Python costs: ssmk.state_update on ten tensors with `out` given.

With no rows the call does everything but arithmetic: keywords, ten tensors borrowed, the checks in
C.  What that takes above an empty C call through cffi is the figure; with one row of two tiny heads
it is told beside it.  Contenders take turns, and the best time of each counts.
"""

import sys
import timeit

import numpy as np
import ssmk
from ssmk._cffi import lib

GOAL = 1.5  # microseconds
ROUNDS, CALLS = 150, 2000
NAMES = "state x dt A B C D z dt_bias out".split()
CALL = f"f({', '.join(NAMES[:-1])}, dt_softplus=True, out=out)"


def tensors(batch):
    """Mamba-2, two heads of (4, 4); the state keeps its one slot when there are no rows."""
    shapes = [(1, 2, 4, 4), (batch, 2, 4), (batch, 2), (2,), (batch, 1, 4), (batch, 1, 4), (2,),
              (batch, 2, 4), (2,), (batch, 2, 4)]  # fmt: skip
    return {name: np.zeros(shape, np.float32) for name, shape in zip(NAMES, shapes)}


def caller(make):
    """{rows: a timer of the call on tensors made of NumPy arrays}"""
    return {
        rows: timeit.Timer(
            CALL, globals=dict({k: make(v) for k, v in tensors(rows).items()}, f=ssmk.state_update)
        )
        for rows in (0, 1)
    }


def contenders():
    yield "numpy", caller(lambda array: array), None
    try:
        import torch
    except ImportError as error:
        print(f"overhead of torch tensors: not measured: {error}", file=sys.stderr)
        return
    yield "torch", caller(torch.tensor), None
    yield "torch, no_grad", caller(torch.tensor), torch.no_grad


def measure():
    """{name: figure}, in microseconds."""
    empty = timeit.Timer("f()", globals={"f": lib.ssmk_version})
    found = list(contenders())
    best = {"empty": float("inf")}

    def time(key, timer):
        best[key] = min(best.get(key, float("inf")), timer.timeit(CALLS) / CALLS * 1e6)

    for _ in range(ROUNDS):
        time("empty", empty)
        for name, timers, context in found:
            for rows, timer in timers.items():
                if context is None:
                    time((name, rows), timer)
                else:
                    with context():
                        time((name, rows), timer)

    figures = {"empty C call": {"value": best["empty"], "unit": "us", "better": "lower"}}
    for name, *_ in found:
        none, one = (best[name, rows] - best["empty"] for rows in (0, 1))
        figures[name] = {
            "value": none, "unit": "us", "goal": GOAL, "better": "lower",
            "detail": f"10 tensors, above an empty C call; with one row of arithmetic {one:.2f} us",
        }  # fmt: skip
    return figures


if __name__ == "__main__":
    for name, figure in measure().items():
        print(f"{name:16} {figure['value']:6.3f} {figure['unit']}  {figure.get('detail', '')}")
