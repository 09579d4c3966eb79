// SPDX-License-Identifier: MIT
// The fields of Mamba-3 that prefill and decode share.
#pragma once

#include "api/check.h"

namespace ssmk {

struct Mamba3Args {
  const DLTensor *B_bias, *C_bias, *mimo_x, *mimo_z, *mimo_out, *norm_weight;
  const DLTensor *z, *trap, *angles;  // what the others depend on
  float norm_eps;
  int32_t rotary;
  uint64_t flags;
};

// Call when nheads, rank, headdim and dstate are bound.  The size of the rotation, nangles, is
// bound by reading `angles` before, or left at 0.
Mamba3 mamba3(Check &c, const Mamba3Args &a, Dim &nheads, Dim &rank, Dim &headdim, Dim &dstate,
              const Dim &nangles);

// angle, k and v states belong to angles and trap.
struct Mamba3StateArgs {
  const DLTensor *angle, *k, *v;
  const char *angle_name, *k_name, *v_name;
};
void only_with_parts(Check &c, const Mamba3Args &a, const Mamba3StateArgs &s);

}  // namespace ssmk
