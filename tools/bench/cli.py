# SPDX-License-Identifier: MIT
"""What to measure, and where the results go."""

import argparse
import importlib
import json
import re
import sys

import numpy as np
import ssmk

from . import ceilings, machine, memory, method, models, peers, report
from .cases import all_cases

FULL, QUICK = 4.0, 0.5  # seconds for one case


class Trouble(Exception):
    """What keeps the benchmark from running, in one line."""


def pattern(text):
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no regular expression: {error}") from None


def positive(text):
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return int(text)


def parser():
    p = argparse.ArgumentParser(
        prog="ssmk bench", description="Measure ssmk beside this machine's ceilings and its peers."
    )
    p.add_argument(
        "what",
        nargs="?",
        default="all",
        choices=("all", *MEASURE),
        help="cpu: the kernels; overhead: of a call; memory: peaks; demo: the model; models: those "
        "of transformers (default: all)",
    )
    p.add_argument("--json", metavar="FILE", help="write everything that was measured")
    p.add_argument("--plot", metavar="FILE", help="draw the ratios: .png, .svg or .pdf")
    p.add_argument(
        "--markdown",
        metavar="FILE",
        help="write the tables; between the lines "
        f"'{report.BEGIN}' and '{report.END}' if the file has them; - is standard output",
    )
    p.add_argument(
        "--from",
        dest="source",
        metavar="FILE",
        help="report an earlier run's JSON and measure nothing",
    )
    p.add_argument(
        "--quick", action="store_true", help="less time for each case: for a look, not for figures"
    )
    p.add_argument(
        "--threads",
        type=positive,
        metavar="N",
        help="for ssmk, ceilings and peers alike (default: ssmk's own)",
    )
    p.add_argument(
        "--only", type=pattern, metavar="REGEX", help="only cases whose family/name it is found in"
    )
    p.add_argument("--list", action="store_true", help="print the cases' family/names")
    group = p.add_argument_group("models", "whole models of transformers, with random weights")
    group.add_argument(
        "--model",
        action="append",
        choices=models.MODELS,
        metavar="NAME",
        help=f"one of {', '.join(models.MODELS)}; may be repeated "
        f"(default: {', '.join(models.DEFAULT)})",
    )
    group.add_argument("--batch", type=positive, metavar="N", help="rows (default: 1, and 8)")
    group.add_argument(
        "--prompt", type=positive, metavar="N", help="tokens of a row (default: 512 over all rows)"
    )
    group.add_argument(
        "--tokens", type=positive, default=32, metavar="N", help="to decode (default: 32)"
    )
    group.add_argument(
        "--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights"
    )
    return p


# What there is to measure; each function adds to `run`


class Run:
    """One run: its settings, and what it finds, as JSON."""

    def __init__(self, args):
        ssmk.set_num_threads(args.threads or 0)
        self.only = args.only
        self.threads = ssmk.num_threads()
        self.budget = QUICK if args.quick else FULL
        self.models = tuple(dict.fromkeys(args.model or models.DEFAULT))
        self.batches = (args.batch,) if args.batch else models.BATCHES
        self.prompt, self.tokens, self.dtype = args.prompt, args.tokens, args.dtype
        self.found = {
            "machine": machine.describe(self.threads),
            "quick": args.quick,
            "ceilings": [],
            "cases": [],
            "figures": [],
            "skipped": [],
            "failed": [],
        }

    def wants(self, title):
        return self.only is None or self.only.search(title)

    def one(self, kind, title, measure):
        """Measure one thing, and go on if it cannot be."""
        print(f"  {title} ...", file=sys.stderr, flush=True)
        try:
            found = measure()
            self.found[kind] += found if isinstance(found, list) else [found]
        except (method.Skip, NotImplementedError) as reason:
            self.found["skipped"].append({"name": title, "reason": str(reason)})
        except method.Wrong as reason:
            self.found["failed"].append({"name": title, "reason": str(reason)})


