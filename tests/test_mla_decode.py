# SPDX-License-Identifier: MIT
"""mla_decode against the reference, and what must hold bit for bit."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import reference
from cases import (
    BF16, F16, F32, FLOATS, I32, LAYOUTS, assert_close, assert_same_bits, normal, place, raw,
)
from cases_mla import (
    FORMS, Mla, arrays_of, assert_decoded, assert_same_run, check, draw_latents, make, run,
)

FORM = pytest.mark.parametrize("form", FORMS)
GROUPS = pytest.mark.parametrize("group", (32, 64, 128))


def of(form, **choices):
    """A case whose cache has that form."""
    return Mla(**{"group": 0 if form == "latent" else 32, **choices})


# Against the reference


@pytest.mark.core
@FORM
@pytest.mark.parametrize("append", [False, True])
@pytest.mark.parametrize("page_size", [None, 16, 32])
def test_every_kind_of_cache(ops, rng, form, append, page_size):
    for T in (None, 1, 3):
        p = of(form, T=T, append=append, page_size=page_size, capacity=96)
        check(ops, rng, p)
        check(ops, rng, replace(p, rope=0, index_dtype=I32))
        check(ops, rng, replace(p, layout="mixed", nheads=5))


@pytest.mark.core
@GROUPS
@pytest.mark.parametrize("latent", (128, 256, 512, 384))
@pytest.mark.parametrize("rope", (0, 64, 7))
def test_every_group_and_width(ops, rng, group, latent, rope):
    p = Mla(2, None, 3, latent, rope, group, 70, append=True)
    check(ops, rng, p)
    check(ops, rng, replace(p, T=2, nheads=16))


@pytest.mark.core
@pytest.mark.parametrize("latent", (1, 7, 8, 24, 96, 500))
@pytest.mark.parametrize("rope", (0, 1, 5, 64, 100))
def test_every_width_of_floats(ops, rng, latent, rope):
    check(ops, rng, Mla(2, None, 3, latent, rope, 0, 50, append=True))


@pytest.mark.core
@pytest.mark.parametrize("latent, rope, group", [
    (1024, 0, 64), (1024, 64, 128), (960, 64, 32), (992, 64, 32), (2176, 40, 128), (1040, 9, 0),
    (1000, 1100, 0),
])  # fmt: skip
def test_wider_than_a_tile(ops, rng, latent, rope, group):
    p = Mla(2, 2, 3, latent, rope, group, 70, append=True)
    check(ops, rng, p)
    check(ops, rng, replace(p, page_size=16, capacity=96, layout="sliced"))


@pytest.mark.core
@FORM
@pytest.mark.parametrize("nheads", (1, 2, 3, 4, 5, 8, 16, 31, 33, 64, 130))
def test_every_number_of_heads(ops, rng, form, nheads):
    check(ops, rng, of(form, nheads=nheads, batch=2))
    check(ops, rng, of(form, nheads=nheads, batch=2, T=3, append=True))


@FORM
def test_every_length(ops, rng, form):
    for seqlen in [*range(0, 36), 63, 64, 65, 255, 256, 257, 511, 513, 700]:
        check(ops, rng, of(form, batch=1, nheads=2, capacity=700, seqlens=(seqlen,)))


@pytest.mark.core
@FORM
@pytest.mark.parametrize("invariant", [False, True])
def test_long_rows_beside_short_ones(ops, rng, form, invariant):
    lengths = (5000, 0, 1, 257, 3000, 255)
    p = of(form, batch=6, nheads=3, latent=32, rope=8, capacity=5008, seqlens=lengths)
    check(ops, rng, p, batch_invariant=invariant)
    check(ops, rng, replace(p, page_size=16), batch_invariant=invariant)


@FORM
@pytest.mark.parametrize("invariant", [False, True])
def test_a_very_long_row(ops, rng, form, invariant):
    """More tokens than the most pieces of the smallest size."""
    p = of(form, batch=1, nheads=2, latent=32, rope=4, capacity=40000, seqlens=(39999,), T=2)
    check(ops, rng, p, batch_invariant=invariant)


@pytest.mark.core
@FORM
def test_queries_before_the_first_token_see_nothing(ops, rng, form):
    p = of(form, batch=6, T=5, seqlens=(0, 1, 2, 4, 5, 6))
    _, _, out, lse = check(ops, rng, p)
    for row in range(5):
        assert (out[row, : 5 - row if row < 3 else 5 - p.seqlens[row]] == 0).all()
        assert np.isneginf(lse[row, : 5 - p.seqlens[row]]).all()


@pytest.mark.core
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@FORM
def test_one_dtype_throughout(ops, rng, form, dtype):
    check(ops, rng, of(form, dtype=dtype, append=True, T=2))


@pytest.mark.parametrize("dtype", (F16, BF16), ids=str)
@pytest.mark.parametrize("name", (
    "q_nope", "q_rope", "latent", "scales", "biases", "k_rope", "new_latent", "new_rope", "out",
))  # fmt: skip
def test_one_tensor_of_another_dtype(ops, rng, name, dtype):
    form = "latent" if name == "latent" else "codes"
    check(ops, rng, of(form, dtype={name: dtype}, append=True))


@pytest.mark.core
@FORM
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(ops, rng, form, layout):
    check(ops, rng, of(form, layout=layout))
    check(ops, rng, of(form, layout=layout, append=True, T=2, page_size=16, dtype=BF16))


@FORM
def test_a_cache_that_is_broadcast(ops, rng, form):
    """One prompt for all rows, with stride 0, may be read; it may not be written."""
    a, placed = make(rng, of(form, batch=1))
    # As Python demands them, whatever the call does: writable.
    cache = {
        name: np.lib.stride_tricks.as_strided(
            array, (3, *array.shape[1:]), (0, *array.strides[1:])
        )
        for name, array in arrays_of(placed).items()
    }
    a = {name: np.repeat(v, 3, 0) for name, v in a.items()}
    want = reference.mla_decode(**a, **cache)
    out, lse = ops.mla_decode(**a, **cache, return_lse=True)
    assert_decoded(out, lse, want)
    new = {"new_latent": draw_latents(rng, (3, 64)), "new_rope": normal(rng, (3, 16))}
    with pytest.raises(ValueError, match="share memory"):
        ops.mla_decode(**{**a, "seqlens": np.full(3, 9)}, **new, **cache)


@pytest.mark.parametrize("scale", (0.01, 0.3, -0.2, 2.0))
@FORM
def test_softmax_scale(ops, rng, form, scale):
    check(ops, rng, of(form, softmax_scale=scale, dtype={"q_nope": F32}))


@pytest.mark.core
@FORM
def test_scores_far_beyond_the_range_of_exp(ops, rng, form):
    """In scores of some thousands the error of a float32 dot product is what remains."""
    p = of(form, capacity=300, sharpness=300.0)
    a, placed = make(rng, p)
    cache = arrays_of(placed)
    want = reference.mla_decode(**a, **cache)
    assert np.abs(want.lse[np.isfinite(want.lse)]).max() > 300
    out, lse, _ = run(ops, a, cache)
    assert_close(out, want.out, dtype=F16)
    finite = np.isfinite(want.lse)
    assert np.allclose(lse[finite], want.lse[finite], rtol=1e-5)


@FORM
def test_scores_that_rise_and_fall_along_the_row(ops, rng, form):
    for sign in (1, -1):
        a, placed = make(rng, of(form, batch=1, capacity=600, seqlens=(600,), rope=1))
        cache = arrays_of(placed)
        cache["k_rope"][0, :, 0] = np.linspace(-400, 400, 600) * sign
        a["q_rope"][...] = 1
        want = reference.mla_decode(**a, **cache, softmax_scale=1.0)
        out, lse, _ = run(ops, a, cache, softmax_scale=1.0)
        assert_close(out, want.out, dtype=F16)
        assert np.allclose(lse, want.lse, rtol=1e-5)


@st.composite
def calls(draw):
    group = draw(st.sampled_from((0, 32, 64, 128)))
    latent = draw(st.integers(1, 300)) if group == 0 else group * draw(st.integers(1, 5))
    page_size = draw(st.sampled_from((None, 16, 32, 64)))
    capacity = draw(st.integers(1, 6)) * (page_size or 40)
    return Mla(
        batch=draw(st.integers(0, 4)),
        T=draw(st.sampled_from((None, 1, 2, 5))),
        nheads=draw(st.integers(0, 20)),
        latent=latent,
        rope=draw(st.sampled_from((0, 1, 8, 30, 64))),
        group=group,
        capacity=capacity,
        page_size=page_size,
        append=draw(st.booleans()),
        dtype=draw(st.sampled_from(FLOATS)),
        index_dtype=draw(st.sampled_from((I32, np.dtype(np.int64)))),
        layout=draw(st.sampled_from(LAYOUTS)),
    )


@given(p=calls(), seed=st.integers(0, 2**32 - 1))
def test_any_call(ops, p, seed):
    check(ops, np.random.default_rng(seed), p)


# The append


ADVERSARIAL = {
    "zeros": lambda rng, shape: np.zeros(shape, F32),
    "negative zeros": lambda rng, shape: -np.zeros(shape, F32),
    "constant": lambda rng, shape: np.full(shape, 0.7, F32),
    "constant, negative": lambda rng, shape: np.full(shape, -3.1, F32),
    "constant, tiny": lambda rng, shape: np.full(shape, 1e-20, F32),
    "negative": lambda rng, shape: -np.abs(normal(rng, shape)) - F32.type(0.5),
    "positive": lambda rng, shape: np.abs(normal(rng, shape)) + F32.type(0.5),
    "huge": lambda rng, shape: normal(rng, shape, scale=1e37),
    "large": lambda rng, shape: normal(rng, shape, scale=2e4),
    "tiny": lambda rng, shape: normal(rng, shape, scale=1e-6),
    "below the least scale": lambda rng, shape: normal(rng, shape, scale=1e-9),
    "subnormal": lambda rng, shape: normal(rng, shape, scale=1e-39),
    "one outlier": lambda rng, shape: np.where(
        np.arange(shape[-1]) % 32 == 5, F32.type(1e3), normal(rng, shape)
    ),
    "far from zero": lambda rng, shape: normal(rng, shape, scale=1e-3) + F32.type(1000),
    "ties": lambda rng, shape: (rng.integers(0, 31, shape) / 2).astype(F32),
    "ties, negative": lambda rng, shape: (rng.integers(-30, 1, shape) / 2).astype(F32),
    "normal": lambda rng, shape: normal(rng, shape),
}


def append(ops, rng, values, group, dtype=F32, T=None):
    """(codes, scales, biases) of values (batch, [T,] latent) after a call that appends them."""
    batch, latent = len(values), values.shape[-1]
    p = Mla(batch, T, 1, latent, 0, group, 40, (37,), dtype={"scales": dtype, "biases": dtype})
    a, placed = make(rng, p)
    cache = arrays_of(placed)
    ops.mla_decode(**a, **cache, new_latent=values)
    at = slice(37 - (T or 1), 37) if T else 36
    return [cache[name][:, at] for name in ("codes", "scales", "biases")]


@pytest.mark.core
@GROUPS
@pytest.mark.parametrize("kind", ADVERSARIAL)
def test_appended_values_have_the_bits_of_the_formula(ops, rng, kind, group):
    for dtype in FLOATS:
        for given_as in FLOATS:
            with np.errstate(over="ignore"):
                values = ADVERSARIAL[kind](rng, (5, 256)).astype(given_as)
                want = reference.quantize(values.astype(F32), group)
                want = [want[0], want[1].astype(dtype), want[2].astype(dtype)]
            if not np.isfinite(values.astype(F32)).all():
                continue
            got = append(ops, rng, values, group, dtype)
            for name, g, w in zip(("codes", "scales", "biases"), got, want):
                assert_same_bits(g, w, f"{name}, {dtype} from {given_as}")


@pytest.mark.core
@GROUPS
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_appended_values_have_the_bits_of_mlx(ops, rng, group, dtype):
    mx = pytest.importorskip("mlx.core", exc_type=ImportError)
    kinds = {name: draw(rng, (16, 512)) for name, draw in ADVERSARIAL.items()}
    for kind, values in kinds.items():
        with np.errstate(over="ignore"):
            values = values.astype(dtype)
        if not np.isfinite(values.astype(F32)).all():
            continue
        # Through float32, which holds all of them: MLX does not take ml_dtypes' arrays.
        array = mx.array(values.astype(F32)).astype(
            {F32: mx.float32, F16: mx.float16, BF16: mx.bfloat16}[dtype]
        )
        with mx.stream(mx.cpu):
            codes, scales, biases = mx.quantize(array, group_size=group, bits=4)
            want = [np.array(codes), *(np.array(s.astype(mx.float32)) for s in (scales, biases))]
        got = append(ops, rng, values, group, dtype)
        assert_same_bits(got[0], want[0], f"codes, {kind}")
        for name, g, w in zip(("scales", "biases"), got[1:], want[1:]):
            assert_same_bits(g, w.astype(dtype), f"{name}, {kind}")


@pytest.mark.core
@FORM
@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("T", (None, 1, 4, 20))
def test_append_and_attend_in_one_call_or_in_two(ops, rng, form, page_size, T):
    for dtype in (F32, {"scales": BF16, "biases": BF16, "latent": BF16, "k_rope": F16}):
        p = of(form, T=T, page_size=page_size, append=True, dtype=dtype, capacity=112)
        a, placed = make(rng, p)
        cache = arrays_of(placed)
        out, lse, after = run(ops, a, cache)
        plain = {k: v for k, v in a.items() if not k.startswith("new_")}
        assert_same_run(run(ops, plain, after), (out, lse, after))


@FORM
def test_tokens_appended_one_by_one_make_the_cache_of_one_call(ops, rng, form):
    p = of(form, batch=3, T=6, append=True, page_size=16, capacity=64, dtype={"scales": BF16})
    a, placed = make(rng, p)
    cache = arrays_of(placed)
    out, lse, after = run(ops, a, cache)
    steps = cache
    for t in range(6):
        one = {k: v[:, t] for k, v in a.items() if k[:2] in ("q_", "ne")}
        one.update(seqlens=a["seqlens"] - 5 + t, page_table=a["page_table"])
        got, _, steps = run(ops, one, steps)
        assert_close(got, out[:, t].astype(np.float64))
    for name in after:
        assert_same_bits(steps[name], after[name], name)


@FORM
def test_pages_that_rows_share_are_read_only(ops, rng, form):
    """A common prompt in common pages, the last page each row's own."""
    p = of(form, batch=3, append=True, page_size=16, capacity=64, seqlens=(45, 40, 48), T=2)
    a, placed = make(rng, p)
    a["page_table"][1:, :2] = a["page_table"][0, :2]
    cache = arrays_of(placed)
    want = reference.mla_decode(**a, **cache)
    out, lse, after = run(ops, a, cache)
    assert_decoded(out, lse, want)
    for name in after:
        assert_same_bits(after[name], want.cache[name], name)


