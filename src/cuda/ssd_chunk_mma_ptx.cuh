// SPDX-License-Identifier: MIT
// What a warp does in one instruction: matrix products, loads of fragments, copies ahead.
#pragma once

#include "cuda/mma.cuh"

namespace ssmk::cuda {

// d += A B; A is 16 x 16, B 16 x 8, sums in float32.
template <class T>
__device__ __forceinline__ void multiply(float (&d)[4], const uint32_t (&a)[4], uint32_t b0,
                                         uint32_t b1) {
  if constexpr (dtype_for<T> == DType::kBF16)
    mma_16(d, a[0], a[1], a[2], a[3], b0, b1);
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
        "{%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// An 8 x 8 matrix in registers, transposed.
__device__ __forceinline__ uint32_t transposed(uint32_t v) {
  uint32_t to;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(to) : "r"(v));
  return to;
}

__device__ __forceinline__ void store_word(uint32_t at, uint32_t v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
}
// Its lower half.
__device__ __forceinline__ void store_half(uint32_t at, uint32_t v) {
  asm volatile("st.shared.b16 [%0], %1;" ::"r"(at), "h"(uint16_t(v)) : "memory");
}
__device__ __forceinline__ uint32_t load_word(uint32_t at) {
  uint32_t v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ void store_two_words(uint32_t at, uint32_t a, uint32_t b) {
  asm volatile("st.shared.v2.b32 [%0], {%1, %2};" ::"r"(at), "r"(a), "r"(b) : "memory");
}
__device__ __forceinline__ uint2 load_two_words(uint32_t at) {
  uint2 v;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(v.x), "=r"(v.y) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ void store_four_words(uint32_t at, uint4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}
__device__ __forceinline__ uint4 load_four_words(uint32_t at) {
  uint4 v;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(at)
               : "memory");
  return v;
}

// 16 bytes to shared memory, around the registers: zeros where not `given`, and nothing is read.
__device__ __forceinline__ void copy_ahead_if(bool given, uint32_t to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
               "r"(given ? 16 : 0)
               : "memory");
}
__device__ __forceinline__ void end_copies() {
  asm volatile("cp.async.commit_group;" ::: "memory");
}
// All but the last kPending groups of this thread's copies are there.
template <int kPending>
__device__ __forceinline__ void wait_for_all_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// The two warps of the same channels meet.
__device__ __forceinline__ void meet_other_half(int pair) {
  asm volatile("bar.sync %0, 64;" ::"r"(pair + 1) : "memory");
}

// 1 / v to a unit in the last place; 0 of what is beyond 2^126.
__device__ __forceinline__ float reciprocal(float v) {
  float r;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(v));
  return r;
}
__device__ __forceinline__ float gate(float z) {
  return z * reciprocal(1.0f + exp2_fast(z * -kLog2e));
}

// sum + 0 v, both times two: NaN where v is not finite.
template <class T>
__device__ __forceinline__ uint32_t add_nothing(uint32_t v, uint32_t sum) {
  uint32_t to;
  if constexpr (dtype_for<T> == DType::kBF16)
    asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(to) : "r"(v), "r"(0), "r"(sum));
  else
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(to) : "r"(v), "r"(0), "r"(sum));
  return to;
}

}  // namespace ssmk::cuda
