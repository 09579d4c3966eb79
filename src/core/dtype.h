// SPDX-License-Identifier: MIT
// The element types that ssmk knows, and their DLPack names.
#pragma once

#include <dlpack/dlpack.h>

#include <cstdint>

// What kernels on a GPU use too.
#if defined(__CUDACC__)
#define SSMK_ANYWHERE __host__ __device__
#else
#define SSMK_ANYWHERE
#endif

namespace ssmk {

enum class DType : uint8_t { kNone, kF32, kF16, kBF16, kC64, kI32, kI64, kU32, kBool };

// Sets of dtypes that an argument may have: bit (1 << DType).
constexpr unsigned set_of(DType d) { return 1u << static_cast<unsigned>(d); }
constexpr unsigned kFloats = set_of(DType::kF32) | set_of(DType::kF16) | set_of(DType::kBF16);
constexpr unsigned kComplex = set_of(DType::kC64);
constexpr unsigned kIndices = set_of(DType::kI32) | set_of(DType::kI64);
constexpr unsigned kBools = set_of(DType::kBool);

SSMK_ANYWHERE constexpr int64_t size_of(DType d) {
  switch (d) {
    case DType::kF32:
    case DType::kI32:
    case DType::kU32: return 4;
    case DType::kF16:
    case DType::kBF16: return 2;
    case DType::kC64:
    case DType::kI64: return 8;
    case DType::kBool: return 1;
    case DType::kNone: break;
  }
  return 0;
}

// kNone for everything that no operation takes.  Flags may come as bool, int8 or uint8.
inline DType dtype_of(DLDataType t) {
  if (t.lanes != 1) return DType::kNone;
  switch (t.code) {
    case kDLFloat: return t.bits == 32 ? DType::kF32 : t.bits == 16 ? DType::kF16 : DType::kNone;
    case kDLBfloat: return t.bits == 16 ? DType::kBF16 : DType::kNone;
    case kDLComplex: return t.bits == 64 ? DType::kC64 : DType::kNone;
    case kDLInt:
      return t.bits == 32   ? DType::kI32
             : t.bits == 64 ? DType::kI64
             : t.bits == 8  ? DType::kBool
                            : DType::kNone;
    case kDLUInt: return t.bits == 32 ? DType::kU32 : t.bits == 8 ? DType::kBool : DType::kNone;
    case kDLBool: return t.bits == 8 ? DType::kBool : DType::kNone;
    default: return DType::kNone;
  }
}

}  // namespace ssmk
