# SPDX-License-Identifier: MIT
"""Kernels for state-space models (Mamba-1, Mamba-2, Mamba-3), and for decoding over a quantised
latent attention cache.

Tensors.  NumPy arrays (bfloat16 from ml_dtypes too), torch tensors, JAX arrays and whatever else
    has `__dlpack__` are borrowed for the length of a call, without a copy.  Kinds may be mixed, all
    on one device.  Any stride is accepted for inputs, 0 (broadcast) and negative ones included;
    outputs may have any strides under which no two elements share memory.  An output may share
    memory with another tensor of the call only where it says so.

Results.  What is not given as `out` (or another output) is allocated: compact, of the kind and on
    the device of `x`, in its dtype if nothing else is said.  What is given is written, and returned
    as it is.  JAX arrays are immutable: where one would be updated in place, a copy is, and comes
    back behind the result, `(out, state)`; nothing of the caller's changes.  JAX works on the CPU,
    and outside of jit, grad and vmap.

Dtypes.  "float" means float32, float16 or bfloat16, each tensor on its own: mixing is free.
    "index" means int32 or int64.  Arithmetic is float32 inside; every result is rounded once, to
    nearest even, when it is stored.

No gradients.  While torch records them, a tensor that requires grad is refused: use torch.no_grad()
    or .detach().

Reproducible.  The same call gives the same bits from run to run and for any number of threads.  A
    row's result does not depend on the other rows of its batch: in state_update and the
    convolutions always, elsewhere with `batch_invariant=True`.  Functions release the GIL, and may
    be called from several threads as long as no memory that one call writes is used by another.

Errors.  A call that raises has written nothing.  The message names the function, the argument, what
    was expected and what came.
    ValueError           the call can never work: shape, dtype, overlap, bad index ...
    NotImplementedError  a sound call that this build, backend or machine cannot do
    TypeError            an argument is no tensor, or one that cannot be used, as a JAX tracer
    BufferError          memory cannot be borrowed: read-only output, foreign byte order ...
    RuntimeError         a tensor requires grad, or the device failed
    MemoryError          no memory for the workspace

Words.  batch rows, seqlen tokens, T tokens of one decode call, dim channels, nheads, headdim,
    ngroups, dstate, rank (of a Mamba-3 MIMO layer; 1 for SISO), nseq sequences, entries slots of a
    pool. Head h (channel h) uses group h / (nheads / ngroups); ngroups divides nheads (dim).
    dt' = clamp(softplus(dt + dt_bias), *dt_limit), each part only if asked for; softplus(x) is
    log1p(exp(x)), and x itself above 20.  silu(z) = z / (1 + exp(-z)).

Sequences, in selective_scan, ssd_chunk and causal_conv1d.  Exactly one of:
    - neither cu_seqlens nor seq_idx: nseq = batch, every row is one sequence;
    - cu_seqlens, index (nseq + 1,): batch is 1, sequence s is the tokens from cu_seqlens[s] up to
      cu_seqlens[s + 1].  It starts at 0, never decreases and ends at seqlen.  A zero-length
      sequence passes its state through;
    - seq_idx, index (batch, seqlen): tokens of a row with the same id form a sequence.  A token
      whose id differs from that of the last real token before it starts from a zero state.  A
      negative id is a pad: its output is 0, it is not read and changes no state.  nseq = batch: the
      initial state belongs to the row's first sequence, the final state is that after the last real
      token.
    initial_states: zeros if not given.
    final_states may be the very tensor initial_states, which is then updated in place.
    state_indices, index (nseq,): initial_states and final_states are pools (entries, ...), and
      sequence s uses slot state_indices[s] of both.  A pad slot: the whole sequence's output is 0,
      nothing of it is read or written.
    has_initial_state, bool or 8-bit integer (nseq,): a sequence whose flag is 0 starts from zeros.

Slots.  A slot index that is negative or equals pad_slot is a pad.  An index past the pool is an
    error on the CPU, and a pad on a GPU.  Two rows must not write one slot, nor may a row read a
    slot that another row writes: an error on the CPU.

`stream` is the integer handle of a CUDA stream or Metal command queue; None takes the current one
of the tensors' framework.  It means nothing on the CPU.

The environment variable SSMK_ISA picks the CPU's instructions: portable, x86-64-v3, x86-64-v4,
neon.

Sources.  Mamba-1: Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State
    Spaces", eq. 2 and algorithm 2.  Mamba-2: Dao and Gu 2024, "Transformers are SSMs", section 6
    and listing 1. Mamba-3: Lahoti et al. 2026, "Mamba-3: Improved Sequence Modeling using State
    Space Principles". Latent attention: DeepSeek-AI 2024, "DeepSeek-V2", section 2.1, in its
    absorbed form.
"""
from . import out as _out
from ._cffi import ffi as _ffi, lib as _lib
from ._op import Op as _Op
from ._table import OPS as _OPS

