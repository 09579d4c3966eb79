// SPDX-License-Identifier: MIT
// Products of bfloat16 matrices on tensor cores, and float32 values as bfloat16 parts.
#pragma once

#include "cuda/values.cuh"

namespace ssmk::cuda {

// d += A B; A is 16 x 16, B 16 x 8, both bfloat16.
__device__ __forceinline__ void mma_16(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t a2,
                                       uint32_t a3, uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
      "{%8, %9}, {%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

// A is 16 x 8, B 8 x 8.
__device__ __forceinline__ void mma_8(float (&d)[4], uint32_t a0, uint32_t a1, uint32_t b0) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(b0));
}

// Two values as one word, the first in its lower half.
template <class T>
__device__ __forceinline__ uint32_t pack_two(float low, float high) {
  if constexpr (dtype_for<T> == DType::kBF16) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&both);
  } else {
    const __half2 both = __floats2half2_rn(low, high);
    return *reinterpret_cast<const uint32_t *>(&both);
  }
}

template <class T>
__device__ __forceinline__ float2 unpack_two(uint32_t word) {
  if constexpr (dtype_for<T> == DType::kBF16) {
    return {__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u)};
  } else {
    return __half22float2(*reinterpret_cast<const __half2 *>(&word));
  }
}

// The upper halves of two words.
__device__ __forceinline__ uint32_t upper_halves(uint32_t low, uint32_t high) {
  return __byte_perm(low, high, 0x7632);
}

// What v has beyond its upper half, exactly; NaN of an infinity.
__device__ __forceinline__ float below_upper_half(float v) {
  return v - __uint_as_float(__float_as_uint(v) & 0xffff0000u);
}

// Three bfloat16 (in the upper halves of words) that add up to v; an infinity is the first alone.
struct Split {
  uint32_t part[3];
};

__device__ __forceinline__ Split split(float v) {
  Split s;
  const bool finite = fabsf(v) < __int_as_float(0x7f800000);
  const float rest = finite ? below_upper_half(v) : 0.0f;
  s.part[0] = __float_as_uint(v);
  s.part[1] = __float_as_uint(rest);
  s.part[2] = __float_as_uint(below_upper_half(rest));
  return s;
}

// Two neighbours as three words of two bfloat16, rounded to nearest, that add up to them exactly;
// NaN of an infinity.
struct PairParts {
  uint32_t part[3];
};

__device__ __forceinline__ PairParts split_two(float low, float high) {
  PairParts s;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    s.part[i] = pack_two<__nv_bfloat16>(low, high);
    low -= __uint_as_float(s.part[i] << 16);
    high -= __uint_as_float(s.part[i] & 0xffff0000u);
  }
  return s;
}

// Four matrices of 8 x 8 from shared memory: lane 8 i + r holds the address of row r of matrix i.
// Lane 4 r + q gets elements 2 q and 2 q + 1 of row r.
__device__ __forceinline__ void load_matrices(uint32_t (&m)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(at)
               : "memory");
}

// The same of their transposes.
__device__ __forceinline__ void load_transposed(uint32_t (&m)[4], uint32_t at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3])
               : "r"(at)
               : "memory");
}

}  // namespace ssmk::cuda
