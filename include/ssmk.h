/* SPDX-License-Identifier: MIT
 *
 * ssmk.h - kernels for state-space models (Mamba-1, Mamba-2, Mamba-3) and for decoding over a
 * quantised latent attention cache.  Plain C99; this file is the whole public interface.
 *
 * Calling.  Every operation takes one struct of arguments:
 *
 *     ssmk_state_update_args args = {.size = sizeof args, .state = &state, .x = &x, ...};
 *     if (ssmk_state_update(&args) != SSMK_OK) puts(ssmk_last_error());
 *
 *   `size` is the sizeof that the caller was compiled with.  Fields are only ever appended, and
 *   zero (NULL, 0, 0.0) always means "not given": a struct from an older caller works, the fields
 *   that it lacks being absent; one from a newer caller works as long as the fields unknown here
 *   are zero.  Zero the struct before filling it (an initialiser as above does).
 *
 * Tensors are borrowed `DLTensor`s (DLPack 1.3): shape, strides in elements (NULL = compact row-
 *   major), byte_offset.  `const DLTensor *` is read; `DLTensor *` is written, and also read where
 *   it says "in place".  Any stride is accepted for inputs, 0 (broadcast) and negative ones
 *   included; outputs may have any strides under which no two elements share memory.  Packed
 *   layouts are the fast path and are recognised at run time.  All tensors of a call live on one
 *   device.  Offsets are 64-bit throughout.  An output may share memory with another tensor of the
 *   call only where it says so; interleaved tensors (two slices of one buffer) that touch no common
 *   byte are fine.
 *
 * Dtypes.  "float" below means float32, float16 or bfloat16, each tensor on its own: mixing is
 *   free.  "index" means int32 or int64, each tensor on its own.  Arithmetic is float32 inside;
 *   every result is rounded once, to nearest even, when it is stored.
 *
 * Ownership.  Outputs, states and workspace are the caller's.  No call allocates device memory,
 *   synchronises a device or compiles anything.  All functions may be called from several threads
 *   at once as long as no memory that one call writes is used by another.
 *
 * Failure.  A call that does not return SSMK_OK has written nothing to any tensor, and
 *   ssmk_last_error() then names the function, the argument, what was expected and what came:
 *   "state_update: B: shape must be (batch, ngroups, dstate) = (4, 1, 128), got (4, 2, 128)".
 *   (An error that a device reports late, SSMK_DEVICE_ERROR, is the exception: outputs are
 *   undefined.)
 *
 * Reproducible.  The same call gives the same bits from run to run and for any number of threads.
 *   A row's result does not depend on the other rows of its batch: in state_update and the
 *   convolutions always, in the other operations when SSMK_BATCH_INVARIANT is set.  Devices, dtypes,
 *   sizes and layouts may choose the order in which a sum is added up.  On a GPU several bfloat16
 *   tokens of Mamba-2, and those of Mamba-3, may be matrix products, where what is infinite in a
 *   factor gives NaN.  There ssd_chunk of 16-bit inputs is matrix products, too: their factors (the
 *   states, the decayed products C B^T, the weighted x, rotated keys and queries) are rounded to the
 *   inputs' dtype, sums and the states that are carried on are float32, and a NaN or infinity in x
 *   may reach the outputs of up to 63 tokens before it in its own sequence.  Of float32 inputs it may
 *   be matrix products whose factors are sums of two TF32 values: errors stay those of float32, what
 *   is infinite in a factor gives NaN, and nothing reaches an earlier token.
 *
 * Words used below.
 *   batch rows, seqlen tokens, T tokens of one decode call, dim channels, nheads, headdim, ngroups,
 *   dstate, rank (of a Mamba-3 MIMO layer; 1 for SISO), nseq sequences, entries slots of a pool.
 *   Head h (channel h) uses group h / (nheads / ngroups); ngroups divides nheads (dim).
 *   dt' = clamp(softplus(dt + dt_bias), dt_min, dt_max), each part only if asked for; softplus(x)
 *   is log1p(exp(x)), and x itself above 20.  Clamping is off when dt_min and dt_max are both 0.
 *   silu(z) = z / (1 + exp(-z)).
 *
 * Sequences in prefill calls (selective_scan, ssd_chunk, causal_conv1d).  Exactly one of:
 *   - neither cu_seqlens nor seq_idx: nseq = batch, every row is one sequence;
 *   - cu_seqlens, index (nseq + 1,): batch is 1, sequence s is the tokens from cu_seqlens[s] up to
 *     cu_seqlens[s + 1]; it starts at 0, never decreases and ends at seqlen.  A zero-length
 *     sequence passes its state through;
 *   - seq_idx, index (batch, seqlen): tokens of a row with the same id form a sequence.  A token
 *     whose id differs from that of the last real token before it starts from a zero state.  A
 *     negative id is a pad: its output is 0, it is not read and changes no state.  nseq = batch:
 *     the initial state belongs to the row's first sequence, the final state is that after the
 *     last real token.
 *   initial_states NULL = zeros.  final_states NULL = not wanted.  final_states may be the very
 *     tensor initial_states (same memory, shape, strides, dtype): it is then updated in place.
 *   state_indices, index (nseq,): initial_states and final_states are pools (entries, ...) and
 *     sequence s uses slot state_indices[s] of both.  A pad slot: the whole sequence's output is 0,
 *     nothing of it is read or written.
 *   has_initial_state, bool (int8, uint8 or bool) (nseq,): a sequence whose flag is 0 starts from
 *     zeros.  Only with initial_states.
 *
 * Slots.  A slot index that is negative or equals pad_slot is a pad.  An index >= entries is an
 *   error on the CPU, and a pad on a GPU, where the indices cannot be seen without a
 *   synchronisation.  Two rows must not write one slot, nor may a row read a slot that another row
 *   writes: on the CPU that is an error, on a GPU the result is undefined.  pad_slot counts only
 *   with SSMK_PAD_SLOT in flags: in a zeroed struct slot 0 is an ordinary slot.
 *
 * Sources.  Mamba-1: Gu and Dao 2023, "Mamba: Linear-Time Sequence Modeling with Selective State
 *   Spaces", eq. 2 and algorithm 2.  Mamba-2: Dao and Gu 2024, "Transformers are SSMs", section 6
 *   and listing 1.  Mamba-3: Lahoti et al. 2026, "Mamba-3: Improved Sequence Modeling using State
 *   Space Principles": the exponential-trapezoidal rule, the data-dependent rotation, MIMO.  Latent
 *   attention: DeepSeek-AI 2024, "DeepSeek-V2", section 2.1, in its absorbed form.
 */
