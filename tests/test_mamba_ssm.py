# SPDX-License-Identifier: MIT
"""ssmk.mamba_ssm: the names, arguments and results of mamba-ssm and causal-conv1d, against the
float64 references and, where transformers has the same function in torch, against that."""

import importlib
import inspect

import numpy as np
import pytest

torch = pytest.importorskip("torch")

import reference
from cases import assert_close, assert_same_bits
from ssmk import mamba_ssm as m

F32, BF16 = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def make(request):
    """Random tensors that depend on nothing but the name of the test."""
    generator = torch.Generator().manual_seed(sum(request.node.name.encode()))

    def normal(*shape, dtype=F32, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype)
    return normal


def array(tensor):
    if tensor is None or not isinstance(tensor, torch.Tensor):
        return tensor
    if tensor.dtype == BF16:
        return tensor.float().numpy()
    return tensor.detach().numpy()


def arrays(*tensors):
    return [array(t) for t in tensors]


def close(got, want, what="out", dtype=None):
    import ml_dtypes

    rounded = np.dtype(ml_dtypes.bfloat16) if got.dtype == BF16 else dtype
    assert_close(array(got), want, what, rounded)


# ---------------------------------------------------------------- signatures

# Positional order and defaults are the interface: code calls these by position.
SIGNATURES = {
    "selective_scan_fn": "(u, delta, A, B, C, D=None, z=None, delta_bias=None, "
        "delta_softplus=False, return_last_state=False)",
    "mamba_inner_fn": "(xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, "
        "out_proj_weight, out_proj_bias, A, B=None, C=None, D=None, delta_bias=None, "
        "B_proj_bias=None, C_proj_bias=None, delta_softplus=True, checkpoint_lvl=1, "
        "b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, b_c_dt_rms_eps=1e-06)",
    "selective_state_update": "(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, "
        "dt_softplus=False, state_batch_indices=None)",
    "mamba_chunk_scan_combined": "(x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, "
        "initial_states=None, seq_idx=None, cu_seqlens=None, dt_softplus=False, "
        "dt_limit=(0.0, inf), return_final_states=False, return_varlen_states=False, "
        "state_dtype=None)",
    "mamba_split_conv1d_scan_combined": "(zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, "
        "chunk_size, initial_states=None, seq_idx=None, dt_limit=(0.0, inf), "
        "return_final_states=False, activation='silu', rmsnorm_weight=None, rmsnorm_eps=1e-06, "
        "outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, norm_before_gate=True, "
        "state_dtype=None)",
    "causal_conv1d_fn": "(x, weight, bias=None, seq_idx=None, initial_states=None, "
        "return_final_states=False, final_states_out=None, activation=None)",
    "causal_conv1d_update": "(x, conv_state, weight, bias=None, activation=None, "
        "cache_seqlens=None, conv_state_indices=None)",
    "causal_conv1d_varlen_states": "(x, cu_seqlens, state_len)",
    "mamba3_siso_combined": "(Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D=None, Z=None, "
        "Input_States=None, chunk_size=64, return_final_states=False, cu_seqlens=None)",
    "mamba3_siso_step": "(Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D=None, Z=None, "
        "Input_States=None)",
    "mamba3_mimo": "(Q, K, V, ADT, DT, Trap, Q_bias, K_bias, MIMO_V, MIMO_Z, MIMO_Out, Angles, D, "
        "Z, chunk_size, rotary_dim_divisor, dtype, return_state=False, cu_seqlens=None, "
        "fuse_pregate_headwise_rms_norm=False, outproj_norm_weight=None, outproj_norm_eps=1e-05)",
    "mamba3_step_fn": "(state, Bstate, Xstate, A, B, C, D, x, dt, trap, xproj, outproj=None, "
        "state_out=None, out=None, z=None, zproj=None, tile_D=64, num_warps=2)",
    "apply_rotary_qk_inference_fwd": "(q, k, angle_state, angle_proj, dt, bias_q=None, "
        "bias_k=None, inplace=False, conjugate=False, rotate_pairwise=True)",
}  # fmt: skip


@pytest.mark.parametrize("name", m.__all__)
def test_signature(name):
    assert str(inspect.signature(getattr(m, name))) == SIGNATURES[name]