__all__ = [
    "selective_scan", "ssd_chunk", "state_update", "causal_conv1d", "causal_conv1d_update",
    "mla_decode", "device_count", "backend_built", "cpu_isa", "num_threads", "set_num_threads"]

_CONSTANTS = {name: getattr(_lib, name) for name in dir(_lib) if name.startswith("SSMK_")}
_DEVICES = {"cpu": 1, "cuda": 2, "metal": 8}  # as DLPack numbers them

__version__ = "{}.{}.{}".format(*_lib.ssmk_version().to_bytes(4, "big")[1:])


def _operation(*results, only_with={}):
    """A declaration becomes the C function of its name; what it returns is its results.

    only_with: {a tensor that is written only where another argument is given: that argument}.

    The declaration holds signature and docstring; _op.pyx says how its parameters are passed on.
    """
    def bind(declaration):
        def address(function):
            return int(_ffi.cast("uintptr_t", _ffi.addressof(_lib, function)))

        name = declaration.__name__
        struct, fields = _OPS[name]
        return _Op(
            declaration, [(field, ctype, _ffi.offsetof(struct, field)) for field, ctype in fields],
            _CONSTANTS, results, only_with, fn=address(f"ssmk_{name}"),
            workspace=address(f"ssmk_{name}_workspace"), last_error=address("ssmk_last_error"),
            size=_ffi.sizeof(struct), complete=_out.complete, allocate=_out.allocate).function
    return bind


@_operation("out", "final_states")
def selective_scan(
        x, dt, A, B, C, D=None, z=None, dt_bias=None, *, dt_softplus=False, dt_limit=None,
        channels_last=False, initial_states=None, final_states=None, return_final_states=False,
        cu_seqlens=None, seq_idx=None, state_indices=None, has_initial_state=None, pad_slot=None,
        batch_invariant=False, out=None, stream=None):
    """Mamba-1 prefill.

        h_t[n] = exp(dt'_t A[d,n]) h_{t-1}[n] + dt'_t x_t B_t[n]
        y_t    = sum_n h_t[n] C_t[n] + D[d] x_t            (A complex: 2 Re(sum) + D x)
        out_t  = y_t silu(z_t), or y_t without z                              for every channel d

    A > 0 is computed as written.  States hold h itself, B included.

    Shapes without channels_last; with it, see the right column.
        x, dt, z, out  float    (batch, dim, seqlen)              (batch, seqlen, dim)
        A              (dim, dstate)  float or complex64
        B, C           each on its own one of
          per token:   float    (batch, ngroups, dstate, seqlen)  (batch, seqlen, ngroups, dstate)
                       float    (batch, dstate, seqlen)           (batch, seqlen, dstate): one group
          constant:    (dim, dstate)
          A complex:   complex64 in these shapes; or, per token, float with the last axis twice as
                       long, holding re, im in turn: (.., 2 seqlen), channels_last (.., 2 dstate)
        D, dt_bias     float    (dim,)                            optional
        z                                                         optional
        initial_states, final_states  (nseq, dim, dstate)         optional; float, complex64 if A is
        cu_seqlens, seq_idx, state_indices, has_initial_state, pad_slot
                       see "Sequences" and "Slots" in help(ssmk)

    dt_softplus, dt_limit = (smallest, largest): what dt' is, see "Words" in help(ssmk).
    final_states is written; return_final_states=True allocates it, in the dtype of initial_states
    if given, else float32 (complex64 for complex A).
    batch_invariant: a row's bits do not depend on the rest of the batch.

    Returns out, or (out, final_states) where final states are wanted.
    For errors and stream see help(ssmk).  Source: Gu and Dao 2023, eq. 2 and algorithm 2.
    """