#ifndef SSMK_H
#define SSMK_H

#include <dlpack/dlpack.h>
#include <stdint.h>

#if defined(_WIN32)
#ifdef SSMK_BUILD
#define SSMK_API __declspec(dllexport)
#else
#define SSMK_API __declspec(dllimport)
#endif
#else
#define SSMK_API __attribute__((visibility("default")))
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* [cffi-begin]  what stands between these marks is also read by tools/ffi_build.py */

#define SSMK_VERSION_MAJOR 0
#define SSMK_VERSION_MINOR 1
#define SSMK_VERSION_PATCH 0

typedef enum ssmk_status {
  SSMK_OK = 0,
  SSMK_INVALID_ARGUMENT = 1, /* the call can never work: shape, dtype, NULL, overlap, index ... */
  SSMK_UNSUPPORTED = 2,      /* a sound call that this build, backend or machine cannot do */
  SSMK_DEVICE_ERROR = 3,     /* the device or its driver reported a failure */
  SSMK_OUT_OF_MEMORY = 4     /* workspace is too small (see ssmk_X_workspace) */
} ssmk_status;

/* Bits of the `flags` fields. */
#define SSMK_BATCH_INVARIANT 1 /* a row's bits do not depend on the rest of the batch */
#define SSMK_PAD_SLOT 2        /* slot `pad_slot` is a pad, besides the negative ones */
#define SSMK_KEEP_STATE 4      /* state_update: leave the pools alone */
#define SSMK_TRAP_SIGMOID 8    /* Mamba-3: `trap` holds lambda in [0, 1], not its logit */

