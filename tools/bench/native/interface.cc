// SPDX-License-Identifier: MIT
// The C interface that tools/bench/ceilings.py loads: which levels run here, and the loops spread
// over threads.
//
// Pieces go to the threads in the same way as the library's own tasks do, so a ratio compares
// kernels, not ways to start threads.
#include <atomic>
#include <cstring>

#include "ceilings.h"
#include "cpu/parallel.h"

namespace ssmk::cpu {
namespace portable {
extern const bench::Loops loops;
}
#if defined(__x86_64__)
namespace x86_64_v3 {
extern const bench::Loops loops;
}
namespace x86_64_v4 {
extern const bench::Loops loops;
}
#elif defined(__aarch64__)
namespace neon {
extern const bench::Loops loops;
}
#endif
}  // namespace ssmk::cpu

namespace {

using ssmk::bench::Loops;

constexpr int64_t kPiece = 256 << 10;  // bytes; a multiple of every vector and of every element

struct Levels {
  const Loops *list[3];
  int count = 0;

  Levels() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    if (v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      list[count++] = &ssmk::cpu::x86_64_v4::loops;
    if (v3) list[count++] = &ssmk::cpu::x86_64_v3::loops;
#elif defined(__aarch64__)
    list[count++] = &ssmk::cpu::neon::loops;
#endif
    list[count++] = &ssmk::cpu::portable::loops;
  }
};

const Levels &levels() {
  static const Levels all;
  return all;
}

template <class Body>
void parallel(int64_t tasks, const Body &body) {
  ssmk::cpu::parallel_for(
      tasks, INT64_MAX, ssmk::cpu::num_threads(),
      [](void *context, int64_t i, int) { (*static_cast<const Body *>(context))(i); },
      const_cast<Body *>(&body));
}

// body(offset, bytes) over pieces of `bytes` bytes.
template <class Body>
void in_pieces(int64_t bytes, const Body &body) {
  parallel((bytes + kPiece - 1) / kPiece, [&](int64_t i) {
    const int64_t begin = i * kPiece;
    body(begin, bytes - begin < kPiece ? bytes - begin : kPiece);
  });
}

template <class Loop>
int64_t on_every_thread(const Loop &loop) {
  std::atomic<int64_t> operations{0};
  parallel(ssmk::cpu::num_threads(), [&](int64_t) {
    float sink = 0;
    operations += loop(&sink);
  });
  return operations;
}

}  // namespace

#define BENCH_API extern "C" __attribute__((visibility("default")))

// Levels that run here, best first; nullptr past the end.
BENCH_API const char *bench_level(int level) {
  return level >= 0 && level < levels().count ? levels().list[level]->level : nullptr;
}

BENCH_API void bench_set_threads(int n) { ssmk::cpu::set_num_threads(n); }
BENCH_API int bench_threads() { return ssmk::cpu::num_threads(); }

BENCH_API void bench_update_f32(int level, char *p, int64_t bytes) {
  const auto loop = levels().list[level]->update_f32;
  in_pieces(bytes, [&](int64_t at, int64_t n) { loop(p + at, n / 4, 1.f, 0.f); });
}

BENCH_API void bench_update_bf16(int level, char *p, int64_t bytes) {
  const auto loop = levels().list[level]->update_bf16;
  in_pieces(bytes, [&](int64_t at, int64_t n) { loop(p + at, n / 2, 1.f, 0.f); });
}

BENCH_API void bench_update_bits(int level, char *p, int64_t bytes) {
  const auto loop = levels().list[level]->update_bits;
  in_pieces(bytes, [&](int64_t at, int64_t n) { loop(p + at, n / 4, 0u); });
}

BENCH_API void bench_read(int level, const char *p, int64_t bytes) {
  const auto loop = levels().list[level]->read;
  in_pieces(bytes, [&](int64_t at, int64_t n) {
    volatile float sink = loop(p + at, n);
    (void)sink;
  });
}

BENCH_API void bench_copy(int level, char *dst, const char *src, int64_t bytes) {
  const auto loop = levels().list[level]->copy;
  in_pieces(bytes, [&](int64_t at, int64_t n) { loop(dst + at, src + at, n); });
}

BENCH_API void bench_copy_streaming(int level, char *dst, const char *src, int64_t bytes) {
  const auto loop = levels().list[level]->copy_streaming;
  in_pieces(bytes, [&](int64_t at, int64_t n) { loop(dst + at, src + at, n); });
}

// The C library's own choice of stores; the level plays no part.
BENCH_API void bench_copy_library(int, char *dst, const char *src, int64_t bytes) {
  in_pieces(bytes, [&](int64_t at, int64_t n) { std::memcpy(dst + at, src + at, size_t(n)); });
}

// These return how many operations all threads together did.
BENCH_API int64_t bench_multiply_add(int level, int64_t rounds) {
  const auto loop = levels().list[level]->multiply_add;
  return on_every_thread([&](float *sink) { return loop(rounds, sink); });
}

BENCH_API int64_t bench_exponential(int level, int64_t rounds) {
  const auto loop = levels().list[level]->exponential;
  return on_every_thread([&](float *sink) { return loop(rounds, sink); });
}

BENCH_API int64_t bench_bare_exponential(int level, int64_t rounds) {
  const auto loop = levels().list[level]->bare_exponential;
  return on_every_thread([&](float *sink) { return loop(rounds, sink); });
}