@_operation(
    "out", "final_states", "final_angle_states", "final_k_states", "final_v_states",
    "captured_states", "captured_angle_states", "captured_k_states", "captured_v_states")
def ssd_chunk(
        x, dt, A, B, C, D=None, z=None, dt_bias=None, *, adt=None, dt_softplus=False, dt_limit=None,
        trap=None, trap_sigmoid=False, angles=None, rotary="interleaved", B_bias=None, C_bias=None,
        mimo_x=None, mimo_z=None, mimo_out=None, norm_weight=None, norm_eps=1e-5,
        initial_states=None, initial_angle_states=None, initial_k_states=None,
        initial_v_states=None, final_states=None, final_angle_states=None, final_k_states=None,
        final_v_states=None, return_final_states=False, cu_seqlens=None, seq_idx=None,
        state_indices=None, has_initial_state=None, pad_slot=None, capture_positions=None,
        captured_states=None, captured_angle_states=None, captured_k_states=None,
        captured_v_states=None, chunk_size=0, batch_invariant=False, out=None, stream=None):
    """Mamba-2 (SSD) and Mamba-3 prefill.

    Mamba-2, for every head (a = dt' A, or adt as given):
        h_t = exp(a_t) h_{t-1} + dt'_t x_t B_t^T          (headdim x dstate)
        y_t = h_t C_t + D x_t;   out_t = y_t silu(z_t), or y_t without z
    Mamba-3 adds the following parts, each optional on its own:
        lambda_t = sigmoid(trap_t), or trap_t itself with trap_sigmoid, or 1 without trap
        theta_t  = (theta_{t-1} + pi tanh(angles_t) dt'_t) mod 2 pi
        q_t^r = Rot(theta_t)(C_t^r + C_bias^r),  k_t^r = Rot(theta_t)(B_t^r + B_bias^r)
        h_t = exp(a_t) h_{t-1}
              + (1 - lambda_t) dt'_t exp(a_t) sum_r (psi^r x_{t-1}) (k_{t-1}^r)^T
              + lambda_t dt'_t sum_r (psi^r x_t) (k_t^r)^T
        y_t^r = h_t q_t^r + D psi^r x_t
        o_t^r = y_t^r silu(zeta^r z_t);
                with norm_weight first y <- y / sqrt(mean_p y^2 + norm_eps) * norm_weight
        out_t = sum_r phi^r o_t^r, or the rank vectors o_t^r without mimo_out

    Shapes
        x               float (batch, seqlen, nheads, headdim)
        dt              float (batch, seqlen, nheads)
        A               float (nheads,)               exactly one of A and adt, the other None;
        adt             float (batch, seqlen, nheads)   adt is the log decay itself
        B, C            float (batch, seqlen, ngroups, dstate), or
                        (batch, seqlen, rank, ngroups, dstate)
        D               float (nheads,) or (nheads, headdim)            optional
        z               float, as x                                     optional
        dt_bias         float (nheads,)                                 optional
        trap            float (batch, seqlen, nheads): logits; with trap_sigmoid lambda in [0, 1]
                        itself                                          optional
        angles          float (batch, seqlen, nheads, nangles), or (batch, seqlen, nangles) for all
                        heads alike; nangles <= dstate / 2              optional
        rotary          how Rot pairs the dstate elements: "interleaved" (2j, 2j+1), or
                        "half" (j, j + dstate/2); j < nangles
        B_bias, C_bias  float (nheads, rank, dstate), or (nheads, dstate) if rank is 1   optional
        mimo_x, mimo_z, mimo_out   float (nheads, rank, headdim): psi, zeta, phi; where not given
                        ones, ones, none
        norm_weight     float (nheads, headdim)                         optional; needs mimo_out if
                        rank > 1
        out             float, as x; (batch, seqlen, rank, nheads, headdim) if rank > 1 without
                        mimo_out
        initial_states, final_states                (nseq, nheads, headdim, dstate)  float, optional
        initial_angle_states, final_angle_states    (nseq, nheads, nangles)          with angles
        initial_k_states, final_k_states            (nseq, rank, nheads, dstate)     with trap
        initial_v_states, final_v_states            (nseq, nheads, headdim)          with trap;
                        x before psi
        capture_positions   index (ncaptures,): flat token numbers b * seqlen + t; the states after
                        that token are written to captured_states (ncaptures, nheads, headdim,
                        dstate) and, where given, to captured_angle_states, captured_k_states,
                        captured_v_states.  Nothing is captured where the
                        position is negative or the token a pad.
        cu_seqlens, seq_idx, state_indices, has_initial_state, pad_slot
                        see "Sequences" and "Slots" in help(ssmk)

    dt_softplus, dt_limit = (smallest, largest): what dt' is, see "Words" in help(ssmk).
    chunk_size: a hint for tuning, 0 = choose; it never changes more than rounding.
    batch_invariant: a row's bits do not depend on the rest of the batch.
    The final states are written; return_final_states=True allocates those of the parts in use, each
    in the dtype of its initial state if given, else float32.

    Returns out, or a tuple of out, the final and the captured states that are wanted, in the order
    of this signature.  For errors and stream see help(ssmk).
    Sources: Dao and Gu 2024, section 6 and listing 1; Lahoti et al. 2026.
    """