def transformers_function(model, name):
    transformers = pytest.importorskip("transformers", minversion="5.15")
    transformers.logging.set_verbosity_error()
    module = importlib.import_module(f"transformers.models.{model}.modeling_{model}")
    return inspect.unwrap(getattr(module, name))


# ---------------------------------------------------------------- Mamba-1


def scan_case(make, batch=2, dim=12, seqlen=19, dstate=5, groups=2, dtype=F32):
    return dict(
        u=make(batch, seqlen, dim, dtype=dtype).transpose(1, 2),
        delta=make(batch, dim, seqlen, dtype=dtype, scale=0.5),
        A=-make(dim, dstate).abs(), B=make(batch, groups, dstate, seqlen, dtype=dtype),
        C=make(batch, groups, dstate, seqlen, dtype=dtype), D=make(dim),
        z=make(batch, dim, seqlen, dtype=dtype), delta_bias=make(dim))  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_selective_scan_fn(make, dtype):
    case = scan_case(make, dtype=dtype)
    out, last = m.selective_scan_fn(*case.values(), True, True)
    want, states = reference.selective_scan(*arrays(*case.values()), dt_softplus=True)
    assert out.dtype == dtype and last.dtype == F32
    close(out, want)
    close(last, states, "last state")
    alone = m.selective_scan_fn(**case, delta_softplus=True)
    assert torch.equal(alone, out) and alone.stride() == case["u"].stride()


def test_selective_scan_fn_equals_that_of_transformers(make):
    theirs = transformers_function("mamba", "mamba_selective_scan")
    case = scan_case(make, groups=1)
    case["B"], case["C"] = case["B"][:, 0], case["C"][:, 0]
    got = m.selective_scan_fn(**case, delta_softplus=True, return_last_state=True)
    want = theirs(*case.values(), delta_softplus=True, return_last_state=True)
    for g, w in zip(got, want, strict=True):
        close(g, array(w.double()))


@pytest.mark.parametrize("is_complex", [False, True])
@pytest.mark.parametrize("constant", ["", "B", "C", "BC"])
def test_mamba_inner_fn(make, is_complex, constant):
    batch, dim, seqlen, dstate, rank, model = 2, 12, 17, 4, 3, 10
    columns = dstate * (2 if is_complex else 1)
    number = (lambda *s: torch.complex(make(*s), make(*s))) if is_complex else make
    A = -make(dim, dstate).abs()
    if is_complex:
        A = torch.complex(A, make(dim, dstate))
    B = number(dim, dstate) if "B" in constant else None
    C = number(dim, dstate) if "C" in constant else None
    rows = rank + columns * ((B is None) + (C is None))
    xz, conv, conv_bias = make(batch, 2 * dim, seqlen), make(dim, 1, 4), make(dim)
    x_proj, dt_proj, out_proj = make(rows, dim), make(dim, rank), make(model, dim)
    out_bias, D, dt_bias = make(model), make(dim), make(dim)
    B_bias = make(columns) if B is None else None
    norms = {} if is_complex else dict(
        b_rms_weight=make(dstate) if B is None else None,
        c_rms_weight=make(dstate) if C is None else None, dt_rms_weight=make(dim))
    got = m.mamba_inner_fn(
        xz, conv, conv_bias, x_proj, dt_proj, out_proj, out_bias, A, B, C, D, dt_bias, B_bias,
        **norms)

    def rms(t, weight):  # over axis 1
        if weight is None:
            return t
        return t / np.sqrt((t * t).mean(1, keepdims=True) + 1e-6) * array(weight)[:, None]

    def number_of(t):
        return t[:, 0::2] + 1j * t[:, 1::2] if is_complex else t

    x, z = np.split(array(xz).astype(np.float64), 2, 1)
    x = reference.causal_conv1d(x, array(conv)[:, 0], array(conv_bias), activation="silu")[0]
    projected = np.einsum("rd,bdl->brl", array(x_proj), x)
    delta = rms(np.einsum("dr,brl->bdl", array(dt_proj), projected[:, :rank]),
                norms.get("dt_rms_weight"))
    rest = projected[:, rank:]
    if B is None:
        part, rest = rest[:, :columns] + array(B_bias)[:, None], rest[:, columns:]
        Bv = number_of(rms(part, norms.get("b_rms_weight")))
    else:
        Bv = array(B)
    Cv = number_of(rms(rest, norms.get("c_rms_weight"))) if C is None else array(C)
    y, _ = reference.selective_scan(
        x, delta, array(A), Bv, Cv, array(D), z, array(dt_bias), dt_softplus=True)
    close(got, np.einsum("md,bdl->blm", array(out_proj), y) + array(out_bias),
          dtype=np.dtype(np.float32))


