// SPDX-License-Identifier: MIT
// Small matrix products in float32 for operands that lie in the nearer caches.
//
//   C[i][j] = scale_i C[i][j] + sum_k A(i, k) B[k][j]
//
// B and C are row-major in whole vectors.  A is read element by element, so both its strides are
// free: its transpose costs nothing.  A tile of C stays in registers over the whole sum, and every
// element is summed in the order of k, however the matrix is cut into tiles.
#pragma once

#include "cpu/simd.h"

namespace ssmk::cpu::SSMK_ISA {

constexpr int kGemmRows = 6;  // of a tile, and its vectors: what fits the registers
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kGemmVectors = 4;
#else
constexpr int kGemmVectors = 2;
#endif

struct GemmA {
  const float *data;
  int64_t row, k;  // strides
};

// What C is multiplied by before the sum is added; NULL: C is not read, it starts from 0.
struct GemmScale {
  const float *data = nullptr;
  int64_t row = 0;  // stride; 0: one factor for all rows
};

template <int kRows, int kVectors>
SSMK_INLINE void gemm_tile(float *C, int64_t ldc, GemmA A, const float *B, int64_t ldb,
                           int64_t depth, GemmScale scale) {
  vf c[kRows][kVectors];
  if (scale.data) {
    SSMK_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const vf factor = splat(scale.data[i * scale.row]);
      SSMK_UNROLL
      for (int v = 0; v < kVectors; ++v) c[i][v] = load(C + i * ldc + v * kLanes) * factor;
    }
  } else {
    SSMK_UNROLL
    for (int i = 0; i < kRows; ++i) {
      SSMK_UNROLL
      for (int v = 0; v < kVectors; ++v) c[i][v] = vf{};
    }
  }
  for (int64_t k = 0; k < depth; ++k) {
    const float *a = A.data + k * A.k, *row = B + k * ldb;
    vf b[kVectors];
    SSMK_UNROLL
    for (int v = 0; v < kVectors; ++v) b[v] = load(row + v * kLanes);
    SSMK_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const vf factor = splat(a[i * A.row]);
      SSMK_UNROLL
      for (int v = 0; v < kVectors; ++v) c[i][v] = fused(factor, b[v], c[i][v]);
    }
  }
  SSMK_UNROLL
  for (int i = 0; i < kRows; ++i) {
    SSMK_UNROLL
    for (int v = 0; v < kVectors; ++v) store(C + i * ldc + v * kLanes, c[i][v]);
  }
}

template <int kVectors, int kRows = kGemmRows>
inline void gemm_rows(int rows, float *C, int64_t ldc, GemmA A, const float *B, int64_t ldb,
                      int64_t depth, GemmScale scale) {
  if (rows == kRows) {
    gemm_tile<kRows, kVectors>(C, ldc, A, B, ldb, depth, scale);
  } else if constexpr (kRows > 1) {
    gemm_rows<kVectors, kRows - 1>(rows, C, ldc, A, B, ldb, depth, scale);
  }
}

// depth(i): the length of the sum for the rows up to i; width(i): the columns of C up to row i that
// are wanted, the rest may be left alone.  Both never decrease; a tile takes those of its last row.
// between(i, end) is called before the tile of the rows i .. end of the first columns: what it
// fetches arrives while the tile is computed.
struct GemmNothing {
  void operator()(int64_t, int64_t) const {}
};

template <class Depth, class Width, class Between = GemmNothing>
inline void gemm(float *C, int64_t ldc, GemmA A, const float *B, int64_t ldb, int64_t rows,
                 int64_t columns, GemmScale scale, const Depth &depth, const Width &width,
                 const Between &between = {}) {
  const int64_t vectors = (columns + kLanes - 1) / kLanes;
  for (int64_t v = 0; v < vectors;) {
    const int64_t left = vectors - v;
    // 5 = 3 + 2: a tile of a single vector keeps the multipliers waiting for its sums.
    const int64_t most = left == kGemmVectors + 1 ? (left + 1) / 2
                         : left < kGemmVectors    ? left
                                                  : kGemmVectors;
    for (int64_t i = 0; i < rows; i += kGemmRows) {
      const int count = int(rows - i < kGemmRows ? rows - i : kGemmRows);
      if (v == 0) between(i, i + count);
      const int64_t wanted = (width(i + count - 1) + kLanes - 1) / kLanes - v;
      const int64_t take = wanted < most ? wanted : most;
      const GemmA a = {A.data + i * A.row, A.row, A.k};
      const GemmScale s = {scale.data ? scale.data + i * scale.row : nullptr, scale.row};
      float *const c = C + i * ldc + v * kLanes;
      const float *const b = B + v * kLanes;
      const int64_t n = depth(i + count - 1);
      if (take == 1) gemm_rows<1>(count, c, ldc, a, b, ldb, n, s);
      if (take == 2) gemm_rows<2>(count, c, ldc, a, b, ldb, n, s);
      if constexpr (kGemmVectors > 2) {
        if (take == 3) gemm_rows<3>(count, c, ldc, a, b, ldb, n, s);
        if (take == 4) gemm_rows<4>(count, c, ldc, a, b, ldb, n, s);
      }
    }
    v += most;
  }
}

inline void gemm(float *C, int64_t ldc, GemmA A, const float *B, int64_t ldb, int64_t rows,
                 int64_t columns, int64_t depth, GemmScale scale) {
  gemm(
      C, ldc, A, B, ldb, rows, columns, scale, [=](int64_t) { return depth; },
      [=](int64_t) { return columns; });
}

}  // namespace ssmk::cpu::SSMK_ISA
