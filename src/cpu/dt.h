// SPDX-License-Identifier: MIT
#pragma once

#include "core/problem.h"
#include "cpu/simd.h"

namespace ssmk::cpu::SSMK_ISA {

// dt' of dt + bias; NaN stays NaN.
SSMK_INLINE vf transform_dt(const DtTransform &f, vf dt) {
  if (f.softplus) dt = softplus(dt);
  if (f.clamp) {
    dt = dt < splat(f.lo) ? splat(f.lo) : dt;
    dt = dt > splat(f.hi) ? splat(f.hi) : dt;
  }
  return dt;
}

}  // namespace ssmk::cpu::SSMK_ISA
