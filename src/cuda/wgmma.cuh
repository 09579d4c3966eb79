// SPDX-License-Identifier: MIT
// The pieces of Hopper (sm_90a) that the fused prefill kernels are built from: warpgroup matrix
// products, their tiles in shared memory, barriers that count arrivals, moved registers.
//
// A tile is rows of 128 bytes (64 values of 16 bits), whose 16-byte pieces are swizzled: piece c of
// row r stands at place c ^ (r % 8).  Its address is a multiple of 1024 bytes.  A product's factor
// either has the summed index along the rows ("along") or across them ("across"); a matrix wider
// than 64 values is several tiles.
#pragma once

#include <cuda.h>

#include "cuda/mma.cuh"

namespace ssmk::cuda {

constexpr int kTileRowBytes = 128;
constexpr int kWarpgroup = 128;  // threads

// The offset of the 16-byte piece c of row r.
__device__ __forceinline__ uint32_t tile_piece(uint32_t r, uint32_t c) {
  return r * kTileRowBytes + ((c ^ (r & 7)) << 4);
}

// ---- Products

// What the tensor cores are told about a factor: where its tile is, how far (in bytes) from eight
// rows to the next eight, and from tile to tile where it is wider than one across the rows.  The
// address is in the lower word, in sixteens: a constant number of bytes further on is an addition.
struct Factor {
  uint32_t low, high;

  __device__ __forceinline__ Factor operator+(int bytes) const {
    return {low + uint32_t(bytes >> 4), high};
  }
  __device__ __forceinline__ uint64_t bits() const { return uint64_t(high) << 32 | low; }
};
__device__ __forceinline__ Factor factor(uint32_t at, uint32_t next_tile = 16) {
  constexpr uint32_t kSwizzle128 = 1u << 30, kEightRows = 1024 >> 4;
  return {next_tile >> 4 << 16 | at >> 4, kSwizzle128 | kEightRows};
}

// Registers that a product uses are settled before it starts.
__device__ __forceinline__ void products_begin() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
// Closes a group of products, which run on by themselves.
__device__ __forceinline__ void products_go() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// All groups but the last kLeft are done.
template <int kLeft>
__device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}

// The compiler keeps what is in v where it is until here.
template <int N>
__device__ __forceinline__ void settle(float (&v)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(v[i])::"memory");
}

// The same of a first factor in registers: products under way still read it.
template <int N>
__device__ __forceinline__ void settle(uint32_t (&a)[N][4]) {
#pragma unroll
  for (int k = 0; k < N; ++k)
#pragma unroll
    for (int i = 0; i < 4; ++i) asm volatile("" : "+r"(a[k][i])::"memory");
}

#define SSMK_ACC8(d, i)                                                                       \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
      "+f"(d[i + 6]), "+f"(d[i + 7])
#define SSMK_ACC32(d, i) \
  SSMK_ACC8(d, i), SSMK_ACC8(d, i + 8), SSMK_ACC8(d, i + 16), SSMK_ACC8(d, i + 24)
#define SSMK_LIST32                                                                             \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31}"
#define SSMK_LIST64                                                                             \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, " \
  "%20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, "  \
  "%38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, "  \
  "%56, %57, %58, %59, %60, %61, %62, %63}"

// d (64 x 64) = or += a b over 16 of the summed index; a and b from shared memory, along it.
#define SSMK_PRODUCT_SS(type)                                                     \
  asm volatile(                                                                   \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %34, 0;\n"                            \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " SSMK_LIST32 \
      ", %32, %33, add, 1, 1, 0, 0;\n}"                                           \
      : SSMK_ACC32(d, 0)                                                          \
      : "l"(a.bits()), "l"(b.bits()), "r"(int(add)))
