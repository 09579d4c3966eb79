// SPDX-License-Identifier: MIT
// Prefill of Mamba-2 and 3 on the GPU: which path takes a call.
//
// SSMK_SSD_PATH names a path that must take every call, or fail it: for tests, which compare paths.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "core/status.h"
#include "cuda/device.h"
#include "cuda/ssd_chunk_path.h"

namespace ssmk::cuda {
namespace {

// The best first; the last one takes whatever the others leave.
const SsdPath *const kPaths[] = {&kSsdWgmma, &kSsdMma, &kSsdTf32, &kSsdGeneral};

const char *wanted_path() {
  const char *const name = std::getenv("SSMK_SSD_PATH");
  return name && *name ? name : nullptr;
}

}  // namespace

ssmk_status ssd_chunk(const SsdChunkProblem &p, const Call &call) {
  if (p.seqs.nseq == 0 || p.nheads == 0) return SSMK_OK;
  int capability = 0;
  if (const ssmk_status status = compute_capability(call, &capability)) return status;
  const char *const wanted = wanted_path();
  for (const SsdPath *path : kPaths) {
    if (wanted && std::strcmp(wanted, path->name)) continue;
    const char *const why = path->refuses(p, capability);
    if (!why) return path->run(p, call);
    if (wanted)
      return fail(SSMK_UNSUPPORTED, "%s: SSMK_SSD_PATH: %s does not take this call: %s", call.op,
                  wanted, why);
  }
  return fail(SSMK_UNSUPPORTED, "%s: SSMK_SSD_PATH: must be a path of this build, got %s", call.op,
              wanted);
}

// Enough for any path that may take the call: which one it is depends on addresses and the device.
uint64_t ssd_chunk_workspace(const SsdChunkProblem &p) {
  uint64_t most = 0;
  for (const SsdPath *path : kPaths) {
    const uint64_t bytes = path->workspace(p);
    if (bytes > most) most = bytes;
  }
  return most;
}

// "general", or with those that come before it "wgmma: why not; mma: why not; general".
const char *ssd_chunk_path(const SsdChunkProblem &p, int capability) {
  static thread_local char text[1024];
  size_t used = 0;
  for (const SsdPath *path : kPaths) {
    const char *const why = path->refuses(p, capability);
    const int n = why ? std::snprintf(text + used, sizeof text - used, "%s: %s; ", path->name, why)
                      : std::snprintf(text + used, sizeof text - used, "%s", path->name);
    if (!why || n < 0 || used + size_t(n) >= sizeof text) break;
    used += size_t(n);
  }
  return text;
}

}  // namespace ssmk::cuda