typedef enum ssmk_activation {
  SSMK_ACTIVATION_NONE = 0,
  SSMK_ACTIVATION_SILU = 1
} ssmk_activation;

/* How a Mamba-3 rotation pairs dstate elements, j < nangles: (2j, 2j+1), or (j, j + dstate/2). */
typedef enum ssmk_rotary {
  SSMK_ROTARY_INTERLEAVED = 0,
  SSMK_ROTARY_HALF = 1
} ssmk_rotary;

/* ------------------------------------ selective_scan: Mamba-1 prefill
 *
 *   h_t[n] = exp(dt'_t A[d,n]) h_{t-1}[n] + dt'_t x_t B_t[n]
 *   y_t    = sum_n h_t[n] C_t[n] + D[d] x_t            (A complex: 2 Re(sum) + D x)
 *   out_t  = y_t silu(z_t), or y_t without z                              for every channel d
 *
 * A > 0 is computed as written.  States hold h itself, B included.
 * Shapes with channels_last = 0; with channels_last = 1 see the right column.
 *
 *   x, dt, z, out   (batch, dim, seqlen)                (batch, seqlen, dim)          float
 *   A               (dim, dstate)                       float or complex64
 *   B, C            each on its own one of
 *     per token     (batch, ngroups, dstate, seqlen)    (batch, seqlen, ngroups, dstate)
 *     one group     (batch, dstate, seqlen)             (batch, seqlen, dstate)
 *     constant      (dim, dstate)
 *                   float; if A is complex complex64, or (per token only) float with the last axis
 *                   twice as long, holding re, im in turn: (.., 2 seqlen), or (.., 2 dstate)
 *   D, dt_bias      (dim,)                              float, optional
 *   z               is optional
 *   initial_states, final_states    (nseq, dim, dstate), optional; float, or complex64 like A
 *   cu_seqlens, seq_idx, state_indices, has_initial_state: see "Sequences"
 */
typedef struct ssmk_selective_scan_args {
  uint64_t size;
  const DLTensor *x;
  const DLTensor *dt;
  const DLTensor *A;
  const DLTensor *B;
  const DLTensor *C;
  const DLTensor *D;
  const DLTensor *z;
  const DLTensor *dt_bias;
  const DLTensor *initial_states;
  const DLTensor *cu_seqlens;
  const DLTensor *seq_idx;
  const DLTensor *state_indices;
  const DLTensor *has_initial_state;
  DLTensor *out;
  DLTensor *final_states;
  int32_t dt_softplus;   /* bool */
  int32_t channels_last; /* bool */
  float dt_min;
  float dt_max;
  int64_t pad_slot;
  void *stream;             /* cudaStream_t or id<MTLCommandQueue>; ignored on the CPU */
  void *workspace;          /* device memory, 256-byte aligned (CPU: host memory, 64) */
  uint64_t workspace_bytes;
  uint64_t flags;           /* SSMK_BATCH_INVARIANT, SSMK_PAD_SLOT */
} ssmk_selective_scan_args;

SSMK_API ssmk_status ssmk_selective_scan(const ssmk_selective_scan_args *args);
/* Scratch that the same call needs, in bytes; data pointers are not looked at and may be NULL.  On
 * the CPU it may grow with ssmk_num_threads(). */
SSMK_API ssmk_status ssmk_selective_scan_workspace(const ssmk_selective_scan_args *args,
    uint64_t *bytes);

