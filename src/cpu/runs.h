// SPDX-License-Identifier: MIT
// A row of tokens cut up by seq_idx.
#pragma once

#include "core/tensor.h"

namespace ssmk::cpu::SSMK_ISA {

// Runs of tokens with one id, in order: pads(begin, end) for negative ids, else
// tokens(begin, end, fresh).  A run is fresh if its id is not that of the last real token before
// it; the first one is not: it belongs to the initial state.
template <class Pads, class Tokens>
inline void each_run(const View<2> &ids, int64_t row, int64_t begin, int64_t end, const Pads &pads,
                     const Tokens &tokens) {
  int64_t last = -1;
  for (int64_t t = begin; t < end;) {
    const int64_t id = read_index(ids, row, t);
    int64_t stop = t + 1;
    while (stop < end &&
           (id < 0 ? read_index(ids, row, stop) < 0 : read_index(ids, row, stop) == id))
      ++stop;
    if (id < 0) {
      pads(t, stop);
    } else {
      tokens(t, stop, last >= 0 && id != last);
      last = id;
    }
    t = stop;
  }
}

}  // namespace ssmk::cpu::SSMK_ISA
