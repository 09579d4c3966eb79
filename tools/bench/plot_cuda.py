# SPDX-License-Identifier: MIT
"""`python -m ssmk.bench.plot_cuda RUN.json`: the tables and the plot of a run of ssmk.bench.cuda.

The plot has time over limit against batch, for ssmk and each peer, a panel for each layer and dtype
of the state that was measured at several batches.  A peer with several algorithms, which share the
first word of their names, counts with its best one.  Prefill has tables and a plot of its own.
"""

import argparse
import json
import re
import sys
from dataclasses import dataclass

from . import plot_prefill, report

COLUMNS = 4  # of panels
MARKS = {"ssmk": "o", "mamba-ssm": "s", "FlashInfer": "^", "causal-conv1d": "D"}
SHORT = (("bfloat16", "bf16"), ("float32", "fp32"), (", 1 tokens", ""), (", 1 groups", ""))


@dataclass
class Row:
    family: str  # the operation
    layer: str
    batch: int
    limit: float  # microseconds, as all times
    ssmk: float
    peers: dict  # name: time, or why it was not measured


def peers_of(row):
    """{peer: its best time, or why there is none}."""
    return {peer: value for peer, (_, value) in plot_prefill.best_of(row["peers"]).items()}


def read(run):
    rows = []
    for row in run["rows"]:
        family, name = row["case"].split(" ", 1)
        batch = int(re.search(r", batch (\d+)", name).group(1))
        layer = re.sub(r", batch \d+", "", name)
        for long, short in SHORT:
            layer = layer.replace(long, short)
        rows.append(Row(family, layer, batch, row["limit_us"], row["ssmk_us"], peers_of(row)))
    return rows


def grouped(rows, key):
    groups = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


# Tables


def versus(row, peer):
    time = row.peers.get(peer)
    return "-" if time is None or isinstance(time, str) else f"{time:.2f} ({time / row.ssmk:.2f}x)"


def remarks(rows, peers):
    """Why a peer is missing where it is, once for each reason."""
    missing = {}
    for row in rows:
        for peer in peers:
            reason = row.peers.get(peer)
            if isinstance(reason, str):
                missing.setdefault((peer, reason), []).append(row.layer)
    for (peer, reason), layers in missing.items():
        where = "" if len(layers) == len(rows) else f" ({'; '.join(dict.fromkeys(layers))})"
        yield f"{peer}: {reason}{where}."


def heading(run):
    machine = run["machine"]
    facts = [machine["device"], f"ssmk {machine['ssmk']}", f"PyTorch {machine['torch']}"]
    facts += [machine[key] for key in ("peers", "date") if machine.get(key)]
    return f"{', '.join(facts)}: `{machine['command']}`\n\n"


def markdown(run):
    lines = []
    for family, rows in grouped(read(run), lambda row: row.family).items():
        peers = list(dict.fromkeys(peer for row in rows for peer in row.peers))
        shown = [p for p in peers if any(not isinstance(r.peers.get(p, ""), str) for r in rows)]
        head = ["case", "limit, us", "ssmk, us", "time over limit", *shown]
        lines += [f"## {family}", "", report.line_of(head), report.line_of(["---"] * len(head))]
        lines += [
            report.line_of([
                f"{row.layer}, batch {row.batch}", f"{row.limit:.2f}", f"{row.ssmk:.2f}",
                f"{row.ssmk / row.limit:.2f}", *(versus(row, peer) for peer in shown),
            ])
            for row in rows
        ]
        lines += ["", *(f"- {remark}" for remark in remarks(rows, peers)), ""]
    lines += [f"- {case['case']}: skipped: {case['why']}" for case in run["skipped"]]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines)).rstrip() + "\n"


# Plot


def panels_of(rows):
    """{title: rows, by batch} of what was measured at several batches."""
    groups = grouped(rows, lambda row: f"{row.family}\n{row.layer}")
    return {
        title: sorted(group, key=lambda row: row.batch)
        for title, group in groups.items()
        if len({row.batch for row in group}) > 1
    }


def curve(rows, contender):
    """(batches, times over the limit) of ssmk or a peer, where it was measured."""
    points = []
    for row in rows:
        time = row.ssmk if contender == "ssmk" else row.peers.get(contender)
        if time is not None and not isinstance(time, str):
            points.append((row.batch, time / row.limit))
    return list(zip(*points)) if points else ([], [])