@_operation("out")
def state_update(
        state, x, dt, A, B, C, D=None, z=None, dt_bias=None, *, dt_softplus=False, dt_limit=None,
        state_indices=None, state_indices_out=None, num_tokens=None, num_accepted_tokens=None,
        intermediate_states=None, intermediate_indices=None, keep_state=False, pad_slot=None,
        adt=None, trap=None, trap_sigmoid=False, angles=None, rotary="interleaved", B_bias=None,
        C_bias=None, mimo_x=None, mimo_z=None, mimo_out=None, norm_weight=None, norm_eps=1e-5,
        angle_state=None, k_state=None, v_state=None, intermediate_angle_states=None,
        intermediate_k_states=None, intermediate_v_states=None, out=None, stream=None):
    """Decode of T >= 1 tokens, for Mamba-1, Mamba-2 and Mamba-3.

    The recurrences of selective_scan and ssd_chunk, token by token, on states that live in pools.
    The rank of `state` says which:
                  without heads (Mamba-1)     with heads (Mamba-2 and Mamba-3)
        state     (entries, dim, dstate)      (entries, nheads, headdim, dstate)     float, in place
        x, z, out (batch, [T,] dim)           (batch, [T,] nheads, headdim)          float
        dt        (batch, [T,] dim)           (batch, [T,] nheads, headdim), or
                                              tied (batch, [T,] nheads)              float
        A         (dim, dstate)               (nheads, headdim, dstate), or
                                              tied (nheads,)                         float
        adt                                   (batch, [T,] nheads): the log decay, instead of A,
                                              which then is None                     float
        B, C      (batch, [T,] dstate), or    (batch, [T,] ngroups, dstate), or
                  (batch, [T,] ngroups, dstate)   (batch, [T,] rank, ngroups, dstate) for Mamba-3
        D         (dim,)                      (nheads,) or (nheads, headdim)         optional
        dt_bias   (dim,)                      (nheads,) or (nheads, headdim)         optional
        z                                                                            optional
    The T axis is there in x, and then in dt, adt, B, C, z, trap, angles and out as well, or in none
    of them (T = 1).  out is computed from the float32 state before that is rounded to the state's
    dtype; with T > 1 the state stays float32 between the tokens of a call.
    dt_softplus, dt_limit = (smallest, largest): what dt' is, see "Words" in help(ssmk).

    Mamba-3 (with heads; each part optional on its own, formulas in ssd_chunk)
        trap (batch, [T,] nheads): logits; with trap_sigmoid lambda itself.  angles (batch, [T,]
        nheads, nangles) or (batch, [T,] nangles).  B_bias, C_bias, mimo_x, mimo_z, mimo_out,
        norm_weight, norm_eps and rotary as in ssd_chunk.  In place: angle_state (entries, nheads,
        nangles) with angles; k_state (entries, rank, nheads, dstate) and v_state (entries, nheads,
        headdim) with trap.  With angles dt and dt_bias are one value a head; angles are stored in
        [0, 2 pi).

    Slots (all optional)
        state_indices      index (batch,): the slot that each row reads; None = the row number.
                           (batch, K): row b reads slot
                           state_indices[b, max(num_accepted_tokens[b], 1) - 1].
        state_indices_out  index (batch,): the slot that each row writes; None = the slot it reads.
                           (batch, T): the state after token t goes to slot [b, t]; a pad there
                           skips that token.
        pad_slot           a slot number that is a pad, besides the negative ones.  A row whose read
                           slot, or whose one write slot, is a pad: outputs 0, nothing read or
                           written.
        num_tokens         index (batch,), 0 .. T: the row's real tokens; the outputs after them are
                           0. With 0 the state passes through.
        intermediate_states   (rows, T, ...) of any float dtype: the state after token t of row b
                           goes to [intermediate_indices[b], t]; likewise intermediate_angle_states,
                           intermediate_k_states and intermediate_v_states, which come with it where
                           their parts do.  In place (see next).
        intermediate_indices  index (batch,); None = the row number; a pad: none are kept.
        num_accepted_tokens   index (batch,).  With 2-D state_indices: see there.  Otherwise with
                           intermediate_states: row b starts from its intermediate state number
                           num_accepted_tokens[b] - 1, as the previous call left it, or from its
                           slot if the count is 0: this is how rejected draft tokens are rolled
                           back.
        keep_state         the pools are read, not written.

    Returns out; `state` and the other states are updated in place.  Those of them that are JAX
    arrays stay as they are, and their successors are returned behind out: (out, state, ...), in the
    order state, angle_state, k_state, v_state, intermediate_states, intermediate_angle_states,
    intermediate_k_states, intermediate_v_states.
    For errors and stream see help(ssmk).  Sources: those of selective_scan and ssd_chunk.
    """


