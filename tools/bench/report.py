# SPDX-License-Identifier: MIT
"""What a run found, as a table on the terminal, Markdown, and a plot.  (JSON is the run itself.)"""

import os
import sys

BEGIN, END = "<!-- ssmk bench: begin -->", "<!-- ssmk bench: end -->"


class Missing(Exception):
    """An optional package that a report needs; the message says how to get it."""


# Wording


def reached(value, goal, better="higher"):
    """ " ok" or " MISSED" where there is a goal."""
    if goal is None:
        return ""
    return " ok" if (value >= goal if better == "higher" else value <= goal) else " MISSED"


def seconds(value):
    for unit, scale in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if value * scale >= 1 or unit == "us":
            return f"{value * scale:.3g} {unit}"


def with_goal(text, value, goal, better="higher"):
    if goal is None:
        return text
    sign = ">=" if better == "higher" else "<="
    return f"{text} ({sign} {goal:g}{reached(value, goal, better)})"


def share(ceiling):
    return with_goal(f"{ceiling['share']:.2f}", ceiling["share"], ceiling["goal"])


def versus(peer):
    if peer is None:
        return "-"
    if "absent" in peer:
        return "absent"
    return with_goal(f"{peer['times']:.1f}x", peer["times"], peer["goal"])


def peers_of(rows):
    """Whom these cases were compared with, and why not if they were not."""
    peers = [row["peer"] for row in rows if "peer" in row]
    return (
        ", ".join(dict.fromkeys(peer["what"] or f"absent, {peer['absent']}" for peer in peers))
        or "-"
    )


def machine_lines(run):
    m = run["machine"]
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in m["versions"].items())
    guessed = "" if m["last_level_cache_known"] else " (assumed: unknown here)"
    lines = [
        f"{m['cpu']}, {m['processors']} processors, {m['threads']} threads used, last-level cache "
        f"{m['last_level_cache'] >> 20} MiB{guessed}, {m['memory'] / 2**30:.0f} GiB of memory",
        f"{m['system']}; ssmk's instruction set {m['isa']}"
        + (f", the ceilings' {run['ceilings_isa']}" if "ceilings_isa" in run else ""),
        versions,
        f"measured {m['date']}, load {m['load']} at the start"
        + (", --quick" if run["quick"] else ""),
    ]
    return lines


def remarks(run):
    """What was not measured, and why."""
    return [
        f"{kind}: {entry['name']}: {entry['reason']}"
        for kind in ("skipped", "failed")
        for entry in run[kind]
    ]


# Tables: (title, header, rows) of text


def tables(run):
    if run["ceilings"]:
        counts = list(run["ceilings"][0]["rates"])
        yield (
            "What the machine can do",
            ["", *(f"{n} thread{'s' * (n != '1')}" for n in counts), "best way"],
            [
                [
                    row["what"],
                    *(f"{row['rates'][n]:.4g} {row['unit']}" for n in counts),
                    row["variant"],
                ]
                for row in run["ceilings"]
            ],
        )
    families = {}
    for row in run["cases"]:
        families.setdefault(row["family"], []).append(row)
    for family, rows in families.items():
        yield (
            f"{family} (ceiling: {rows[0]['ceiling']['what']}; peer: {peers_of(rows)})",
            [
                "case",
                "time",
                "rate",
                "share of the ceiling",
                "median",
                "faster than the peer",
                "error",
            ],
            [
                [
                    row["name"],
                    seconds(row["seconds"]),
                    f"{row['amount'] / row['seconds']:.3g} {row['unit']}",
                    share(row["ceiling"]),
                    f"{row['ceiling']['median_share']:.2f}",
                    versus(row.get("peer")),
                    f"{row['error']:.0e}",
                ]
                for row in rows
            ],
        )
    families = {}
    for row in run["figures"]:
        families.setdefault(row["family"], []).append(row)
    for family, rows in families.items():
        yield (
            family,
            ["what", "value", ""],
            [
                [
                    row["name"],
                    with_goal(
                        f"{row['value']:.3g} {row['unit']}",
                        row["value"],
                        row.get("goal"),
                        row.get("better", "higher"),
                    ),
                    row.get("detail", ""),
                ]
                for row in rows
            ],
        )


def plain(title, header, rows):
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]
    print(f"\n{title}")
    for line in [header, *rows]:
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip())


