// SPDX-License-Identifier: MIT
// Threads.  Compiled once, for the baseline: nothing here belongs to an instruction-set level.
#pragma once

#include <cstdint>

namespace ssmk::cpu {

int num_threads();
void set_num_threads(int n);  // n <= 0: the default again

// Runs task(context, i, worker) for every i in [0, ntasks), in any order, on up to `workers`
// threads (no more than num_threads()).  worker, in [0, workers), tells the threads of a call
// apart: tasks of one worker run one after the other and may share scratch.  `work` estimates the
// whole, in elements touched; little work stays on the calling thread.  Tasks must not depend on
// each other, and what a task computes must not depend on how many there are: then results do not
// depend on the number of threads.
void parallel_for(int64_t ntasks, int64_t work, int workers,
                  void (*task)(void *context, int64_t i, int worker), void *context);

}  // namespace ssmk::cpu
