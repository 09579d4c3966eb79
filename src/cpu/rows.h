// SPDX-License-Identifier: MIT
// Moving rows and tiles between the caller's tensors (any dtype, any stride) and float32 scratch in
// L1.
//
// Kernels compute on float32 tiles; these functions are the only places that look at a dtype or ask
// whether a stride is 1, once per row, so every mix of dtypes and layouts runs the same arithmetic.
#pragma once

#include <type_traits>

#include "core/tensor.h"
#include "cpu/simd.h"

namespace ssmk::cpu::SSMK_ISA {

SSMK_INLINE float to_float(float x) { return x; }
SSMK_INLINE float to_float(bf16 x) { return bitcast<float>(uint32_t(x.bits) << 16); }
// The conversions that take several steps reuse the vector code, so that every path rounds alike.
SSMK_INLINE float to_float(f16 x) {
  f16 lanes[kLanes] = {x};
  return load(lanes)[0];
}

template <class T>
SSMK_INLINE T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    T lanes[kLanes];
    store(lanes, splat(x));
    return lanes[0];
  }
}

// Calls f with a null pointer of the storage type.
template <class F>
SSMK_INLINE auto with_type(DType d, F &&f) {
  switch (d) {
    case DType::kF16: return f(static_cast<f16 *>(nullptr));
    case DType::kBF16: return f(static_cast<bf16 *>(nullptr));
    default: return f(static_cast<float *>(nullptr));
  }
}

template <class T>
SSMK_INLINE float load_one(const void *p) {
  T v;
  std::memcpy(&v, p, sizeof v);
  return to_float(v);
}

// One element, converted.
inline float read_one(const char *p, DType d) {
  return with_type(d, [&](auto *t) { return load_one<std::remove_pointer_t<decltype(t)>>(p); });
}

inline void write_one(char *p, DType d, float x) {
  with_type(d, [&](auto *t) {
    const auto v = from_float<std::remove_pointer_t<decltype(t)>>(x);
    std::memcpy(p, &v, sizeof v);
  });
}

// dst[0 .. n) <- n elements from src, `stride` elements apart.
inline void read_row(float *dst, const char *src, DType dtype, int64_t stride, int64_t n) {
  with_type(dtype, [&](auto *type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *s = reinterpret_cast<const T *>(src);
    int64_t i = 0;
    if (stride == 1) {
      for (; i + kLanes <= n; i += kLanes) store(dst + i, load(s + i));
      if (i < n && n >= kLanes) {  // a last vector, over part of the one before it
        store(dst + n - kLanes, load(s + n - kLanes));
        return;
      }
    } else if (stride == 0 && n > 0) {
      const float value = to_float(s[0]);
      for (; i < n; ++i) dst[i] = value;
    }
    for (; i < n; ++i) dst[i] = to_float(s[i * stride]);
  });
}

// The same, and zeros up to a whole vector.
inline void read_padded(float *dst, const char *src, DType dtype, int64_t stride, int64_t n) {
  read_row(dst, src, dtype, stride, n);
  for (int64_t i = n; i % kLanes; ++i) dst[i] = 0;
}

// Two vectors as the 16-bit elements of one.
template <class T, int... L>
SSMK_INLINE vf paired(vf a, vf b, std::integer_sequence<int, L...>) {
  if constexpr (std::is_same_v<T, bf16>) {
    // The rounded bits stay in the upper halves, where one shuffle finds all of them.
    using Halves = uint16_t __attribute__((vector_size(kVectorBytes)));
    vu x = rounded_up_half(a), y = rounded_up_half(b);
#if defined(__AVX512F__)
    const bool nan = _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_UNORD_Q) != 0;
#else
    const bool nan = true;  // or not: cheaper than to find out
#endif
    if (nan) {
      x = a == a ? x : bitcast<vu>(a) | 0x400000u;
      y = b == b ? y : bitcast<vu>(b) | 0x400000u;
    }
    const Halves i = bitcast<Halves>(x), j = bitcast<Halves>(y);
    return bitcast<vf>(__builtin_shufflevector(i, j, (2 * L + 1)...));
  } else {
    vh low, high;
    store(reinterpret_cast<T *>(&low), a);
    store(reinterpret_cast<T *>(&high), b);
    return bitcast<vf>(__builtin_shufflevector(low, high, L...));
  }
}

