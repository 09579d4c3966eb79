// SPDX-License-Identifier: MIT
// The ways in which the GPU can do a prefill call; ssd_chunk.cu tries them in turn.
#pragma once

#include "cuda/kernels.h"

namespace ssmk::cuda {

struct SsdPath {
  const char *name;
  // Why it does not take a call, or nullptr if it does: by sizes, dtypes, strides, addresses and
  // the GPU's compute capability (90 for 9.0).
  const char *(*refuses)(const SsdChunkProblem &, int capability);
  ssmk_status (*run)(const SsdChunkProblem &, const Call &);
  // Bytes, by sizes and dtypes alone: a query has no addresses, and maybe no device.
  uint64_t (*workspace)(const SsdChunkProblem &);
};

// Mamba-2 on 9.0, through warpgroup products and the copy engine.
extern const SsdPath kSsdWgmma;
// 16-bit inputs on tensor cores.
extern const SsdPath kSsdMma;
// float32 inputs of Mamba-2 on tensor cores.
extern const SsdPath kSsdTf32;
// Takes every call.
extern const SsdPath kSsdGeneral;

}  // namespace ssmk::cuda
