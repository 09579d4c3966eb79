// SPDX-License-Identifier: MIT
// What this machine can do at best, as loops that do nothing else.  One table of them per
// instruction-set level.
#pragma once

#include <cstdint>

namespace ssmk::bench {

// Each runs over one piece of a buffer, or for some rounds, on the calling thread.
struct Loops {
  const char *level;

  // In-place read-modify-write of n elements: p = a p + b.  With a = 1, b = 0 the data stay as they
  // are, so a benchmark may run these on the very memory that a kernel works on.
  void (*update_f32)(void *p, int64_t n, float a, float b);
  void (*update_bf16)(void *p, int64_t n, float a, float b);
  // The same for bits that are not to be looked at as numbers; n 32-bit words.
  void (*update_bits)(void *p, int64_t n, uint32_t mask);

  float (*read)(const void *p, int64_t bytes);
  // dst is 64-byte aligned.
  void (*copy)(void *dst, const void *src, int64_t bytes);
  void (*copy_streaming)(void *dst, const void *src, int64_t bytes);

  // Arithmetic on registers and L1 alone; each returns how many operations it did: multiply-adds,
  // exponentials.
  int64_t (*multiply_add)(int64_t rounds, float *sink);
  int64_t (*exponential)(int64_t rounds, float *sink);       // the library's
  int64_t (*bare_exponential)(int64_t rounds, float *sink);  // without its care for the extremes
};

}  // namespace ssmk::bench
