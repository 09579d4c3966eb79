// SPDX-License-Identifier: MIT
// parallel_for() over a lambda.  Per level, so that no instantiation is shared between levels.
#pragma once

#include "cpu/parallel.h"

namespace ssmk::cpu::SSMK_ISA {

// f(i) for every task.
template <class F>
inline void parallel(int64_t ntasks, int64_t work, const F &f) {
  parallel_for(
      ntasks, work, num_threads(),
      [](void *context, int64_t i, int) { (*static_cast<const F *>(context))(i); },
      const_cast<void *>(static_cast<const void *>(&f)));
}

// f(i, worker) for every task, on at most `workers` threads.
template <class F>
inline void parallel_workers(int64_t ntasks, int64_t work, int workers, const F &f) {
  parallel_for(
      ntasks, work, workers,
      [](void *context, int64_t i, int worker) { (*static_cast<const F *>(context))(i, worker); },
      const_cast<void *>(static_cast<const void *>(&f)));
}

}  // namespace ssmk::cpu::SSMK_ISA
