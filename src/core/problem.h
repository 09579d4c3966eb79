// SPDX-License-Identifier: MIT
// What a backend is asked to do: one plain struct per operation, checked by src/api.
// Axes stand in the order of the comments whatever the layout of the caller's tensors.
#pragma once

#include <cstdint>

#include "core/tensor.h"

namespace ssmk {

struct Workspace {
  void *data = nullptr;
  uint64_t bytes = 0;
};

// dt' = clamp(softplus(dt + dt_bias)), each part if asked for.
struct DtTransform {
  bool softplus = false;
  bool clamp = false;
  float lo = 0, hi = 0;
};

// Which slots are pads.
struct PadRule {
  bool has_pad_slot = false;
  int64_t pad_slot = 0;
  int64_t entries = 0;

  SSMK_ANYWHERE bool is_pad(int64_t slot) const {
    return slot < 0 || slot >= entries || (has_pad_slot && slot == pad_slot);
  }
};

// How the tokens of a prefill call are cut into sequences, and where their states are.
struct Sequences {
  int64_t nseq = 0;
  View<1> cu_seqlens;         // (nseq + 1)
  View<2> seq_idx;            // (batch, seqlen)
  View<1> state_indices;      // (nseq)
  View<1> has_initial_state;  // (nseq)
  PadRule pad;
};

// Tokens [begin, end) of row `row`, whose states are in slot `slot`.
struct Sequence {
  int64_t row = 0, begin = 0, end = 0, slot = 0;
  bool pad = false;          // the slot is a pad: zero the output, touch nothing else
  bool has_initial = false;  // given that there are initial states at all
};

inline Sequence sequence(const Sequences &seqs, int64_t s, int64_t seqlen) {
  Sequence q;
  q.row = seqs.cu_seqlens.given() ? 0 : s;
  q.begin = seqs.cu_seqlens.given() ? read_index(seqs.cu_seqlens, s) : 0;
  q.end = seqs.cu_seqlens.given() ? read_index(seqs.cu_seqlens, s + 1) : seqlen;
  q.slot = seqs.state_indices.given() ? read_index(seqs.state_indices, s) : s;
  q.pad = seqs.state_indices.given() && seqs.pad.is_pad(q.slot);
  q.has_initial = !seqs.has_initial_state.given() || *seqs.has_initial_state.at(s) != 0;
  return q;
}

// What a head carries from token to token, in pools or one entry a sequence; axis 0 is the entry.
struct HeadStates {
  View<4> h;      // (entries, nheads, headdim, dstate)
  View<3> angle;  // (entries, nheads, nangles)
  View<4> k;      // (entries, rank, nheads, dstate)
  View<3> v;      // (entries, nheads, headdim)
};

// The weights and switches of Mamba-3 that prefill and decode share.
struct Mamba3 {
  int64_t rank = 1, nangles = 0;
  View<3> B_bias, C_bias;            // (nheads, rank, dstate)
  View<3> mimo_x, mimo_z, mimo_out;  // (nheads, rank, headdim): psi, zeta, phi
  View<2> norm_weight;               // (nheads, headdim)
  float norm_eps = 0;
  bool rotary_half = false;   // pairs (j, j + dstate / 2), else (2j, 2j + 1)
  bool trap_sigmoid = false;  // trap holds lambda, not its logit

