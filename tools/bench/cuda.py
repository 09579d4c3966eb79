# SPDX-License-Identifier: MIT
"""`python -m ssmk.bench.cuda`: the CUDA backend beside the memory's own speed and beside peers.

Each contender's calls stand in a CUDA graph, on one of several sets of buffers after the other that
together are larger than L2; graphs are replayed in turns, timed by events, and medians compared.
The limit of a case is the time of an in-place read-modify-write of as many bytes as it must read
and write, or, where it mostly writes elsewhere, of a copy: measured in the same turns.  Where the
floating-point operations that a case names need longer at the rate of a large bf16 product, that
time is the limit.

What is measured is in `cuda_cases`.  A module there has `cases(context)`, which yields Cases.
"""

import argparse
import ctypes
import importlib
import json
import re
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

from .method import Skip, Wrong

CACHES = 3  # buffers are this many times L2
NODES = (20, 400)  # of a graph: at least, at most
MODULES = ("causal_conv1d", "ssd_chunk", "state_update")
PRODUCT = 8192  # rows and columns of the bf16 product that the tensor cores' rate is taken from
LAUNCHES = 5  # turns without a graph
COPIES = (300, 1000)  # MB of the copies that are measured with it


@dataclass
class Contender:
    """`run(i)` puts the work on set i of the buffers on the current stream."""

    name: str
    run: Callable
    check: Callable = None  # () -> error relative to the reference, or {tensor: {"max": that,
    # "rms": ..}}; at most `tolerance`
    tolerance: float = 0.0


@dataclass
class Case:
    name: str
    bytes: int  # that must be read and written
    sets: int  # how many sets of buffers there are
    ssmk: Contender
    peers: list = field(default_factory=list)  # Contenders, or (name, why it is not here)
    limit: str = "update"  # or "copy"
    flops: float = 0.0  # that the tensor cores must do, in units of bf16's
    nodes: int = NODES[0]  # that a graph has at least
    launched: bool = False  # measured without a graph, too: a call after the other from Python