def table(run):
    """Print the run, with rich's tables where rich is installed."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print("\n".join(machine_lines(run)))
        for entry in tables(run):
            plain(*entry)
    else:
        # Where nobody watches, as in a log, lines are as long as they need to be.
        console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
        for line in machine_lines(run):
            console.print(Text(line, style="dim"))
        for title, header, rows in tables(run):
            shown = Table(title=Text(title, style="bold"), title_justify="left", box=box.SIMPLE)
            for name in header:
                shown.add_column(name, overflow="fold")
            for cells in rows:
                shown.add_row(
                    *(
                        Text(
                            cell,
                            style=(
                                "red"
                                if "MISSED" in cell
                                else "green" if cell.endswith("ok)") else ""
                            ),
                        )
                        for cell in cells
                    )
                )
            console.print(shown)
    for line in remarks(run):
        print(line)


# Markdown


def line_of(cells):
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def markdown(run):
    lines = [f"- {line}" for line in machine_lines(run)]
    for title, header, rows in tables(run):
        cells = [header, ["---"] * len(header), *rows]
        lines += ["", f"### {title}", "", *map(line_of, cells)]
    lines += ["", *(f"- {line}" for line in remarks(run))] if remarks(run) else []
    return "\n".join(lines) + "\n"


def write_markdown(run, path):
    write_text(markdown(run), path)


def write_text(text, path, marks=(BEGIN, END)):
    """To a file, or between its marks if it has them, or to standard output."""
    begin, end = marks
    if path == "-":
        sys.stdout.write(text)
        return
    if os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            old = file.read()
        if begin in old and end in old:
            head, tail = old.split(begin, 1)[0], old.split(end, 1)[1]
            text = f"{head}{begin}\n{text}{end}{tail}"
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


# Plot


def plotting():
    try:
        import matplotlib
    except ImportError:
        raise Missing("--plot needs matplotlib: pip install ssmk[bench]") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


# For figures whose letters stay letters, and nothing in whose file depends on when it was made.
SAME_EACH_TIME = {"svg.fonttype": "none", "svg.hashsalt": "ssmk", "font.size": 8}


def finish(figure, title, drawn, path):
    """Title, and a legend of what was drawn ({name: artist}), under the whole figure; to a file."""
    figure.suptitle(title, fontsize=9)
    figure.legend(drawn.values(), drawn.keys(), loc="outside lower right", ncols=len(drawn),
                  frameon=False)
    svg = str(path).endswith(".svg")
    figure.savefig(path, dpi=150, metadata={"Date": None} if svg else None)
    plotting().close(figure)


def bars(axes, names, values, goals, texts, families, title):
    """Bars, one colour for each family, a black mark at each goal, the figures in the margin."""
    order = list(dict.fromkeys(families))
    colours = [f"C{order.index(family)}" for family in families]
    places = range(len(names))
    axes.barh(places, values, color=colours, height=0.7)
    for place, value, goal, text in zip(places, values, goals, texts):
        missed = "MISSED" in reached(value, goal)
        axes.text(
            1.01,
            place,
            text,
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=8,
            color="firebrick" if missed else "black",
        )
        if goal is not None:
            axes.plot([goal, goal], [place - 0.45, place + 0.45], color="black", linewidth=2)
    axes.set_yticks(places, names, fontsize=8)
    axes.invert_yaxis()
    axes.set_title(title, loc="left", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)


def plot(run, path):
    """Two panels: shares of the ceilings, and times faster than the peers."""
    pyplot = plotting()
    cases = run["cases"]
    if not cases:
        raise Missing("--plot draws cases of the CPU benchmark, and none was measured")
    compared = [row for row in cases if "times" in row.get("peer", {})]
    heights = [len(cases), len(compared)] if compared else [len(cases)]
    figure, panels = pyplot.subplots(
        len(heights),
        1,
        figsize=(11, 1.6 + 0.32 * sum(heights)),
        squeeze=False,
        height_ratios=heights,
        layout="constrained",
    )
    name = lambda row: f"{row['family']} {row['name']}"

    shares = [row["ceiling"]["share"] for row in cases]
    axes = panels[0, 0]
    bars(
        axes,
        [name(row) for row in cases],
        shares,
        [row["ceiling"]["goal"] for row in cases],
        [f"{value:.2f}" for value in shares],
        [row["family"] for row in cases],
        "Share of what the machine can do (black: goal)",
    )
    axes.set_xlim(0, max(1.1, 1.1 * max(shares)))
    axes.axvline(1, color="grey", linewidth=0.8, linestyle="dashed")

    if compared:
        times = [row["peer"]["times"] for row in compared]
        goals = [row["peer"]["goal"] for row in compared]
        axes = panels[1, 0]
        bars(
            axes,
            [name(row) for row in compared],
            times,
            goals,
            [f"{value:.1f}x  {row['peer']['what']}" for value, row in zip(times, compared)],
            [row["family"] for row in compared],
            "Times faster than what runs today (black: goal)",
        )
        axes.set_xscale("log")
        axes.set_xlim(
            min(1, 0.8 * min(times)), 1.3 * max([*times, *(goal for goal in goals if goal)])
        )
        axes.axvline(1, color="grey", linewidth=0.8, linestyle="dashed")

    m = run["machine"]
    figure.suptitle(
        f"ssmk {m['versions']['ssmk']}, {m['cpu']}, {m['threads']} threads, {m['isa']}", fontsize=11
    )
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