def test_mamba_inner_fn_refuses_norms_of_constants(make):
    args = [make(1, 8, 5), make(4, 1, 4), None, make(3, 4), make(4, 1), make(4, 4), None,
            -make(4, 2).abs()]
    with pytest.raises(NotImplementedError, match="b_rms_weight"):
        m.mamba_inner_fn(*args, make(4, 2), None, b_rms_weight=make(2))
    with pytest.raises(ValueError, match="x_proj_weight: must have 5 rows, got 3"):
        m.mamba_inner_fn(*args)


@pytest.mark.parametrize("heads, tied", [(False, False), (True, False), (True, True)])
def test_selective_state_update(make, heads, tied):
    batch, entries, nheads, headdim, dstate, groups = 4, 6, 6, 8, 16, 3
    shape = (nheads, headdim) if heads else (24,)

    def per_row(*front):
        if tied:
            return make(*front, nheads)[..., None].expand(*front, *shape)
        return make(*front, *shape)

    state = make(entries, *shape, dstate)
    x, z, dt = make(batch, *shape), make(batch, *shape), per_row(batch)
    A = -per_row().abs()[..., None].expand(*shape, dstate) if tied else -make(*shape, dstate).abs()
    B, C = make(batch, groups, dstate), make(batch, groups, dstate)
    D, dt_bias = per_row(), per_row()
    slots = torch.tensor([3, -1, 0, 5], dtype=torch.int32)
    before = array(state).copy()
    got = m.selective_state_update(state, x, dt, A, B, C, D, z, dt_bias, True, slots)
    want = reference.state_update(
        before, *arrays(x, dt, A, B, C, D, z, dt_bias), dt_softplus=True,
        state_indices=array(slots))
    close(got, want.out)
    close(state, want.states["state"], "state")
    assert not got[1].any()
    assert_same_bits(array(state)[[1, 2, 4]], before[[1, 2, 4]])


def test_selective_state_update_needs_neither_D_nor_bias(make):
    state, x = make(2, 8, 4), make(2, 8)
    args = make(2, 8), -make(8, 4).abs(), make(2, 4), make(2, 4)
    want = reference.state_update(array(state), *arrays(x, *args))
    close(m.selective_state_update(state, x, *args), want.out)
    close(state, want.states["state"])


# ---------------------------------------------------------------- Mamba-2


def ssd_case(make, batch=2, seqlen=37, nheads=6, headdim=8, groups=3, dstate=16, dtype=F32):
    return dict(
        x=make(batch, seqlen, nheads, headdim, dtype=dtype), dt=make(batch, seqlen, nheads),
        A=-make(nheads).abs(), B=make(batch, seqlen, groups, dstate, dtype=dtype),
        C=make(batch, seqlen, groups, dstate, dtype=dtype), chunk_size=16,
        D=make(nheads, headdim), z=make(batch, seqlen, nheads, headdim, dtype=dtype),
        dt_bias=make(nheads), initial_states=make(batch, nheads, headdim, dstate))  # fmt: skip


def ssd_reference(case, **more):
    kept = {k: array(v) for k, v in case.items() if k != "chunk_size"}
    return reference.ssd_chunk(**kept, **more)


@pytest.mark.parametrize("dtype", [F32, BF16])
def test_mamba_chunk_scan_combined(make, dtype):
    case = ssd_case(make, dtype=dtype)
    out, final = m.mamba_chunk_scan_combined(
        *case.values(), dt_softplus=True, dt_limit=(0.1, 0.9), return_final_states=True)
    want, states, _ = ssd_reference(case, dt_softplus=True, dt_limit=(0.1, 0.9))
    assert out.dtype == dtype and final.dtype == F32
    close(out, want)
    close(final, states.h, "final states")


