# SPDX-License-Identifier: MIT
"""Prefill in a run of ssmk.bench.cuda: its tables and its plot, for ssmk.bench.plot_cuda.

The plot has time over limit for ssmk and each peer: a panel for each layer that was measured in
several sizes, and one for the layers that were measured in one.
"""

import re

from . import report

BEGIN, END = "<!-- ssmk bench prefill: begin -->", "<!-- ssmk bench prefill: end -->"
SHOWN = ("out", "states")  # whose errors stand in the table
WIDTH = 0.8  # of the bars of one case
TICKS = (1, 2, 5, 10, 20, 50, 100, 200, 500)


def is_prefill(entry):
    """Of a row, or of a case that was skipped."""
    return entry["case"].startswith("ssd_chunk ")


def best_of(peers):
    """{peer: (its name in full, its time, or why there is none)}, with the best of those whose
    names share the first word."""
    found = {}
    for name, value in peers.items():
        found.setdefault(name.split()[0], []).append((name, value))
    return {
        peer: min((pair for pair in pairs if not isinstance(pair[1], str)),
                  key=lambda pair: pair[1], default=pairs[0])
        for peer, pairs in found.items()
    }


def words(case):
    """(layer, batch, seqlen) of a case's name."""
    layer, batch, seqlen = re.fullmatch(r"\S+ (.*), batch (\d+), seqlen (\d+)", case).groups()
    return layer, int(batch), int(seqlen)


def size_of(batch, seqlen, layer):
    return f"{batch} x {seqlen}" + (" on average" if "packed" in layer else "")


def text_of(row):
    layer, batch, seqlen = words(row["case"])
    return f"{layer}, {size_of(batch, seqlen, layer)}"


# Tables


def times(rows):
    peers = list(dict.fromkeys(peer for row in rows for peer in best_of(row["peers"])))
    head = ["case", "memory, us", "tensor cores, us", "ssmk, us", "time over limit", "bound by"]
    yield report.line_of([*head, *peers])
    yield report.line_of(["---"] * (len(head) + len(peers)))
    for row in rows:
        mine, limit = row["ssmk_us"], row["limit_us"]
        cells = [text_of(row), f"{row['memory_us']:.1f}", f"{row['tensor_us']:.1f}",
                 "-" if mine is None else f"{mine:.1f}",
                 "-" if mine is None else f"{mine / limit:.2f}",
                 "tensor cores" if row["limit"] == "tensor" else "memory"]
        best = best_of(row["peers"])
        for peer in peers:
            time = best.get(peer, (peer, "-"))[1]
            if isinstance(time, str):
                cells.append("-")
            else:
                by = f"{time / mine:.2f}x" if mine else f"{time / limit:.1f} x the limit"
                cells.append(f"{time:.1f} ({by})")
        yield report.line_of(cells)


def launched(rows):
    """What calls take without a graph, for the cases where that was measured."""
    rows = [row for row in rows if row.get("launched_us")]
    if not rows:
        return
    peers = list(dict.fromkeys(peer for row in rows for peer in best_of(row["peers"])))
    yield report.line_of(["case", "ssmk, us", *peers])
    yield report.line_of(["---"] * (2 + len(peers)))
    for row in rows:
        mine = row["launched_us"].get("ssmk")
        cells = [text_of(row), f"{mine:.1f}" if mine else "-"]
        for peer in peers:
            times = [time for name, time in row["launched_us"].items() if name.split()[0] == peer]
            by = f" ({min(times) / mine:.2f}x)" if times and mine else ""
            cells.append(f"{min(times):.1f}{by}" if times else "-")
        yield report.line_of(cells)


def pair(error, what):
    found = error.get(what) if isinstance(error, dict) else None
    return f"{found['max']:.1e} / {found['rms']:.1e}" if found else "-"


def accuracy(rows):
    """Errors of ssmk and of the best of each peer, for the cases where there are any."""
    rows = [row for row in rows if row.get("errors")]
    peers = list(dict.fromkeys(peer for row in rows for peer in best_of(row["peers"])))
    contenders = ["ssmk", *peers]
    if not rows:
        return
    yield report.line_of(["case", *(f"{what}, {who}" for what in SHOWN for who in contenders)])
    yield report.line_of(["---"] * (1 + len(SHOWN) * len(contenders)))
    for row in rows:
        names = {"ssmk": "ssmk", **{k: name for k, (name, _) in best_of(row["peers"]).items()}}
        yield report.line_of([text_of(row), *(
            pair(row["errors"].get(names.get(who)), what) for what in SHOWN for who in contenders)])


