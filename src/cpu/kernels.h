// SPDX-License-Identifier: MIT
// The CPU backend's operations, one table of them per instruction-set level.
#pragma once

#include <cstdint>

#include "core/problem.h"

namespace ssmk::cpu {

struct Kernels {
  const char *isa;
  void (*selective_scan)(const SelectiveScanProblem &);
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

// Bytes of workspace that the problems want (0 unless dstate is that large), the same at every
// level.
uint64_t selective_scan_workspace(const SelectiveScanProblem &);
uint64_t state_update_workspace(const StateUpdateProblem &);
uint64_t mla_decode_workspace(const MlaDecodeProblem &);

}  // namespace ssmk::cpu