template <class T>
__device__ __forceinline__ void product_64(float (&d)[32], Factor a, Factor b, bool add) {
  if constexpr (dtype_for<T> == DType::kBF16) {
    SSMK_PRODUCT_SS("bf16");
  } else {
    SSMK_PRODUCT_SS("f16");
  }
}
#undef SSMK_PRODUCT_SS

// The same with a in registers, as pairs of 16-bit values.
#define SSMK_PRODUCT_RS(type)                                                     \
  asm volatile(                                                                   \
      "{\n.reg .pred add;\nsetp.ne.b32 add, %37, 0;\n"                            \
      "wgmma.mma_async.sync.aligned.m64n64k16.f32." type "." type " " SSMK_LIST32 \
      ", {%32, %33, %34, %35}, %36, add, 1, 1, 0;\n}"                             \
      : SSMK_ACC32(d, 0)                                                          \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits()), "r"(int(add)))
template <class T>
__device__ __forceinline__ void product_64(float (&d)[32], const uint32_t (&a)[4], Factor b,
                                           bool add) {
  if constexpr (dtype_for<T> == DType::kBF16) {
    SSMK_PRODUCT_RS("bf16");
  } else {
    SSMK_PRODUCT_RS("f16");
  }
}
#undef SSMK_PRODUCT_RS

// d (64 x 128, or 64 x 64) += a b; a in registers, b across the rows of its tiles.
#define SSMK_PRODUCT_ACROSS(n, list, last, type)                                                  \
  "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." type "." type " " list ", " last ", 1, 1, 1, " \
                                                                                    "1;"
template <class T>
__device__ __forceinline__ void product_across(float (&d)[64], const uint32_t (&a)[4], Factor b) {
#define SSMK_OPERANDS                   \
  : SSMK_ACC32(d, 0), SSMK_ACC32(d, 32)    \
  : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits())
  if constexpr (dtype_for<T> == DType::kBF16) {
    asm volatile(SSMK_PRODUCT_ACROSS("128", SSMK_LIST64, "{%64, %65, %66, %67}, %68", "bf16")
                     SSMK_OPERANDS);
  } else {
    asm volatile(SSMK_PRODUCT_ACROSS("128", SSMK_LIST64, "{%64, %65, %66, %67}, %68", "f16")
                     SSMK_OPERANDS);
  }
#undef SSMK_OPERANDS
}
template <class T>
__device__ __forceinline__ void product_across(float (&d)[32], const uint32_t (&a)[4], Factor b) {
#define SSMK_OPERANDS \
  : SSMK_ACC32(d, 0)     \
  : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.bits())
  if constexpr (dtype_for<T> == DType::kBF16) {
    asm volatile(SSMK_PRODUCT_ACROSS("64", SSMK_LIST32, "{%32, %33, %34, %35}, %36", "bf16")
                     SSMK_OPERANDS);
  } else {
    asm volatile(SSMK_PRODUCT_ACROSS("64", SSMK_LIST32, "{%32, %33, %34, %35}, %36", "f16")
                     SSMK_OPERANDS);
  }
#undef SSMK_OPERANDS
}
#undef SSMK_PRODUCT_ACROSS
#undef SSMK_LIST32
#undef SSMK_LIST64
#undef SSMK_ACC32
#undef SSMK_ACC8

// ---- Tiles and registers

// Four 8 x 8 matrices to shared memory, as load_matrices() and load_transposed() read them.
__device__ __forceinline__ void store_matrices(uint32_t at, uint32_t a, uint32_t b, uint32_t c,
                                               uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(a),
               "r"(b), "r"(c), "r"(d)
               : "memory");
}
__device__ __forceinline__ void store_transposed(uint32_t at, uint32_t a, uint32_t b, uint32_t c,
                                                 uint32_t d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(at),
               "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}

// Reads of shared memory that stay where they are written.
__device__ __forceinline__ float shared_float(uint32_t at) {
  float v;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(v) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ int shared_int(uint32_t at) { return __float_as_int(shared_float(at)); }
__device__ __forceinline__ float2 shared_float2(uint32_t at) {
  float2 v;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(v.x), "=f"(v.y) : "r"(at) : "memory");
  return v;
}
__device__ __forceinline__ float4 shared_float4(uint32_t at) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
               : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w)
               : "r"(at)
               : "memory");
  return v;
}

