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
        _unsupported(
            function, "activation", f"expected None, 'silu' or 'swish', got {activation!r}")
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
    return ssmk.selective_scan(
        u, delta, A, B, C, D, z, delta_bias, dt_softplus=delta_softplus,
        return_final_states=return_last_state, out=torch.empty_like(u))


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
    for constant, extra, what in (
            (B, (B_proj_bias, b_rms_weight), "B_proj_bias and b_rms_weight"),
            (C, (C_proj_bias, c_rms_weight), "C_proj_bias and c_rms_weight")):
        if constant is not None and any(t is not None for t in extra):
            _unsupported(name, what, "go with what x_proj_weight makes, not with a constant")
    x, z = xz.chunk(2, dim=1)
    # Results have their channels packed, as the projections want them.
    packed = torch.empty((x.shape[0], x.shape[2], x.shape[1]), dtype=x.dtype, device=x.device)
    x = ssmk.causal_conv1d(
        x, _conv_weight(conv1d_weight), conv1d_bias, activation="silu", out=packed.transpose(1, 2))
    rank, dstate = delta_proj_weight.shape[1], A.shape[-1] * (2 if A.is_complex() else 1)
    widths = [rank] + [dstate] * ((B is None) + (C is None))
    if x_proj_weight.shape[0] != sum(widths):
        _wrong(name, "x_proj_weight", f"must have {sum(widths)} rows, got {x_proj_weight.shape[0]}")
    delta, *BC = F.linear(x.transpose(1, 2), x_proj_weight).split(widths, dim=-1)

    def normed(t, weight):
        return t if weight is None else _rms_norm(t, weight, b_c_dt_rms_eps)

    def per_token(t, bias, weight):
        t = normed(t if bias is None else t + bias.to(t.dtype), weight)
        if A.is_complex():  # re and im in turn along dstate
            t = torch.view_as_complex(t.float().unflatten(-1, (-1, 2)).contiguous())
        return t.transpose(1, 2)

    delta = normed(F.linear(delta, delta_proj_weight), dt_rms_weight).transpose(1, 2)
    B = per_token(BC.pop(0), B_proj_bias, b_rms_weight) if B is None else B
    C = per_token(BC.pop(0), C_proj_bias, c_rms_weight) if C is None else C
    y = selective_scan_fn(x, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def _conv_weight(weight):
    return weight.squeeze(1) if weight.dim() == 3 else weight  # (dim, 1, width) of a torch Conv1d


def _rms_norm(t, weight, eps):
    """Over the last axis, in float32; weight may be longer where t has groups of it."""
    y = t.float()
    y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + eps)
    return (y * weight.float()).to(t.dtype)


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
        if seq_idx is None:
            _unsupported(name, "return_varlen_states", "needs seq_idx, which keeps the sequences "
                                                       "apart")
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
    return ssmk.ssd_chunk(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus, dt_limit=_limits(name, dt_limit),
        initial_states=initial_states, seq_idx=seq_idx, final_states=final, chunk_size=chunk_size,
        **ends)


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
    weight, width = _conv_weight(conv1d_weight), zxbcdt.shape[-1]
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
    y = _rms_norm(y.unflatten(-1, (-1, group)), weight.unflatten(0, (-1, group)), eps).flatten(-2)
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
    return ssmk.causal_conv1d(
        x, weight, bias, activation=activation, seq_idx=seq_idx, initial_states=initial_states,
        final_states=final_states_out, out=torch.empty_like(x))


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
# There Q, K, V are C, B, x here.  Scalars of a head lie (batch, nheads, seqlen), here (batch,
# seqlen, nheads).  trap is a logit, except in mamba3_step_fn.


def _empty(like, dtype, *shape):
    return torch.empty(shape, dtype=dtype, device=like.device)


def _prefill3(Q, K, V, ADT, DT, Trap, Angles, D, Z, cu_seqlens, final, **more):
    return ssmk.ssd_chunk(
        V, DT.transpose(1, 2), None, K, Q, D, Z, adt=ADT.transpose(1, 2),
        trap=Trap.transpose(1, 2), angles=Angles, cu_seqlens=cu_seqlens, **final, **more)


