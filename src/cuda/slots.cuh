// SPDX-License-Identifier: MIT
// Slots and counts as kernels read them: what the host cannot see is made harmless here.
#pragma once

#include "core/problem.h"

namespace ssmk::cuda {

// The slot that a row uses; `row` itself without indices.  Out of range is a pad, and so is
// whatever the pad rule says.
struct Slot {
  int64_t index;
  bool pad;
};

__device__ __forceinline__ Slot slot_of(const View<1> &indices, const PadRule &rule, int64_t row) {
  if (!indices.given()) return {row, false};
  const int64_t index = read_index(indices, row);
  return {index, rule.is_pad(index)};
}

// A count of tokens, held within 0 and the tokens that there are.
__device__ __forceinline__ int64_t count_of(const View<1> &counts, int64_t row, int64_t most) {
  if (!counts.given()) return most;
  const int64_t n = read_index(counts, row);
  return n < 0 ? 0 : n > most ? most : n;
}

}  // namespace ssmk::cuda