def test_negative_steps_are_clamped_by_default_as_there(make):
    case = ssd_case(make)
    out = m.mamba_chunk_scan_combined(**case)
    want, *_ = ssd_reference(case, dt_limit=(0.0, np.inf))
    close(out, want)
    unclamped, *_ = ssd_reference(case)
    assert np.abs(unclamped - want).max() > 0.1 * np.abs(want).max(), "the case tells nothing"
    with pytest.raises(NotImplementedError, match="dt_limit"):
        m.mamba_chunk_scan_combined(**case, dt_limit=(0, 0))


def test_mamba_chunk_scan_combined_equals_that_of_transformers(make):
    theirs = transformers_function("mamba2", "mamba2_chunk_scan")
    case = ssd_case(make)
    case["D"] = case["D"][:, 0]
    del case["z"]
    more = dict(dt_softplus=True, dt_limit=(0.05, 2.0), return_final_states=True)
    got = m.mamba_chunk_scan_combined(**case, **more)
    case["hidden_states"] = case.pop("x")
    for g, w in zip(got, theirs(**case, **more), strict=True):
        close(g, array(w.double()))


def test_varlen_states(make):
    """States at the ends of packed sequences, an empty one among them, and the final ones."""
    case = ssd_case(make, batch=1)
    cuts = torch.tensor([0, 7, 7, 36, 37])
    case["seq_idx"] = torch.repeat_interleave(torch.arange(4), cuts.diff())[None].int()
    out, final, ends = m.mamba_chunk_scan_combined(
        **case, cu_seqlens=cuts, dt_softplus=True, return_final_states=True,
        return_varlen_states=True, state_dtype=F32)
    want, states, captured = ssd_reference(
        case, dt_softplus=True, dt_limit=(0, np.inf), capture_positions=np.array([6, 35, 36]))
    close(out, want)
    close(final, states.h)
    close(ends[[0, 2, 3]], captured.h)
    assert not ends[1].any() and ends.dtype == F32
    out, ends = m.mamba_chunk_scan_combined(
        **case, cu_seqlens=cuts, dt_softplus=True, return_varlen_states=True)
    assert ends.dtype == case["C"].dtype and ends.shape == (4, 6, 8, 16)


def test_what_cannot_keep_sequences_apart_is_refused(make):
    case, cuts = ssd_case(make, batch=1), torch.tensor([0, 7, 37])
    with pytest.raises(NotImplementedError, match="cu_seqlens.*seq_idx"):
        m.mamba_chunk_scan_combined(**case, cu_seqlens=cuts)
    with pytest.raises(NotImplementedError, match="needs seq_idx"):
        m.mamba_chunk_scan_combined(**case, cu_seqlens=cuts, return_varlen_states=True)
    with pytest.raises(ValueError, match="cu_seqlens: is needed"):
        m.mamba_chunk_scan_combined(**case, return_varlen_states=True)


