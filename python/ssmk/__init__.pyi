# SPDX-License-Identifier: MIT
from typing import Any, Literal, Protocol, TypeVar, overload

class Tensor(Protocol):
    """What has __dlpack__: numpy.ndarray, torch.Tensor, jax.Array, ..."""

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any: ...
    def __dlpack_device__(self) -> tuple[Any, Any]: ...

class JaxArray(Tensor, Protocol):
    """A tensor too, told by its functional updates: type checkers complain of the overlap."""

    @property
    def at(self) -> Any: ...

_X = TypeVar("_X", bound=Tensor)
_S = TypeVar("_S", bound=Tensor)
_J = TypeVar("_J", bound=JaxArray)

__version__: str

@overload
def selective_scan(
    x: _X, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, *, dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None, channels_last: bool = False,
    initial_states: Tensor | None = None, final_states: None = None,
    return_final_states: Literal[False] = False, cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None, state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None, pad_slot: int | None = None,
    batch_invariant: bool = False, out: Tensor | None = None, stream: int | None = None,
) -> _X: ...
@overload
def selective_scan(
    x: _X, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, *, dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None, channels_last: bool = False,
    initial_states: Tensor | None = None, final_states: _S, return_final_states: bool = False,
    cu_seqlens: Tensor | None = None, seq_idx: Tensor | None = None,
    state_indices: Tensor | None = None, has_initial_state: Tensor | None = None,
    pad_slot: int | None = None, batch_invariant: bool = False, out: Tensor | None = None,
    stream: int | None = None,
) -> tuple[_X, _S]: ...
@overload
def selective_scan(
    x: _X, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, *, dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None, channels_last: bool = False,
    initial_states: Tensor | None = None, final_states: None = None,
    return_final_states: Literal[True], cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None, state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None, pad_slot: int | None = None,
    batch_invariant: bool = False, out: Tensor | None = None, stream: int | None = None,
) -> tuple[_X, _X]: ...
def ssd_chunk(
    x: Tensor, dt: Tensor, A: Tensor | None, B: Tensor, C: Tensor, D: Tensor | None = None,
    z: Tensor | None = None, dt_bias: Tensor | None = None, *, adt: Tensor | None = None,
    dt_softplus: bool = False, dt_limit: tuple[float, float] | None = None,
    trap: Tensor | None = None, trap_sigmoid: bool = False, angles: Tensor | None = None,
    rotary: Literal["interleaved", "half"] = "interleaved", B_bias: Tensor | None = None,
    C_bias: Tensor | None = None, mimo_x: Tensor | None = None, mimo_z: Tensor | None = None,
    mimo_out: Tensor | None = None, norm_weight: Tensor | None = None, norm_eps: float = 1e-05,
    initial_states: Tensor | None = None, initial_angle_states: Tensor | None = None,
    initial_k_states: Tensor | None = None, initial_v_states: Tensor | None = None,
    final_states: Tensor | None = None, final_angle_states: Tensor | None = None,
    final_k_states: Tensor | None = None, final_v_states: Tensor | None = None,
    return_final_states: bool = False, cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None, state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None, pad_slot: int | None = None,
    capture_positions: Tensor | None = None, captured_states: Tensor | None = None,
    captured_angle_states: Tensor | None = None, captured_k_states: Tensor | None = None,
    captured_v_states: Tensor | None = None, chunk_size: int = 0, batch_invariant: bool = False,
    out: Tensor | None = None, stream: int | None = None,
) -> Any: ...
@overload
def state_update(  # type: ignore[overload-overlap]
    state: _J, x: _X, dt: Tensor, A: Tensor | None, B: Tensor, C: Tensor,
    D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None, *,
    dt_softplus: bool = False, dt_limit: tuple[float, float] | None = None,
    state_indices: Tensor | None = None, state_indices_out: Tensor | None = None,
    num_tokens: Tensor | None = None, num_accepted_tokens: Tensor | None = None,
    intermediate_states: Tensor | None = None, intermediate_indices: Tensor | None = None,
    keep_state: bool = False, pad_slot: int | None = None, adt: Tensor | None = None,
    trap: Tensor | None = None, trap_sigmoid: bool = False, angles: Tensor | None = None,
    rotary: Literal["interleaved", "half"] = "interleaved", B_bias: Tensor | None = None,
    C_bias: Tensor | None = None, mimo_x: Tensor | None = None, mimo_z: Tensor | None = None,
    mimo_out: Tensor | None = None, norm_weight: Tensor | None = None, norm_eps: float = 1e-05,
    angle_state: Tensor | None = None, k_state: Tensor | None = None,
    v_state: Tensor | None = None, intermediate_angle_states: Tensor | None = None,
    intermediate_k_states: Tensor | None = None, intermediate_v_states: Tensor | None = None,
    out: Tensor | None = None, stream: int | None = None,
) -> tuple[Any, ...]: ...
@overload
def state_update(
    state: Tensor, x: _X, dt: Tensor, A: Tensor | None, B: Tensor, C: Tensor,
    D: Tensor | None = None, z: Tensor | None = None, dt_bias: Tensor | None = None, *,
    dt_softplus: bool = False, dt_limit: tuple[float, float] | None = None,
    state_indices: Tensor | None = None, state_indices_out: Tensor | None = None,
    num_tokens: Tensor | None = None, num_accepted_tokens: Tensor | None = None,
    intermediate_states: Tensor | None = None, intermediate_indices: Tensor | None = None,
    keep_state: bool = False, pad_slot: int | None = None, adt: Tensor | None = None,
    trap: Tensor | None = None, trap_sigmoid: bool = False, angles: Tensor | None = None,
    rotary: Literal["interleaved", "half"] = "interleaved", B_bias: Tensor | None = None,
    C_bias: Tensor | None = None, mimo_x: Tensor | None = None, mimo_z: Tensor | None = None,
    mimo_out: Tensor | None = None, norm_weight: Tensor | None = None, norm_eps: float = 1e-05,
    angle_state: Tensor | None = None, k_state: Tensor | None = None,
    v_state: Tensor | None = None, intermediate_angle_states: Tensor | None = None,
    intermediate_k_states: Tensor | None = None, intermediate_v_states: Tensor | None = None,
    out: Tensor | None = None, stream: int | None = None,
) -> _X: ...
@overload
def causal_conv1d(
    x: _X, weight: Tensor, bias: Tensor | None = None, *,
    activation: Literal["silu"] | None = None, channels_last: bool = False,
    initial_states: Tensor | None = None, final_states: None = None,
    return_final_states: Literal[False] = False, cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None, state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None, pad_slot: int | None = None,
    out: Tensor | None = None, stream: int | None = None,
) -> _X: ...
@overload
def causal_conv1d(
    x: _X, weight: Tensor, bias: Tensor | None = None, *,
    activation: Literal["silu"] | None = None, channels_last: bool = False,
    initial_states: Tensor | None = None, final_states: _S, return_final_states: bool = False,
    cu_seqlens: Tensor | None = None, seq_idx: Tensor | None = None,
    state_indices: Tensor | None = None, has_initial_state: Tensor | None = None,
    pad_slot: int | None = None, out: Tensor | None = None, stream: int | None = None,
) -> tuple[_X, _S]: ...
@overload
def causal_conv1d(
    x: _X, weight: Tensor, bias: Tensor | None = None, *,
    activation: Literal["silu"] | None = None, channels_last: bool = False,
    initial_states: Tensor | None = None, final_states: None = None,
    return_final_states: Literal[True], cu_seqlens: Tensor | None = None,
    seq_idx: Tensor | None = None, state_indices: Tensor | None = None,
    has_initial_state: Tensor | None = None, pad_slot: int | None = None,
    out: Tensor | None = None, stream: int | None = None,
) -> tuple[_X, _X]: ...
@overload
def causal_conv1d_update(  # type: ignore[overload-overlap]
    x: _X, conv_state: _J, weight: Tensor, bias: Tensor | None = None, *,
    activation: Literal["silu"] | None = None, cache_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None, state_indices_out: Tensor | None = None,
    num_tokens: Tensor | None = None, channels_last: bool = False, pad_slot: int | None = None,
    out: Tensor | None = None, stream: int | None = None,
) -> tuple[_X, _J]: ...
@overload
def causal_conv1d_update(
    x: _X, conv_state: Tensor, weight: Tensor, bias: Tensor | None = None, *,
    activation: Literal["silu"] | None = None, cache_seqlens: Tensor | None = None,
    state_indices: Tensor | None = None, state_indices_out: Tensor | None = None,
    num_tokens: Tensor | None = None, channels_last: bool = False, pad_slot: int | None = None,
    out: Tensor | None = None, stream: int | None = None,
) -> _X: ...
def mla_decode(
    q_nope: Tensor, seqlens: Tensor, *, q_rope: Tensor | None = None,
    latent: Tensor | None = None, codes: Tensor | None = None, scales: Tensor | None = None,
    biases: Tensor | None = None, k_rope: Tensor | None = None,
    page_table: Tensor | None = None, new_latent: Tensor | None = None,
    new_rope: Tensor | None = None, softmax_scale: float | None = None,
    lse: Tensor | None = None, return_lse: bool = False, batch_invariant: bool = False,
    out: Tensor | None = None, stream: int | None = None,
) -> Any: ...
def device_count(kind: Literal["cpu", "cuda", "metal"] = "cpu") -> int: ...
def backend_built(kind: Literal["cpu", "cuda", "metal"]) -> bool: ...
def cpu_isa() -> str: ...
def num_threads() -> int: ...
def set_num_threads(n: int) -> None: ...
