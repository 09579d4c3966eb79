# SPDX-License-Identifier: MIT
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

def selective_scan_fn(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, delta_bias: Tensor | None = None, delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any: ...
def mamba_inner_fn(
    xz: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, x_proj_weight: Tensor,
    delta_proj_weight: Tensor, out_proj_weight: Tensor, out_proj_bias: Tensor | None, A: Tensor,
    B: Tensor | None = None, C: Tensor | None = None, D: Tensor | None = None,
    delta_bias: Tensor | None = None, B_proj_bias: Tensor | None = None,
    C_proj_bias: Tensor | None = None, delta_softplus: bool = True, checkpoint_lvl: int = 1,
    b_rms_weight: Tensor | None = None, c_rms_weight: Tensor | None = None,
    dt_rms_weight: Tensor | None = None, b_c_dt_rms_eps: float = 1e-06,
) -> Tensor: ...
def selective_state_update(
    state: Tensor, x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, dt_softplus: bool = False,
    state_batch_indices: Tensor | None = None,
) -> Tensor: ...
def mamba_chunk_scan_combined(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int,
    D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None, seq_idx: Tensor | None = None,
    cu_seqlens: Tensor | None = None, dt_softplus: bool = False,
    dt_limit: tuple[float, float] = ..., return_final_states: bool = False,
    return_varlen_states: bool = False, state_dtype: torch.dtype | None = None,
) -> Any: ...
def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor, conv1d_weight: Tensor, conv1d_bias: Tensor | None, dt_bias: Tensor, A: Tensor,
    D: Tensor | None, chunk_size: int, initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None, dt_limit: tuple[float, float] = ...,
    return_final_states: bool = False, activation: str | None = 'silu',
    rmsnorm_weight: Tensor | None = None, rmsnorm_eps: float = 1e-06,
    outproj_weight: Tensor | None = None, outproj_bias: Tensor | None = None,
    headdim: int | None = None, ngroups: int = 1, norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
) -> Any: ...
def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None, return_final_states: bool = False,
    final_states_out: Tensor | None = None, activation: str | None = None,
) -> Any: ...
def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None,
    activation: str | None = None, cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor: ...
def causal_conv1d_varlen_states(
    x: Tensor, cu_seqlens: Tensor, state_len: int,
) -> Tensor: ...
def mamba3_siso_combined(
    Q: Tensor, K: Tensor, V: Tensor, ADT: Tensor, DT: Tensor, Trap: Tensor, Q_bias: Tensor,
    K_bias: Tensor, Angles: Tensor, D: Tensor | None = None, Z: Tensor | None = None,
    Input_States: Sequence[Tensor] | None = None, chunk_size: int = 64,
    return_final_states: bool = False, cu_seqlens: Tensor | None = None,
) -> Any: ...
def mamba3_siso_step(
    Q: Tensor, K: Tensor, V: Tensor, ADT: Tensor, DT: Tensor, Trap: Tensor, Q_bias: Tensor,
    K_bias: Tensor, Angles: Tensor, D: Tensor | None = None, Z: Tensor | None = None,
    Input_States: Sequence[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor]]: ...
def mamba3_mimo(
    Q: Tensor, K: Tensor, V: Tensor, ADT: Tensor, DT: Tensor, Trap: Tensor, Q_bias: Tensor,
    K_bias: Tensor, MIMO_V: Tensor, MIMO_Z: Tensor | None, MIMO_Out: Tensor | None, Angles: Tensor,
    D: Tensor | None, Z: Tensor | None, chunk_size: int, rotary_dim_divisor: int,
    dtype: torch.dtype, return_state: bool = False, cu_seqlens: Tensor | None = None,
    fuse_pregate_headwise_rms_norm: bool = False, outproj_norm_weight: Tensor | None = None,
    outproj_norm_eps: float = 1e-05,
) -> Any: ...
def mamba3_step_fn(
    state: Tensor, Bstate: Tensor, Xstate: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, x: Tensor, dt: Tensor, trap: Tensor, xproj: Tensor,
    outproj: Tensor | None = None, state_out: Tensor | None = None, out: Tensor | None = None,
    z: Tensor | None = None, zproj: Tensor | None = None, tile_D: int = 64, num_warps: int = 2,
) -> None: ...
def apply_rotary_qk_inference_fwd(
    q: Tensor, k: Tensor, angle_state: Tensor, angle_proj: Tensor, dt: Tensor,
    bias_q: Tensor | None = None, bias_k: Tensor | None = None, inplace: bool = False,
    conjugate: bool = False, rotate_pairwise: bool = True,
) -> tuple[Tensor, Tensor, Tensor]: ...