// n elements at dst, `stride` apart, <- src[0 .. n).  `streamed`: the output is larger than the
// caches.
inline void write_row(char *dst, DType dtype, int64_t stride, const float *src, int64_t n,
                      bool streamed = false) {
  with_type(dtype, [&](auto *type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T *d = reinterpret_cast<T *>(dst);
    int64_t i = 0;
    if (stride == 1 && n >= kLanes) {
      constexpr int kPerVector = kVectorBytes / sizeof(T);
      const uintptr_t past = reinterpret_cast<uintptr_t>(d) % kVectorBytes;
      if (streamed && n >= 2 * kPerVector && past % sizeof(T) == 0) {
        // Up to the first boundary: whole vectors, and a part of one.
        const int64_t head = past ? int64_t(kVectorBytes - past) / int64_t(sizeof(T)) : 0;
        for (; i + kLanes <= head; i += kLanes) store(d + i, load(src + i));
        if (i < head) {
          T part[kLanes];
          store(part, load(src + i));
          for (int k = 0; i < head; ++i, ++k) d[i] = part[k];
        }
        for (; i + kPerVector <= n; i += kPerVector) {
          if constexpr (sizeof(T) == 4) {
            stream(d + i, load(src + i));
          } else {
            stream(reinterpret_cast<float *>(d + i),
                   paired<T>(load(src + i), load(src + i + kLanes),
                             std::make_integer_sequence<int, 2 * kLanes>{}));
          }
        }
      }
      for (; i + kLanes <= n; i += kLanes) store(d + i, load(src + i));
      if (i < n) {  // a last vector, over part of the one before it
        store(d + n - kLanes, load(src + n - kLanes));
        return;
      }
    }
    for (; i < n; ++i) d[i * stride] = from_float<T>(src[i]);
  });
}

// n zeros at dst, `stride` apart.
inline void zero_row(char *dst, DType dtype, int64_t stride, int64_t n) {
  const int64_t size = size_of(dtype);
  if (stride == 1) {
    std::memset(dst, 0, size_t(n * size));
  } else {
    for (int64_t i = 0; i < n; ++i) std::memset(dst + i * stride * size, 0, size_t(size));
  }
}

// dst[r * ld + c] <- src(r, c), r < rows, c < cols.  Whichever axis is packed in memory is the one
// walked: a source packed along r is read in vectors and transposed in registers.
inline void read_tile(float *dst, int64_t ld, const char *src, DType dtype, int64_t row_stride,
                      int64_t col_stride, int64_t rows, int64_t cols) {
  const int64_t size = size_of(dtype);
  if (row_stride != 1 || col_stride == 1) {
    for (int64_t r = 0; r < rows; ++r)
      read_row(dst + r * ld, src + r * row_stride * size, dtype, col_stride, cols);
    return;
  }
  with_type(dtype, [&](auto *type) {
    using T = std::remove_pointer_t<decltype(type)>;
    const T *s = reinterpret_cast<const T *>(src);
    const int64_t whole_rows = rows - rows % kLanes, whole_cols = cols - cols % kLanes;
    for (int64_t c = 0; c < whole_cols; c += kLanes)
      for (int64_t r = 0; r < whole_rows; r += kLanes) {
        vf v[kLanes];
        for (int i = 0; i < kLanes; ++i) v[i] = load(s + r + (c + i) * col_stride);
        transpose(v);
        for (int i = 0; i < kLanes; ++i) store(dst + (r + i) * ld + c, v[i]);
      }
    for (int64_t c = 0; c < cols; ++c)
      for (int64_t r = c < whole_cols ? whole_rows : 0; r < rows; ++r)
        dst[r * ld + c] = to_float(s[r + c * col_stride]);
  });
}

// dst(r, c) <- src[r * ld + c]: the inverse of read_tile.
inline void write_tile(char *dst, DType dtype, int64_t row_stride, int64_t col_stride,
                       const float *src, int64_t ld, int64_t rows, int64_t cols) {
  const int64_t size = size_of(dtype);
  if (row_stride != 1 || col_stride == 1) {
    for (int64_t r = 0; r < rows; ++r)
      write_row(dst + r * row_stride * size, dtype, col_stride, src + r * ld, cols);
    return;
  }
  with_type(dtype, [&](auto *type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T *d = reinterpret_cast<T *>(dst);
    const int64_t whole_rows = rows - rows % kLanes, whole_cols = cols - cols % kLanes;
    for (int64_t c = 0; c < whole_cols; c += kLanes)
      for (int64_t r = 0; r < whole_rows; r += kLanes) {
        vf v[kLanes];
        for (int i = 0; i < kLanes; ++i) v[i] = load(src + (r + i) * ld + c);
        transpose(v);
        for (int i = 0; i < kLanes; ++i) store(d + r + (c + i) * col_stride, v[i]);
      }
    for (int64_t c = 0; c < cols; ++c)
      for (int64_t r = c < whole_cols ? whole_rows : 0; r < rows; ++r)
        d[r + c * col_stride] = from_float<T>(src[r * ld + c]);
  });
}

}  // namespace ssmk::cpu::SSMK_ISA
