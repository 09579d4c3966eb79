# SPDX-License-Identifier: MIT
"""`ssmk demo`: a trained Mamba labels every character of a file with its language, through ssmk.

The model comes with the PyPI package `typeseg`, and with it two engines of its own (ONNX Runtime,
NumPy).  ssmk's engine (typeseg_model.py) reads the whole text; then all of them read a piece of it,
in turns, to compare their speed and their logits.  Labels are made of the logits by typeseg's code.
"""

import codecs
import sys
import time
from argparse import ArgumentTypeError
from importlib import util
from types import SimpleNamespace

import numpy as np

ENGINES = {"ssmk": "ssmk, NumPy", "onnx": "typeseg, ONNX", "numpy": "typeseg, NumPy"}
COMPARED = 2500  # characters that all engines read
ROUNDS = 3
AGREEMENT = 1e-4  # largest difference of two engines' logits, relative to the largest logit


class DemoError(Exception):
    """What keeps the demo from running, in one line."""


def add_arguments(parser):
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "file", nargs="?", metavar="FILE", help="any file; - is standard input (default: a sample)"
    )
    source.add_argument("--text", metavar="STR", help="label this text instead of a file")
    parser.add_argument(
        "--engine",
        choices=[*ENGINES, "all"],
        default="all",
        help="which of typeseg's engines to compare with; ssmk: with none (default: all)",
    )
    parser.add_argument("--no-color", action="store_true", help="plain text, as into a file")
    parser.add_argument(
        "--lines",
        type=_count,
        default=100,
        metavar="N",
        help="show the first N lines of the text (default: 100; 0: all)",
    )
    parser.add_argument(
        "--limit",
        type=_count,
        default=1 << 20,
        metavar="BYTES",
        help="read the first BYTES of a file, 1.5 KB of memory each (default: 1048576; 0: all)",
    )


def run(args):
    """The exit status: 0, or 1 if the engines disagree."""
    _require("typeseg", "threadpoolctl", "rich", *["onnxruntime"] * (args.engine == "onnx"))
    from ssmk.demo_page import Page

    page = Page(no_color=args.no_color, lines=args.lines)
    engines = Engines()
    name, text = _read(args)
    tokens = engines.tokens(text)
    if tokens.size == 0:
        raise DemoError(f"{name} is empty: there is nothing to label")

    try:
        with page.progress("reading") as progress:
            start = time.perf_counter()
            logits = engines.model.logits(tokens, progress=progress)
            seconds = time.perf_counter() - start
        result = engines.segmentation(text, logits)
    except MemoryError:
        message = f"not enough memory for {len(tokens):,} bytes of text: --limit reads less"
        raise DemoError(message) from None
    page.result(name, result, len(tokens), seconds)

    others = [engine for engine in ("onnx", "numpy") if args.engine in (engine, "all")]
    if "onnx" in others and not util.find_spec("onnxruntime"):
        others.remove("onnx")
        page.note(
            "typeseg's ONNX engine is left out, it needs onnxruntime: pip install 'ssmk[demo]'"
        )
    if not others:
        return 0
    piece = text[:COMPARED]
    with page.progress("comparing") as progress:
        rows = compare(engines, piece, ["ssmk", *others], progress=progress)
    page.note(f"The same {len(piece):,} characters by every engine, best of {ROUNDS} in turns:")
    page.comparison(rows, ENGINES)
    agree = all(row.agrees for row in rows)
    page.note(
        f"The logits {'agree' if agree else 'DISAGREE'} (bound: {AGREEMENT:g} of the largest)."
    )
    return 0 if agree else 1


def bench():
    """The figures of `ssmk bench demo`."""
    try:
        _require("typeseg", "threadpoolctl", "onnxruntime")
    except DemoError as error:
        raise ImportError(str(error)) from None
    ours, *others = compare(Engines(), SAMPLE * 2, list(ENGINES))
    figures = [_figure("ssmk, characters a second", ours.rate, "/s")]
    for row in others:
        goals = {"goal": 2.0} if row.engine == "onnx" else {}
        figures += [
            _figure(f"as fast as {ENGINES[row.engine]}", ours.rate / row.rate, "x", **goals),
            _figure(
                f"logits differ from {ENGINES[row.engine]}",
                row.difference / row.scale,
                "of the largest",
                goal=AGREEMENT,
                better="lower",
            ),
        ]
    return figures


def _figure(name, value, unit, **goal):
    detail = f"typeseg's Mamba, {2 * len(SAMPLE):,} characters"
    return {"family": "demo", "name": name, "value": value, "unit": unit, "detail": detail, **goal}


def compare(engines, text, names, *, progress=None):
    """Runs the engines `names` on one text, in turns; one row each, measured against the first."""
    tokens = engines.tokens(text)
    for name in names:
        engines.logits(name, tokens[:1])  # loads what it needs

    seconds, logits = {}, {}
    for turn in range(ROUNDS):
        for i, name in enumerate(names):
            time.sleep(0.05)  # the threads of the engine before may still be spinning
            start = time.perf_counter()
            logits[name] = engines.logits(name, tokens)
            took = time.perf_counter() - start
            seconds[name] = min(took, seconds.get(name, took))
            if progress is not None:
                progress(turn * len(names) + i + 1, ROUNDS * len(names))

    rows, first = [], names[0]
    labels = {name: engines.segmentation(text, logits[name]).char_labels for name in names}
    for name in names:
        difference = float(np.abs(logits[name] - logits[first]).max())
        scale = float(np.abs(logits[name]).max())
        rows.append(
            SimpleNamespace(
                engine=name,
                rate=len(text) / seconds[name],
                difference=difference,
                scale=scale,
                differing_labels=sum(a != b for a, b in zip(labels[name], labels[first])),
                agrees=difference <= AGREEMENT * scale,
            )
        )
    return rows


