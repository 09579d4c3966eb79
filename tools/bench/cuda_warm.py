# SPDX-License-Identifier: MIT
"""`python -m ssmk.bench.cuda_warm`: compiles the peers' Triton kernels in as many processes as the
machine has processors, and tunes them, before ssmk.bench.cuda measures.

A process of its own would compile what an autotuner tries one after the other, for some minutes.
Here all of it is compiled first, by processes that share it out; then one process tunes, alone on
the GPU; then every size is called once, for the kernels that its strides and counts ask for.  All
of it stays in Triton's cache, TRITON_CACHE_DIR, and with TRITON_CACHE_AUTOTUNING=1 what was chosen.
"""

import argparse
import os
import re
import sys
import time
import traceback
from pathlib import Path

SMALL = 2, 512  # batch and tokens of the calls that only compile


def forked(count, work):
    """work(i) in `count` processes; this one must not have started CUDA."""
    children = []
    for i in range(count):
        child = os.fork()
        if not child:
            try:
                work(i)
            except Exception:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def share_out(shard, count):
    """From now on autotuned kernels are not run: their configurations are compiled, every count-th
    that differs by kernel or dtypes in this process."""
    from triton.runtime.autotuner import Autotuner

    turns = {}

    def run(self, *args, **kwargs):
        dtypes = tuple(str(a.dtype) for a in args if hasattr(a, "dtype"))
        for config in self.configs:
            turn = turns.setdefault((self.base_fn.__name__, dtypes, str(config)), len(turns))
            if turn % count == shard:
                try:
                    self.fn.run(*args, **{**kwargs, **config.all_kwargs(), "warmup": True})
                except Exception as e:  # some do not fit: the autotuner will pass them over, too
                    print(f"{self.base_fn.__name__}, {config}: {str(e)[:80]}", file=sys.stderr)

    Autotuner.run = run


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m ssmk.bench.cuda_warm", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--only", type=re.compile, default=re.compile(""), metavar="REGEX",
                        help="cases whose name it is found in")
    parser.add_argument("--peers", type=Path, metavar="DIR", required=True)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args(arguments)
    import torch

    from . import cuda
    from .cuda_cases import ssd_chunk

    if "TRITON_CACHE_DIR" not in os.environ:
        sys.exit("TRITON_CACHE_DIR does not say where the kernels are to be kept")
    points = [
        (layer, *size) for layer, sizes in ssd_chunk.POINTS for size in sizes
        if options.only.search(ssd_chunk.name_of(layer, *size))
    ]
    if not points:
        return
    first = list({point[0]: point for point in reversed(points)}.values())[::-1]
    rest = [point for point in points if point not in first]
    start = time.monotonic()

    def call_peers(layer, batch, seqlen):
        context = cuda.Context(torch, torch.device("cuda", 0), options.peers, 1)
        context.sets_for = lambda nbytes: 1
        case = ssd_chunk.case(context, "", layer, batch, seqlen)
        for peer in case.peers:
            if isinstance(peer, tuple):
                continue
            try:
                peer.run(0)
                torch.cuda.synchronize()
            except Exception as e:
                print(f"{layer.name}, {batch} x {seqlen}: {peer.name}: {str(e)[:200]}",
                      file=sys.stderr)
            torch.cuda.empty_cache()

    def compiles(i):
        share_out(i, options.processes)
        for layer, *_ in first:
            call_peers(layer, *SMALL)

    def tunes(i):
        for point in first:
            call_peers(*point)

    def calls(i):
        for point in rest[i :: options.processes]:
            call_peers(*point)

    for what, count, work in (("compiled", options.processes, compiles), ("tuned", 1, tunes),
                              ("all sizes called", min(len(rest), options.processes), calls)):
        forked(count, work)
        print(f"{what} after {time.monotonic() - start:.0f} s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
