// SPDX-License-Identifier: MIT
// Views with strides in bytes that fit 32 bits: index * stride is one instruction, in 64 bits.
#pragma once

#include "cuda/values.cuh"

namespace ssmk::cuda {

template <int Rank>
struct Near {
  char *data = nullptr;
  int32_t stride[Rank] = {};
  DType dtype = DType::kNone;

  __device__ bool given() const { return dtype != DType::kNone; }
  template <class... Index>
  __device__ __forceinline__ char *at(Index... index) const {
    const int i[] = {int(index)...};
    char *to = data;
#pragma unroll
    for (unsigned k = 0; k < sizeof...(Index); ++k) to += int64_t(i[k]) * stride[k];
    return to;
  }
};

// A stride in bytes: false if it does not fit.
inline bool narrow_stride(int64_t elements, DType dtype, int32_t *to) {
  const int64_t bytes = elements * size_of(dtype);
  *to = int32_t(bytes);
  return *to == bytes;
}

// Some axes of a view as Near: false if its strides do not fit.
template <int To, int From>
bool near(const View<From> &v, const int (&axes)[To], Near<To> *to) {
  to->data = v.data;
  to->dtype = v.dtype;
  for (int k = 0; k < To; ++k)
    if (!narrow_stride(v.stride[axes[k]], v.dtype, &to->stride[k])) return false;
  return true;
}

// All axes.
template <int Rank>
bool near(const View<Rank> &v, Near<Rank> *to) {
  int axes[Rank];
  for (int k = 0; k < Rank; ++k) axes[k] = k;
  return near(v, axes, to);
}

template <int Rank, class... Index>
__device__ __forceinline__ int64_t near_index(const Near<Rank> &v, Index... index) {
  const char *const p = v.at(index...);
  return v.dtype == DType::kI64 ? *reinterpret_cast<const int64_t *>(p)
                                : *reinterpret_cast<const int32_t *>(p);
}

// at + i * stride.  Where the compiler knows that i is no negative number it would multiply in
// pieces.
template <class T>
__device__ __forceinline__ T *step(T *at, int i, int stride) {
  T *to;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(to) : "r"(i), "r"(stride), "l"(at));
  return to;
}

// A Near whose at() is one instruction an axis whatever the compiler knows of the indices.
template <int Rank>
struct Stepped : Near<Rank> {
  template <class... Index>
  __device__ __forceinline__ char *at(Index... index) const {
    const int i[] = {int(index)...};
    char *to = this->data;
#pragma unroll
    for (unsigned k = 0; k < sizeof...(Index); ++k) to = step(to, i[k], this->stride[k]);
    return to;
  }
};

// As bits and as values.
template <int Rank, class... Index>
__device__ __forceinline__ uint32_t bits_at(const Stepped<Rank> &v, Index... index) {
  return load_bits(v.at(index...), v.dtype);
}
template <int Rank>
__device__ __forceinline__ float value_of(uint32_t bits, const Stepped<Rank> &v) {
  return value_of(bits, v.dtype);
}
template <int Rank, class... Index>
__device__ __forceinline__ void store_at(const Stepped<Rank> &v, float value, Index... index) {
  store(v.at(index...), v.dtype, value);
}

// As bits, as load_bits(): nothing waits for it before it is used.
__device__ __forceinline__ int64_t load_index(const char *p, DType dtype) {
  int64_t index;
  asm volatile(
      "{\n.reg .pred wide;\n.reg .b32 near;\nsetp.ne.u32 wide, %2, 0;\n"
      "@!wide ld.global.b32 near, [%1];\n@!wide cvt.s64.s32 %0, near;\n"
      "@wide ld.global.b64 %0, [%1];\n}"
      : "=l"(index)
      : "l"(p), "r"(uint32_t(dtype == DType::kI64))
      : "memory");
  return index;
}

// Two neighbours, aligned to the bytes that they fill.
__device__ __forceinline__ uint2 load_two(const char *p, DType dtype) {
  uint2 bits;
  asm volatile(
      "{\n.reg .pred wide;\nsetp.ne.u32 wide, %3, 0;\nmov.b32 %1, 0;\n"
      "@wide ld.global.v2.b32 {%0, %1}, [%2];\n@!wide ld.global.b32 %0, [%2];\n}"
      : "=&r"(bits.x), "=&r"(bits.y)
      : "l"(p), "r"(uint32_t(dtype == DType::kF32))
      : "memory");
  return bits;
}

__device__ __forceinline__ float2 two_values(uint2 bits, DType dtype) {
  if (dtype == DType::kF16)
    return {value_of(bits.x & 0xffff, dtype), value_of(bits.x >> 16, dtype)};
  const bool wide = dtype == DType::kF32;
  return {__uint_as_float(wide ? bits.x : bits.x << 16),
          __uint_as_float(wide ? bits.y : bits.x & 0xffff0000u)};
}

__device__ __forceinline__ void store_two(char *p, DType dtype, float2 v) {
  if (dtype == DType::kF32) {
    *reinterpret_cast<float2 *>(p) = v;
  } else if (dtype == DType::kF16) {
    store_pack(reinterpret_cast<__half *>(p),
               Pack<__half, 2>{{narrow<__half>(v.x), narrow<__half>(v.y)}});
  } else {
    store_pack(reinterpret_cast<__nv_bfloat16 *>(p),
               Pack<__nv_bfloat16, 2>{{narrow<__nv_bfloat16>(v.x), narrow<__nv_bfloat16>(v.y)}});
  }
}

}  // namespace ssmk::cuda
