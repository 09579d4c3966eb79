# SPDX-License-Identifier: MIT
"""Peak memory of a call against the bytes of its inputs and outputs.

Each case is a process of its own: `python -m ssmk.bench.memory CASE THREADS` prints one JSON
object.  A peak only ever rises, so the process first fills up to the peak that its imports and a
small warm-up call left behind, then makes the inputs and calls.
"""

import json
import subprocess
import sys

import numpy as np

from . import method

GOAL = 1.1


def scan(ssmk, dtype, channels_last, dim, seqlen, fill):
    shape = (1, seqlen, dim) if channels_last else (1, dim, seqlen)
    projection = (1, seqlen, 16) if channels_last else (1, 16, seqlen)
    inputs = [
        fill(shape, dtype),
        fill(shape, dtype),
        fill((dim, 16), "f4"),
        fill(projection, dtype),
        fill(projection, dtype),
        fill(dim, "f4"),
        fill(shape, dtype),
        fill(dim, "f4"),
    ]
    call = lambda: ssmk.selective_scan(
        *inputs, dt_softplus=True, channels_last=channels_last, return_final_states=True
    )
    return inputs, call


def chunks(ssmk, dtype, mimo, nheads, seqlen, fill):
    """Mamba-2, or a Mamba-3 layer of rank 4, whose final states are wanted."""
    values, tokens, ranks = (1, seqlen, nheads, 64), (1, seqlen, nheads), (4,) if mimo else ()
    projection = (1, seqlen, *ranks, 1, 128)
    inputs = dict(
        x=fill(values, dtype), dt=fill(tokens, dtype), A=fill(nheads, "f4"),
        B=fill(projection, dtype), C=fill(projection, dtype), z=fill(values, dtype),
    )  # fmt: skip
    np.negative(np.abs(inputs["A"]), out=inputs["A"])
    if mimo:
        inputs.update(trap=fill(tokens, dtype), angles=fill((1, seqlen, 32), dtype))
        for name in ("mimo_x", "mimo_z", "mimo_out"):
            inputs[name] = fill((nheads, 4, 64), "f4")
    call = lambda: ssmk.ssd_chunk(**inputs, dt_softplus=True, return_final_states=True)
    return list(inputs.values()), call


def convolution(ssmk, dtype, channels_last, dim, seqlen, fill):
    shape = (4, seqlen, dim) if channels_last else (4, dim, seqlen)
    inputs = [fill(shape, dtype), fill((dim, 4), dtype), fill(dim, dtype)]
    return inputs, lambda: ssmk.causal_conv1d(
        *inputs, activation="silu", channels_last=channels_last, return_final_states=True
    )


def update(ssmk, dtype, channels_last, batch, dstate, fill):
    inputs = [
        fill((batch, 80, 64, dstate), dtype),
        fill((batch, 80, 64), dtype),
        fill((batch, 80), dtype),
        fill(80, "f4"),
        fill((batch, 1, dstate), dtype),
        fill((batch, 1, dstate), dtype),
    ]
    return inputs, lambda: ssmk.state_update(*inputs, dt_softplus=True)


CASES = {
    "selective_scan fp32 (D, L), dim 1536, seqlen 4096": (scan, "fp32", False, 1536, 4096),
    "selective_scan bf16 (L, D), dim 1536, seqlen 4096": (scan, "bf16", True, 1536, 4096),
    "ssd_chunk fp32 mamba2, 24 x 64, dstate 128, seqlen 4096": (chunks, "fp32", False, 24, 4096),
    "ssd_chunk bf16 mamba2, 24 x 64, dstate 128, seqlen 4096": (chunks, "bf16", False, 24, 4096),
    "ssd_chunk bf16 mamba3 rank 4, 24 x 64, dstate 128, seqlen 4096": (
        chunks,
        "bf16",
        True,
        24,
        4096,
    ),
    "causal_conv1d fp32 (D, L), batch 4, dim 1536, seqlen 2048": (
        convolution,
        "fp32",
        False,
        1536,
        2048,
    ),
    "causal_conv1d bf16 (L, D), batch 4, dim 1536, seqlen 2048": (
        convolution,
        "bf16",
        True,
        1536,
        2048,
    ),
    "state_update bf16, batch 64, 80 x 64, dstate 128": (update, "bf16", False, 64, 128),
}
SMALL = {scan: (64, 64), chunks: (2, 64), convolution: (64, 64), update: (1, 16)}  # sizes of the warm-up call


def peak():
    """The most memory that this process has held, in bytes."""
    try:
        # Linux's ru_maxrss starts at that of the process that started this one; this does not.
        with open("/proc/self/status") as status:
            return next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
    except OSError:
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
            1 if sys.platform == "darwin" else 1024
        )


def fill_up():
    """Hold memory until the peak rises, and so is what the process holds; what must be kept."""
    start, kept = peak(), []
    while peak() < start + (2 << 20):
        kept.append(np.ones(1 << 20, np.uint8))
    return kept


def child(name, threads):
    import ssmk

    ssmk.set_num_threads(threads)
    make, dtype_name, channels_last, *sizes = CASES[name]
    rng, dtype = np.random.default_rng(), method.dtype_named(dtype_name)

    # Bounded so that the recurrences stay ordinary numbers; fresh and touched everywhere.
    def fill(shape, dtype):
        return method.normal(rng, shape, dtype, 0.1, -0.5)

    make(ssmk, dtype, channels_last, *SMALL[make], fill)[1]()
    kept = fill_up()
    before = peak()
    inputs, call = make(ssmk, dtype, channels_last, *sizes, fill)
    results = call()
    held = peak() - before
    outputs = results if isinstance(results, tuple) else (results,)
    if not all(np.isfinite(out.astype(np.float32)).all() for out in outputs):
        raise method.Wrong("the output is not finite")
    need = sum(array.nbytes for array in (*inputs, *outputs))
    del kept
    return {"bytes": held, "need": need}


def measure(name, threads):
    """One figure, as JSON, from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", __name__, name, str(threads)], capture_output=True, text=True
    )
    if done.returncode:
        raise method.Wrong((done.stderr.strip().splitlines() or ["no message"])[-1])
    found = json.loads(done.stdout)
    return {
        "family": "memory",
        "name": name,
        "value": found["bytes"] / found["need"],
        "unit": "x",
        "detail": f"{found['bytes'] / 1e6:.1f} MB held, "
        f"{found['need'] / 1e6:.1f} MB of inputs and outputs",
        "goal": GOAL,
        "better": "lower",
    }


if __name__ == "__main__":
    print(json.dumps(child(sys.argv[1], int(sys.argv[2]))))
