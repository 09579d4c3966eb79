// SPDX-License-Identifier: MIT
// The fields that several operations share: dt, sequences, slots, workspace.
#pragma once

#include "api/check.h"

namespace ssmk {

DtTransform dt_transform(Check &c, int32_t softplus, float lo, float hi);
PadRule pad_rule(uint64_t flags, int64_t pad_slot, int64_t entries);
void only_flags(Check &c, uint64_t flags, uint64_t known);
ssmk_status check_workspace(Check &c, const Workspace &given, uint64_t needed);

struct SequenceArgs {
  const DLTensor *cu_seqlens, *seq_idx, *state_indices, *has_initial_state;
  const DLTensor *initial_states, *final_states;
};

// How a prefill call is cut up.  `slots` is bound, or left for the states to bind if there are
// state_indices; the pad rule gets its number of entries in finish_sequences().
Sequences sequences(Check &c, const SequenceArgs &a, Dim &batch, Dim &seqlen, Dim &slots);

// After the states are read: the pad rule, and on the CPU what only the data can tell: cu_seqlens
// is sound, slots are inside the pool and no slot is written twice.
void finish_sequences(Check &c, Sequences &s, const Dim &slots, const Dim &seqlen, uint64_t flags,
                      int64_t pad_slot, bool writes_states);

// On the CPU: every value of v is in [lo, hi].
void check_range(Check &c, const View<1> &v, const char *name, int64_t n, int64_t lo, int64_t hi,
                 const char *expected);

// Decode calls: which slots a row reads and writes.  On the CPU: all inside the pool, and no slot
// that one row writes is read or written by another.
struct SlotUse {
  View<2> in, out;  // (batch, K), (batch, outs)
  View<1> num_accepted;
  int64_t batch, choices, outs;
  bool writes;
  const char *in_name, *out_name;
};
void check_slots(Check &c, const SlotUse &use, const PadRule &pad);

}  // namespace ssmk