def _final_states(V, K, Angles, cu_seqlens, rank, k_dtype, v_dtype):
    """Room for the states after each sequence: angles and h in float32."""
    nseq = V.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    nheads, headdim = V.shape[2:]
    return dict(
        final_states=_empty(V, torch.float32, nseq, nheads, headdim, K.shape[-1]),
        final_angle_states=_empty(V, torch.float32, nseq, nheads, Angles.shape[-1]),
        final_k_states=_empty(V, k_dtype, nseq, rank, nheads, K.shape[-1]),
        final_v_states=_empty(V, v_dtype, nseq, nheads, headdim))


def mamba3_siso_combined(
        Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D=None, Z=None, Input_States=None,
        chunk_size=64, return_final_states=False, cu_seqlens=None):
    """Prefill of Mamba-3 with rank 1: Q, K (batch, seqlen, ngroups, dstate), V, Z (batch, seqlen,
    nheads, headdim), ADT, DT, Trap (batch, nheads, seqlen), biases (nheads, dstate), Angles (batch,
    seqlen, nheads, nangles).  Returns out in V's dtype, or (out, angle, ssm, k, v) with states of
    every sequence; v in V's dtype, the others float32."""
    final = {}
    if return_final_states:
        final = _final_states(V, K, Angles, cu_seqlens, 1, torch.float32, V.dtype)
    initial = {}
    if Input_States is not None and any(t is not None for t in Input_States):
        if any(t is None for t in Input_States):
            _wrong("mamba3_siso_combined", "Input_States", "all four or none")
        angle, ssm, k, v = Input_States
        initial = dict(
            initial_states=ssm, initial_angle_states=angle, initial_k_states=k[:, None],
            initial_v_states=v)
    result = _prefill3(
        Q, K, V, ADT, DT, Trap, Angles, D, Z, cu_seqlens, final, B_bias=K_bias, C_bias=Q_bias,
        chunk_size=chunk_size, **initial)
    if not final:
        return result
    out, ssm, angle, k, v = result
    return out, angle, ssm, k[:, 0], v


def mamba3_mimo(
        Q, K, V, ADT, DT, Trap, Q_bias, K_bias, MIMO_V, MIMO_Z, MIMO_Out, Angles, D, Z, chunk_size,
        rotary_dim_divisor, dtype, return_state=False, cu_seqlens=None,
        fuse_pregate_headwise_rms_norm=False, outproj_norm_weight=None, outproj_norm_eps=1e-5):
    """Prefill of Mamba-3 with rank R: Q, K (batch, seqlen, R, ngroups, dstate), biases (nheads, R,
    dstate), MIMO_V, MIMO_Z, MIMO_Out (nheads, R, headdim), the rest as in mamba3_siso_combined.
    Returns out in `dtype`, (batch, seqlen, R, nheads, headdim) if MIMO_Out is None; or (out, angle,
    ssm, k, v) with states of every sequence; k in `dtype`, v in V's, the others float32."""
    name, rank, dstate = "mamba3_mimo", Q.shape[2], Q.shape[-1]
    nheads, headdim = V.shape[2:]
    if Angles.shape[-1] * rotary_dim_divisor != dstate:
        _wrong(name, "Angles", f"must have {dstate} / {rotary_dim_divisor} values a head, got "
                               f"{Angles.shape[-1]}")
    norm = {}
    if fuse_pregate_headwise_rms_norm:
        if outproj_norm_weight is None or MIMO_Out is None or Z is None:
            _wrong(name, "fuse_pregate_headwise_rms_norm", "needs outproj_norm_weight, MIMO_Out "
                                                           "and Z")
        norm = dict(norm_weight=outproj_norm_weight.view(nheads, headdim),
                    norm_eps=outproj_norm_eps)
    elif outproj_norm_weight is not None:
        _wrong(name, "outproj_norm_weight", "without fuse_pregate_headwise_rms_norm")
    final = {}
    if return_state:
        final = _final_states(V, K, Angles, cu_seqlens, rank, dtype, V.dtype)
    several = MIMO_Out is None and rank > 1
    out = _empty(V, dtype, *V.shape[:2], *((rank,) if several else ()), nheads, headdim)
    result = _prefill3(
        Q, K, V, ADT, DT, Trap, Angles, D, Z, cu_seqlens, final, B_bias=K_bias, C_bias=Q_bias,
        rotary="half", mimo_x=MIMO_V, mimo_z=None if Z is None else MIMO_Z, mimo_out=MIMO_Out,
        chunk_size=chunk_size, out=out, **norm)
    if MIMO_Out is None and not several:
        out = out[:, :, None]
    if not final:
        return out
    _, ssm, angle, k, v = result
    return out, angle, ssm, k, v