@pytest.mark.parametrize("nonssm", [0, 5])
@pytest.mark.parametrize("norm", ["none", "before", "after"])
def test_mamba_split_conv1d_scan_combined(make, nonssm, norm):
    batch, seqlen, nheads, headdim, groups, dstate, model = 2, 21, 4, 6, 2, 8, 10
    dim, channels = nheads * headdim, nheads * headdim + 2 * groups * dstate
    zxbcdt = make(batch, seqlen, 2 * nonssm + dim + channels + nheads)
    weight, bias, dt_bias = make(channels, 4), make(channels), make(nheads)
    A, D, seq_idx = -make(nheads).abs(), make(nheads), torch.arange(seqlen).div(
        8, rounding_mode="floor").expand(batch, -1).int()
    norm_weight = None if norm == "none" else make(dim)
    out_weight, out_bias = make(model, nonssm + dim), make(model)
    initial = make(batch, nheads, headdim, dstate)
    got, final = m.mamba_split_conv1d_scan_combined(
        zxbcdt, weight, bias, dt_bias, A, D, 16, initial, seq_idx, (0.01, 1.5), True, "swish",
        norm_weight, 1e-5, out_weight, out_bias, headdim, groups, norm == "before")

    x0, z0, z, xBC, dt = np.split(array(zxbcdt).astype(np.float64), np.cumsum(
        [nonssm, nonssm, dim, channels]), axis=-1)
    ids = array(seq_idx)
    xBC, _ = reference.causal_conv1d(
        xBC, *arrays(weight, bias), activation="silu", channels_last=True, seq_idx=ids)
    x, B, C = np.split(xBC, [dim, dim + groups * dstate], axis=-1)
    shape = batch, seqlen, -1
    gate = reference.silu(z)
    y, states, _ = reference.ssd_chunk(
        x.reshape(*shape, headdim), dt, array(A), B.reshape(*shape, dstate),
        C.reshape(*shape, dstate), array(D), dt_bias=array(dt_bias), dt_softplus=True,
        dt_limit=(0.01, 1.5), initial_states=array(initial), seq_idx=ids)
    y = y.reshape(shape)
    y = y if norm == "before" else y * gate
    if norm != "none":
        parts = y.reshape(batch, seqlen, groups, -1)
        parts = parts / np.sqrt((parts**2).mean(-1, keepdims=True) + 1e-5)
        y = parts.reshape(shape) * array(norm_weight)
    y = y * gate if norm == "before" else y
    y = np.concatenate([reference.silu(x0) * z0, y], -1)
    close(got, y @ array(out_weight).T.astype(np.float64) + array(out_bias))
    close(final, states.h)


def test_split_conv1d_says_what_does_not_fit(make):
    args = make(1, 5, 63), make(56, 4), None, make(4), -make(4).abs(), make(4), 16
    with pytest.raises(ValueError, match="headdim: is needed"):
        m.mamba_split_conv1d_scan_combined(*args)
    with pytest.raises(ValueError, match="zxbcdt: its last axis of 63 does not split"):
        m.mamba_split_conv1d_scan_combined(*args, headdim=6, ngroups=2)
    with pytest.raises(ValueError, match="conv1d_weight: 56 channels"):
        m.mamba_split_conv1d_scan_combined(*args, headdim=15, ngroups=2)


# ---------------------------------------------------------------- convolution


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("activation", [None, "silu", "swish"])
def test_causal_conv1d_fn(make, last, activation):
    x = make(2, 9, 16).transpose(1, 2) if last else make(2, 16, 9)
    weight, bias, initial = make(16, 4), make(16), make(2, 16, 3)
    silu = activation and "silu"
    out, final = m.causal_conv1d_fn(x, weight, bias, None, initial, True, None, activation)
    want, states = reference.causal_conv1d(
        *arrays(x, weight, bias), activation=silu, initial_states=array(initial),
        final_states=np.zeros((2, 16, 3)))
    close(out, want)
    close(final, states)
    room = torch.full((2, 16, 3), torch.nan)
    again = m.causal_conv1d_fn(
        x, weight, bias, None, initial, True, room, activation=activation)
    assert again[1] is room and torch.equal(room, final) and torch.equal(again[0], out)
    ids = torch.tensor([[0] * 4 + [-1] * 2 + [1] * 3, [0] * 9]).int()
    want, _ = reference.causal_conv1d(
        *arrays(x, weight, bias), activation=silu, seq_idx=array(ids))
    close(m.causal_conv1d_fn(x, weight, bias, ids, activation=activation), want)


def test_causal_conv1d_fn_refuses(make):
    x, weight, ids = make(1, 8, 5), make(8, 4), torch.zeros(1, 5, dtype=torch.int32)
    with pytest.raises(ValueError, match="seq_idx: excludes"):
        m.causal_conv1d_fn(x, weight, seq_idx=ids, return_final_states=True)
    with pytest.raises(NotImplementedError, match="activation.*'gelu'"):
        m.causal_conv1d_fn(x, weight, activation="gelu")
    with pytest.raises(ValueError, match="final_states_out: without"):
        m.causal_conv1d_fn(x, weight, final_states_out=make(1, 8, 3))


