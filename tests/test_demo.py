# SPDX-License-Identifier: MIT
"""The trained Mamba of the demo: its logits against those of typeseg's own two engines."""

from importlib import util

import numpy as np
import pytest

for package in ("typeseg", "threadpoolctl"):
    pytest.importorskip(package, reason=f"needs {package}: pip install 'ssmk[demo]'")

import ssmk  # noqa: E402
from ssmk import demo, typeseg_model  # noqa: E402

BOUND = 1e-4  # of the largest logit
TYPESEG_ENGINES = [
    pytest.param(
        "onnx",
        marks=pytest.mark.skipif(not util.find_spec("onnxruntime"), reason="needs onnxruntime"),
    ),
    "numpy",
]


def noise(length):
    """Every byte value that typeseg tells apart, and characters of two and three bytes."""
    rng = np.random.default_rng(7)
    return "".join(map(chr, rng.integers(0, 0x900, length)))


TEXTS = {
    "one character": "x",
    "two characters": "x=",
    "one character of four bytes": "\N{FACE WITH TEARS OF JOY}",
    "not ASCII": "Größe: 3 µm, naïve Ωμέγα, 東京都、日本語のテキスト。",
    "the sample": demo.SAMPLE,
    "one letter, a long time": "a" * 2000,
    "noise": noise(1500),
    "ten thousand characters": (demo.SAMPLE * 5)[:10_000],
}


@pytest.fixture(scope="module")
def engines():
    return demo.Engines()


@pytest.fixture(scope="module")
def read(engines):
    """(tokens, logits of ssmk's engine) of a named text"""
    cache = {}

    def get(name):
        if name not in cache:
            tokens = engines.tokens(TEXTS[name])
            cache[name] = tokens, engines.model.logits(tokens)
        return cache[name]

    return get


@pytest.mark.parametrize("engine", TYPESEG_ENGINES)
@pytest.mark.parametrize("text", TEXTS)
def test_the_logits_and_the_labels_are_those_of_typesegs_engines(engines, read, text, engine):
    tokens, logits = read(text)
    theirs = engines.logits(engine, tokens)
    assert logits.shape == theirs.shape == (len(tokens), 35)
    assert logits.dtype == np.float32
    assert np.abs(logits - theirs).max() <= BOUND * np.abs(theirs).max()

    if text != "noise":  # of which the model is so unsure that rounding may decide
        labels = [engines.segmentation(TEXTS[text], each).char_labels for each in (logits, theirs)]
        assert labels[0] == labels[1]


def test_an_empty_text_has_no_logits(engines):
    assert engines.model.logits(engines.tokens("")).shape == (0, 35)


# Segments of one and two tokens are shorter than the convolution looks ahead.
@pytest.mark.parametrize("segment", [1, 2, 3, 100, 104, 105, 1000])
def test_segments_do_not_change_the_logits(engines, segment):
    tokens = engines.tokens(demo.SAMPLE[:210])
    whole = engines.model.logits(tokens)
    assert len(whole) > 200
    cut = engines.model.logits(tokens, segment=segment)
    assert np.abs(cut - whole).max() <= 1e-5 * np.abs(whole).max()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("block", [1, 7, 64])
def test_blocks_and_threads_do_not_change_the_logits(engines, block, threads, monkeypatch):
    tokens = engines.tokens(demo.SAMPLE[:210])
    whole = engines.model.logits(tokens)
    monkeypatch.setattr(typeseg_model, "BLOCK", block)
    monkeypatch.setattr(typeseg_model, "SHARE", 1)
    monkeypatch.setattr(ssmk, "num_threads", lambda: threads)
    for segment in (100, len(tokens)):
        cut = engines.model.logits(tokens, segment=segment)
        assert np.abs(cut - whole).max() <= 1e-5 * np.abs(whole).max()