/* ------------------------------------ ssd_chunk: Mamba-2 and Mamba-3 prefill
 *
 * Mamba-2, for every head (a = dt' A, or adt as given):
 *   h_t = exp(a_t) h_{t-1} + dt'_t x_t B_t^T          (headdim x dstate)
 *   y_t = h_t C_t + D x_t;   out_t = y_t silu(z_t), or y_t without z
 * Mamba-3 adds the following parts, each optional on its own:
 *   lambda_t = sigmoid(trap_t), or 1 without trap
 *   theta_t  = (theta_{t-1} + pi tanh(angles_t) dt'_t) mod 2 pi
 *   q_t^r = Rot(theta_t)(C_t^r + C_bias^r),  k_t^r = Rot(theta_t)(B_t^r + B_bias^r)
 *   h_t = exp(a_t) h_{t-1} + (1 - lambda_t) dt'_t exp(a_t) sum_r (psi^r x_{t-1}) (k_{t-1}^r)^T
 *                          + lambda_t dt'_t sum_r (psi^r x_t) (k_t^r)^T
 *   y_t^r = h_t q_t^r + D psi^r x_t
 *   o_t^r = y_t^r silu(zeta^r z_t); with norm_weight y is first multiplied by
 *           norm_weight / sqrt(mean_p y^2 + norm_eps)
 *   out_t = sum_r phi^r o_t^r, or the rank vectors o_t^r without mimo_out
 *
 *   x               (batch, seqlen, nheads, headdim)       float, like all that follow
 *   dt              (batch, seqlen, nheads)
 *   A               (nheads,): exactly one of A and adt
 *   adt             (batch, seqlen, nheads): the log decay itself, independent of dt
 *   B, C            (batch, seqlen, ngroups, dstate), or (batch, seqlen, rank, ngroups, dstate)
 *   out             as x; (batch, seqlen, rank, nheads, headdim) if rank > 1 without mimo_out
 *  optional:
 *   D               (nheads,) or (nheads, headdim)
 *   z               as x
 *   dt_bias         (nheads,)
 *   trap            (batch, seqlen, nheads): logits, or lambda with SSMK_TRAP_SIGMOID
 *   angles          (batch, seqlen, nheads, nangles), or (batch, seqlen, nangles) for all heads;
 *                   nangles <= dstate / 2
 *   B_bias, C_bias  (nheads, rank, dstate), or (nheads, dstate) if rank is 1
 *   mimo_x, mimo_z, mimo_out   (nheads, rank, headdim): psi, zeta, phi.  NULL: ones, ones, none
 *   norm_weight     (nheads, headdim); if rank > 1 mimo_out is needed too
 *   initial_states, final_states               (nseq, nheads, headdim, dstate)
 *   initial_angle_states, final_angle_states   (nseq, nheads, nangles), with angles
 *   initial_k_states, final_k_states           (nseq, rank, nheads, dstate), with trap
 *   initial_v_states, final_v_states           (nseq, nheads, headdim): x before psi, with trap
 *   capture_positions   index (ncaptures,): flat token numbers b * seqlen + t.  Where it is
 *                       negative, or the token a pad, nothing is captured, nothing written.
 *   captured_states     (ncaptures, nheads, headdim, dstate): the states after those tokens, and
 *                       where given captured_angle_states, captured_k_states, captured_v_states
 *   cu_seqlens, seq_idx, state_indices, has_initial_state: see "Sequences"; for all four states
 *   chunk_size      a hint for tuning, 0 = choose; never changes more than rounding
 */