@pytest.mark.parametrize("ring", [False, True])
@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_causal_conv1d_update(make, ring, tokens):
    x = make(3, 8) if tokens == 0 else make(3, 8, tokens)
    state, weight, bias = make(5, 8, 6), make(8, 4), make(8)
    lengths = torch.tensor([2, 7, 0], dtype=torch.int32) if ring else None
    slots = torch.tensor([4, -1, 1], dtype=torch.int32)
    want, pool = reference.causal_conv1d_update(
        *arrays(x, state, weight, bias), activation="silu", cache_seqlens=array(lengths),
        state_indices=array(slots))
    got = m.causal_conv1d_update(x, state, weight, bias, "silu", lengths, slots)
    close(got, want)
    close(state, pool)
    assert not got[1].any()


def test_causal_conv1d_varlen_states(make):
    x, cuts = make(11, 6), torch.tensor([0, 2, 2, 10, 11], dtype=torch.int32)
    got = m.causal_conv1d_varlen_states(x, cuts, 4)
    _, want = reference.causal_conv1d(
        array(x).T[None], np.ones((6, 5)), cu_seqlens=array(cuts), final_states=np.zeros((4, 6, 4)))
    close(got, want)
    assert m.causal_conv1d_varlen_states(x[:0], torch.zeros(3, dtype=torch.int32), 4).shape == (
        2, 6, 4)


# ---------------------------------------------------------------- Mamba-3


def mamba3_case(make, rank, batch=2, seqlen=23, nheads=4, headdim=8, groups=2, dstate=16,
                nangles=4):
    heads = (rank,) if rank else ()
    return dict(
        Q=make(batch, seqlen, *heads, groups, dstate),
        K=make(batch, seqlen, *heads, groups, dstate),
        V=make(batch, seqlen, nheads, headdim), ADT=-make(batch, nheads, seqlen).abs(),
        DT=make(batch, nheads, seqlen).abs(), Trap=make(batch, nheads, seqlen),
        Q_bias=make(nheads, *heads, dstate), K_bias=make(nheads, *heads, dstate),
        Angles=make(batch, seqlen, nheads, nangles), D=make(nheads),
        Z=make(batch, seqlen, nheads, headdim))  # fmt: skip


def initial3(make, nseq, rank, nheads=4, headdim=8, dstate=16, nangles=4):
    k = (rank,) if rank else ()
    return (make(nseq, nheads, nangles).abs(), make(nseq, nheads, headdim, dstate),
            make(nseq, *k, nheads, dstate), make(nseq, nheads, headdim))  # fmt: skip


def reference3(case, states=None, **more):
    a = {k: array(v) for k, v in case.items()}
    initial = {}
    if states is not None:
        angle, h, k, v = arrays(*states)
        initial = dict(
            initial_angle_states=angle, initial_states=h, initial_v_states=v,
            initial_k_states=k[:, None] if k.ndim == 3 else k)
    return reference.ssd_chunk(
        a["V"], a["DT"].swapaxes(1, 2), None, a["K"], a["Q"], a["D"], a["Z"],
        adt=a["ADT"].swapaxes(1, 2), trap=a["Trap"].swapaxes(1, 2), angles=a["Angles"],
        B_bias=a["K_bias"], C_bias=a["Q_bias"], **initial, **more)


def around(got, want):
    """Angles, across the border of 2 pi."""
    assert np.abs(np.exp(1j * array(got).astype(np.float64)) - np.exp(1j * want)).max() < 1e-4


@pytest.mark.parametrize("packed", [False, True])
def test_mamba3_siso_combined(make, packed):
    case = mamba3_case(make, 0, batch=1 if packed else 2)
    cuts = torch.tensor([0, 5, 5, 23], dtype=torch.int32) if packed else None
    states = initial3(make, 3 if packed else 2, 0)
    out, angle, h, k, v = m.mamba3_siso_combined(
        *case.values(), states, 16, return_final_states=True, cu_seqlens=cuts)
    want, final, _ = reference3(case, states, cu_seqlens=array(cuts))
    close(out, want)
    around(angle, final.angle)
    close(h, final.h, "ssm")
    close(k, final.k[:, 0], "k")
    close(v, final.v, "v")
    assert angle.dtype == h.dtype == k.dtype == F32
    assert torch.equal(m.mamba3_siso_combined(*case.values(), states, 16, cu_seqlens=cuts), out)
    with pytest.raises(ValueError, match="all four or none"):
        m.mamba3_siso_combined(*case.values(), (None, *states[1:]))


