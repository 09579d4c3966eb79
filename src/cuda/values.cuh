// SPDX-License-Identifier: MIT
// Values on the GPU: loads and stores of every float dtype, one at a time or in packs of up to 16
// bytes, and the functions that the operations share.
//
// Arithmetic is float32; a store rounds once, to nearest even.  Kernels write fmaf() where they
// mean one: whether the compiler contracts a * b + c differs from one instantiation to the next,
// and the fast paths must give the bits of the general one (but for matrix products, which add in
// another order).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "core/problem.h"

namespace ssmk::cuda {

// ---- One value of a type known when compiling

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ float widen(__half v) { return __half2float(v); }
__device__ __forceinline__ float widen(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T narrow(float v);
template <>
__device__ __forceinline__ float narrow<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half narrow<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 narrow<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}

template <class T>
constexpr DType dtype_for = DType::kF32;
template <>
inline constexpr DType dtype_for<__half> = DType::kF16;
template <>
inline constexpr DType dtype_for<__nv_bfloat16> = DType::kBF16;

// As bits in 32.
template <class T>
__device__ __forceinline__ float widen_bits(uint32_t bits) {
  if constexpr (sizeof(T) == 4) return __uint_as_float(bits);
  if constexpr (dtype_for<T> == DType::kBF16) return __uint_as_float(bits << 16);
  return __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
}

// ---- One value of a dtype known when running

// 32 bits if `wide` is not 0, else 16, without a branch: several loads in a row are then under way
// together.
__device__ __forceinline__ uint32_t load_either(const char *p, uint32_t wide) {
  uint32_t bits;
  asm volatile(
      "{\n.reg .pred wide;\nsetp.ne.u32 wide, %2, 0;\n"
      "@wide ld.global.b32 %0, [%1];\n@!wide ld.global.u16 %0, [%1];\n}"
      : "=r"(bits)
      : "l"(p), "r"(wide)
      : "memory");
  return bits;
}

__device__ __forceinline__ uint32_t load_bits(const char *p, DType dtype) {
  return load_either(p, dtype == DType::kF32);
}

// The same, and 0 of a tensor that is not given, whose dtype is kNone.
__device__ __forceinline__ uint32_t load_given(const char *p, DType dtype) {
  uint32_t bits;
  asm volatile(
      "{\n.reg .pred wide, half;\nsetp.eq.u32 wide, %2, %3;\nsetp.gt.u32 half, %2, %3;\n"
      "mov.u32 %0, 0;\n@wide ld.global.b32 %0, [%1];\n@half ld.global.u16 %0, [%1];\n}"
      : "=&r"(bits)
      : "l"(p), "r"(uint32_t(dtype)), "r"(uint32_t(DType::kF32))
      : "memory");
  return bits;
}

__device__ __forceinline__ float value_of(uint32_t bits, DType dtype) {
  const float half = __half2float(__ushort_as_half(static_cast<unsigned short>(bits)));
  const float other = __uint_as_float(dtype == DType::kBF16 ? bits << 16 : bits);
  return dtype == DType::kF16 ? half : other;
}

__device__ __forceinline__ float load(const char *p, DType dtype) {
  if (dtype == DType::kF32) return *reinterpret_cast<const float *>(p);
  if (dtype == DType::kF16) return widen(*reinterpret_cast<const __half *>(p));
  return widen(*reinterpret_cast<const __nv_bfloat16 *>(p));
}

__device__ __forceinline__ void store(char *p, DType dtype, float v) {
  if (dtype == DType::kF32) {
    *reinterpret_cast<float *>(p) = v;
  } else if (dtype == DType::kF16) {
    *reinterpret_cast<__half *>(p) = narrow<__half>(v);
  } else {
    *reinterpret_cast<__nv_bfloat16 *>(p) = narrow<__nv_bfloat16>(v);
  }
}

// The element of a view at an index of each axis; 64-bit offsets throughout.
template <int Rank, class... Index>
__device__ __forceinline__ float load_at(const View<Rank> &v, Index... index) {
  return load(v.at(index...), v.dtype);
}

template <int Rank, class... Index>
__device__ __forceinline__ void store_at(const View<Rank> &v, float value, Index... index) {
  store(v.at(index...), v.dtype, value);
}

// ---- Packs: N neighbours in memory, aligned to the bytes that they fill

// Raw words of 2, 4, 8 or 16 bytes.
template <int Bytes>
struct Word;
template <>
struct Word<2> {
  using type = uint16_t;
};
template <>
struct Word<4> {
  using type = uint32_t;
};
template <>
struct Word<8> {
  using type = uint2;
};
template <>
struct Word<16> {
  using type = uint4;
};

template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T v[N];
};

// kOnce: memory that the call touches once, as states, is marked to leave the caches first; what
// the rows of a batch share, as weights, is not.
template <bool kOnce, class W>
__device__ __forceinline__ W load_word(const W *p) {
  if constexpr (kOnce) return __ldcs(p);
  return *p;
}

template <bool kOnce, class W>
__device__ __forceinline__ void store_word(W *p, W word) {
  if constexpr (kOnce) {
    __stcs(p, word);
  } else {
    *p = word;
  }
}