typedef struct ssmk_ssd_chunk_args {
  uint64_t size;
  const DLTensor *x;
  const DLTensor *dt;
  const DLTensor *A;
  const DLTensor *adt;
  const DLTensor *B;
  const DLTensor *C;
  const DLTensor *D;
  const DLTensor *z;
  const DLTensor *dt_bias;
  const DLTensor *trap;
  const DLTensor *angles;
  const DLTensor *B_bias;
  const DLTensor *C_bias;
  const DLTensor *mimo_x;
  const DLTensor *mimo_z;
  const DLTensor *mimo_out;
  const DLTensor *norm_weight;
  const DLTensor *initial_states;
  const DLTensor *initial_angle_states;
  const DLTensor *initial_k_states;
  const DLTensor *initial_v_states;
  const DLTensor *cu_seqlens;
  const DLTensor *seq_idx;
  const DLTensor *state_indices;
  const DLTensor *has_initial_state;
  const DLTensor *capture_positions;
  DLTensor *out;
  DLTensor *final_states;
  DLTensor *final_angle_states;
  DLTensor *final_k_states;
  DLTensor *final_v_states;
  DLTensor *captured_states;
  DLTensor *captured_angle_states;
  DLTensor *captured_k_states;
  DLTensor *captured_v_states;
  int32_t dt_softplus; /* bool */
  int32_t chunk_size;
  float dt_min;
  float dt_max;
  float norm_eps;
  int32_t rotary; /* ssmk_rotary */
  int64_t pad_slot;
  void *stream;
  void *workspace;
  uint64_t workspace_bytes;
  uint64_t flags; /* SSMK_BATCH_INVARIANT, SSMK_PAD_SLOT, SSMK_TRAP_SIGMOID */
} ssmk_ssd_chunk_args;

SSMK_API ssmk_status ssmk_ssd_chunk(const ssmk_ssd_chunk_args *args);
SSMK_API ssmk_status ssmk_ssd_chunk_workspace(const ssmk_ssd_chunk_args *args, uint64_t *bytes);

/* ------------------------------------ state_update: decode, T >= 1 tokens
 *
 * The recurrences above, token by token, on states in pools.  The rank of `state` says which:
 *
 *                without heads: Mamba-1          with heads: Mamba-2 and Mamba-3
 *   state        (entries, dim, dstate)          (entries, nheads, headdim, dstate), in place
 *   x, z, out    (batch, [T,] dim)               (batch, [T,] nheads, headdim)
 *   dt           (batch, [T,] dim)               (batch, [T,] nheads, headdim)
 *                                                or, tied, (batch, [T,] nheads)
 *   A            (dim, dstate)                   (nheads, headdim, dstate) or, tied, (nheads,)
 *   adt                                          (batch, [T,] nheads): instead of A
 *   B, C         (batch, [T,] ngroups, dstate)   (batch, [T,] ngroups, dstate), Mamba-3 also
 *                or (batch, [T,] dstate)         (batch, [T,] rank, ngroups, dstate)
 *   D, dt_bias   (dim,)                          (nheads,) or (nheads, headdim)
 * All are float; z, D and dt_bias are optional.  The T axis is there in x, and then in dt, adt, B,
 * C, z, trap, angles and out as well, or in none of them (T = 1).
 * out is computed from the float32 state before that is rounded to the state's dtype; with T > 1
 * the state stays float32 between the tokens of a call.
 *
 * Mamba-3 (with heads; each part optional on its own, formulas above):
 *   trap         (batch, [T,] nheads)
 *   angles       (batch, [T,] nheads, nangles) or (batch, [T,] nangles)
 *   B_bias, C_bias, mimo_x, mimo_z, mimo_out, norm_weight, rotary as in ssd_chunk
 *   angle_state  (entries, nheads, nangles), required with angles; in place, as are
 *   k_state      (entries, rank, nheads, dstate) and
 *   v_state      (entries, nheads, headdim), both required with trap
 *   With angles dt and dt_bias are one value a head.  Exactly one of A and adt is given.
 *   Angles are stored in [0, 2 pi).
 *   out is (batch, [T,] rank, nheads, headdim) if rank > 1 without mimo_out
 *
 * Slots (all optional; index dtypes):
 *   state_indices         (batch,): the slot that each row reads; NULL = the row number.
 *                         (batch, K): row b reads state_indices[b, max(accepted, 1) - 1], where
 *                         accepted is num_accepted_tokens[b].
 *   state_indices_out     (batch,): the slot that each row writes; NULL = the slot it reads.
 *                         (batch, T): the state after token t goes to slot [b, t]; a pad there
 *                         skips that token.
 *                         A row whose read slot, or whose one write slot, is a pad: outputs 0,
 *                         nothing read, nothing written.
 *   num_tokens            (batch,), 0 .. T: the row's real tokens; the outputs after them are 0.
 *                         With 0 the state passes through.
 *   intermediate_states   (rows, T, ...), float: the state after token t of row b goes to
 *                         [intermediate_indices[b], t]; likewise intermediate_angle_states,
 *                         _k_states and _v_states, which come with it where their parts do.  In
 *                         place: see num_accepted_tokens.
 *   intermediate_indices  (batch,); NULL = the row number; a negative one: none for that row.
 *   num_accepted_tokens   (batch,).  With 2-D state_indices: see there.  Otherwise, with
 *                         intermediate_states: row b starts from its intermediate state number
 *                         num_accepted_tokens[b] - 1, as the previous call left it, or from its
 *                         slot if the count is 0.  So rejected draft tokens are rolled back.
 *                         Required with K > 1, refused where there is nothing to choose from.
 *   SSMK_KEEP_STATE       the pools are read, not written; excludes state_indices_out.
 */