def _require(*packages):
    for package in packages:
        if not util.find_spec(package):
            raise DemoError(f"this needs {package}: pip install 'ssmk[demo]'")


class Engines:
    """The model in each of its engines, and what typeseg does before and behind it."""

    def __init__(self):
        import typeseg

        # All but Options is typeseg's own business, which another version may do differently.
        try:
            from typeseg import _numpy_backend, _onnx_backend, _runtime, _tokenize

            self.tokens = _tokenize.text_to_bytes
            self._assemble, self._options = _runtime._assemble, typeseg.Options()
            onnx, numpy, weights = (
                _onnx_backend.mamba_logits,
                _numpy_backend.mamba_forward,
                _runtime._weights,
            )
        except (ImportError, AttributeError) as error:
            message = (
                f"cannot use typeseg {typeseg.__version__} ({error}): pip install 'ssmk[demo]'"
            )
            raise DemoError(message) from None
        from ssmk.typeseg_model import TypesegMamba

        self.model = TypesegMamba()
        self._logits = {
            "ssmk": self.model.logits,
            "onnx": onnx,
            "numpy": lambda tokens: numpy(weights(self.model.file), tokens),
        }

    def logits(self, name, tokens):
        return self._logits[name](tokens)

    def segmentation(self, text, logits):
        p = np.exp(logits - logits.max(axis=1, keepdims=True))
        p /= p.sum(axis=1, keepdims=True)
        return self._assemble(text, p, self._options)


# ---- the text


def _read(args):
    """(what was read, text)"""
    if args.text is not None:
        return "the text", args.text
    if args.file is None:
        return "the sample text", SAMPLE
    size = args.limit + 1 if args.limit else -1
    try:
        if args.file == "-":
            data = sys.stdin.buffer.read(size)
        else:
            with open(args.file, "rb") as file:
                data = file.read(size)
    except OSError as error:
        raise DemoError(f"{args.file}: {error.strerror or error}") from None
    name = "standard input" if args.file == "-" else args.file
    if args.limit and len(data) > args.limit:
        return f"the first {args.limit:,} bytes of {name}", decode(data[: args.limit], final=False)
    return name, decode(data)


def decode(data, *, final=True):
    """UTF-8, or what a byte order mark says.  As in typeseg's own command, bytes that are neither
    become U+FFFD.  Not `final`: a character that is cut off at the end is left out.
    """
    marks = {
        codecs.BOM_UTF8: "utf-8-sig",
        codecs.BOM_UTF32_LE: "utf-32",  # before UTF-16, whose mark it begins with
        codecs.BOM_UTF32_BE: "utf-32",
        codecs.BOM_UTF16_LE: "utf-16",
        codecs.BOM_UTF16_BE: "utf-16",
    }
    encoding = next((marks[mark] for mark in marks if data.startswith(mark)), "utf-8")
    return codecs.getincrementaldecoder(encoding)("replace").decode(data, final)


def _count(value):
    if not value.isdecimal():
        raise ArgumentTypeError(f"expected a number of at least 0, got {value!r}")
    return int(value)


# ---- the sample

SAMPLE = '''\
You asked what I found on the old computer of the café. Most of it is the diary of the owner, and I
have left that alone. The rest are bits and pieces that somebody must have written late at night,
after the last guest had gone home: how to add up the takings, what was on the menu that day. I have
copied them below, one after another, and cannot say which of them is still in use. The very last
line came out of the printer in the kitchen.

{
  "shop": {"name": "Café du Coin", "open": true, "tables": 14, "menu": ["thé", "scones", "soup"]},
  "owner": null,
  "rating": 4.5
}

#include <stdio.h>
#include <stdlib.h>

/* Change for a sum in pence: the largest coins first. */
int main(int argc, char **argv) {
  static const int coins[] = {200, 100, 50, 20, 10, 5, 2, 1};
  int sum = argc > 1 ? atoi(argv[1]) : 0;
  for (int i = 0; i < 8; sum %= coins[i++]) {
    printf("%4d x %d\\n", sum / coins[i], coins[i]);
  }
  return 0;
}

#!/bin/bash
set -euo pipefail
for f in /srv/till/*.csv; do gzip -9 "$f" && mv "$f.gz" /backup/; done
echo "kept $(ls /backup | wc -l) files" >&2

<!DOCTYPE html>
<html><head><title>Menu of the day</title>
<style>
  body { margin: 0 auto; font-family: serif; }
  .menu li { color: #2a6f4e; padding: 4px 8px; border-bottom: 1px solid silver; }
</style></head>
<body><h1>Today</h1><ul class="menu"><li>Leek soup</li><li>Scones &amp; jam</li></ul>
<script>
  document.querySelectorAll(".menu li").forEach((item) => {
    item.addEventListener("click", () => console.log(`${item.textContent} ordered`));
  });
</script></body></html>

import csv
from pathlib import Path

def totals(path):
    """Sum the takings of each day."""
    with Path(path).open(newline="") as file:
        rows = csv.DictReader(file)
        return {row["day"]: float(row["taken"]) * 1.07 for row in rows}

SELECT day, SUM(price * amount) AS taken FROM orders
  LEFT JOIN prices ON prices.item = orders.item
 WHERE day BETWEEN '2024-03-01' AND '2024-03-31' GROUP BY day ORDER BY taken DESC;

VGhlIHNlY3JldCBvZiBhIGdvb2Qgc291cCBpcyBwYXRpZW5jZSwgYW5kIGEgbGVlayBvZiB5b3VyIG93bi4=
'''