def measure_cpu(run):
    cases = [case for case in all_cases() if run.wants(case.title)]
    if not cases:
        return
    native = ceilings.Ceilings()
    native.set_threads(run.threads)
    peers.set_threads(run.threads)
    context = method.Context(
        np.random.default_rng(), native, machine.last_level_cache()[0], machine.memory() // 2
    )
    run.found["ceilings_isa"] = native.level
    run.one(
        "ceilings",
        "ceilings",
        lambda: ceilings.measure(native, context, run.threads, run.budget / 4),
    )
    for case in cases:
        run.one("cases", case.title, lambda: method.measure(case, context, run.budget))


def measure_memory(run):
    for name in memory.CASES:
        if run.wants(f"memory/{name}"):
            run.one("figures", f"memory/{name}", lambda: memory.measure(name, run.threads))


def measure_models(run):
    for name in run.models:
        for batch in run.batches:
            title = f"models/{name}, batch {batch}"

            def measure(name=name, batch=batch):
                prompt = run.prompt or max(512 // batch, 1)
                return list(models.measure(name, batch, prompt, run.tokens, run.dtype,
                                           5 * run.budget))

            if run.wants(title):
                peers.set_threads(run.threads)
                run.one("figures", title, measure)


def as_figures(family, found):
    """Rows for the report: `found` is one figure, a list of them, or a dict of them by name.

    A figure is a dict: value, unit, and where known name, goal, better ("higher" or "lower"),
    detail.
    """
    if isinstance(found, dict) and "value" not in found:
        found = [dict(figure, name=figure.get("name", name)) for name, figure in found.items()]
    rows = [found] if isinstance(found, dict) else found
    return [{"family": family, "name": family, **row} for row in rows]


def figures_of(module, function):
    """Figures of another module; skipped, with the reason, where it or its needs are missing."""
    name = module.rpartition(".")[2]

    def measure(run):
        def call():
            try:
                measured = getattr(importlib.import_module(module, __package__), function)
            except (ImportError, AttributeError) as error:
                raise method.Skip(str(error)) from None
            return as_figures(name, measured())

        if run.wants(name):
            run.one("figures", name, call)

    return measure


MEASURE = {
    "cpu": measure_cpu,
    "overhead": figures_of(".overhead", "measure"),
    "memory": measure_memory,
    "demo": figures_of("ssmk.demo", "bench"),
    "models": measure_models,
}


def measure(args):
    run = Run(args)
    if run.found["machine"]["load"] > 0.5:
        load = run.found["machine"]["load"]
        print(f"The machine is busy (load {load}): do not trust these figures.", file=sys.stderr)
    for name, function in MEASURE.items():
        if args.what in (name, "all"):
            function(run)
    if not any(run.found[kind] for kind in ("cases", "figures", "skipped", "failed")):
        raise Trouble(f"--only {args.only.pattern} leaves nothing to measure; --list has the names")
    return run.found


def list_cases():
    titles = [case.title for case in all_cases()] + [f"memory/{name}" for name in memory.CASES]
    titles += [f"models/{name}, batch {batch}" for name in models.MODELS for batch in models.BATCHES]
    print(*titles, "overhead", "demo", sep="\n")


def main(argv=None):
    """The exit status: 0; 1 where a result was wrong or something asked for could not be done."""
    args = parser().parse_args(argv)
    if args.list:
        list_cases()
        return 0
    try:
        # What cannot be written is better known before the minutes of measuring.
        if args.plot:
            report.plotting()
        for path in (args.json, args.markdown, args.plot):
            if path and path != "-":
                open(path, "a").close()
        if args.source:
            with open(args.source, encoding="utf-8") as file:
                found = json.load(file)
        else:
            found = measure(args)
        report.table(found)
        if args.json:
            with open(args.json, "w", encoding="utf-8") as file:
                json.dump(found, file, indent=1)
                file.write("\n")
        if args.markdown:
            report.write_markdown(found, args.markdown)
        if args.plot:
            report.plot(found, args.plot)
    except (Trouble, report.Missing, OSError) as error:
        print(f"ssmk bench: {error}", file=sys.stderr)
        return 1
    return 1 if found["failed"] else 0