typedef struct ssmk_state_update_args {
  uint64_t size;
  const DLTensor *x;
  const DLTensor *dt;
  const DLTensor *A;
  const DLTensor *adt;
  const DLTensor *B;
  const DLTensor *C;
  const DLTensor *D;
  const DLTensor *z;
  const DLTensor *dt_bias;
  const DLTensor *trap;
  const DLTensor *angles;
  const DLTensor *B_bias;
  const DLTensor *C_bias;
  const DLTensor *mimo_x;
  const DLTensor *mimo_z;
  const DLTensor *mimo_out;
  const DLTensor *norm_weight;
  const DLTensor *state_indices;
  const DLTensor *state_indices_out;
  const DLTensor *num_tokens;
  const DLTensor *num_accepted_tokens;
  const DLTensor *intermediate_indices;
  DLTensor *state;
  DLTensor *angle_state;
  DLTensor *k_state;
  DLTensor *v_state;
  DLTensor *intermediate_states;
  DLTensor *intermediate_angle_states;
  DLTensor *intermediate_k_states;
  DLTensor *intermediate_v_states;
  DLTensor *out;
  int32_t dt_softplus; /* bool */
  int32_t rotary;      /* ssmk_rotary */
  float dt_min;
  float dt_max;
  float norm_eps;
  int32_t reserved; /* 0 */
  int64_t pad_slot;
  void *stream;
  void *workspace;
  uint64_t workspace_bytes;
  uint64_t flags; /* SSMK_PAD_SLOT, SSMK_KEEP_STATE, SSMK_TRAP_SIGMOID */
} ssmk_state_update_args;

SSMK_API ssmk_status ssmk_state_update(const ssmk_state_update_args *args);
SSMK_API ssmk_status ssmk_state_update_workspace(const ssmk_state_update_args *args,
    uint64_t *bytes);

/* ------------------------------------ causal_conv1d: the short convolution
 *
 *   out_t = act(bias + sum_{w < width} weight[w] X_{t - width + 1 + w})
 *
 * where X is the initial state (zeros without one) followed by x.  Depthwise over dim channels,
 * width 2 to 8.  Taps go by position: with seq_idx one that falls on another id or on a pad counts
 * 0, and the initial state stands before the row's position 0, for tokens of the first sequence.
 *
 *   x, out          (batch, dim, seqlen); channels_last = 1: (batch, seqlen, dim)      float
 *   weight          (dim, width)                                                       float
 *   bias            (dim,)                                                   float, optional
 *   initial_states, final_states   (nseq, dim, state_len), state_len >= width - 1, float, optional:
 *                   the last inputs before and after the call, newest last, 0 where there were
 *                   none.  With seq_idx the final state is what a token of the last sequence,
 *                   right after its last one, would find before it.
 *   cu_seqlens, seq_idx, state_indices, has_initial_state: see "Sequences"
 */
