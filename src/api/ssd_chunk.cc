// SPDX-License-Identifier: MIT
#include "api/check.h"

using namespace ssmk;

namespace {

ssmk_status not_built(const ssmk_ssd_chunk_args *user) {
  Check c("ssd_chunk", false);
  ssmk_ssd_chunk_args a;
  c.args(user, &a);
  return c.unsupported("is declared but not built in this version, on any backend");
}

}  // namespace

extern "C" {

SSMK_API ssmk_status ssmk_ssd_chunk(const ssmk_ssd_chunk_args *args) { return not_built(args); }

SSMK_API ssmk_status ssmk_ssd_chunk_workspace(const ssmk_ssd_chunk_args *args, uint64_t *) {
  return not_built(args);
}

}  // extern "C"