def plot(run, path):
    pyplot = report.plotting()
    rows = read(run)
    panels = panels_of(rows)
    if not panels:
        raise report.Missing("nothing was measured at several batches: there is no curve to draw")
    contenders = ["ssmk", *dict.fromkeys(peer for row in rows for peer in row.peers)]
    colours = {name: f"C{i}" for i, name in enumerate(contenders)}
    columns = min(COLUMNS, len(panels))
    height = -(-len(panels) // columns)
    with pyplot.rc_context(report.SAME_EACH_TIME):
        figure, grid = pyplot.subplots(
            height, columns, figsize=(3.1 * columns, 0.7 + 2.3 * height), squeeze=False,
            layout="constrained",
        )
        drawn = {}
        for axes, (title, group) in zip(grid.flat, panels.items()):
            for name in contenders:
                batches, ratios = curve(group, name)
                if batches:
                    drawn[name], = axes.plot(
                        batches, ratios, color=colours[name], marker=MARKS.get(name, "."),
                        markersize=4, linewidth=2 if name == "ssmk" else 1,
                    )
            axes.axhline(1, color="grey", linewidth=0.8, linestyle="dashed")
            axes.set_title(title, loc="left", fontsize=8)
            axes.set_xscale("log", base=2)
            ticks = sorted({row.batch for row in group})
            axes.set_xticks(ticks, [str(batch) for batch in ticks])
            axes.minorticks_off()
            axes.set_ylim(bottom=0)
            axes.spines[["top", "right"]].set_visible(False)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_axis_off()
        for axes in grid[:, 0]:
            axes.set_ylabel("time over limit")
        for axes in grid[-1]:
            axes.set_xlabel("batch")
        machine = run["machine"]
        title = (f"ssmk {machine['ssmk']}, {machine['device']} (grey: in-place "
                 "read-modify-write of the same bytes)")
        report.finish(figure, title, drawn, path)


# Prefill or not, how it is written, its marks in a page
PARTS = (
    (False, markdown, (report.BEGIN, report.END)),
    (True, plot_prefill.markdown, (plot_prefill.BEGIN, plot_prefill.END)),
)


def part_of(run, prefill):
    return {**run, **{key: [entry for entry in run[key]
                            if plot_prefill.is_prefill(entry) == prefill]
                      for key in ("rows", "skipped")}}


def write(run, path):
    """Each part that there is between its marks, where the page has any; else they are the page."""
    texts = []
    for prefill, written, marks in PARTS:
        part = part_of(run, prefill)
        if part["rows"] or part["skipped"]:
            texts.append((heading(part) + written(part), marks))
    try:
        with open(path, encoding="utf-8") as file:
            page = file.read()
    except FileNotFoundError:
        page = ""
    if not any(mark in page for *_, marks in PARTS for mark in marks):
        report.write_text("\n".join(text for text, _ in texts), path)
        return
    for _, marks in texts:
        if not all(mark in page for mark in marks):
            raise report.Missing(f"{path} has no place for a part of the run: {marks[0]}")
    for text, marks in texts:
        report.write_text(text, path, marks)


def main(arguments=None):
    parser = argparse.ArgumentParser(
        prog="python -m ssmk.bench.plot_cuda", description=__doc__.split("\n")[0]
    )
    parser.add_argument("run", metavar="RUN.json", nargs="+",
                        help="what ssmk.bench.cuda --json wrote; several are taken as one")
    parser.add_argument("--markdown", metavar="FILE", default="-",
                        help="between its marks, if it has them; - is standard output")
    parser.add_argument("--plot", metavar="FILE", help="of decode: .svg, .png or .pdf")
    parser.add_argument("--prefill-plot", metavar="FILE", help="the same of prefill")
    options = parser.parse_args(arguments)
    try:
        runs = []
        for path in options.run:
            with open(path, encoding="utf-8") as file:
                runs.append(json.load(file))
        run = {key: [entry for r in runs for entry in r[key]] for key in ("rows", "skipped")}
        run["machine"] = {k: v for r in reversed(runs) for k, v in r["machine"].items()}
        if options.plot:
            plot(part_of(run, False), options.plot)
        if options.prefill_plot:
            plot_prefill.plot(part_of(run, True), options.prefill_plot)
        write(run, options.markdown)
    except (report.Missing, OSError) as error:
        print(f"plot_cuda: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