  bool any() const {
    return rank > 1 || B_bias.given() || C_bias.given() || mimo_x.given() || mimo_z.given() ||
           mimo_out.given() || norm_weight.given();
  }
};

struct SelectiveScanProblem {
  int64_t batch = 0, dim = 0, seqlen = 0, ngroups = 1, dstate = 0;
  bool complex = false;
  bool B_varies = true, C_varies = true;
  View<3> x, dt, z, out;  // (batch, dim, seqlen)
  ComplexView<2> A;       // (dim, dstate)
  ComplexView<4> B, C;    // (batch, ngroups, dstate, seqlen), or constant: (1, dim, dstate, 1)
  View<1> D, dt_bias;     // (dim)
  ComplexView<3> initial_states, final_states;  // (nseq or entries, dim, dstate)
  Sequences seqs;
  DtTransform dt_transform;
  bool batch_invariant = false;
  Workspace workspace;
};

struct SsdChunkProblem {
  int64_t batch = 0, seqlen = 0, nheads = 0, headdim = 0, ngroups = 1, dstate = 0, ncaptures = 0;
  int64_t chunk_size = 0;  // 0 = choose
  View<4> x, z;            // (batch, seqlen, nheads, headdim)
  View<5> out;             // (batch, seqlen, rank, nheads, headdim); rank summed: stride 0 there
  View<3> dt, adt, trap;   // (batch, seqlen, nheads)
  View<1> A, dt_bias;      // (nheads)
  View<5> B, C;            // (batch, seqlen, rank, ngroups, dstate)
  View<2> D;               // (nheads, headdim)
  View<4> angles;          // (batch, seqlen, nheads, nangles)
  Mamba3 mamba3;
  HeadStates initial, final, captured;
  View<1> capture_positions;  // (ncaptures)
  Sequences seqs;
  DtTransform dt_transform;
  bool batch_invariant = false;
  Workspace workspace;
};

// The pools and slots of a decode call.
struct Slots {
  View<2> in;   // (batch, K): slots that can be read; K = 1 unless accepted counts choose
  View<2> out;  // (batch, T or 1): slots to write
  int64_t in_choices = 1;
  bool in_chosen = false;  // by accepted counts: `in` came with two axes
  bool out_per_token = false;
  View<1> num_tokens, num_accepted;  // (batch)
  View<1> intermediate_indices;      // (batch)
  int64_t intermediate_entries = 0;
  PadRule pad;
  bool keep_state = false;
};

struct StateUpdateProblem {
  int64_t batch = 0, ntokens = 1, nheads = 0, headdim = 0, ngroups = 1, dstate = 0;
  View<4> x, dt, z;   // (batch, T, nheads, headdim); Mamba-1: headdim = dim / nheads, A etc. untied
  View<5> out;        // (batch, T, rank, nheads, headdim); one vector for all ranks: stride 0 there
  View<3> A;          // (nheads, headdim, dstate)
  View<3> adt, trap;  // (batch, T, nheads)
  View<5> B, C;       // (batch, T, rank, ngroups, dstate)
  View<2> D, dt_bias;    // (nheads, headdim)
  View<4> angles;        // (batch, T, nheads, nangles)
  View<4> state;         // (entries, nheads, headdim, dstate)
  View<5> intermediate;  // (rows, T, nheads, headdim, dstate)
  Mamba3 mamba3;
  View<3> angle_state, v_state;                // (entries, nheads, nangles or headdim)
  View<4> k_state;                             // (entries, rank, nheads, dstate)
  View<4> intermediate_angle, intermediate_v;  // (rows, T, nheads, nangles or headdim)
  View<5> intermediate_k;                      // (rows, T, rank, nheads, dstate)
  Slots slots;
  DtTransform dt_transform;
  Workspace workspace;

  bool is_mamba3() const { return mamba3.any() || adt.given() || trap.given() || angles.given(); }
};

enum class Activation : uint8_t { kNone, kSilu };

struct CausalConv1dProblem {
  int64_t batch = 0, dim = 0, seqlen = 0, width = 0, state_len = 0;
  View<3> x, out;                        // (batch, dim, seqlen)
  View<2> weight;                        // (dim, width)
  View<1> bias;                          // (dim)
  View<3> initial_states, final_states;  // (nseq or entries, dim, state_len)
  Sequences seqs;
  Activation activation = Activation::kNone;
  Workspace workspace;
};

struct CausalConv1dUpdateProblem {
  int64_t batch = 0, dim = 0, ntokens = 1, width = 0, state_len = 0;
  View<3> x, out;                                                       // (batch, dim, T)
  View<2> weight;                                                       // (dim, width)
  View<1> bias;                                                         // (dim)
  View<3> conv_state;                                                   // (entries, dim, state_len)
  View<1> cache_seqlens, state_indices, state_indices_out, num_tokens;  // (batch)
  PadRule pad;
  Activation activation = Activation::kNone;
  Workspace workspace;
};

constexpr int64_t kMaxConvWidth = 8;

// The cache's first axis is the row, or with pages the page; `position` runs inside it.
struct MlaDecodeProblem {
  int64_t batch = 0, ntokens = 1, nheads = 0, latent = 0, rope = 0;
  int64_t group = 0;       // channels of one scale; 0: the cache holds floats
  int64_t capacity = 0;    // positions that a row can have
  int64_t page_size = 0;   // a power of two, or 0: dense
  View<4> q_nope, out;     // (batch, T, nheads, latent)
  View<4> q_rope;          // (batch, T, nheads, rope)
  View<3> values;          // (rows or pages, position, latent): a cache of floats
  View<3> codes;           // (rows or pages, position, latent / 8)
  View<3> scales, biases;  // (rows or pages, position, latent / group)
  View<3> k_rope;          // (rows or pages, position, rope)
  View<2> page_table;      // (batch, max_pages)
  View<1> seqlens;         // (batch)
  View<3> new_latent;      // (batch, T, latent): given, the cache is written
  View<3> new_rope;        // (batch, T, rope)
  View<3> lse;             // (batch, T, nheads)
  float softmax_scale = 0;
  bool batch_invariant = false;
  Workspace workspace;
};

}  // namespace ssmk
