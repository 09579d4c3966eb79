// SPDX-License-Identifier: MIT
#include "api/check.h"

using namespace ssmk;

namespace {

ssmk_status not_built(const ssmk_mla_decode_args *user) {
  Check c("mla_decode", false);
  ssmk_mla_decode_args a;
  c.args(user, &a);
  return c.unsupported("is declared but not built in this version, on any backend");
}

}  // namespace

extern "C" {

SSMK_API ssmk_status ssmk_mla_decode(const ssmk_mla_decode_args *args) { return not_built(args); }

SSMK_API ssmk_status ssmk_mla_decode_workspace(const ssmk_mla_decode_args *args, uint64_t *) {
  return not_built(args);
}

}  // extern "C"