@_operation("out", "final_states")
def causal_conv1d(
        x, weight, bias=None, *, activation=None, channels_last=False, initial_states=None,
        final_states=None, return_final_states=False, cu_seqlens=None, seq_idx=None,
        state_indices=None, has_initial_state=None, pad_slot=None, out=None, stream=None):
    """The short causal convolution of a layer, depthwise, over whole sequences.

        out_t = act(bias + sum_{w < width} weight[w] X_{t - width + 1 + w})
        X_s   = the initial state for s < 0, else x_s                              for every channel

    With seq_idx a tap whose id differs from the token's counts 0.

    Shapes
        x, out          float (batch, dim, seqlen); with channels_last (batch, seqlen, dim)
        weight          float (dim, width), width 2 to 8
        bias            float (dim,)                                   optional
        initial_states, final_states   float (nseq, dim, state_len), state_len >= width - 1: the
                        last inputs before and after the call, newest last, 0 where there were none.
                        Optional.  With seq_idx the final state holds inputs of the row's last
                        sequence only.
        cu_seqlens, seq_idx, state_indices, has_initial_state, pad_slot
                        see "Sequences" and "Slots" in help(ssmk)

    activation is None or "silu".  final_states is written; return_final_states=True allocates it,
    in dtype and state_len of initial_states if given, else float32 with state_len = width - 1.

    Returns out, or (out, final_states) where final states are wanted.
    For errors and stream see help(ssmk).
    """


@_operation("out")
def causal_conv1d_update(
        x, conv_state, weight, bias=None, *, activation=None, cache_seqlens=None,
        state_indices=None, state_indices_out=None, num_tokens=None, channels_last=False,
        pad_slot=None, out=None, stream=None):
    """The decode step of causal_conv1d: T >= 1 tokens, on states that live in a pool.

        x, out          float (batch, dim) or (batch, dim, T); with channels_last (batch, T, dim)
        conv_state      float (entries, dim, state_len), state_len >= width - 1: the last inputs, in
                        place
        weight          float (dim, width), width 2 to 8
        bias            float (dim,)                                   optional
        activation      None or "silu"
        cache_seqlens   index (batch,), >= 0: conv_state is a ring.  Token t of row b goes to
                        position (cache_seqlens[b] + t) mod state_len and its taps are read
                        backwards from there; a smaller count rolls tokens back (as far as state_len
                        reaches). None: the state is shifted left by T, newest last.  With a ring T
                        may exceed state_len; taps come from x then.
        state_indices, state_indices_out   index (batch,): the slots that each row reads and writes;
                        None = the row number, and the slot it reads
        pad_slot        a slot number that is a pad, besides the negative ones.  A row whose read or
                        write slot is a pad: outputs 0, nothing read, nothing written
        num_tokens      index (batch,), 0 .. T: the row's real tokens; the outputs after them are 0.
                        Optional.

    Returns out; `conv_state` is updated in place, or, if it is a JAX array, stays as it is and
    (out, conv_state) is returned.  For errors and stream see help(ssmk).
    """


