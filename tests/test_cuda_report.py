# SPDX-License-Identifier: MIT
"""The tables and the plot of the CUDA benchmark, made from a run written by hand."""

import json
import re
from importlib import util

import pytest

from ssmk.bench import plot_cuda, plot_prefill

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


def written(run, path):
    path.write_text(json.dumps(run))
    return path


@pytest.fixture
def file(tmp_path):
    return written(RUN, tmp_path / "run.json")


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


# Prefill


def prefill(case, memory, tensor, mine, errors=None, launched=None, **peers):
    limit = max(memory, tensor)
    found = row(f"ssd_chunk {case}", limit, mine or 1.0, **peers)
    found.update(memory_us=memory, tensor_us=tensor, flops=1.0, ssmk_us=mine,
                 limit="tensor" if tensor > memory else "copy", errors=errors or {},
                 ssmk_over_limit=mine and mine / limit, launched_us=launched or {})
    return found if mine else {**found, "ssmk_refused": "not yet"}


def off(most):
    return {what: {"max": most, "rms": most / 4} for what in ("out", "states")}


BF16 = "Mamba-2, 80 heads, bf16"
PREFILL = {
    "machine": {**RUN["machine"], "rates": {"copy_TB/s": {"300 MB": 4.2, "1000 MB": 4.3},
                                            "bf16_product_TFLOP/s": 790.5}},
    "rows": [
        prefill(f"{BF16}, batch 8, seqlen 4096", 160.0, 120.0, 240.0,
                {"ssmk": off(1e-3), "mamba-ssm chunk 256": off(3e-3),
                 "mamba-ssm chunk 128": off(2e-3)},
                {"ssmk": 250.0, "mamba-ssm chunk 256": 1550.0, "mamba-ssm chunk 128": 1250.0},
                **{"mamba-ssm chunk 256": 1500.0, "mamba-ssm chunk 128": 1200.0}),
        prefill(f"{BF16}, batch 1, seqlen 512", 3.0, 2.0, 12.0,
                {"ssmk": off(1e-3), "mamba-ssm chunk 256": off(4e-3)},
                **{"mamba-ssm chunk 256": 300.0, "mamba-ssm chunk 128": "broke"}),
        prefill("Mamba-2, 80 heads, bf16, packed, batch 16, seqlen 1024", 80.0, 60.0, None,
                **{"mamba-ssm": "not packed"}),
        prefill("Mamba-3 rank 4, 32 heads, batch 8, seqlen 2048", 60.0, 120.0, 300.0,
                {"ssmk": off(1e-3)}, **{"mamba-ssm": 900.0}),
    ],
    "skipped": [{"case": "ssd_chunk of another kind", "why": "no room"}],
}


@pytest.fixture
def prefill_file(tmp_path):
    return written(PREFILL, tmp_path / "prefill.json")