typedef struct ssmk_causal_conv1d_args {
  uint64_t size;
  const DLTensor *x;
  const DLTensor *weight;
  const DLTensor *bias;
  const DLTensor *initial_states;
  const DLTensor *cu_seqlens;
  const DLTensor *seq_idx;
  const DLTensor *state_indices;
  const DLTensor *has_initial_state;
  DLTensor *out;
  DLTensor *final_states;
  int32_t activation;    /* ssmk_activation */
  int32_t channels_last; /* bool */
  int64_t pad_slot;
  void *stream;
  void *workspace;
  uint64_t workspace_bytes;
  uint64_t flags; /* SSMK_PAD_SLOT */
} ssmk_causal_conv1d_args;

SSMK_API ssmk_status ssmk_causal_conv1d(const ssmk_causal_conv1d_args *args);
SSMK_API ssmk_status ssmk_causal_conv1d_workspace(const ssmk_causal_conv1d_args *args,
    uint64_t *bytes);

/* ------------------------------------ causal_conv1d_update: its decode step
 *
 *   x, out          (batch, dim) or (batch, dim, T); channels_last = 1: (batch, T, dim)    float
 *   conv_state      (entries, dim, state_len), state_len >= width - 1, float: the last inputs; in
 *                   place
 *   weight, bias    as in causal_conv1d
 *  optional, index dtypes:
 *   cache_seqlens   (batch,), >= 0: conv_state is a ring.  Token t of row b goes to position
 *                   (cache_seqlens[b] + t) mod state_len, and its taps are read backwards from
 *                   there; a smaller count rolls tokens back, as far as state_len reaches.  T may
 *                   exceed state_len.  NULL: the state is shifted left by T, newest last.
 *   state_indices, state_indices_out   (batch,): read and write slot, as in state_update
 *   num_tokens      (batch,), 0 .. T: real tokens; the outputs after them are 0
 */
typedef struct ssmk_causal_conv1d_update_args {
  uint64_t size;
  const DLTensor *x;
  const DLTensor *weight;
  const DLTensor *bias;
  const DLTensor *cache_seqlens;
  const DLTensor *state_indices;
  const DLTensor *state_indices_out;
  const DLTensor *num_tokens;
  DLTensor *conv_state;
  DLTensor *out;
  int32_t activation;    /* ssmk_activation */
  int32_t channels_last; /* bool */
  int64_t pad_slot;
  void *stream;
  void *workspace;
  uint64_t workspace_bytes;
  uint64_t flags; /* SSMK_PAD_SLOT */
} ssmk_causal_conv1d_update_args;

SSMK_API ssmk_status ssmk_causal_conv1d_update(const ssmk_causal_conv1d_update_args *args);
SSMK_API ssmk_status ssmk_causal_conv1d_update_workspace(const ssmk_causal_conv1d_update_args *args,
    uint64_t *bytes);

