// SPDX-License-Identifier: MIT
// The CPU backend's operations, one table of them per instruction-set level.
#pragma once

#include <cstdint>

#include "core/problem.h"

namespace ssmk::cpu {

struct Kernels {
  const char *isa;
  void (*selective_scan)(const SelectiveScanProblem &);
  void (*ssd_chunk)(const SsdChunkProblem &);
  void (*state_update)(const StateUpdateProblem &);
  void (*causal_conv1d)(const CausalConv1dProblem &);
  void (*causal_conv1d_update)(const CausalConv1dUpdateProblem &);
  void (*mla_decode)(const MlaDecodeProblem &);
};

// The level picked for this process (see ssmk_cpu_isa), or nullptr if SSMK_ISA names one that
// cannot run here.
const Kernels *kernels();

// What SSMK_ISA may be on this machine, for the error message: "portable, x86-64-v3".
const char *available_levels();

// States of up to this dstate live on the stack of the thread that works on them; larger ones in
// the workspace.
constexpr int64_t kMaxStackState = 1024;

// Bytes of workspace that the problems want (0 unless states are that large), the same at every
// level.
uint64_t selective_scan_workspace(const SelectiveScanProblem &);
uint64_t state_update_workspace(const StateUpdateProblem &);
uint64_t mla_decode_workspace(const MlaDecodeProblem &);

// A part for each thread that may work on it: num_threads() counts.
uint64_t ssd_chunk_workspace(const SsdChunkProblem &);

// Floats of scratch for one head of one row in a decode call of Mamba-3: on the stack up to a
// limit, above it in the workspace, one piece a head.
constexpr int64_t kMamba3StackFloats = 32768;
int64_t mamba3_update_floats(const StateUpdateProblem &);

}  // namespace ssmk::cpu