template <class T, int N, bool kOnce = false>
__device__ __forceinline__ Pack<T, N> load_pack(const T *p) {
  constexpr int kBytes = sizeof(T) * N;
  using W = typename Word<(kBytes < 16 ? kBytes : 16)>::type;
  Pack<T, N> pack;
  W *to = reinterpret_cast<W *>(&pack);
#pragma unroll
  for (int i = 0; i < kBytes / int(sizeof(W)); ++i)
    to[i] = load_word<kOnce>(reinterpret_cast<const W *>(p) + i);
  return pack;
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> load_pack_once(const T *p) {
  return load_pack<T, N, true>(p);
}

template <bool kOnce = false, class T, int N>
__device__ __forceinline__ void store_pack(T *p, const Pack<T, N> &pack) {
  constexpr int kBytes = sizeof(T) * N;
  using W = typename Word<(kBytes < 16 ? kBytes : 16)>::type;
  const W *from = reinterpret_cast<const W *>(&pack);
#pragma unroll
  for (int i = 0; i < kBytes / int(sizeof(W)); ++i)
    store_word<kOnce>(reinterpret_cast<W *>(p) + i, from[i]);
}

template <class T, int N>
__device__ __forceinline__ void store_pack_once(T *p, const Pack<T, N> &pack) {
  store_pack<true>(p, pack);
}

// The last where `given`, without a branch.
template <class T, int N>
__device__ __forceinline__ void store_pack_once_if(bool given, T *p, const Pack<T, N> &pack) {
  constexpr int kBytes = sizeof(T) * N;
  static_assert(kBytes == 8 || kBytes == 16, "two or four words");
  const uint32_t *const w = reinterpret_cast<const uint32_t *>(&pack);
  if constexpr (kBytes == 16)
    asm volatile(
        "{\n.reg .pred given;\nsetp.ne.u32 given, %5, 0;\n"
        "@given st.global.cs.v4.b32 [%0], {%1, %2, %3, %4};\n}" ::"l"(p),
        "r"(w[0]), "r"(w[1]), "r"(w[2]), "r"(w[3]), "r"(uint32_t(given))
        : "memory");
  else
    asm volatile(
        "{\n.reg .pred given;\nsetp.ne.u32 given, %3, 0;\n"
        "@given st.global.cs.v2.b32 [%0], {%1, %2};\n}" ::"l"(p),
        "r"(w[0]), "r"(w[1]), "r"(uint32_t(given))
        : "memory");
}

template <class T, int N>
__device__ __forceinline__ void widen(const Pack<T, N> &pack, float (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = widen(pack.v[i]);
}

// Two at a time: one instruction each.
template <int N>
__device__ __forceinline__ void widen(const Pack<__nv_bfloat16, N> &pack, float (&to)[N]) {
  if constexpr (N % 2) {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = widen(pack.v[i]);
  } else {
    const uint32_t *const words = reinterpret_cast<const uint32_t *>(&pack);
#pragma unroll
    for (int i = 0; i < N / 2; ++i) {
      to[2 * i] = __uint_as_float(words[i] << 16);
      to[2 * i + 1] = __uint_as_float(words[i] & 0xffff0000u);
    }
  }
}

template <class T, int N>
__device__ __forceinline__ Pack<T, N> narrow_pack(const float (&from)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int i = 0; i < N; ++i) pack.v[i] = narrow<T>(from[i]);
  return pack;
}

// On the host: can elements along `axis` be read in packs of `bytes`, wherever the other axes'
// indices point?  Sizes of 1 make a stride meaningless, but Check has made those compact.
template <int Rank>
bool packs_along(const View<Rank> &v, int axis, int64_t bytes) {
  if (v.stride[axis] != 1 || reinterpret_cast<uintptr_t>(v.data) % uintptr_t(bytes)) return false;
  for (int k = 0; k < Rank; ++k)
    if (k != axis && v.stride[k] * size_of(v.dtype) % bytes) return false;
  return true;
}

// The same for packs of `elements` of the view, read up to 16 bytes at a time.
template <int Rank>
bool packs_of(const View<Rank> &v, int axis, int64_t elements) {
  const int64_t bytes = elements * size_of(v.dtype);
  return packs_along(v, axis, bytes < 16 ? bytes : 16);
}

// ---- Shared memory

// By its address there.
__device__ __forceinline__ uint32_t shared_address(const void *p) {
  return uint32_t(__cvta_generic_to_shared(p));
}

// 16 bytes to shared memory, around the registers.
__device__ __forceinline__ void copy_ahead(void *to, const void *from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from)
               : "memory");
}
// This thread's copies are there.
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_all;" ::: "memory");
}

// ---- Functions, in float32: each within a few units in the last place of its largest values

constexpr float kLog2e = 1.4426950408889634f;

// 2^x: two units in the last place; results below 2^-126 are 0.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float sigmoid(float x) {
  return __fdividef(1.0f, 1.0f + exp2_fast(-x * kLog2e));
}

// z / (1 + exp(-z)).
__device__ __forceinline__ float silu(float z) {
  return __fdividef(z, 1.0f + exp2_fast(-z * kLog2e));
}

// log1p(exp(x)), which is x itself above 20.  With e = exp(-|x|): max(x, 0) + log1p(e), and
// log1p(e) = 2 atanh(s), s = e / (2 + e) <= 1/3, by its series up to s^13: 2^-26 of the value.
__device__ __forceinline__ float softplus(float x) {
  const float e = exp2_fast(-fabsf(x) * kLog2e), s = __fdividef(e, 2.0f + e), s2 = s * s;
  float series = fmaf(s2, 2.0f / 13, 2.0f / 11);
  series = fmaf(s2, series, 2.0f / 9);
  series = fmaf(s2, series, 2.0f / 7);
  series = fmaf(s2, series, 2.0f / 5);
  series = fmaf(s2, series, 2.0f / 3);
  series = fmaf(s2, series, 2.0f);
  return fmaf(s, series, x > 0.0f ? x : 0.0f);
}

// dt with its bias added, as the call wants it.
__device__ __forceinline__ float transform_dt(const DtTransform &f, float dt) {
  if (f.softplus) dt = softplus(dt);
  if (f.clamp) {
    dt = dt < f.lo ? f.lo : dt;
    dt = dt > f.hi ? f.hi : dt;
  }
  return dt;
}

}  // namespace ssmk::cuda
