// SPDX-License-Identifier: MIT
// Memory by hints and by bare addresses: what a kernel may do before those ahead of it in the
// stream have ended, and accesses whose addresses the compiler keeps as they are.
#pragma once

#include "cuda/near.cuh"

namespace ssmk::cuda {

// An index that may change before this kernel may look at it.  It does not come from the
// first-level cache, nor does it get there.
__device__ __forceinline__ int64_t peek_index(const Near<2> &v, int i, int j) {
  const char *const p = v.at(i, j);
  if (v.dtype == DType::kI64) {
    int64_t index;
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(index) : "l"(p));
    return index;
  }
  int32_t index;
  asm volatile("ld.relaxed.gpu.global.b32 %0, [%1];" : "=r"(index) : "l"(p));
  return index;
}

// Values as bits in 32, by an address of which the compiler may not know that it is global.
template <class T>
__device__ __forceinline__ uint32_t load_near(const char *p) {
  uint32_t bits;
  if constexpr (sizeof(T) == 4)
    asm volatile("ld.global.b32 %0, [%1];" : "=r"(bits) : "l"(p) : "memory");
  else
    asm volatile("ld.global.u16 %0, [%1];" : "=r"(bits) : "l"(p) : "memory");
  return bits;
}

template <class T>
__device__ __forceinline__ void store_near(char *p, T value) {
  const auto bits = reinterpret_cast<const typename Word<sizeof(T)>::type &>(value);
  if constexpr (sizeof(T) == 4)
    asm volatile("st.global.b32 [%0], %1;" ::"l"(p), "r"(bits) : "memory");
  else
    asm volatile("st.global.b16 [%0], %1;" ::"l"(p), "h"(bits) : "memory");
}

// Four values of shared memory by their address there.
__device__ __forceinline__ void load_shared(uint32_t at, float *to) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(to[0]), "=f"(to[1]), "=f"(to[2]), "=f"(to[3])
               : "r"(at)
               : "memory");
}

}  // namespace ssmk::cuda