/* ------------------------------------ mla_decode: attention over a latent cache
 *
 *   score_i = softmax_scale (q_nope . latent_i + q_rope . k_rope_i);  p = softmax(score)
 *   out     = sum_i p_i latent_i;   lse = log sum_i exp(score_i), natural logarithm
 * A query that sees nothing gives out 0 and lse -inf.  The T queries of a row are its last T
 * tokens: query t sees the cache tokens i < seqlens[b] - T + t + 1.
 *
 *   q_nope          (batch, [T,] nheads, latent), float: multiplied by the key up-projection
 *   q_rope          (batch, [T,] nheads, rope), float, optional, with k_rope
 *   The cache is dense, (batch, capacity, ...), or with page_table paged, (pages, page_size, ...)
 *   with page_size a power of two of at least 16.  It is either
 *     latent        (.., latent), float, or
 *     codes         (.., latent / 8), uint32: 4-bit codes, element i of each 8 at bits 4i .. 4i+3
 *     scales, biases   (.., latent / group), float; group 32, 64 or 128:
 *                   value = code * scale + bias (the affine layout of MLX; scales may be negative)
 *   k_rope          (.., rope), float, optional
 *   page_table      (batch, max_pages), index: page j of row b.  Entries past the row's end are
 *                   not read.
 *   seqlens         (batch,), index: tokens of each row in the cache, those that this call appends
 *                   included
 *   new_latent      (batch, [T,] latent), new_rope (batch, [T,] rope), float, optional: the T
 *                   newest tokens.  They are quantised if the cache is, stored at positions
 *                   seqlens[b] - T and up, and used.  Only then is the cache written.
 *   out             (batch, [T,] nheads, latent), float
 *   lse             (batch, [T,] nheads), float32, optional
 *   softmax_scale   0 means 1 / sqrt(latent + rope)
 */
typedef struct ssmk_mla_decode_args {
  uint64_t size;
  const DLTensor *q_nope;
  const DLTensor *q_rope;
  const DLTensor *page_table;
  const DLTensor *seqlens;
  const DLTensor *new_latent;
  const DLTensor *new_rope;
  DLTensor *latent;
  DLTensor *codes;
  DLTensor *scales;
  DLTensor *biases;
  DLTensor *k_rope;
  DLTensor *out;
  DLTensor *lse;
  float softmax_scale;
  int32_t reserved; /* 0 */
  void *stream;
  void *workspace;
  uint64_t workspace_bytes;
  uint64_t flags; /* SSMK_BATCH_INVARIANT */
} ssmk_mla_decode_args;

SSMK_API ssmk_status ssmk_mla_decode(const ssmk_mla_decode_args *args);
SSMK_API ssmk_status ssmk_mla_decode_workspace(const ssmk_mla_decode_args *args, uint64_t *bytes);

/* ------------------------------------ the library itself */

/* What went wrong in the last failing call of this thread; "" before any.  Valid until the thread's
 * next failure. */
SSMK_API const char *ssmk_last_error(void);

/* The name of a status: "SSMK_OK", ...; "unknown" for other values. */
SSMK_API const char *ssmk_status_name(ssmk_status status);

/* The library's version: major << 16 | minor << 8 | patch. */
SSMK_API uint32_t ssmk_version(void);

/* Devices of one kind (kDLCPU, kDLCUDA, kDLMetal as numbered by DLPack) that calls can use now: 1
 * for the CPU; 0 where the backend is not built, has no driver or finds no device.  Never an
 * error. */
SSMK_API int32_t ssmk_device_count(int32_t device_type);

/* 1 if this build has the backend for that kind of device, else 0. */
SSMK_API int32_t ssmk_backend_built(int32_t device_type);

/* The CPU instruction set in use: "x86-64-v4", "x86-64-v3", "neon" or "portable".  Picked at the
 * first use: the best that the machine has, or what the environment variable SSMK_ISA names.  A
 * level that this build or machine lacks is not replaced in silence: this returns "invalid", and
 * every CPU call fails with SSMK_UNSUPPORTED. */
SSMK_API const char *ssmk_cpu_isa(void);

/* Threads that one CPU call may use.  Default: OMP_NUM_THREADS if set, else the processors that
 * this process may run on.  n <= 0 restores the default.  Results do not depend on it. */
SSMK_API void ssmk_set_num_threads(int32_t n);
SSMK_API int32_t ssmk_num_threads(void);

/* [cffi-end] */

#ifdef __cplusplus
}
#endif
#endif /* SSMK_H */
