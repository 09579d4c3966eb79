# SPDX-License-Identifier: MIT
"""Small calls of every path of the CUDA kernels, for compute-sanitizer: a script, not a test."""

import itertools

import torch

import ssmk
from test_cuda import OPERATIONS, VARIANTS, arguments, conv_arguments, conv_variants


def calls():
    for operation in OPERATIONS:
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
    for v in itertools.islice(conv_variants(), 40):
        if v["batch"] < 1000:
            yield "causal_conv1d_update", "conv_state", *conv_arguments(torch, v)


def main():
    done, missing = 0, set()
    for operation, state_name, state, a in calls():
        try:
            getattr(ssmk, operation)(**{state_name: state}, **a)
            torch.cuda.synchronize()
            done += 1
        except NotImplementedError as e:
            missing.add(str(e))
    print(f"{done} calls", *sorted(missing), sep="; ")


if __name__ == "__main__":
    main()
