# SPDX-License-Identifier: MIT
"""Pools and tensors past 2^31 elements: every offset is 64-bit.

The memory is reserved, not used: only the pages that a call touches exist.
"""

import os

import numpy as np
import pytest

import cases_conv
import cases_mla
import cases_scan
import cases_ssd
import cases_update
import reference
from cases import BF16, F32, assert_close, assert_same_bits, normal

ELEMENTS = 2**31 + 2**26
RESIDENT_LIMIT = 1 << 30


def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def vast():
    """More than 2^31 bfloat16 elements, of which hardly any may be touched."""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("this system does not tell how much memory is in use")
    before = resident()
    try:
        memory = np.empty(ELEMENTS, BF16)
    except MemoryError:
        pytest.skip("this system does not reserve memory that it may not have")
    yield memory
    used = resident() - before
    assert used < RESIDENT_LIMIT, f"a call on few slots of a large pool touched {used >> 20} MiB"


def pool_of(vast, *slot):
    """As many slots as there is room for."""
    size = int(np.prod(slot))
    entries = len(vast) // size
    return vast[: entries * size].reshape(entries, *slot)


def far_slots(pool, count):
    """The first slot and the last ones: their elements lie beyond 2^31."""
    slots = np.arange(len(pool) - count, len(pool))
    slots[0] = 0
    return slots


@pytest.mark.parametrize("heads", [False, True], ids=["mamba1", "mamba2"])
@pytest.mark.parametrize("index_dtype", (np.int32, np.int64), ids=["int32", "int64"])
def test_state_update(ops, rng, vast, heads, index_dtype):
    p = cases_update.Update(3, 2, heads, 4, 16, 64)
    pool = pool_of(vast, *p.channels, p.dstate)
    assert pool.size > 2**31
    a = cases_update.make(rng, p)
    slots = far_slots(pool, 6)
    pool[slots] = normal(rng, (6, *pool.shape[1:]), BF16)
    small = pool[slots].copy()
    want = reference.state_update(small, **a, state_indices=[0, 4, 2], state_indices_out=[5, 1, 2])
    a["state_indices"] = slots[[0, 4, 2]].astype(index_dtype)
    a["state_indices_out"] = slots[[5, 1, 2]].astype(index_dtype)
    assert_close(ops.state_update(pool, **a), want.out)
    assert_close(pool[slots], want.states["state"], "state")


def test_state_update_keeps_intermediate_states(ops, rng, vast):
    p = cases_update.Update(2, 3)
    kept = pool_of(vast, 3, *p.channels, p.dstate)
    a = cases_update.make(rng, p)
    state = normal(rng, (2, *p.channels, p.dstate))
    want = reference.state_update(state, **a, intermediate_states=np.zeros((2, *kept.shape[1:])))
    rows = np.array([len(kept) - 1, 0])
    out = ops.state_update(state, **a, intermediate_states=kept, intermediate_indices=rows)
    assert_close(out, want.out)
    assert_close(kept[rows], want.states["intermediate_states"], "intermediate_states")


def test_selective_scan(ops, rng, vast):
    p = cases_scan.Scan(4, 8, 30, 16)
    pool = pool_of(vast, p.dim, p.dstate)
    a = cases_scan.make(rng, p)
    slots = far_slots(pool, 4)
    pool[slots] = a["initial_states"].astype(BF16)
    a["initial_states"] = pool[slots].copy()
    want, want_final = reference.selective_scan(**a)
    a.update(initial_states=pool, state_indices=slots)
    out, _ = ops.selective_scan(**a, final_states=pool)
    assert_close(out, want)
    assert_close(pool[slots], want_final, "final_states")


def test_ssd_chunk(ops, rng, vast):
    """All four pools in turn; captures go to rows of a vast tensor."""
    p = cases_ssd.Ssd(4, 70, 4, 16, 16, has=cases_ssd.SISO)
    for part, shape in p.state_shapes().items():
        initial, final = f"initial_{part}states", f"final_{part}states"
        pool = pool_of(vast, *shape)
        a = cases_ssd.make(rng, cases_ssd.Ssd(4, 70, 4, 16, 16, has=cases_ssd.SISO, initial=(part,)))
        slots = far_slots(pool, 4)
        pool[slots] = a[initial].astype(BF16)
        a[initial] = pool[slots].copy()
        want = cases_ssd.wanted_results(a)
        a.update({initial: pool, "state_indices": slots})
        out, _ = ops.ssd_chunk(**a, **{final: pool})
        assert_close(out, want["out"])
        cases_ssd.assert_state(pool[slots], want[final], final)


def test_ssd_chunk_captures(ops, rng, vast):
    """Most positions are skipped; the last of them lie beyond 2^31 elements."""
    a = cases_ssd.make(rng, cases_ssd.Ssd(2, 70, 2, 64, 64))
    captured = pool_of(vast, 2, 64, 64)
    assert captured.size > 2**31
    positions = np.full(len(captured), -1, np.int32)
    rows, tokens = far_slots(captured, 3), [5, 139, 64]
    positions[rows] = tokens
    want = cases_ssd.wanted_results({**a, "capture_positions": np.array(tokens)})
    out, _ = ops.ssd_chunk(**a, capture_positions=positions, captured_states=captured)
    assert_close(out, want["out"])
    assert_close(captured[rows], want["captured_states"], "captured_states")