def test_nothing_is_written_without_new_tokens(ops, rng):
    for form in FORMS:
        a, placed = make(rng, of(form, page_size=16))
        cache = arrays_of(placed)
        for name, array in run(ops, a, cache)[2].items():
            assert_same_bits(array, cache[name], name)


def test_append_without_queries(ops, rng):
    """No heads: nothing to answer, and the tokens are stored all the same."""
    for form in FORMS:
        check(ops, rng, of(form, nheads=0, append=True, T=3))


# NaN stays where it is


def nan_like(array):
    """NaN, or codes that look like nothing else."""
    return np.full_like(array, 0xDEADBEEF if array.dtype.kind == "u" else np.nan)


@pytest.mark.core
@FORM
@pytest.mark.parametrize("page_size", [None, 16])
def test_what_lies_past_the_end_is_not_read(ops, rng, form, page_size):
    for T in (None, 4):
        p = of(form, batch=4, T=T, capacity=96, page_size=page_size, seqlens=(0, 1, 50, 96))
        a, placed = make(rng, p)
        cache = arrays_of(placed)
        clean = run(ops, a, cache)
        dirty = {name: nan_like(array) for name, array in cache.items()}
        for row, seqlen in enumerate(p.seqlens):
            at = np.arange(seqlen)
            where = (row, at) if page_size is None else (a["page_table"][row][at // 16], at % 16)
            for name in cache:
                dirty[name][where] = cache[name][where]
        got = run(ops, a, dirty)
        assert_same_bits(got[0], clean[0])
        assert_same_bits(got[1], clean[1], "lse")


@pytest.mark.core
@FORM
def test_nan_in_a_row_stays_in_that_row(ops, rng, form):
    a, placed = make(rng, of(form, batch=4, append=True, capacity=600, seqlens=(600, 590, 500, 3)))
    cache = arrays_of(placed)
    clean = run(ops, a, cache)
    rest = [0, 2, 3]
    for name in (*(n for n in a if n != "seqlens"), *(n for n in cache if n != "codes")):
        source = a if name in a else cache
        dirty = source[name].copy()
        dirty[1] = np.nan
        changed = {name: dirty}
        got = run(ops, {**a, **changed}, cache) if name in a else run(ops, a, {**cache, **changed})
        assert np.isnan(got[0][1]).any(), f"{name}: NaN was lost"
        assert_same_bits(got[0][rest], clean[0][rest])
        assert_same_bits(got[1][rest], clean[1][rest], "lse")
        for cached in cache:
            assert_same_bits(got[2][cached][rest], clean[2][cached][rest], cached)


@pytest.mark.core
@FORM
def test_nan_in_a_token_reaches_only_the_queries_that_see_it(ops, rng, form):
    p = of(form, batch=1, T=5, append=True, seqlens=(70,), nheads=3)
    a, placed = make(rng, p)
    cache = arrays_of(placed)
    clean = run(ops, a, cache)
    for name in ("new_latent", "new_rope"):
        dirty = a[name].copy()
        dirty[0, 3] = np.nan
        out, lse, _ = run(ops, a, cache, **{name: dirty})
        assert_same_bits(out[:, :3], clean[0][:, :3])
        assert_same_bits(lse[:, :3], clean[1][:, :3], "lse")
        assert np.isnan(out[:, 3:]).all() and np.isnan(lse[:, 3:]).all()


def test_nan_in_a_head_stays_in_that_head(ops, rng):
    a, placed = make(rng, Mla(nheads=6))
    cache = arrays_of(placed)
    clean = run(ops, a, cache)
    a["q_nope"][:, 2] = np.nan
    got = run(ops, a, cache)
    rest = [0, 1, 3, 4, 5]
    assert_same_bits(got[0][:, rest], clean[0][:, rest])
    assert np.isnan(got[1][:, 2][a["seqlens"] > 0]).all()


def test_nan_among_new_values_does_not_hide(ops, rng):
    values = normal(rng, (4, 64))
    values[1, 3] = np.nan
    _, scales, biases = append(ops, rng, values, 32)
    assert np.isnan(scales[1, 0]) and np.isnan(biases[1, 0])
    assert np.isfinite(np.delete(scales, 1, 0)).all() and np.isfinite(scales[1, 1])


# Bits


@pytest.mark.core
@FORM
@pytest.mark.parametrize("invariant", [False, True])
def test_bits_do_not_depend_on_the_number_of_threads(ops, rng, threads, form, invariant):
    for p in (
        of(form, batch=1, nheads=16, capacity=3000, seqlens=(3000,), append=True),
        of(form, batch=5, nheads=40, capacity=700, T=3, append=True),
    ):
        a, placed = make(rng, p)
        cache = arrays_of(placed)
        threads(1)
        want = run(ops, a, cache, batch_invariant=invariant)
        for n in (2, 3, 7):
            threads(n)
            assert_same_run(run(ops, a, cache, batch_invariant=invariant), want)
        assert_same_run(run(ops, a, cache, batch_invariant=invariant), want)


@pytest.mark.core
@FORM
def test_a_row_has_the_bits_that_it_has_alone_if_asked(ops, rng, form):
    lengths = (9000, 700, 20, 0, 8193)
    p = of(form, batch=5, nheads=3, latent=32, rope=8, capacity=9000, seqlens=lengths)
    a, placed = make(rng, p)
    cache = arrays_of(placed)
    out, lse, _ = run(ops, a, cache, batch_invariant=True)
    for row in range(5):
        one = {k: v[row : row + 1] for k, v in a.items()}
        got = run(ops, one, {k: v[row : row + 1] for k, v in cache.items()}, batch_invariant=True)
        assert_same_bits(got[0][0], out[row])
        assert_same_bits(got[1][0], lse[row], "lse")


@FORM
def test_pages_give_the_bits_of_a_dense_cache(ops, rng, form):
    for page_size in (16, 64, 128):
        p = of(form, page_size=page_size, capacity=640, T=2, append=True)
        a, placed = make(rng, p)
        cache = arrays_of(placed)
        out, lse, _ = run(ops, a, cache)
        table = np.clip(a["page_table"], 0, len(next(iter(cache.values()))) - 1)
        dense = {
            name: np.ascontiguousarray(array[table]).reshape(3, 640, -1)
            for name, array in cache.items()
        }
        got = run(ops, {k: v for k, v in a.items() if k != "page_table"}, dense)
        assert_same_bits(got[0], out)
        assert_same_bits(got[1], lse, "lse")


@FORM
def test_strides_give_the_bits_of_packed_tensors(ops, rng, form):
    p = of(form, batch=2, capacity=300, T=2, append=True, latent=128)
    a, placed = make(rng, p)
    cache = arrays_of(placed)
    want = run(ops, a, cache)
    for layout in LAYOUTS:
        moved = {name: place(rng, array, layout).array for name, array in a.items()}
        laid = {name: place(rng, array, layout).array for name, array in cache.items()}
        out, lse = ops.mla_decode(**moved, **laid, return_lse=True)
        assert_same_run((out, lse, laid), want)


# From Python


def test_results_are_allocated(ops, rng):
    a, placed = make(rng, Mla(dtype=BF16, T=2))
    cache = arrays_of(placed)
    out = ops.mla_decode(**a, **cache)
    assert out.dtype == BF16 and out.shape == a["q_nope"].shape
    got, lse = ops.mla_decode(**a, **cache, return_lse=True)
    assert_same_bits(got, out)
    assert lse.dtype == F32 and lse.shape == a["q_nope"].shape[:-1]


@FORM
def test_torch(ops, rng, form):
    torch = pytest.importorskip("torch")
    a, placed = make(rng, of(form, append=True, page_size=16, T=2))
    cache = arrays_of(placed)
    want = run(ops, a, cache)
    tensors = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in {**a, **cache}.items()}
    out, lse = ops.mla_decode(**tensors, return_lse=True)
    assert isinstance(out, torch.Tensor)
    after = {name: tensors[name].numpy() for name in cache}
    assert_same_run((out.numpy(), lse.numpy(), after), want)


@FORM
def test_jax_gets_the_caches_that_follow(ops, rng, form):
    jax = pytest.importorskip("jax")
    a, placed = make(rng, of(form, append=True, T=2, index_dtype=I32))
    cache = arrays_of(placed)
    out, lse, after = run(ops, a, cache)
    arrays = {k: jax.numpy.asarray(np.ascontiguousarray(v)) for k, v in {**a, **cache}.items()}
    got = ops.mla_decode(**arrays, return_lse=True)
    assert all(isinstance(array, jax.Array) for array in got)
    assert_same_bits(np.asarray(got[0]), out)
    assert_same_bits(np.asarray(got[1]), lse, "lse")
    assert len(got) == 2 + len(cache)
    for name, array in zip(cache, got[2:]):
        assert_same_bits(np.asarray(array), after[name], name)


@FORM
def test_caches_that_are_only_read_may_be_read_only(ops, rng, form):
    """Without new tokens: NumPy's may be locked, JAX's are neither copied nor returned."""
    a, placed = make(rng, of(form, T=2, index_dtype=I32))
    cache = arrays_of(placed)
    want = ops.mla_decode(**a, **cache)
    for array in cache.values():
        array.flags.writeable = False
    assert_same_bits(ops.mla_decode(**a, **cache), want)
    new = dict(new_latent=normal(rng, (*a["q_nope"].shape[:2], a["q_nope"].shape[-1])))
    if "q_rope" in a:
        new["new_rope"] = normal(rng, (*a["q_nope"].shape[:2], a["q_rope"].shape[-1]))
    with pytest.raises(BufferError, match="read-only"):
        ops.mla_decode(**a, **cache, **new)
    jax = pytest.importorskip("jax")
    arrays = {k: jax.numpy.asarray(np.ascontiguousarray(v)) for k, v in {**a, **cache}.items()}
    got = ops.mla_decode(**arrays)
    assert isinstance(got, jax.Array)
    assert_same_bits(np.asarray(got), want)


def test_a_cache_filled_from_nothing_token_by_token(ops, rng):
    nheads, latent, rope, steps = 4, 64, 16, 40
    cache = dict(
        codes=np.zeros((1, 64, latent // 8), np.uint32), scales=np.zeros((1, 64, 2), F16),
        biases=np.zeros((1, 64, 2), F16), k_rope=np.zeros((1, 64, rope), F16),
    )
    seen = draw_latents(rng, (steps, latent))
    for step in range(steps):
        q, qr = normal(rng, (1, nheads, latent)), normal(rng, (1, nheads, rope))
        a = dict(
            q_nope=q, q_rope=qr, seqlens=np.array([step + 1]), new_latent=seen[None, step],
            new_rope=normal(rng, (1, rope), F16),
        )
        out = ops.mla_decode(**a, **cache)
    codes, scales, biases = reference.quantize(seen, 32)
    assert_same_bits(cache["codes"][0, :steps], codes, "codes")
    assert_same_bits(cache["scales"][0, :steps], scales.astype(F16), "scales")
    plain = {k: v for k, v in a.items() if not k.startswith("new")}
    assert_close(out, reference.mla_decode(**plain, **cache).out)
    assert not raw(cache["codes"][0, steps:]).any()