def reasons(rows):
    """Why a time is missing where it is, and how often each peer's choice was the best."""
    for row in rows:
        if row["ssmk_us"] is None:
            yield f"ssmk: {row['ssmk_refused']} ({text_of(row)})."
        for name, value in row["peers"].items():
            if isinstance(value, str):
                yield f"{name}: {value} ({text_of(row)})."


def markdown(run):
    rows = run["rows"]
    rates = run["machine"].get("rates", {})
    lines = ["## ssd_chunk", ""]
    if rates:
        copies = ", ".join(f"{size} at {rate} TB/s" for size, rate in rates["copy_TB/s"].items())
        lines += [f"Copies of {copies}; a bfloat16 product of 8192 rows and columns at "
                  f"{rates['bf16_product_TFLOP/s']} TFLOP/s.", ""]
    lines += [*times(rows), ""]
    errors = list(accuracy(rows))
    if errors:
        lines += ["Largest error over largest value / root mean square of the error over that of "
                  "the values, against float64:", "", *errors, ""]
    without = list(launched(rows))
    if without:
        lines += ["Without a graph, calls launched one after the other from Python:", "", *without,
                  ""]
    lines += [f"- {reason}" for reason in dict.fromkeys(reasons(rows))]
    lines += [f"- {case['case']}: skipped: {case['why']}" for case in run["skipped"]]
    return "\n".join(lines).rstrip() + "\n"


# Plot


def panels_of(rows):
    """{title: [(label, row)]}: layers in several sizes by tokens, then what is left, by layer."""
    layers, panels, left = {}, {}, []
    for row in rows:
        layers.setdefault(words(row["case"])[0], []).append(row)
    for layer, group in layers.items():
        named = [(words(row["case"])[1:], row) for row in group]
        if len(named) > 1:
            named.sort(key=lambda pair: (pair[0][0] * pair[0][1], pair[0]))
            panels[layer] = [(f"{b} x {n}", row) for (b, n), row in named]
        else:
            label = f"{layer}, {size_of(*named[0][0], layer)}".replace(", ", ",\n")
            left.append((label, group[0]))
    if left:
        panels["other layers"] = left
    return panels


def over_limit(row, contender):
    if contender == "ssmk":
        time = row["ssmk_us"]
    else:
        time = best_of(row["peers"]).get(contender, (None, None))[1]
    return None if time is None or isinstance(time, str) else time / row["limit_us"]


def plot(run, path):
    pyplot = report.plotting()
    panels = panels_of(run["rows"])
    if not panels:
        raise report.Missing("no prefill was measured: there is nothing to draw")
    contenders = ["ssmk", *dict.fromkeys(p for row in run["rows"] for p in best_of(row["peers"]))]
    with pyplot.rc_context(report.SAME_EACH_TIME):
        figure, grid = pyplot.subplots(
            len(panels), 1, figsize=(9, 0.8 + 1.9 * len(panels)), squeeze=False, sharey=True,
            layout="constrained")
        drawn = {}
        for axes, (title, cases) in zip(grid[:, 0], panels.items()):
            for c, name in enumerate(contenders):
                place = (c - (len(contenders) - 1) / 2) * WIDTH / len(contenders)
                known = [(i + place, over_limit(row, name)) for i, (_, row) in enumerate(cases)]
                known = [(x, y) for x, y in known if y is not None]
                if not known:
                    continue
                drawn[name] = bars = axes.bar(
                    [x for x, _ in known], [y for _, y in known], WIDTH / len(contenders),
                    color=f"C{c}")
                axes.bar_label(bars, [f"{y:.3g}" for _, y in known], fontsize=7)
            axes.set_yscale("log")
            axes.set_xlim(-0.5, max(len(cases), 4) - 0.5)
            axes.set_xticks(range(len(cases)), [label for label, _ in cases])
            axes.set_title(title, loc="left", fontsize=8)
            axes.set_ylabel("time over limit")
            axes.spines[["top", "right"]].set_visible(False)
        top = max((y for cases in panels.values() for _, row in cases for name in contenders
                   if (y := over_limit(row, name))), default=1)
        ticks = [t for t in TICKS if t <= 2 * top]
        grid[0, 0].set_ylim(1, 2 * top)
        grid[0, 0].set_yticks(ticks, [str(t) for t in ticks])
        grid[0, 0].minorticks_off()
        machine = run["machine"]
        title = (f"Prefill, batch x tokens: ssmk {machine['ssmk']}, {machine['device']} (1: the "
                 "slower of the memory and the tensor cores alone)")
        report.finish(figure, title, drawn, path)
