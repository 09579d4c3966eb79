# SPDX-License-Identifier: MIT
"""The trained Mamba of the PyPI package `typeseg`, read through ssmk.

A byte-level model of six bidirectional Mamba-1 layers: it gives every byte of a text a logit for
each of 35 content types.  The package supplies the weights and the tokens; what computes is here,
one layer being

    n       = (h - mean(h)) / sqrt(var(h) + 1e-6) * scale + shift
    x, z    = n W_in + b_in
    u       = silu(conv(x))              4 taps, "SAME" padding: one token back, two ahead
    r, B, C = u W_x + b_x
    dt      = softplus(r W_dt + b_dt) + 1e-4
    y       = scan(u, dt, A, B, C, D) from the left + the same from the right
    h      += (y silu(z)) W_out + b_out

Threads.  Matrix products and what is done element by element work on rows that do not depend on
each other: each thread takes a share of a block's rows through a whole chain of such steps, with a
BLAS that is held to one thread.  The scans and the convolution share out their channels themselves.

Memory.  Only h is as long as the text (1 KiB a token).  A layer updates it in place, segment by
segment; what it needs besides is as long as a segment (4.2 KiB a token), and is worked through in
blocks that stay in the caches.  Three things cross the border between two segments:
  - from the left, the scan's state and the convolution's last inputs, which are carried along;
  - from the right, the state of the other scan.  A sweep over the segments from right to left finds
    it before the update, and what the sweep computes on its way is computed again.
So segments never change the logits by more than rounding, and a text of one segment needs no sweep.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from types import SimpleNamespace

import numpy as np
from threadpoolctl import ThreadpoolController

import ssmk

SEGMENT = 32768  # tokens: 140 MB of scratch
BLOCK = 512  # tokens a thread: 0.5 MB for each array that a step touches
SHARE = 128  # tokens: less is not worth waking a thread
MAX_THREADS = 16

LAYER_NORM_EPS = 1e-6
DT_FLOOR = 1e-4
LOOK_AHEAD = 2  # how far the convolution sees ahead
NON_ASCII = 128  # the embedding has a row for each ASCII byte, and this one for all the others


class TypesegMamba:
    """typeseg's Mamba; the tokens are the byte values that typeseg makes of a text."""

    def __init__(self):
        data = resources.files("typeseg") / "data"
        config = json.loads((data / "manifest.json").read_text())["mamba"]
        self.file = config["file"]
        with (data / self.file).open("rb") as file, np.load(file) as arrays:
            weights = {name: arrays[name].astype(np.float32) for name in arrays.files}
        self.embedding = weights["Embed_0__embedding"]
        self.layers = [_layer(weights, i, config["dt_rank"]) for i in range(config["n_layers"])]
        head, bias = weights["Dense_0__kernel"], weights["Dense_0__bias"]
        self.head, self.head_bias = _behind_norm(weights, "", head, bias)
        self.blas = ThreadpoolController()

    def logits(self, tokens, *, segment=SEGMENT, progress=None):
        """Logits (tokens, classes), float32; calls `progress(done, total)` as the work goes on."""
        if segment < 1:
            raise ValueError(f"segment must be at least 1, got {segment}")
        h = self.embedding[np.minimum(tokens, NON_ASCII)]
        logits = np.empty((len(h), self.head.shape[1]), np.float32)
        segments = _cut(slice(0, len(h)), segment)
        once = segments[0].stop if segments else 0  # the first segment is not swept
        report = _counter(progress, len(self.layers) * (3 * len(h) - once))

        with _Team() as team, self.blas.limit(limits=1, user_api="blas"):
            run = _Run(h, segments, team, self.layers[0], report)
            for layer in self.layers:
                from_right = _states_from_right(run, layer)
                _update(run, layer, from_right)

            for at in _cut(slice(0, len(h)), run.block):

                def classify(rows, h=h[at], logits=logits[at]):
                    np.matmul(_normalise(h[rows], run.n[rows]), self.head, out=logits[rows])
                    logits[rows] += self.head_bias

                team.share(classify, at.stop - at.start)
        return logits


# ---- weights


