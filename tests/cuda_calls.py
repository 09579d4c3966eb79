# SPDX-License-Identifier: MIT
"""Small calls of every path of the CUDA kernels, for compute-sanitizer: a script, not a test.

Operations may be named on the command line; without names all are called.
"""

import itertools
import os
import sys
from dataclasses import replace

import numpy as np
import torch

import ssmk
import test_cuda_ssd_chunk as ssd
from test_cuda import OPERATIONS, VARIANTS, arguments, conv_arguments, conv_variants


def updates(names):
    """(operation, name of the state, state, the other arguments)"""
    for operation in (name for name in OPERATIONS if name in names):
        state_name = "conv_state" if operation == "causal_conv1d_update" else "state"
        for batch, T, dtype, has in VARIANTS.values():
            most = batch if "channels" in has else 9  # kernels of their own for many rows
            state, a = arguments(torch, operation, min(batch, most), T, dtype, has)
            entries = len(state)
            yield operation, state_name, state, a
            pads = torch.tensor([-1, entries, 2**31 - 1], dtype=torch.int32, device="cuda")
            slots = a["state_indices"].clone()
            slots[::2] = pads[torch.arange(len(slots[::2]), device="cuda") % 3]
            yield operation, state_name, state, {**a, "state_indices": slots}
            free = torch.ones(entries, dtype=torch.bool, device="cuda")
            free[a["state_indices"].long()] = False
            out = free.nonzero()[: len(slots), 0]
            yield operation, state_name, state, {**a, "state_indices_out": out}
            if operation == "causal_conv1d_update":
                by_input = state.swapaxes(1, 2).contiguous().swapaxes(1, 2)
                yield operation, state_name, by_input, a
                longer = torch.cat([state[..., :1], state], -1)
                yield operation, state_name, longer, a
                counts = torch.arange(len(slots), device="cuda")
                yield operation, state_name, longer, {**a, "cache_seqlens": counts}
    for v in itertools.islice(conv_variants(), 40 if "causal_conv1d_update" in names else 0):
        if v["batch"] < 1000:
            yield "causal_conv1d_update", "conv_state", *conv_arguments(torch, v)


def chunks():
    """The arguments of ssd_chunk, on the path that takes them and on the general one."""
    rng = np.random.default_rng(1)
    for p in ssd.VARIANTS.values():
        short = p if p.nseq else replace(p, seqlen=min(p.seqlen, 37))
        a = ssd.arguments(torch, rng, short)
        yield {**a, **ssd.rooms(torch, a, short)}
        if p.pool:
            slots = torch.tensor([-1, 3, ssd.ENTRIES, 0, 2**31 - 1], device="cuda")
            yield {**a, **ssd.rooms(torch, a, short), "state_indices": slots}
        start = {name.replace("final", "initial"): room
                 for name, room in ssd.rooms(torch, a, short).items() if "final" in name}
        if p.pool is None and not p.flags:  # in place
            pools = {name.replace("initial", "final"): room for name, room in start.items()}
            room = ssd.rooms(torch, a, short)
            yield {**a, **start, **room, **pools}


def main(names):
    done, missing = 0, set()

    def call(operation, **a):
        nonlocal done
        try:
            getattr(ssmk, operation)(**a)
            torch.cuda.synchronize()
            done += 1
        except NotImplementedError as e:
            missing.add(str(e))

    for operation, state_name, state, a in updates(names):
        call(operation, **{state_name: state}, **a)
    if "ssd_chunk" in names:
        for path in ("", "general"):
            os.environ["SSMK_SSD_PATH"] = path
            for a in chunks():
                call("ssd_chunk", **a)
    print(f"{done} calls", *sorted(missing), sep="; ")


if __name__ == "__main__":
    main(sys.argv[1:] or (*OPERATIONS, "ssd_chunk"))