def mamba3_siso_step(
        Q, K, V, ADT, DT, Trap, Q_bias, K_bias, Angles, D=None, Z=None, Input_States=None):
    """One token: shapes of mamba3_siso_combined without seqlen.  Returns (out, [angle, ssm, k, v]),
    new states in float32, v being V itself; Input_States stay as they are."""
    if Input_States is None:
        _wrong("mamba3_siso_step", "Input_States", "are needed")
    angle, ssm, k, v = (t.to(torch.float32, copy=True) for t in Input_States)
    out = ssmk.state_update(
        ssm, V, DT, None, K, Q, D, Z, adt=ADT, trap=Trap, angles=Angles, B_bias=K_bias,
        C_bias=Q_bias, angle_state=angle, k_state=k[:, None], v_state=v)
    return out, [angle, ssm, k, V]


def mamba3_step_fn(
        state, Bstate, Xstate, A, B, C, D, x, dt, trap, xproj, outproj=None, state_out=None,
        out=None, z=None, zproj=None, tile_D=64, num_warps=2):
    """One token of rank R, behind bias and rotation: B, C (batch, R, nheads, dstate), trap in
    [0, 1], xproj, outproj, zproj (R, nheads, headdim).  Writes state (state_out, if given, instead)
    and out, (batch, R, nheads, headdim) without outproj, which the caller allocates.  Bstate and
    Xstate are read only, the caller advances them.  z gates without outproj as well.  tile_D and
    num_warps say how a GPU does it."""
    name, rank = "mamba3_step_fn", B.shape[1]
    if out is None:
        _wrong(name, "out", "is needed")
    if zproj is not None and z is None:
        _wrong(name, "zproj", "without z")
    if state_out is not None:
        state_out.copy_(state)
        state = state_out

    def heads_first(t):
        return None if t is None else t.transpose(0, 1)

    ssmk.state_update(
        state, x, dt, None, B, C, D, z, adt=A * dt, trap=trap, trap_sigmoid=True,
        mimo_x=heads_first(xproj), mimo_z=heads_first(zproj), mimo_out=heads_first(outproj),
        k_state=Bstate.clone(), v_state=Xstate.clone(),
        out=out[:, 0] if outproj is None and rank == 1 else out)


@_no_gradients
def apply_rotary_qk_inference_fwd(
        q, k, angle_state, angle_proj, dt, bias_q=None, bias_k=None, inplace=False, conjugate=False,
        rotate_pairwise=True):
    """Bias and rotation of one token's q, k (batch, R, nheads, dstate): (q, k, angle_state).  The
    angle is kept in [0, 2 pi).  ssmk.state_update does this itself where it gets angles; on its own
    it is torch's."""
    theta = angle_state.float() + math.pi * torch.tanh(angle_proj.float()) * dt.float()[..., None]
    theta = torch.remainder(theta, 2 * math.pi)
    cos, sin = torch.cos(theta)[:, None], torch.sin(theta)[:, None]
    sin = -sin if conjugate else sin
    nangles, half = theta.shape[-1], q.shape[-1] // 2

    def rotated(t, bias):
        t = t.float() if bias is None else t.float() + bias.float()
        if rotate_pairwise:
            first, second = slice(0, 2 * nangles, 2), slice(1, 2 * nangles, 2)
        else:
            first, second = slice(0, nangles), slice(half, half + nangles)
        a, b = t[..., first], t[..., second]
        turned = t.clone()
        turned[..., first] = a * cos - b * sin
        turned[..., second] = a * sin + b * cos
        return turned

    results = rotated(q, bias_q), rotated(k, bias_k), theta
    into = (q, k, angle_state) if inplace else [
        torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, angle_state)]
    for t, result in zip(into, results):
        t.copy_(result)
    return tuple(into)
