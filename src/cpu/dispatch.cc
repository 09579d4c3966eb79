// SPDX-License-Identifier: MIT
// Which instruction-set level this process uses.
#include <cstdlib>
#include <cstring>
#include <string>

#include "cpu/kernels.h"

namespace ssmk::cpu {

namespace portable {
extern const Kernels table;
}
#if defined(__x86_64__)
namespace x86_64_v3 {
extern const Kernels table;
}
namespace x86_64_v4 {
extern const Kernels table;
}
#elif defined(__aarch64__)
namespace neon {
extern const Kernels table;
}
#endif

namespace {

struct Level {
  const Kernels *kernels;
  bool runs_here;
};

// Best first.  Every processor with AVX2 and FMA has the rest of x86-64-v3 as well.
struct Levels {
  Level list[3];
  int count = 0;

  Levels() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2");
    const bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
                    __builtin_cpu_supports("avx512vl");
    list[count++] = {&x86_64_v4::table, v4};
    list[count++] = {&x86_64_v3::table, v3};
#elif defined(__aarch64__)
    list[count++] = {&neon::table, true};
#endif
    list[count++] = {&portable::table, true};
  }
};

const Levels &levels() {
  static const Levels all;
  return all;
}

const Kernels *pick() {
  const char *wanted = std::getenv("SSMK_ISA");
  const Levels &all = levels();
  for (int i = 0; i < all.count; ++i)
    if (all.list[i].runs_here &&
        (!wanted || !*wanted || !std::strcmp(wanted, all.list[i].kernels->isa)))
      return all.list[i].kernels;
  return nullptr;
}

int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

}  // namespace

const Kernels *kernels() {
  static const Kernels *const picked = pick();
  return picked;
}

const char *available_levels() {
  static const std::string text = [] {
    std::string s;
    const Levels &all = levels();
    for (int i = 0; i < all.count; ++i)
      if (all.list[i].runs_here)
        s += (s.empty() ? "" : ", ") + std::string(all.list[i].kernels->isa);
    return s;
  }();
  return text.c_str();
}

// A float32 state for every channel, the channels of a group padded to whole vectors of the widest
// level.
uint64_t selective_scan_workspace(const SelectiveScanProblem &p) {
  if (p.dstate <= kMaxStackState) return 0;
  const int64_t channels = p.seqs.nseq * p.ngroups * round_up(p.dim / p.ngroups, 16);
  return uint64_t(channels) * uint64_t(p.dstate) * (p.complex ? 8 : 4);
}

// Arrays of Mamba3Token (state_update_mamba3_token.h), each padded to whole vectors of the widest
// level.
int64_t mamba3_update_floats(const StateUpdateProblem &p) {
  const int64_t rank = p.mamba3.rank, n = round_up(p.dstate, 16), rows = round_up(p.headdim, 16);
  return rank * (6 * n + 3 * rows + 256) + 3 * n + 9 * rows + 5 * round_up(p.mamba3.nangles, 16) +
         (p.ntokens > 1 ? p.headdim * n : 0);
}

// The states of the call in float32, headdim and dstate padded to whole vectors of the widest
// level.
uint64_t state_update_workspace(const StateUpdateProblem &p) {
  if (p.is_mamba3()) {
    const int64_t floats = mamba3_update_floats(p);
    return floats <= kMamba3StackFloats ? 0 : uint64_t(p.batch * p.nheads) * uint64_t(floats) * 4;
  }
  if (p.dstate <= kMaxStackState) return 0;
  return uint64_t(p.batch * p.nheads * round_up(p.headdim, 16)) * uint64_t(round_up(p.dstate, 16)) *
         4;
}

}  // namespace ssmk::cpu