def test_mamba3_siso_step_continues_prefill(make):
    case, states = mamba3_case(make, 0), initial3(make, 2, 0)
    want, *want_states = m.mamba3_siso_combined(
        *case.values(), states, return_final_states=True)
    for t in range(23):
        token = {
            k: v if k.endswith("bias") or k == "D" else
            v[..., t] if k in ("ADT", "DT", "Trap") else v[:, t] for k, v in case.items()}
        before = [s.clone() for s in states]
        out, after = m.mamba3_siso_step(*token.values(), states)
        for s, b in zip(states, before):
            assert torch.equal(s, b), "input states must stay"
        states = after
        close(out, array(want[:, t].double()))
    around(states[0], array(want_states[0].double()))
    for got, final in zip(states[1:], want_states[1:]):
        close(got, array(final.double()))
    with pytest.raises(ValueError, match="Input_States"):
        m.mamba3_siso_step(*token.values())


def mimo(make, rank=3, nheads=4, headdim=8):
    return make(nheads, rank, headdim), make(nheads, rank, headdim), make(nheads, rank, headdim)


@pytest.mark.parametrize("how", ["plain", "norm", "no out", "no gate", "packed"])
def test_mamba3_mimo(make, how):
    case = mamba3_case(make, 3, batch=1 if how == "packed" else 2)
    V, Z, Out = mimo(make)
    Out = None if how in ("no out", "no gate") else Out
    if how == "no gate":
        case["Z"] = None
    cuts = torch.tensor([0, 5, 23]) if how == "packed" else None
    weight = make(32)
    norm = dict(fuse_pregate_headwise_rms_norm=True, outproj_norm_weight=weight) if (
        how == "norm") else {}
    args = list(case.values())
    out, angle, h, k, v = m.mamba3_mimo(
        *args[:8], V, Z, Out, case["Angles"], case["D"], case["Z"], 8, 4, F32, True, cuts, **norm)
    want, final, _ = reference3(
        case, rotary="half", mimo_x=array(V), mimo_z=None if case["Z"] is None else array(Z),
        mimo_out=array(Out), cu_seqlens=array(cuts),
        **(dict(norm_weight=array(weight).reshape(4, 8), norm_eps=1e-5) if norm else {}))
    close(out, want)
    around(angle, final.angle)
    close(h, final.h)
    close(k, final.k)
    close(v, final.v)
    low = m.mamba3_mimo(
        *args[:8], V, Z, Out, case["Angles"], case["D"], case["Z"], 8, 4, BF16, cu_seqlens=cuts,
        **norm)
    assert low.dtype == BF16
    close(low, want)


def test_mamba3_mimo_refuses(make):
    case, (V, Z, Out) = mamba3_case(make, 3), mimo(make)
    args = [*case.values()][:8] + [V, Z, Out, case["Angles"], case["D"], case["Z"], 8]
    with pytest.raises(ValueError, match="Angles: must have 16 / 2 values"):
        m.mamba3_mimo(*args, 2, F32)
    with pytest.raises(ValueError, match="outproj_norm_weight: without"):
        m.mamba3_mimo(*args, 4, F32, outproj_norm_weight=make(32))
    with pytest.raises(ValueError, match="fuse_pregate_headwise_rms_norm: needs"):
        m.mamba3_mimo(*args, 4, F32, fuse_pregate_headwise_rms_norm=True)