def _layer(weights, index, dt_rank):
    """The weights of one layer under the names of the formula."""
    name = f"CheckpointMambaBlock1D_{index}__"
    kernel, bias = (
        [weights[f"{name}Dense_{i}__{which}"] for i in range(4)] for which in ("kernel", "bias")
    )
    dim = weights[name + "D"].shape[0]
    in_x, in_x_bias = _behind_norm(weights, name, kernel[0][:, :dim], bias[0][:dim])
    in_z, in_z_bias = _behind_norm(weights, name, kernel[0][:, dim:], bias[0][dim:])
    return SimpleNamespace(
        in_x=in_x,
        in_x_bias=in_x_bias,
        in_z=in_z,
        in_z_bias=in_z_bias,
        conv=np.ascontiguousarray(weights[name + "Conv_0__kernel"][:, 0, :].T),
        conv_bias=weights[name + "Conv_0__bias"],
        x=kernel[1],
        x_bias=bias[1],
        dt_rank=dt_rank,
        dt=kernel[2],
        dt_bias=bias[2],
        A=-np.exp(weights[name + "A_log"]),
        D=weights[name + "D"],
        out=kernel[3],
        out_bias=bias[3],
    )


def _behind_norm(weights, name, kernel, bias):
    """A dense layer behind a layer norm takes over the norm's scale and shift."""
    scale, shift = weights[name + "LayerNorm_0__scale"], weights[name + "LayerNorm_0__bias"]
    return np.ascontiguousarray(scale[:, None] * kernel), shift @ kernel + bias


# ---- one layer


class _Run:
    """What all layers work on: the text, and scratch that lives within a segment or a block."""

    def __init__(self, h, segments, team, layer, report):
        self.h, self.segments, self.team, self.report = h, segments, team, report
        self.block = BLOCK * team.size
        dim, dstate = layer.A.shape

        def scratch(rows, columns):
            return np.empty((rows, columns), np.float32)

        longest = segments[0].stop if segments else 0
        self.u, self.z, self.dt, self.y = (scratch(longest, dim) for _ in range(4))
        self.rBC = scratch(longest, layer.dt_rank + 2 * dstate)
        self.n, self.x, self.y_right = (scratch(self.block + LOOK_AHEAD, dim) for _ in range(3))

    def blocks(self, segment):
        """(its place in the text, its place in a segment's scratch) for each block"""
        for at in _cut(segment, self.block):
            yield at, slice(at.start - segment.start, at.stop - segment.start)


def _states_from_right(run, layer):
    """For every segment the state with which the scan from the right enters it."""
    states = np.zeros((len(run.segments), 1, *layer.A.shape), np.float32)
    for i in range(len(run.segments) - 1, 0, -1):
        states[i - 1] = states[i]
        for at, here in reversed([*run.blocks(run.segments[i])]):
            _scan_inputs(run, layer, at, here, _conv_state(run, layer, at.start))
            _scan(run, layer, here, states[i - 1], run.y_right, from_right=True)
            run.report(at.stop - at.start)
    return states


def _update(run, layer, from_right):
    """h += the layer's output."""
    from_left = np.zeros((1, *layer.A.shape), np.float32)
    conv_state = _conv_state(run, layer, 0)
    for segment, right in zip(run.segments, from_right):
        for at, here in run.blocks(segment):
            _scan_inputs(run, layer, at, here, conv_state, gate=True)
            _scan(run, layer, here, from_left, run.y[here], gate=True)
            run.report(at.stop - at.start)

        for at, here in reversed([*run.blocks(segment)]):
            # The gate is linear in the sum of the two scans, so each applies it on its way out.
            y = _scan(run, layer, here, right, run.y_right, gate=True, from_right=True)

            def output(rows, y=y, y_left=run.y[here], h=run.h[at]):
                y[rows] += y_left[rows]
                out = np.matmul(y[rows], layer.out, out=run.x[rows])
                out += layer.out_bias
                h[rows] += out

            run.team.share(output, len(y))
            run.report(at.stop - at.start)


