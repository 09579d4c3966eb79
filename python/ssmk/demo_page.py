# SPDX-License-Identifier: MIT
"""What `ssmk demo` prints: in colour on a terminal, else plain."""

import colorsys

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from rich.text import Text


class Page:
    def __init__(self, *, no_color, lines):
        self.console = _Console(no_color=no_color or None, highlight=False, emoji=False)
        self.colourless = self.console.no_color or self.console.color_system is None
        self.lines = lines

    def note(self, line=""):
        self.console.print(line, markup=False, soft_wrap=True)

    def progress(self, what):
        """For a `with` block: a bar, called as bar(done, total).  Only on a terminal."""
        return _Bar(what, self.console)

    def result(self, name, result, ntokens, seconds):
        """Heading, legend and labelled text of typeseg's Segmentation `result`."""
        length = len(result.text)
        self.note(
            f"{printable(name)}: {length:,} characters ({ntokens:,} tokens) "
            f"read in {seconds:.2f} s, {length / seconds:,.0f} characters/s"
        )
        self.note()
        styles = self._legend(result)
        self.note()

        shown = _head(result.text, self.lines)
        if self.colourless:
            self._plain(result, shown)
        else:
            self._coloured(result, shown, styles)
        if shown < length:
            self.note(f"... and {length - shown:,} characters more (--lines 0 shows them all)")
        self.note()

    def comparison(self, rows, labels):
        """The engines side by side, the first being ssmk's."""
        table = Table(box=SIMPLE)
        table.add_column("engine")
        for heading in ("characters/s", "ssmk's speed", "logits differ", "labels"):
            table.add_column(heading, justify="right")
        ours = rows[0]
        table.add_row(labels[ours.engine], f"{ours.rate:,.0f}", "", "", "")
        for row in rows[1:]:
            table.add_row(
                labels[row.engine],
                f"{row.rate:,.0f}",
                f"{ours.rate / row.rate:.1f} x",
                f"{row.difference:.0e} of {row.scale:.1f}",
                f"{row.differing_labels:,} differ" if row.differing_labels else "identical",
            )
        self.console.print(table)

    def _legend(self, result):
        """Prints the labels with their shares, the largest first; returns their styles."""
        counts, styles = {}, {}
        for segment in result.segments:
            counts[segment.label] = counts.get(segment.label, 0) + segment.end - segment.start
        legend = Text()
        for label, count in sorted(counts.items(), key=lambda item: -item[1]):
            styles[label] = "" if self.colourless else _style(len(styles))
            legend.append(f" {label} ", styles[label])
            legend.append(f" {count / len(result.text):.0%}   ")
        self.console.print(legend, soft_wrap=True)
        return styles

    def _coloured(self, result, shown, styles):
        text = Text()
        for label, piece in _pieces(result, shown):
            text.append(piece, styles[label])
        self.console.print(text, soft_wrap=True)

    def _plain(self, result, shown):
        width = max(len(segment.label) for segment in result.segments)
        for label, piece in _pieces(result, shown):
            for line in piece.strip("\n").split("\n"):
                self.note(f"{label:{width}} | {line}")
                label = ""


class _Console(Console):
    def on_broken_pipe(self):
        raise  # to main(), where all commands treat it alike; rich would exit here


class _Bar:
    def __init__(self, what, console):
        columns = Progress.get_default_columns()
        self.bar = Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        )
        self.task = self.bar.add_task(what, total=1)

    def __enter__(self):
        self.bar.start()
        return lambda done, total: self.bar.update(self.task, completed=done / total)

    def __exit__(self, *error):
        self.bar.stop()


def printable(text):
    """The text with every character that could steer a terminal made visible."""
    return text.replace("\r\n", "\n").translate(_VISIBLE)


# C0 controls have pictures; C1 controls, marks of lines and of direction, surrogates do not.
_PICTURES = {0x7F: 0x2421} | {c: 0x2400 + c for c in range(0x20) if chr(c) not in "\t\n"}
_MARKS = [0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A)]
_VISIBLE = _PICTURES | dict.fromkeys([*range(0x80, 0xA0), *_MARKS, *range(0xD800, 0xE000)], 0xFFFD)


def _pieces(result, shown):
    """(label, printable text) of the segments in the first `shown` characters"""
    for segment in result.segments:
        if segment.start < shown:
            yield segment.label, printable(result.text[segment.start : min(segment.end, shown)])


def _head(text, lines):
    """How many characters the first `lines` lines hold; a very long line counts as several."""
    if not lines:
        return len(text)
    end = 0
    for _ in range(lines):
        end = text.find("\n", end) + 1
        if not end:
            break
    return min(end or len(text), 120 * lines)


def _style(i):
    """Dark text on the i-th of a series of light colours, each far in hue from those before it."""
    hue = i * 0.618034 % 1
    red, green, blue = (round(255 * c) for c in colorsys.hls_to_rgb(hue, 0.80, 0.65))
    return f"#202020 on rgb({red},{green},{blue})"
