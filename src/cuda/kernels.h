// SPDX-License-Identifier: MIT
// The CUDA backend as the rest of the library sees it; plain C++.  Without CUDA in the build
// absent.cc stands in: nothing is built, there are no devices.
#pragma once

#include <ssmk.h>

#include <cstdint>

#include "core/problem.h"

namespace ssmk::cuda {

// Where a call runs, and its name for messages.
struct Call {
  const char *op = nullptr;
  int device = 0;
  void *stream = nullptr;  // cudaStream_t
};

// An operation: it puts its kernels on the stream and returns at once.  The call's device is
// current, and current again is afterwards the one that was before.
template <class Problem>
struct Entry {
  ssmk_status (*run)(const Problem &, const Call &) = nullptr;  // nullptr: not on CUDA
  uint64_t (*workspace)(const Problem &) = nullptr;             // nullptr: needs none
};

struct Kernels {
  Entry<StateUpdateProblem> state_update;
  Entry<CausalConv1dUpdateProblem> causal_conv1d_update;
  Entry<SsdChunkProblem> ssd_chunk;
  // Which path a call takes on a GPU of a compute capability, and why none before it: for tests.
  const char *(*ssd_chunk_path)(const SsdChunkProblem &, int capability) = nullptr;
};

const Kernels &kernels();

bool built();
// 0 where there is no driver, or one that this runtime cannot use.
int device_count();

}  // namespace ssmk::cuda