class Ceilings:
    """The native loops on memory of their own."""

    def __init__(self, torch, device):
        library = ctypes.CDLL(str(Path(__file__).with_name("_ceilings_cuda.so")))
        self.library, self.torch, self.device = library, torch, device

    def launch(self, name, *arguments):
        """One of the native functions, on the current stream."""
        stream = self.torch.cuda.current_stream(self.device).cuda_stream
        index = self.device.index or 0
        if getattr(self.library, name)(*arguments, index, ctypes.c_void_p(stream)):
            raise RuntimeError(f"{name} could not be launched")

    def contender(self, kind, nbytes, sets):
        torch, nbytes = self.torch, -(-nbytes // 32) * 32
        half = nbytes // 2  # is read, and half is written
        halves = 1 if kind == "update" else 2
        rooms = [
            torch.zeros(halves * half, dtype=torch.uint8, device=self.device) for _ in range(sets)
        ]

        def run(i):
            room, size = rooms[i].data_ptr(), ctypes.c_size_t(half)
            if kind == "update":
                self.launch("ceiling_update", ctypes.c_void_p(room), size)
            else:
                to = ctypes.c_void_p(room + half)
                self.launch("ceiling_copy", to, ctypes.c_void_p(room), size)

        return Contender(kind, run)

    def through_slots(self, name, nbytes, slots):
        """The same for a pool: a slot after another, as slots[i] (int32, on the device) of set i
        name them."""
        torch, batch = self.torch, len(slots[0])
        each = -(-nbytes // (2 * 16 * batch)) * 16
        rooms = [torch.zeros(batch * each, dtype=torch.uint8, device=self.device) for _ in slots]

        def run(i):
            self.launch("ceiling_update_slots", ctypes.c_void_p(rooms[i].data_ptr()),
                        ctypes.c_size_t(each), ctypes.c_void_p(slots[i].data_ptr()),
                        ctypes.c_uint(batch))

        return Contender(name, run)


class Context:
    """What cases are made from."""

    def __init__(self, torch, device, peers, turns):
        self.torch, self.device, self.peers, self.turns = torch, device, peers, turns
        self.l2 = torch.cuda.get_device_properties(device).L2_cache_size
        self.ceilings = Ceilings(torch, device)
        self.generator = torch.Generator(device).manual_seed(0)
        self.known_rates = None

    def rates(self):
        """Of the machine, measured once: TB/s of copies by MB, TFLOP/s of a bf16 product."""
        if self.known_rates is None:
            a, b = (self.normal(PRODUCT, PRODUCT, dtype=self.torch.bfloat16) for _ in range(2))
            into = self.torch.empty_like(a)
            # A graph keeps no buffers alive.
            product = Contender("product", lambda i: self.torch.mm(a, b, out=into))
            runs = {"product": (product, 1, 5)}
            for size in COPIES:
                sets = self.sets_for(size * 10**6)
                copy = self.ceilings.contender("copy", size * 10**6, sets)
                runs[size] = copy, sets, NODES[0]
            times = timed(self, {name: graph_of(self, *run) for name, run in runs.items()})
            self.known_rates = {
                "copy_TB/s": {f"{size} MB": round(size / times[size], 3) for size in COPIES},
                "bf16_product_TFLOP/s": round(2e-6 * PRODUCT**3 / times["product"], 1),
            }
        return self.known_rates

    def sets_for(self, nbytes):
        return max(2, min(NODES[1], -(-CACHES * self.l2 // max(nbytes, 1))))

    def normal(self, *shape, dtype):
        room = self.torch.randn(shape, generator=self.generator, device=self.device)
        return room.to(dtype)

    def relative_error(self, got, want):
        want = want.double()
        return float((got.double() - want).abs().max() / want.abs().max())


def graph_of(context, contender, sets, least):
    """(graph, how many calls it holds)."""
    torch = context.torch
    nodes = max(least, sets)
    nodes -= nodes % sets if nodes > sets else 0
    stream = torch.cuda.Stream(context.device)
    with torch.cuda.stream(stream):
        for i in range(min(sets, 3)):  # what compiles when first called does so now
            contender.run(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for node in range(nodes):
            contender.run(node % sets)
    return graph, nodes


def timed(context, graphs):
    """{name: microseconds a call} of {name: (graph, calls)}, medians over the turns."""
    torch = context.torch
    times = {name: [] for name in graphs}
    for turn in range(context.turns + 2):
        for name, (graph, nodes) in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            graph.replay()  # the clocks and the caches are then this contender's
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if turn > 1:
                times[name].append(start.elapsed_time(end) * 1000 / nodes)
    return {name: statistics.median(values) for name, values in times.items()}


def timed_launches(context, contenders, sets, count):
    """{name: microseconds a call} of calls from Python: what is slower, these or the GPU."""
    torch = context.torch
    times = {c.name: [] for c in contenders}
    for turn in range(LAUNCHES + 1):
        for c in contenders:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda.synchronize()
            start.record()
            for node in range(count):
                c.run(node % sets)
            end.record()
            end.synchronize()
            if turn:
                times[c.name].append(start.elapsed_time(end) * 1000 / count)
    return {name: statistics.median(values) for name, values in times.items()}


def largest(error):
    if not isinstance(error, dict):
        return error
    worst = [found["max"] for found in error.values()]
    return next((value for value in worst if value != value), max(worst))  # NaN before all


def measure(context, case):
    """({contender: microseconds a call}, {contender: error}, {contender: microseconds without a
    graph}); what fails has its error as time."""
    limits = [context.ceilings.contender(case.limit, case.bytes, case.sets)]
    contenders, results, errors, graphs = [case.ssmk, *limits], {}, {}, {}
    for peer in case.peers:
        if isinstance(peer, tuple):
            results[peer[0]] = peer[1]
        else:
            contenders.append(peer)
    for c in contenders:
        try:
            if c.check:
                errors[c.name] = error = c.check()
                if not largest(error) <= c.tolerance:
                    raise Wrong(f"its error is {largest(error):.2g}, more than {c.tolerance:.2g}")
            graphs[c.name] = graph_of(context, c, case.sets, case.nodes)
        except Exception as e:
            refused = c is case.ssmk and isinstance(e, NotImplementedError) and case.peers
            if c in (case.ssmk, *limits) and not refused:
                raise
            results[c.name] = " ".join(str(e).split())[:120] or type(e).__name__
    results.update(timed(context, graphs))
    launched = {}
    if case.launched:
        measured = [c for c in contenders if c.name in graphs and c not in limits]
        launched = timed_launches(context, measured, case.sets, max(case.nodes, case.sets))
    return results, errors, launched


# Reporting


def row_of(context, case, results, errors, launched):
    """ssmk_us is None where the library refuses the case, and ssmk_refused says why."""
    mine, memory = results[case.ssmk.name], results[case.limit]
    names = [peer[0] if isinstance(peer, tuple) else peer.name for peer in case.peers]
    peers = {name: results[name] for name in names}
    row = {"case": case.name, "bytes": case.bytes, "limit": case.limit, "limit_us": memory}
    if case.flops:
        tensor = case.flops / context.rates()["bf16_product_TFLOP/s"] * 1e-6
        row.update(flops=case.flops, memory_us=memory, tensor_us=tensor,
                   limit="tensor" if tensor > memory else case.limit, limit_us=max(tensor, memory))
    refused = isinstance(mine, str)
    row.update(ssmk_us=None if refused else mine,
               ssmk_over_limit=None if refused else mine / row["limit_us"], peers=peers)
    if refused:
        row["ssmk_refused"] = mine
    if any(isinstance(error, dict) for error in errors.values()):
        row["errors"] = errors
    if launched:
        row["launched_us"] = launched
    return row


def against(row, time):
    """How long a peer took: as often as ssmk, or where that has no time, as the limit."""
    by = row["ssmk_us"] or row["limit_us"]
    return f"{time / by:.2f}x" + ("" if row["ssmk_us"] else " the limit")


def show(rows, file=sys.stdout):
    width = max(len(row["case"]) for row in rows)
    head = f"{'case':{width}}  {'limit us':>9}  {'ssmk us':>9}  over limit  peers over ssmk"
    print(head, file=file)
    for row in rows:
        peers = [
            f"{name}: {value}" if isinstance(value, str) else f"{name} {against(row, value)}"
            for name, value in row["peers"].items()
        ]
        if row["ssmk_us"] is None:
            mine = f"{'-':>9}  {'-':>10}"
            peers.append(f"ssmk: {row['ssmk_refused']}")
        else:
            mine = f"{row['ssmk_us']:9.2f}  {row['ssmk_over_limit']:10.3f}"
        print(f"{row['case']:{width}}  {row['limit_us']:9.2f}  {mine}  {', '.join(peers)}",
              file=file)


def peer_versions(folder):
    """The names of what tools/gpu --pack has unpacked, versions in them."""
    found = sorted(entry.name for entry in folder.glob("*-[0-9]*")) if folder else []
    return ", ".join(name.replace("-", " ").replace("_", "-") for name in found)


def cases(context, only):
    for name in MODULES:
        try:
            module = importlib.import_module(f".cuda_cases.{name}", __package__)
        except ModuleNotFoundError as e:
            if not (e.name or "").endswith(f"cuda_cases.{name}"):
                raise
            continue
        yield from module.cases(context, only)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m ssmk.bench.cuda", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--only", type=re.compile, default=re.compile(""), metavar="REGEX",
                        help="cases whose name it is found in")
    parser.add_argument("--peers", type=Path, metavar="DIR",
                        help="where tools/gpu has packed peers")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there too")
    parser.add_argument("--turns", type=int, default=15, help="that the median is taken of")
    options = parser.parse_args(arguments)
    import ssmk
    import torch

    if ssmk.device_count("cuda") == 0 or not torch.cuda.is_available():
        sys.exit("no CUDA device that this build and this PyTorch can use")
    device = torch.device("cuda", torch.cuda.current_device())
    context = Context(torch, device, options.peers, options.turns)
    rows, skipped = [], []
    for case in cases(context, options.only):
        try:
            rows.append(row_of(context, case, *measure(context, case)))
            print(f"  {case.name}: {rows[-1]['ssmk_over_limit'] or '-'}", file=sys.stderr)
        except (Skip, NotImplementedError) as e:
            skipped.append({"case": case.name, "why": str(e)})
        torch.cuda.empty_cache()
        if options.json:
            machine = {"device": torch.cuda.get_device_name(device), "l2": context.l2,
                       "torch": torch.__version__, "ssmk": ssmk.__version__,
                       "peers": peer_versions(options.peers), "date": time.strftime("%Y-%m-%d"),
                       "command": "python -m ssmk.bench.cuda",
                       **({"rates": context.known_rates} if context.known_rates else {})}
            options.json.write_text(
                json.dumps({"machine": machine, "rows": rows, "skipped": skipped}, indent=1) + "\n")
    if rows:
        show(rows)
    for case in skipped:
        print(f"{case['case']}: skipped: {case['why']}")
    if not rows and not skipped:
        sys.exit("no case has such a name")


if __name__ == "__main__":
    main()