@_operation("out", "lse", only_with=dict.fromkeys(
    ("latent", "codes", "scales", "biases", "k_rope"), "new_latent"))
def mla_decode(
        q_nope, seqlens, *, q_rope=None, latent=None, codes=None, scales=None, biases=None,
        k_rope=None, page_table=None, new_latent=None, new_rope=None, softmax_scale=None, lse=None,
        return_lse=False, batch_invariant=False, out=None, stream=None):
    """Attention decode over a latent cache, with the append of the new tokens in the same call.

        score_i = softmax_scale (q_nope . latent_i + q_rope . k_rope_i);  p = softmax(score)
        out     = sum_i p_i latent_i;   lse = log sum_i exp(score_i), natural logarithm

    A query that sees nothing gives out 0 and lse -inf.  The T queries of a row are its last T
    tokens: query t sees cache tokens i < seqlens[b] - T + t + 1 (seqlens counts the tokens after
    the append).

        q_nope          float (batch, [T,] nheads, latent), multiplied by the key up-projection
        q_rope          float (batch, [T,] nheads, rope)               optional, with k_rope
        The cache is dense (batch, capacity, ...) or, with page_table, paged (pages, page_size,
        ...), page_size a power of two of at least 16.  It is either
          latent        float (.., latent), or
          codes         uint32 (.., latent / 8): 4-bit codes, element i of each 8 at bits 4i .. 4i+3
          scales, biases   float (.., latent / group), group 32, 64 or 128, latent a multiple of it:
                        value = code * scale + bias (as in MLX; scales may be negative)
        k_rope          float (.., rope)                               optional
        page_table      index (batch, max_pages): page j of row b.  Entries past the end are not
                        read. Optional.
        seqlens         index (batch,): tokens of each row in the cache, those appended by this call
                        included
        new_latent, new_rope   float (batch, [T,] latent) and (batch, [T,] rope): the T newest
                        tokens; they are quantised if need be, stored at positions seqlens[b] - T ..
                        and used. Optional: the cache tensors are in place then, else only read.
        out             float (batch, [T,] nheads, latent)
        lse             float32 (batch, [T,] nheads): written; return_lse=True allocates it
        softmax_scale   None means 1 / sqrt(latent + rope)
        batch_invariant   a row's bits do not depend on the rest of the batch

    Returns out, or (out, lse) where that is wanted; then, as in state_update, the successors of
    cache tensors that are JAX arrays.  For errors and stream see help(ssmk).
    Source: DeepSeek-AI 2024, section 2.1.
    """


def _device(kind):
    if kind not in _DEVICES:
        raise ValueError(f"kind: expected one of {', '.join(map(repr, _DEVICES))}, got {kind!r}")
    return _DEVICES[kind]


def device_count(kind="cpu"):
    """Devices of a kind ("cpu", "cuda", "metal") that calls can use now: 1 for the CPU; 0 where the
    backend is not built, has no driver or finds no device."""
    return _lib.ssmk_device_count(_device(kind))


def backend_built(kind):
    """Whether this build has the backend for a kind of device: "cpu", "cuda" or "metal"."""
    return bool(_lib.ssmk_backend_built(_device(kind)))


def cpu_isa():
    """The CPU instruction set in use: "x86-64-v4", "x86-64-v3", "neon" or "portable".

    "invalid" if SSMK_ISA names one that this build or machine lacks: every call on the CPU then
    raises NotImplementedError.
    """
    return _ffi.string(_lib.ssmk_cpu_isa()).decode()


def num_threads():
    """Threads that one CPU call may use.

    Default: OMP_NUM_THREADS if set, else the processors that this process may run on.
    """
    return _lib.ssmk_num_threads()


def set_num_threads(n):
    """Set num_threads(); n <= 0 restores the default.  Results do not depend on it."""
    _lib.ssmk_set_num_threads(n)
