# SPDX-License-Identifier: MIT
"""ssmk's operations as the modeling files of transformers call them: (batch, dim, seqlen) and
(batch, seqlen, nheads, headdim), on torch tensors on the CPU.

Results lie in memory in the order of x's axes, which empty_like keeps, so that the transposes
around a call stay views.  torch.compile sees the operations as custom operators (torch.ops.ssmk),
whose shapes it knows and whose insides it leaves alone.
"""
import torch

import ssmk


def _states(x, *shape):
    return torch.empty(shape, dtype=torch.float32, device=x.device)


def _limits(dt_limit, dt_softplus):
    """dt_limit, or None where it does nothing: a softplus is never negative."""
    low, high = dt_limit
    if high == float("inf") and (low == -high or dt_softplus and low <= 0):
        return None
    return low, high


# ---------------------------------------------------------------- the calls, run at once


def _selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, final):
    result = torch.empty_like(x)
    final_states = _states(x, x.shape[0], *A.shape) if final else None
    ssmk.selective_scan(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus, final_states=final_states,
        out=result)
    return (result, final_states) if final else result


def _ssd_chunk(
        x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_limit,
        final):
    nseq = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    final_states = _states(x, nseq, *x.shape[2:], B.shape[-1]) if final else None
    return ssmk.ssd_chunk(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus,
        dt_limit=_limits(dt_limit, dt_softplus), initial_states=initial_states, seq_idx=seq_idx,
        cu_seqlens=cu_seqlens, final_states=final_states)


def _state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    return ssmk.state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus=dt_softplus)


def _causal_conv1d(x, weight, bias, seq_idx, cu_seqlens, silu):
    return ssmk.causal_conv1d(
        x, weight, bias, activation="silu" if silu else None, seq_idx=seq_idx,
        cu_seqlens=cu_seqlens, out=torch.empty_like(x))


def _causal_conv1d_update(x, conv_state, weight, bias, silu):
    return ssmk.causal_conv1d_update(
        x, conv_state, weight, bias, activation="silu" if silu else None, out=torch.empty_like(x))


# ---------------------------------------------------------------- the same as custom operators
#
# An operator always returns the same number of tensors: final states that are not wanted are empty.

_Maybe = torch.Tensor | None


def _pair(result, final):
    return result if final else (result, _states(result, 0))


@torch.library.custom_op("ssmk::selective_scan", mutates_args=())
def _selective_scan_op(
        x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
        D: _Maybe, z: _Maybe, dt_bias: _Maybe, dt_softplus: bool,
        final: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return _pair(_selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, final), final)


@_selective_scan_op.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, dt_softplus, final):
    states = (x.shape[0], *A.shape) if final else (0,)
    return torch.empty_like(x), _states(x, *states)


@torch.library.custom_op("ssmk::ssd_chunk", mutates_args=())
def _ssd_chunk_op(
        x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor, C: torch.Tensor,
        D: _Maybe, z: _Maybe, dt_bias: _Maybe, initial_states: _Maybe, seq_idx: _Maybe,
        cu_seqlens: _Maybe, dt_softplus: bool, dt_min: float, dt_max: float,
        final: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return _pair(_ssd_chunk(
        x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus,
        (dt_min, dt_max), final), final)


@_ssd_chunk_op.register_fake
def _(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_min,
      dt_max, final):
    nseq = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    states = (nseq, *x.shape[2:], B.shape[-1]) if final else (0,)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device), _states(x, *states)


@torch.library.custom_op("ssmk::state_update", mutates_args=("state",))
def _state_update_op(
        state: torch.Tensor, x: torch.Tensor, dt: torch.Tensor, A: torch.Tensor, B: torch.Tensor,
        C: torch.Tensor, D: _Maybe, z: _Maybe, dt_bias: _Maybe,
        dt_softplus: bool) -> torch.Tensor:
    return _state_update(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus)


@_state_update_op.register_fake
def _(state, x, dt, A, B, C, D, z, dt_bias, dt_softplus):
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@torch.library.custom_op("ssmk::causal_conv1d", mutates_args=())
def _causal_conv1d_op(
        x: torch.Tensor, weight: torch.Tensor, bias: _Maybe, seq_idx: _Maybe, cu_seqlens: _Maybe,
        silu: bool) -> torch.Tensor:
    return _causal_conv1d(x, weight, bias, seq_idx, cu_seqlens, silu)


@_causal_conv1d_op.register_fake
def _(x, weight, bias, seq_idx, cu_seqlens, silu):
    return torch.empty_like(x)


@torch.library.custom_op("ssmk::causal_conv1d_update", mutates_args=("conv_state",))
def _causal_conv1d_update_op(
        x: torch.Tensor, conv_state: torch.Tensor, weight: torch.Tensor, bias: _Maybe,
        silu: bool) -> torch.Tensor:
    return _causal_conv1d_update(x, conv_state, weight, bias, silu)


@_causal_conv1d_update_op.register_fake
def _(x, conv_state, weight, bias, silu):
    return torch.empty_like(x)


# ---------------------------------------------------------------- one or the other
#
# An operator's way through torch's dispatcher costs more than a decode step, so that only graphs
# take it.


def selective_scan(x, dt, A, B, C, D, z, dt_bias, dt_softplus, final):
    args = x, dt, A, B, C, D, z, dt_bias, dt_softplus, final
    if not torch.compiler.is_compiling():
        return _selective_scan(*args)
    out, states = torch.ops.ssmk.selective_scan(*args)
    return (out, states) if final else out


def ssd_chunk(
        x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus, dt_limit,
        final):
    args = x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx, cu_seqlens, dt_softplus
    if not torch.compiler.is_compiling():
        return _ssd_chunk(*args, dt_limit, final)
    out, states = torch.ops.ssmk.ssd_chunk(*args, *map(float, dt_limit), final)
    return (out, states) if final else out


def state_update(*args):
    compiling = torch.compiler.is_compiling()
    return (torch.ops.ssmk.state_update if compiling else _state_update)(*args)


def causal_conv1d(*args):
    compiling = torch.compiler.is_compiling()
    return (torch.ops.ssmk.causal_conv1d if compiling else _causal_conv1d)(*args)


def causal_conv1d_update(*args):
    compiling = torch.compiler.is_compiling()
    return (torch.ops.ssmk.causal_conv1d_update if compiling else _causal_conv1d_update)(*args)
