# SPDX-License-Identifier: MIT
"""The tables and the plot of the CUDA benchmark, made from a run written by hand."""

import json
import re
from importlib import util

import pytest

from ssmk.bench import plot_cuda

needs_matplotlib = pytest.mark.skipif(
    not util.find_spec("matplotlib"), reason="needs matplotlib: pip install ssmk[bench]"
)


def row(case, limit, mine, **peers):
    return {"case": case, "bytes": 1, "limit": "update", "limit_us": limit, "ssmk_us": mine,
            "ssmk_over_limit": mine / limit,
            "peers": {name.replace("_", " "): value for name, value in peers.items()}}


HEADS = "state_update 80 heads, 1 groups, dstate 128, bfloat16 state, "
CHANNELS = "state_update Mamba-1, dim 5120, dstate 16, float32 state, "
CONV = "causal_conv1d_update bf16 by channel, "


def peers(mamba, auto, simple):
    return {"mamba-ssm": mamba, "FlashInfer auto": auto, "FlashInfer simple": simple}


RUN = {
    "machine": {"device": "A GPU", "l2": 1, "torch": "2.0", "ssmk": "0.1", "peers": "flashinfer 1",
                "date": "2026-01-02", "command": "python -m ssmk.bench.cuda"},
    "rows": [
        row(HEADS + "1 tokens, batch 16", 10.0, 12.0, **peers(24.0, 18.0, 15.0)),
        row(HEADS + "1 tokens, batch 1", 2.0, 3.0, **peers(4.5, 6.0, "did not compile: a | b")),
        row(HEADS + "4 tokens, batch 1", 2.0, 4.0, **peers("one only", "not measured", "no")),
        row(CHANNELS + "batch 1", 1.0, 1.5, **{"mamba-ssm": 3.0, "FlashInfer": "heads only"}),
        row(CONV + "batch 4", 1.0, 1.2, **{"causal-conv1d": 2.4}),
        row(CONV + "batch 1", 1.0, 1.1, **{"causal-conv1d": "broke"}),
    ],
    "skipped": [{"case": "another", "why": "no room"}],
}


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "run.json"
    path.write_text(json.dumps(RUN))
    return path


def test_tables_have_every_case_and_the_best_of_each_peer(file, capsys):
    assert plot_cuda.main([str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "A GPU, ssmk 0.1, PyTorch 2.0, flashinfer 1, 2026-01-02: " \
                       "`python -m ssmk.bench.cuda`"
    assert "| case | limit, us | ssmk, us | time over limit | mamba-ssm | FlashInfer |" in lines
    layer = "80 heads, dstate 128, bf16 state"
    assert f"| {layer}, batch 16 | 10.00 | 12.00 | 1.20 | 24.00 (2.00x) | 15.00 (1.25x) |" in lines
    assert f"| {layer}, batch 1 | 2.00 | 3.00 | 1.50 | 4.50 (1.50x) | 6.00 (2.00x) |" in lines
    assert f"| {layer}, 4 tokens, batch 1 | 2.00 | 4.00 | 2.00 | - | - |" in lines
    assert "| bf16 by channel, batch 4 | 1.00 | 1.20 | 1.20 | 2.40 (2.00x) |" in lines
    assert "| bf16 by channel, batch 1 | 1.00 | 1.10 | 1.10 | - |" in lines
    assert f"- FlashInfer: not measured ({layer}, 4 tokens)." in lines
    assert "- FlashInfer: heads only (Mamba-1, dim 5120, dstate 16, fp32 state)." in lines
    assert "- causal-conv1d: broke (bf16 by channel)." in lines
    assert lines[-1] == "- another: skipped: no room"


def test_tables_go_between_the_marks_of_a_file(file, tmp_path):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- ssmk bench: begin -->\nold\n<!-- ssmk bench: end -->\nafter\n")
    assert plot_cuda.main([str(file), "--markdown", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- ssmk bench: begin -->\nA GPU")
    assert text.endswith("<!-- ssmk bench: end -->\nafter\n")
    assert "old" not in text and text.count("## state_update") == 1


def test_several_runs_are_taken_as_one(file, tmp_path, capsys):
    more = tmp_path / "more.json"
    more.write_text(json.dumps({**RUN, "rows": [row(CONV + "batch 9", 1.0, 1.0)], "skipped": []}))
    assert plot_cuda.main([str(file), str(more)]) == 0
    out = capsys.readouterr().out
    assert "batch 4 |" in out and "by channel, batch 9 |" in out


def test_panels_are_layers_that_were_measured_at_several_batches():
    panels = plot_cuda.panels_of(plot_cuda.read(RUN))
    heads, conv = "state_update\n80 heads, dstate 128, bf16 state", \
                  "causal_conv1d_update\nbf16 by channel"
    assert list(panels) == [heads, conv]
    assert plot_cuda.curve(panels[heads], "ssmk") == [(1, 16), (1.5, 1.2)]
    assert plot_cuda.curve(panels[heads], "FlashInfer") == [(1, 16), (3.0, 1.5)]
    assert plot_cuda.curve(panels[conv], "causal-conv1d") == [(4,), (2.4,)]
    assert plot_cuda.curve(panels[conv], "mamba-ssm") == ([], [])


@needs_matplotlib
def test_the_plot_is_small_and_the_same_each_time(file, tmp_path):
    for name in ("one.svg", "two.svg"):
        assert plot_cuda.main([str(file), "--plot", str(tmp_path / name), "--markdown",
                               str(tmp_path / "page.md")]) == 0
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    assert len(text) < 100_000
    words = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    for word in ("ssmk", "FlashInfer", "mamba-ssm", "causal-conv1d", "bf16 by channel"):
        assert any(word in found for found in words), word


@needs_matplotlib
def test_a_run_without_curves_has_no_plot(tmp_path, capsys):
    path = tmp_path / "run.json"
    path.write_text(json.dumps({**RUN, "rows": RUN["rows"][2:4]}))
    assert plot_cuda.main([str(path), "--plot", str(tmp_path / "plot.svg")]) == 1
    assert "no curve to draw" in capsys.readouterr().err
    assert plot_cuda.main([str(tmp_path / "nothing.json")]) == 1
