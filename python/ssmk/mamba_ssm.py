# SPDX-License-Identifier: MIT
"""ssmk under the names that code for mamba-ssm 2.3 and causal-conv1d 1.6 calls.

    from ssmk.mamba_ssm import selective_scan_fn, mamba_chunk_scan_combined, causal_conv1d_fn

Names, the order of arguments and their defaults are those of these packages; the tensors are
torch's, are not copied, and may be of mixed dtypes and of any strides.  Nothing is installed under
the packages' own names.  What a function of theirs does that ssmk does not is refused with
NotImplementedError, and never ignored.

Gradients are refused (RuntimeError) while torch records them: use torch.no_grad().
Where results differ on purpose:
    - arithmetic is float32 throughout, rounded once at the end; softplus keeps small steps;
    - pads (negative seq_idx, negative slots) give 0 and reach nothing else;
    - decays greater than 1 (A > 0) are computed, not clamped;
    - Mamba-3 does not round its inputs or the cumulative angle to bfloat16, and packed sequences
      of any length, none included, have their own final states;
    - with constant B the last state of selective_scan_fn includes B.
"""
import functools
import math

import torch
import torch.nn.functional as F

import ssmk

__all__ = [
    "selective_scan_fn", "mamba_inner_fn", "selective_state_update", "mamba_chunk_scan_combined",
    "mamba_split_conv1d_scan_combined", "causal_conv1d_fn", "causal_conv1d_update",
    "causal_conv1d_varlen_states", "mamba3_siso_combined", "mamba3_siso_step", "mamba3_mimo",
    "mamba3_step_fn", "apply_rotary_qk_inference_fwd"]


# ---------------------------------------------------------------- refusing


def _unsupported(function, argument, why):
    raise NotImplementedError(f"{function}: {argument}: {why}")


def _wrong(function, argument, why):
    raise ValueError(f"{function}: {argument}: {why}")


def _no_gradients(function):
    """Where torch's own operations stand between ssmk's, these could lose a gradient in silence."""
    @functools.wraps(function)
    def checked(*args, **kwargs):
        if torch.is_grad_enabled() and any(
                isinstance(t, torch.Tensor) and t.requires_grad for t in (*args, *kwargs.values())):
            raise RuntimeError(
                f"{function.__name__}: a tensor requires grad, and ssmk has no gradients: use "
                "torch.no_grad() or .detach()")
        return function(*args, **kwargs)
    return checked


def _activation(function, activation):
    if activation not in (None, "silu", "swish"):
        _unsupported(function, "activation", f"expected None, 'silu' or 'swish', got {activation!r}")
    return "silu" if activation else None


def _limits(function, dt_limit):
    low, high = map(float, dt_limit)
    if low == high == 0:
        _unsupported(function, "dt_limit", "(0, 0) would make every step 0")
    return None if (low, high) == (-math.inf, math.inf) else (low, high)


# ---------------------------------------------------------------- Mamba-1


def selective_scan_fn(
        u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
        return_last_state=False):
    """Scan of Mamba-1; out (batch, dim, seqlen) in u's dtype, and if wanted the last state (batch,
    dim, dstate) in float32 or complex64.  See ssmk.selective_scan."""
    out = torch.empty_like(u)
    result = ssmk.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, dt_softplus=delta_softplus,
        return_final_states=return_last_state, out=out)
    return result


