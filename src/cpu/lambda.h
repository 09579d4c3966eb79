// SPDX-License-Identifier: MIT
// parallel_for() over a lambda.  Per level, so that no instantiation is shared between levels.
#pragma once

#include "cpu/parallel.h"

namespace ssmk::cpu::SSMK_ISA {

template <class F>
inline void parallel(int64_t ntasks, int64_t work, const F &f) {
  parallel_for(
      ntasks, work, [](void *context, int64_t i) { (*static_cast<const F *>(context))(i); },
      const_cast<void *>(static_cast<const void *>(&f)));
}

}  // namespace ssmk::cpu::SSMK_ISA
