// SPDX-License-Identifier: MIT
// Where the states of a decode call are: what the kernels of Mamba-1, 2 and 3 share.
#pragma once

#include "core/problem.h"
#include "cpu/simd.h"

namespace ssmk::cpu::SSMK_ISA {

// The kernel of calls with parts of Mamba-3.
void state_update_mamba3(const StateUpdateProblem &);

// Rows (p) by states (n) of one head somewhere in memory.
struct States {
  char *data = nullptr;
  DType dtype = DType::kNone;
  int64_t row = 0, state = 0;  // strides, in elements

  char *at(int64_t p, int64_t n) const { return data + (p * row + n * state) * size_of(dtype); }
  bool operator==(const States &o) const { return data == o.data && dtype == o.dtype; }
};

// Slots of one batch row, resolved.
struct RowSlots {
  bool pad = false;
  int64_t in = 0, out = 0, tokens = 0;
  int64_t intermediate = -1;  // row of the intermediate states to write, -1: none
  int64_t start = -1;         // intermediate state to start from, -1: the slot
};

inline RowSlots row_slots(const StateUpdateProblem &p, int64_t b) {
  const Slots &s = p.slots;
  RowSlots r;
  const int64_t accepted = s.num_accepted.given() ? read_index(s.num_accepted, b) : 0;
  const int64_t choice = s.in_choices > 1 && accepted > 1 ? accepted - 1 : 0;
  r.in = s.in.given() ? read_index(s.in, b, choice) : b;
  r.out = s.out.given() && !s.out_per_token ? read_index(s.out, b, 0) : r.in;
  r.pad = s.pad.is_pad(r.in) || s.pad.is_pad(r.out);
  r.tokens = s.num_tokens.given() ? read_index(s.num_tokens, b) : p.ntokens;
  if (p.intermediate.given()) {
    r.intermediate = s.intermediate_indices.given() ? read_index(s.intermediate_indices, b) : b;
    if (r.intermediate < 0 || r.intermediate >= s.intermediate_entries) r.intermediate = -1;
    if (!s.in_chosen && r.intermediate >= 0) r.start = accepted - 1;
  }
  return r;
}

}  // namespace ssmk::cpu::SSMK_ISA