@_no_gradients
def mamba_inner_fn(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight,
        out_proj_bias, A, B=None, C=None, D=None, delta_bias=None, B_proj_bias=None,
        C_proj_bias=None, delta_softplus=True, checkpoint_lvl=1, b_rms_weight=None,
        c_rms_weight=None, dt_rms_weight=None, b_c_dt_rms_eps=1e-6):
    """A whole layer of Mamba-1 from xz (batch, 2 dim, seqlen) to (batch, seqlen, d_model):
    convolution, projections, optional norms of B, C and delta, scan, gate, projection.
    checkpoint_lvl is about gradients, of which there are none."""
    name = "mamba_inner_fn"
    x, z = xz.chunk(2, dim=1)
    rank, dstate = delta_proj_weight.shape[1], A.shape[-1] * (2 if A.is_complex() else 1)
    # What the autocast of torch's own operations would compute in; ssmk's take what comes.
    weight = conv1d_weight.squeeze(1) if conv1d_weight.dim() == 3 else conv1d_weight
    if (B is not None and B_proj_bias is not None) or (C is not None and C_proj_bias is not None):
        _wrong(name, "B_proj_bias, C_proj_bias", "belong to B and C that come from x_proj")
    x = ssmk.causal_conv1d(
        x.contiguous() if x.stride(1) == 0 else x, weight, conv1d_bias, activation="silu",
        out=torch.empty_like(x.transpose(1, 2), memory_format=torch.contiguous_format)
        .transpose(1, 2))
    projected = F.linear(x.transpose(1, 2), x_proj_weight)  # (batch, seqlen, rank [+ B] [+ C])
    widths = [rank] + [dstate] * ((B is None) + (C is None))
    if projected.shape[-1] != sum(widths):
        _wrong(name, "x_proj_weight", f"expected {sum(widths)} rows, got {projected.shape[-1]}")
    parts = list(projected.split(widths, dim=-1))

    def normed(part, weight):
        return part if weight is None else F.rms_norm(
            part, part.shape[-1:], weight.to(part.dtype), b_c_dt_rms_eps)

    delta = F.linear(normed(parts.pop(0), dt_rms_weight), delta_proj_weight)
    if B is None:
        B = parts.pop(0)
        B = normed(B if B_proj_bias is None else B + B_proj_bias, b_rms_weight).transpose(1, 2)
        B = _real_pairs(B) if A.is_complex() else B
    elif b_rms_weight is not None:
        _unsupported(name, "b_rms_weight", "with a constant B")
    if C is None:
        C = parts.pop(0)
        C = normed(C if C_proj_bias is None else C + C_proj_bias, c_rms_weight).transpose(1, 2)
        C = _real_pairs(C) if A.is_complex() else C
    elif c_rms_weight is not None:
        _unsupported(name, "c_rms_weight", "with a constant C")
    y = selective_scan_fn(
        x, delta.transpose(1, 2), A, B, C, D, z, delta_bias, delta_softplus)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def _real_pairs(BC):
    """(batch, 2 dstate, seqlen), re and im in turn along dstate -> complex (batch, dstate,
    seqlen)."""
    batch, dstate, seqlen = BC.shape
    return torch.view_as_complex(
        BC.float().reshape(batch, dstate // 2, 2, seqlen).transpose(2, 3).contiguous())


def selective_state_update(
        state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False,
        state_batch_indices=None):
    """Decode step of Mamba-1 (state (entries, dim, dstate)) and Mamba-2 (state (entries, nheads,
    headdim, dstate)); state in place.  dt, A, D and dt_bias of Mamba-2 may be expanded (stride 0)
    or come as one value a head.  A negative index is a pad: its output is 0.  See
    ssmk.state_update."""
    return ssmk.state_update(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus,
        state_indices=state_batch_indices)


# ---------------------------------------------------------------- Mamba-2


def mamba_chunk_scan_combined(
        x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
        cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False,
        return_varlen_states=False, state_dtype=None):
    """SSD of Mamba-2, x (batch, seqlen, nheads, headdim).  Returns out, and behind it the final
    states (batch, ...) in float32 and the states at the ends of the sequences (nseq, ...) where
    wanted.  dt is clamped to dt_limit, as there: with the default a negative dt is 0.

    cu_seqlens only says whose states return_varlen_states returns (in state_dtype, else C's dtype;
    batch is 1); what keeps the sequences apart is seq_idx.  initial_states belong to the first
    sequence of a row, and here reach it whole."""
    name = "mamba_chunk_scan_combined"
    ends = {}
    if return_varlen_states:
        if cu_seqlens is None:
            _wrong(name, "cu_seqlens", "is needed for return_varlen_states")
        if x.shape[0] != 1:
            _wrong(name, "x", f"batch must be 1 with return_varlen_states, got {x.shape[0]}")
        count = len(cu_seqlens) - 1
        ends["captured_states"] = torch.zeros(
            (count, *x.shape[2:], B.shape[-1]), dtype=state_dtype or C.dtype, device=x.device)
        # After the last token of each; a sequence without tokens captures nothing: 0, as there.
        ends["capture_positions"] = torch.where(cu_seqlens.diff() > 0, cu_seqlens[1:] - 1, -1)
    elif cu_seqlens is not None:
        _unsupported(name, "cu_seqlens", "selects the states of return_varlen_states, and nothing "
                                         "else; to keep sequences apart pass seq_idx")
    final = torch.empty(
        (x.shape[0], *x.shape[2:], B.shape[-1]), dtype=torch.float32,
        device=x.device) if return_final_states else None
    if ends:
        if seq_idx is None:
            _unsupported(name, "return_varlen_states", "needs seq_idx: without it states would be "
                                                       "those of a single sequence")
    result = ssmk.ssd_chunk(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus, dt_limit=_limits(name, dt_limit),
        initial_states=initial_states, seq_idx=seq_idx, final_states=final, chunk_size=chunk_size,
        **ends)
    return result


@_no_gradients
def mamba_split_conv1d_scan_combined(
        zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None,
        seq_idx=None, dt_limit=(0.0, float("inf")), return_final_states=False, activation="silu",
        rmsnorm_weight=None, rmsnorm_eps=1e-6, outproj_weight=None, outproj_bias=None, headdim=None,
        ngroups=1, norm_before_gate=True, state_dtype=None):
    """A whole layer of Mamba-2 behind its first projection.  zxbcdt (batch, seqlen, 2 d_nonssm +
    2 dim + 2 ngroups dstate + nheads) is [x0, z0 of a gated MLP | z | x, B, C | dt].  state_dtype
    is about what their stages hand to each other; here that is float32 always."""
    name = "mamba_split_conv1d_scan_combined"
    nheads = A.shape[0] if D is None else D.shape[0]
    if D is not None and D.dim() == 2:
        headdim = D.shape[1]
    elif headdim is None:
        _wrong(name, "headdim", "is needed where D has one value a head")
    weight = conv1d_weight.squeeze(1) if conv1d_weight.dim() == 3 else conv1d_weight
    batch, seqlen, width = zxbcdt.shape
    dim = nheads * headdim
    dstate, odd = divmod(weight.shape[0] - dim, 2 * ngroups)
    if odd or dstate <= 0:
        _wrong(name, "conv1d_weight", f"{weight.shape[0]} channels are not nheads headdim + 2 "
                                      f"ngroups dstate with nheads headdim = {dim}")
    nonssm, odd = divmod(width - 2 * dim - 2 * ngroups * dstate - nheads, 2)
    if odd or nonssm < 0:
        _wrong(name, "zxbcdt", f"its last axis of {width} does not split into 2 d_nonssm + 2 * "
                               f"{dim} + 2 * {ngroups} * {dstate} + {nheads}")
    mlp, z, xBC, dt = zxbcdt.split([2 * nonssm, dim, dim + 2 * ngroups * dstate, nheads], dim=-1)
    xBC = ssmk.causal_conv1d(
        xBC, weight, conv1d_bias, activation=_activation(name, activation), seq_idx=seq_idx,
        channels_last=True)
    x, B, C = xBC.split([dim, ngroups * dstate, ngroups * dstate], dim=-1)
    z = z.unflatten(-1, (nheads, headdim))
    result = mamba_chunk_scan_combined(
        x.unflatten(-1, (nheads, headdim)), dt, A, B.unflatten(-1, (ngroups, dstate)),
        C.unflatten(-1, (ngroups, dstate)), chunk_size, D,
        z if rmsnorm_weight is None else None, dt_bias, initial_states, seq_idx,
        dt_softplus=True, dt_limit=dt_limit, return_final_states=return_final_states)
    out, final = result if return_final_states else (result, None)
    out = out.flatten(-2)
    if rmsnorm_weight is not None:
        out = _gated_norm(
            out, z.flatten(-2), rmsnorm_weight, rmsnorm_eps, dim // ngroups, norm_before_gate)
    if nonssm:
        x0, z0 = mlp.chunk(2, dim=-1)
        out = torch.cat([F.silu(x0) * z0, out], dim=-1)
    if outproj_weight is not None:
        out = F.linear(out, outproj_weight, outproj_bias)
    elif outproj_bias is not None:
        _wrong(name, "outproj_bias", "without outproj_weight")
    return (out, final) if return_final_states else out


def _gated_norm(y, z, weight, eps, group, norm_before_gate):
    dtype, y, gate = y.dtype, y.float(), F.silu(z.float())
    y = y if norm_before_gate else y * gate
    y = F.rms_norm(y.unflatten(-1, (-1, group)), (group,), eps=eps).flatten(-2) * weight.float()
    return (y * gate if norm_before_gate else y).to(dtype)


# ---------------------------------------------------------------- convolution


def causal_conv1d_fn(
        x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
        final_states_out=None, activation=None):
    """The convolution over x (batch, dim, seqlen), packed along either axis.  States are (batch,
    dim, width - 1), returned in x's dtype.  Unlike there, states go with every layout."""
    name = "causal_conv1d_fn"
    if seq_idx is not None and (
            initial_states is not None or return_final_states or final_states_out is not None):
        _wrong(name, "seq_idx", "excludes initial_states, return_final_states and final_states_out")
    activation = _activation(name, activation)
    if final_states_out is not None and not return_final_states:
        _wrong(name, "final_states_out", "without return_final_states")
    if return_final_states and final_states_out is None:
        batch, dim, _ = x.shape
        final_states_out = torch.empty(
            (batch, weight.shape[1] - 1, dim), dtype=x.dtype, device=x.device).transpose(1, 2)
    result = ssmk.causal_conv1d(
        x, weight, bias, activation=activation, seq_idx=seq_idx, initial_states=initial_states,
        final_states=final_states_out, out=torch.empty_like(x))
    return result


def causal_conv1d_update(
        x, conv_state, weight, bias=None, activation=None, cache_seqlens=None,
        conv_state_indices=None):
    """Decode step of the convolution: x (batch, dim) or (batch, dim, seqlen), conv_state (entries,
    dim, state_len) in place; with cache_seqlens a ring.  A negative index is a pad."""
    if activation in (True, False):  # as old callers pass it
        activation = "silu" if activation else None
    return ssmk.causal_conv1d_update(
        x, conv_state, weight, bias, activation=_activation("causal_conv1d_update", activation),
        cache_seqlens=cache_seqlens, state_indices=conv_state_indices)


@_no_gradients
def causal_conv1d_varlen_states(x, cu_seqlens, state_len):
    """The last state_len inputs of each packed sequence of x (total, dim), newest last, 0 before
    its first: (nseq, dim, state_len).  It is a gather, and torch's own."""
    ends, starts = cu_seqlens[1:, None].long(), cu_seqlens[:-1, None].long()
    tokens = ends - torch.arange(state_len, 0, -1, device=x.device)  # (nseq, state_len)
    states = x[tokens.clamp(min=0)] if len(x) else x.new_zeros((*tokens.shape, x.shape[1]))
    return torch.where((tokens >= starts)[..., None], states, 0).transpose(1, 2)


# ---------------------------------------------------------------- Mamba-3
#
# There Q, K, V are C, B, x here; scalars per head lie (batch, nheads, seqlen), here (batch, seqlen,
# nheads).  In prefill trap is a logit.


def _tokens_first(t):
    return None if t is None else t.transpose(1, 2)


def _mamba3(
        name, Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, Z, states, cu_seqlens, chunk_size,
        want_states, rotary, **more):
    initial = {}
    if states is not None:
        angle, ssm, k, v = states
        initial = dict(
            initial_states=ssm, initial_angle_states=angle, initial_v_states=v,
            initial_k_states=k[:, None] if k.dim() == 3 else k)
    result = ssmk.ssd_chunk(
        V, _tokens_first(DT), None, K, Q, D, Z, adt=_tokens_first(ADT), trap=_tokens_first(Trap),
        angles=Angles, rotary=rotary, B_bias=K_bias, C_bias=Q_bias, cu_seqlens=cu_seqlens,
        chunk_size=chunk_size, return_final_states=want_states, **initial, **more)
    if not want_states:
        return result
    out, ssm, angle, k, v = result
    return out, angle, ssm, k, v


def mamba3_siso_combined(
        Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D=None, Z=None, Input_States=None,
        chunk_size=64, return_final_states=False, cu_seqlens=None):
    """Prefill of Mamba-3 with rank 1: Q, K (batch, seqlen, ngroups, dstate), V, Z (batch, seqlen,
    nheads, headdim), ADT, DT, Trap (batch, nheads, seqlen), biases (nheads, dstate), Angles (batch,
    seqlen, nheads, nangles).  Returns out, or (out, angle, ssm, k, v) states, one for each packed
    sequence, in the dtypes of Input_States, else float32."""
    result = _mamba3(
        "mamba3_siso_combined", Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D, Z, Input_States,
        cu_seqlens, chunk_size, return_final_states, "interleaved")
    if not return_final_states:
        return result
    out, angle, ssm, k, v = result
    return out, angle, ssm, k[:, 0], v


def mamba3_mimo(
        Q, K, V, ADT, DT, Trap, Q_bias, K_bias, MIMO_V, MIMO_Z, MIMO_Out, Angles, D=None, Z=None,
        chunk_size=16, rotary_dim_divisor=4, dtype=torch.bfloat16, return_state=False,
        cu_seqlens=None, outproj_norm_weight=None, outproj_norm_eps=1e-5):
    """placeholder"""