@pytest.mark.parametrize("projected", [True, False])
@pytest.mark.parametrize("in_place", [True, False])
def test_rotary_and_step_continue_mamba3_mimo(make, projected, in_place):
    """Decode as the module does it: rotation, step, then its own copies of angle, k and v."""
    case, (V, Z, Out) = mamba3_case(make, 3, groups=1), mimo(make)
    Out = Out if projected else None
    args = [*case.values()][:8]
    want, angle_T, h_T, k_T, v_T = m.mamba3_mimo(
        *args, V, Z, Out, case["Angles"], case["D"], case["Z"], 8, 4, F32, True)
    angle, h = torch.zeros(2, 4, 4), torch.zeros(2, 4, 8, 16)
    k, v = torch.zeros(2, 3, 4, 16), torch.zeros(2, 4, 8)
    first = lambda t: None if t is None else t.transpose(0, 1)
    for t in range(23):
        C, B = (case[n][:, t].expand(-1, -1, 4, -1) for n in "QK")
        C, B, angle = m.apply_rotary_qk_inference_fwd(
            C, B, angle, case["Angles"][:, t], case["DT"][..., t], first(case["Q_bias"]),
            first(case["K_bias"]), rotate_pairwise=False)
        dt, x = case["DT"][..., t], case["V"][:, t]
        out = torch.full((2, 4, 8) if projected else (2, 3, 4, 8), torch.nan)
        before, states = h.clone(), (k.clone(), v.clone())
        new = None if in_place else torch.full_like(h, torch.nan)
        m.mamba3_step_fn(
            h, k, v, case["ADT"][..., t] / dt, B, C, case["D"], x, dt,
            torch.sigmoid(case["Trap"][..., t]), first(V), first(Out), new, out,
            case["Z"][:, t], first(Z), tile_D=64, num_warps=4)
        assert torch.equal(k, states[0]) and torch.equal(v, states[1]), "are read only"
        if not in_place:
            assert torch.equal(h, before), "state_out is written instead"
            h = new
        k, v = B, x
        close(out, array(want[:, t].double()), dtype=np.dtype(np.float32))
    around(angle, array(angle_T.double()))
    for got, final in (h, h_T), (k, k_T), (v, v_T):
        close(got, array(final.double()))


@pytest.mark.parametrize("pairwise", [True, False])
@pytest.mark.parametrize("conjugate", [True, False])
def test_apply_rotary(make, pairwise, conjugate):
    q, k, state, proj = make(2, 3, 4, 10), make(2, 3, 4, 10), make(2, 4, 3).abs(), make(2, 4, 3)
    dt = make(2, 4).abs()
    theta = array(state) + np.pi * np.tanh(array(proj).astype(np.float64)) * array(dt)[..., None]
    rotary = "interleaved" if pairwise else "half"
    turn = (-theta if conjugate else theta)[:, None]
    want_q, want_k = (
        reference.rotate(array(t).astype(np.float64), np.broadcast_to(turn, (2, 3, 4, 3)), rotary)
        for t in (q, k))
    got = m.apply_rotary_qk_inference_fwd(
        q, k, state, proj, dt, conjugate=conjugate, rotate_pairwise=pairwise)
    close(got[0], want_q)
    close(got[1], want_k)
    around(got[2], theta)
    again = m.apply_rotary_qk_inference_fwd(
        q, k, state, proj, dt, inplace=True, conjugate=conjugate, rotate_pairwise=pairwise)
    for t, g, a in zip((q, k, state), got, again):
        assert a is t and torch.equal(t, g)


# ---------------------------------------------------------------- gradients


def test_gradients_are_refused_everywhere(make):
    x = make(2, 8, 5).requires_grad_()
    weight, A = make(8, 4), -make(8, 4).abs()
    case = ssd_case(make)
    with torch.enable_grad():
        for call in (
            lambda: m.selective_scan_fn(x, make(2, 8, 5), A, make(2, 4, 5), make(2, 4, 5)),
            lambda: m.causal_conv1d_fn(x, weight),
            lambda: m.causal_conv1d_update(x, make(2, 8, 3), weight),
            lambda: m.causal_conv1d_varlen_states(x[0].T, torch.tensor([0, 5]), 3),
            lambda: m.selective_state_update(
                make(2, 8, 4), x[..., 0], make(2, 8), A, make(2, 4), make(2, 4)),
            lambda: m.mamba_chunk_scan_combined(**{**case, "x": case["x"].requires_grad_()}),
            lambda: m.mamba_inner_fn(
                x, weight, None, make(12, 8), make(8, 4), make(8, 8).requires_grad_(), None, A),
            lambda: m.mamba_split_conv1d_scan_combined(
                x, weight, None, make(2), make(2), make(2), 16, headdim=2),
            lambda: m.apply_rotary_qk_inference_fwd(
                make(1, 1, 1, 4).requires_grad_(), make(1, 1, 1, 4), make(1, 1, 2), make(1, 1, 2),
                make(1, 1)),
        ):
            with pytest.raises(RuntimeError, match="grad"):
                call()