def test_prefill_tables_have_both_limits_and_the_errors(prefill_file, capsys):
    assert plot_cuda.main([str(prefill_file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("A GPU, ssmk 0.1") and "## ssd_chunk" in lines
    assert "Copies of 300 MB at 4.2 TB/s, 1000 MB at 4.3 TB/s; a bfloat16 product of 8192 rows " \
           "and columns at 790.5 TFLOP/s." in lines
    assert "| case | memory, us | tensor cores, us | ssmk, us | time over limit | bound by | " \
           "mamba-ssm |" in lines
    assert f"| {BF16}, 8 x 4096 | 160.0 | 120.0 | 240.0 | 1.50 | memory | 1200.0 (5.00x) |" in lines
    assert f"| {BF16}, 1 x 512 | 3.0 | 2.0 | 12.0 | 4.00 | memory | 300.0 (25.00x) |" in lines
    packed = f"{BF16}, packed, 16 x 1024 on average"
    assert f"| {packed} | 80.0 | 60.0 | - | - | memory | - |" in lines
    assert "| Mamba-3 rank 4, 32 heads, 8 x 2048 | 60.0 | 120.0 | 300.0 | 2.50 | tensor cores | " \
           "900.0 (3.00x) |" in lines
    assert "| case | out, ssmk | out, mamba-ssm | states, ssmk | states, mamba-ssm |" in lines
    one, two = "1.0e-03 / 2.5e-04", "2.0e-03 / 5.0e-04"  # of the choice that is the fastest
    assert f"| {BF16}, 8 x 4096 | {one} | {two} | {one} | {two} |" in lines
    assert f"| Mamba-3 rank 4, 32 heads, 8 x 2048 | {one} | - | {one} | - |" in lines
    at = lines.index("| case | ssmk, us | mamba-ssm |")
    assert lines[at + 2 : at + 4] == [f"| {BF16}, 8 x 4096 | 250.0 | 1250.0 (5.00x) |", ""]
    assert f"- ssmk: not yet ({packed})." in lines
    assert f"- mamba-ssm: not packed ({packed})." in lines
    assert f"- mamba-ssm chunk 128: broke ({BF16}, 1 x 512)." in lines
    assert lines[-1] == "- ssd_chunk of another kind: skipped: no room"


def test_a_peer_is_compared_with_the_limit_where_ssmk_has_no_time():
    refused = prefill(f"{BF16}, batch 1, seqlen 2048", 10.0, 8.0, None, **{"mamba-ssm": 400.0})
    line = list(plot_prefill.times([refused]))[-1]
    assert line.endswith("| - | memory | 400.0 (40.0 x the limit) |")
    assert plot_prefill.over_limit(refused, "ssmk") is None
    assert plot_prefill.over_limit(refused, "mamba-ssm") == 40.0


def test_decode_and_prefill_have_places_of_their_own(file, prefill_file, tmp_path, capsys):
    page = tmp_path / "page.md"
    marks = [f"{begin}\nold\n{end}\n" for begin, end in (
        ("<!-- ssmk bench: begin -->", "<!-- ssmk bench: end -->"),
        (plot_prefill.BEGIN, plot_prefill.END))]
    page.write_text("one\n" + marks[0] + "two\n" + marks[1] + "three\n")
    assert plot_cuda.main([str(prefill_file), "--markdown", str(page)]) == 0
    text = page.read_text()
    assert text.startswith("one\n" + marks[0] + "two\n") and text.endswith("three\n")
    assert text.count("## ssd_chunk") == 1 and text.count("old") == 1
    assert plot_cuda.main([str(file), "--markdown", str(page)]) == 0
    assert plot_cuda.main([str(file), str(prefill_file), "--markdown", str(page)]) == 0
    both = page.read_text()
    assert both.index("## state_update") < both.index("two") < both.index("## ssd_chunk")
    assert both.count("old") == 0 and "790.5 TFLOP/s" in both

    page.write_text("one\n" + marks[0])
    assert plot_cuda.main([str(prefill_file), "--markdown", str(page)]) == 1
    assert "no place" in capsys.readouterr().err
    assert page.read_text() == "one\n" + marks[0]
    page.write_text("nothing of ours")
    assert plot_cuda.main([str(file), str(prefill_file), "--markdown", str(page)]) == 0
    assert "## state_update" in page.read_text() and "## ssd_chunk" in page.read_text()


def test_prefill_panels_are_layers_in_several_sizes_and_one_for_the_rest():
    panels = plot_prefill.panels_of(PREFILL["rows"])
    assert list(panels) == [BF16, "other layers"]
    assert [label for label, _ in panels[BF16]] == ["1 x 512", "8 x 4096"]
    assert [label for label, _ in panels["other layers"]] == [
        "Mamba-2,\n80 heads,\nbf16,\npacked,\n16 x 1024 on average",
        "Mamba-3 rank 4,\n32 heads,\n8 x 2048"]


@needs_matplotlib
def test_the_prefill_plot_is_small_and_the_same_each_time(file, prefill_file, tmp_path, capsys):
    for name in ("one.svg", "two.svg"):
        assert plot_cuda.main([str(file), str(prefill_file), "--prefill-plot",
                               str(tmp_path / name)]) == 0
    text = (tmp_path / "one.svg").read_text()
    assert text == (tmp_path / "two.svg").read_text()
    assert len(text) < 100_000
    found = re.findall(r"<text[^>]*>([^<]*)</text>", text)
    for word in ("ssmk", "mamba-ssm", "1 x 512", BF16):
        assert any(word in words for words in found), word
    assert plot_cuda.main([str(file), "--prefill-plot", str(tmp_path / "three.svg")]) == 1
    assert "no prefill was measured" in capsys.readouterr().err
