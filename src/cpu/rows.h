// SPDX-License-Identifier: MIT
// Moving rows and tiles between the caller's tensors (any dtype, any stride) and float32 scratch in
// L1.
//
// Kernels compute on float32 tiles; these functions are the only places that look at a dtype or ask
// whether a stride is 1, once per row, so every mix of dtypes and layouts runs the same arithmetic.
#pragma once

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
    } else if (stride == 0 && n > 0) {
      const float value = to_float(s[0]);
      for (; i < n; ++i) dst[i] = value;
    }
    for (; i < n; ++i) dst[i] = to_float(s[i * stride]);
  });
}

// n elements at dst, `stride` apart, <- src[0 .. n).  `streamed`: the output is larger than the
// caches.
inline void write_row(char *dst, DType dtype, int64_t stride, const float *src, int64_t n,
                      bool streamed = false) {
  with_type(dtype, [&](auto *type) {
    using T = std::remove_pointer_t<decltype(type)>;
    T *d = reinterpret_cast<T *>(dst);
    int64_t i = 0;
    if (stride == 1) {
      constexpr int kPerVector = kVectorBytes / sizeof(T);
      if (streamed) {
        const uintptr_t past = reinterpret_cast<uintptr_t>(d) % kVectorBytes;
        const int64_t head = past ? int64_t(kVectorBytes - past) / int64_t(sizeof(T)) : 0;
        for (; i < head && i < n; ++i) d[i] = from_float<T>(src[i]);
        for (; i + kPerVector <= n; i += kPerVector) {
          if constexpr (sizeof(T) == 4) {
            stream(d + i, load(src + i));
          } else {
            T whole[kPerVector];
            store(whole, load(src + i));
            store(whole + kLanes, load(src + i + kLanes));
            stream(reinterpret_cast<float *>(d + i), load_bits<T, vf>(whole));
          }
        }
      }
      for (; i + kLanes <= n; i += kLanes) store(d + i, load(src + i));
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