def _scan_inputs(run, layer, at, here, conv_state, *, gate=False):
    """u, r, B, C, dt, and z for the gate, of the tokens `at` into the rows `here` of the scratch.

    ssmk's convolution is causal, out_t = sum_w weight_w x_(t-3+w), and the model's is
    sum_w weight_w x_(t-1+w): the same outputs, due two tokens earlier.  So it is fed two tokens
    ahead of the block, and zeros behind the text.  `conv_state` moves on by one block.
    """
    length = at.stop - at.start
    h, x, z = run.h[at.start : at.stop + LOOK_AHEAD], run.x[: length + LOOK_AHEAD], run.z[here]
    u, rBC, dt = run.u[here], run.rBC[here], run.dt[here]
    x[len(h) :] = 0

    def project(rows):
        n = _normalise(h[rows], run.n[rows])
        np.matmul(n, layer.in_x, out=x[rows])
        x[rows] += layer.in_x_bias
        if gate:
            z_rows = z[rows]  # without those ahead of the block
            np.matmul(n[: len(z_rows)], layer.in_z, out=z_rows)
            z_rows += layer.in_z_bias

    run.team.share(project, len(h))

    ssmk.causal_conv1d(
        x[None, LOOK_AHEAD:],
        layer.conv,
        layer.conv_bias,
        activation="silu",
        channels_last=True,
        initial_states=conv_state,
        final_states=conv_state,
        out=u[None],
    )

    # Not the scan's own softplus: the model adds to it, and so bounds how long a channel remembers.
    def select(rows):
        np.matmul(u[rows], layer.x, out=rBC[rows])
        rBC[rows] += layer.x_bias
        dt_rows = np.matmul(rBC[rows, : layer.dt_rank], layer.dt, out=dt[rows])
        dt_rows += layer.dt_bias
        np.log1p(np.exp(dt_rows, out=dt_rows), out=dt_rows)
        dt_rows += DT_FLOOR

    run.team.share(select, length)


def _scan(run, layer, here, state, out, *, gate=False, from_right=False):
    """The selective scan over the rows `here`, from either side; `state` moves on."""
    B = layer.dt_rank
    C = B + layer.A.shape[1]
    order = np.s_[None, ::-1] if from_right else np.s_[None]
    out = out[: here.stop - here.start]
    ssmk.selective_scan(
        run.u[here][order],
        run.dt[here][order],
        layer.A,
        run.rBC[here, B:C][order],
        run.rBC[here, C:][order],
        layer.D,
        run.z[here][order] if gate else None,
        channels_last=True,
        initial_states=state,
        final_states=state,
        out=out[order],
    )
    return out


def _conv_state(run, layer, start):
    """The convolution's state for a block at `start`: the inputs start - 1 .. start + 1."""
    width = layer.conv.shape[1]
    inputs = np.zeros((width - 1, run.h.shape[1]), np.float32)
    before = min(start, width - 1 - LOOK_AHEAD)
    h = run.h[start - before : start + LOOK_AHEAD]
    first = width - 1 - LOOK_AHEAD - before
    inputs[first : first + len(h)] = _normalise(h, np.empty_like(h)) @ layer.in_x + layer.in_x_bias
    return np.ascontiguousarray(inputs.T)[None]


def _normalise(h, out):
    """The layer norm of the rows of h, without its scale and shift."""
    n = np.subtract(h, h.mean(axis=1, keepdims=True), out=out[: len(h)])
    variance = np.einsum("td,td->t", n, n) / h.shape[1]
    n *= (1 / np.sqrt(variance + LAYER_NORM_EPS))[:, None]
    return n


# ---- helpers


class _Team:
    """Threads that share rows."""

    def __init__(self):
        self.size = min(ssmk.num_threads(), MAX_THREADS)
        self.pool = ThreadPoolExecutor(max(self.size - 1, 1))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.pool.shutdown()

    def share(self, work, length):
        """Calls work(rows) for slices that make up `length` rows, and waits for all of them."""
        shares = _cut(slice(0, length), max(SHARE, -(-length // self.size)))
        others = [self.pool.submit(work, rows) for rows in shares[1:]]
        work(shares[0])
        for other in others:
            other.result()


def _cut(span, size):
    """The slice `span` in pieces of `size`, the last one shorter."""
    return [slice(at, min(at + size, span.stop)) for at in range(span.start, span.stop, size)]


def _counter(progress, total):
    """A function that adds up the tokens it is given and reports the sum."""
    done = 0

    def report(tokens):
        nonlocal done
        done += tokens
        if progress is not None:
            progress(done, total)

    return report