def test_tokens_far_apart(ops, rng, vast):
    """More than 2^31 elements lie between the rows of x and of out, 2^26 between the tokens."""
    a = cases_ssd.make(rng, cases_ssd.Ssd(2, 9, 2, 4, 16, initial=False))
    size = np.dtype(BF16).itemsize
    strides = [size * n for n in (2**31 + 2**22, 2**22, 2**20, 1)]
    far, out = (np.ndarray((2, 9, 2, 4), BF16, vast, 2**start * size, strides) for start in (0, 18))
    far[...] = a["x"].astype(BF16)
    want = cases_ssd.wanted_results({**a, "x": far})["out"]
    assert_close(ops.ssd_chunk(**{**a, "x": far}, out=out), want)
    strides = [size * n for n in (2**31 + 2**22, 2**22, 2**20, 1)]
    for name in ("B", "C"):
        far = np.ndarray((2, 9, 1, 16), BF16, vast, 0, strides)
        far[...] = a[name].astype(BF16)
        assert_close(ops.ssd_chunk(**{**a, name: far}),
                     cases_ssd.wanted_results({**a, name: far})["out"])  # fmt: skip


def test_rows_far_apart(ops, rng, vast):
    """More than 2^31 elements lie between the rows of x, and of out."""
    a = cases_scan.make(rng, cases_scan.Scan(2, 4, 30, 16))
    row, channel = 2**31 + 2**22, 2**20
    size = np.dtype(BF16).itemsize
    far = np.ndarray((2, 4, 30), BF16, vast, 0, (row * size, channel * size, size))
    far_out = np.ndarray((2, 4, 30), BF16, vast, 2**25 * size, (row * size, channel * size, size))
    far[...] = a["x"].astype(BF16)
    want, _ = reference.selective_scan(**{**a, "x": far})
    assert_close(ops.selective_scan(**{**a, "x": far}, out=far_out), want)
    c = cases_conv.make(rng, cases_conv.Conv(2, 4, 30))
    want, _ = reference.causal_conv1d(**{**c, "x": far})
    assert_close(ops.causal_conv1d(**{**c, "x": far}, out=far_out), want)


def test_causal_conv1d(ops, rng, vast):
    p = cases_conv.Conv(4, 16, 30)
    pool = pool_of(vast, p.dim, 3)
    a = cases_conv.make(rng, p)
    slots = far_slots(pool, 4)
    pool[slots] = a["initial_states"].astype(BF16)
    a["initial_states"] = pool[slots].copy()
    want, want_final = reference.causal_conv1d(**a)
    a.update(initial_states=pool, state_indices=slots.astype(np.int32))
    out, _ = ops.causal_conv1d(**a, final_states=pool)
    assert_close(out, want)
    assert_close(pool[slots], want_final, "final_states")


@pytest.mark.parametrize("ring", [False, True])
def test_causal_conv1d_update(ops, rng, vast, ring):
    a, placed = cases_conv.make_update(rng, cases_conv.ConvUpdate(4, 2, 16, ring=ring))
    pool = pool_of(vast, 16, 3)
    slots = far_slots(pool, 4)
    pool[slots] = placed.array.astype(BF16)
    want, want_state = reference.causal_conv1d_update(conv_state=pool[slots].copy(), **a)
    out = ops.causal_conv1d_update(a.pop("x"), pool, **a, state_indices=slots)
    assert_close(out, want)
    assert_close(pool[slots], want_state, "conv_state")


@pytest.mark.parametrize("index_dtype", (np.int32, np.int64), ids=["int32", "int64"])
@pytest.mark.parametrize("form", cases_mla.FORMS)
def test_mla_decode(ops, rng, vast, form, index_dtype):
    """Pages at both ends of the pool, to which tokens are added."""
    p = cases_mla.Mla(
        2, 2, latent=64, rope=0, group=32 if form == "codes" else 0, page_size=16, capacity=48,
        append=True, dtype={"latent": BF16},
    )
    a, placed = cases_mla.make(rng, p)
    small = {name: one.array for name, one in placed.items()}
    name = "codes" if form == "codes" else "latent"
    values = small[name]
    pool = pool_of(vast.view(values.dtype), 16, values.shape[-1])
    pages = far_slots(pool, len(values))
    pool[pages] = values
    cache = {name: pool}
    for other in ("scales", "biases") if form == "codes" else ():
        # Reserved as well; the pages in use are the same.
        cache[other] = np.empty((len(pool), 16, 2), F32)
        cache[other][pages] = small[other]
    want = reference.mla_decode(**a, **small)
    used = np.clip(a["page_table"], 0, len(values) - 1)
    table = np.where(a["page_table"] == used, pages[used], -1).astype(index_dtype)
    out = ops.mla_decode(**{**a, "page_table": table}, **cache)
    assert_close(out, want.out)
    for name in cache:
        assert_same_bits(cache[name][pages], want.cache[name], name)


def test_ring_whose_count_is_past_32_bits(ops, rng):
    a, placed = cases_conv.make_update(rng, cases_conv.ConvUpdate(2, 3, 8, 4, 5, ring=True))
    a["cache_seqlens"] = np.array([2**40 + 3, 2**62 + 1])
    want, want_state = reference.causal_conv1d_update(conv_state=placed.array.copy(), **a)
    out, state = cases_conv.run_update(ops, a, placed.array)
    assert_close(out, want)
    assert_close(state, want_state, "conv_state")