__device__ __forceinline__ int4 shared_int4(uint32_t at) {
  const float4 v = shared_float4(at);
  return {__float_as_int(v.x), __float_as_int(v.y), __float_as_int(v.z), __float_as_int(v.w)};
}
__device__ __forceinline__ void shared_store(uint32_t at, int4 v) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(at), "r"(v.x), "r"(v.y), "r"(v.z),
               "r"(v.w)
               : "memory");
}

__device__ __forceinline__ void shared_store(uint32_t at, int v) {
  asm volatile("st.shared.b32 [%0], %1;" ::"r"(at), "r"(v) : "memory");
}
__device__ __forceinline__ void shared_store(uint32_t at, float2 v) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(at), "f"(v.x), "f"(v.y) : "memory");
}

// What this thread wrote to shared memory is seen by the products that others start after a
// barrier.
__device__ __forceinline__ void show_to_products() {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// ---- Barriers

// A barrier of `threads` threads; number 0 is that of the whole block.
__device__ __forceinline__ void meet(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// Opens each time that `count` arrivals have been counted.
__device__ __forceinline__ void gate_make(uint32_t gate, uint32_t count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(gate), "r"(count) : "memory");
}
__device__ __forceinline__ void gate_arrive(uint32_t gate) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(gate) : "memory");
}
// One arrival, and as many bytes as are to come by bring_tile().
__device__ __forceinline__ void gate_expect(uint32_t gate, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(gate), "r"(bytes)
               : "memory");
}
__device__ __forceinline__ void gate_wait(uint32_t gate, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred open;\nagain:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 open, [%0], %1;\n@!open bra again;\n}" ::"r"(gate),
      "r"(parity)
      : "memory");
}

// ---- Tiles from memory, by the copy engine

// What a tile is cut from: a tensor of 16-bit values with axes (batch, token, head, column), the
// last one compact.  Made on the host, passed to the kernel by value.
using TileSource = CUtensorMap;

// 64 columns of 64 tokens; tokens past the end of the tensor are zeros.  The gate counts the bytes.
__device__ __forceinline__ void bring_tile(uint32_t to, const TileSource &from, int row, int token,
                                           int head, int column, uint32_t gate) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(to),
      "l"(&from), "r"(column), "r"(head), "r"(token), "r"(row), "r"(gate)
      : "memory");
}

// The other way: what was written to the tile is shown to the copy engine first (show_to_products
// and a barrier).  One thread does this, and later waits until its tiles have been read.
__device__ __forceinline__ void send_tile(const TileSource &to, int row, int token, int head,
                                          int column, uint32_t from) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];\n"
      "cp.async.bulk.commit_group;" ::"l"(&to),
      "r"(column), "r"(head), "r"(token), "r"(row), "r"(from)
      : "memory");
}
__device__ __forceinline__ void tiles_read() {
  asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
}

// v, but the compiler does not know that: what follows from it is worked out where it is
// used, and not kept in registers, or memory, from before.
template <class T>
__device__ __forceinline__ T afresh(T v) {
  asm volatile("" : "+r"(v));
  return v;
}

// This thread's number in its block, read once: the compiler would read it again and again.
__device__ __forceinline__ int thread_number() {
  int i;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(i));
  return i;
}

// The block's number, read where it stands: what follows from it is then not worked out before
// warps part, and kept in registers by all.
__device__ __forceinline__ int block_number() {
  int i;
  asm volatile("mov.u32 %0, %%ctaid.x;" : "=r"(i));
  return i;
}

// ---- Registers, given from warpgroup to warpgroup

template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

}  // namespace ssmk::cuda