def test_segments_see_what_lies_far_to_their_right(engines):
    """The model reads both ways: the end of a text changes the logits at its beginning."""
    text = (demo.SAMPLE * 2)[:3000]
    with_end = engines.model.logits(engines.tokens(text), segment=512)[:512]
    without = engines.model.logits(engines.tokens(text[:1500]), segment=512)[:512]
    assert np.abs(with_end - without).max() > 0.01 * np.abs(with_end).max()


def test_a_text_is_read_alike_every_time(engines, read):
    tokens, logits = read("the sample")
    assert np.array_equal(engines.model.logits(tokens), logits)


def test_the_blas_gets_its_threads_back(engines):
    blas = engines.model.blas.select(user_api="blas")
    before = [library["num_threads"] for library in blas.info()]
    during = []
    engines.model.logits(
        engines.tokens("x" * 50),
        progress=lambda done, total: during.append([each["num_threads"] for each in blas.info()]),
    )
    assert len(before) > 0 and during[0] == [1] * len(before)
    assert [library["num_threads"] for library in blas.info()] == before


@pytest.mark.parametrize("segment", [64, 5000])
def test_progress_rises_to_its_total(engines, segment):
    calls = []
    tokens = engines.tokens(demo.SAMPLE)
    engines.model.logits(
        tokens, segment=segment, progress=lambda done, total: calls.append((done, total))
    )
    done, totals = zip(*calls)
    assert len(set(totals)) == 1
    assert list(done) == sorted(set(done))
    assert done[-1] == totals[-1]


def test_a_segment_of_no_tokens_is_refused(engines):
    with pytest.raises(ValueError, match="segment must be at least 1, got 0"):
        engines.model.logits(engines.tokens("x"), segment=0)


# ---- the comparison


def test_the_comparison_finds_the_engines_in_agreement(engines):
    ours, theirs = demo.compare(engines, demo.SAMPLE[:300], ["ssmk", "numpy"])
    assert (ours.engine, theirs.engine) == ("ssmk", "numpy")
    assert theirs.agrees and theirs.differing_labels == 0
    assert ours.rate > 0 and theirs.rate > 0


@pytest.mark.parametrize("wrong", [1e-2, np.nan])
def test_the_comparison_notices_logits_that_differ(engines, wrong, monkeypatch):
    right = engines.model.logits

    def off(tokens):
        logits = right(tokens)
        logits[len(tokens) // 2, 3] += wrong
        return logits

    monkeypatch.setitem(engines._logits, "ssmk", off)
    _, theirs = demo.compare(engines, demo.SAMPLE[:300], ["ssmk", "numpy"])
    assert not theirs.agrees


@pytest.mark.skipif(not util.find_spec("onnxruntime"), reason="needs onnxruntime")
def test_the_benchmark_has_figures_with_their_goals(monkeypatch):
    monkeypatch.setattr(demo, "SAMPLE", demo.SAMPLE[:200])
    figures = {figure["name"]: figure for figure in demo.bench()}
    assert figures["ssmk, characters a second"]["value"] > 0
    assert figures["as fast as typeseg, ONNX"]["goal"] == 2
    difference = figures["logits differ from typeseg, ONNX"]
    assert (
        difference["better"] == "lower" and 0 < difference["value"] <= difference["goal"] == BOUND
    )


# ---- the text


@pytest.mark.parametrize(
    "data, text",
    [
        (b"plain", "plain"),
        ("naïve".encode(), "naïve"),
        ("naïve".encode("utf-8-sig"), "naïve"),
        ("naïve 東".encode("utf-16"), "naïve 東"),
        (b"\xfe\xff" + "naïve".encode("utf-16-be"), "naïve"),
        ("naïve 東".encode("utf-32"), "naïve 東"),
        (b"\x00\xff\x80a", "\x00\ufffd\ufffda"),
    ],
)
def test_files_are_decoded_by_their_mark_else_as_utf8(data, text):
    assert demo.decode(data) == text


def test_a_character_that_the_limit_cuts_is_left_out():
    assert demo.decode("naï".encode()[:3], final=False) == "na"
    assert demo.decode("naï".encode()[:3]) == "na\ufffd"
