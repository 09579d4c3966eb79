// SPDX-License-Identifier: MIT
// ssmk.h in C++17, included twice and used: this has to compile without a warning and link.
#include <ssmk.h>
#include <ssmk.h>

#include <cstddef>
#include <cstring>
#include <type_traits>

template <class Args>
constexpr bool sound() {
  static_assert(std::is_standard_layout_v<Args> && std::is_trivial_v<Args>);
  static_assert(offsetof(Args, size) == 0, "or its value could not be read");
  static_assert(sizeof(Args) % 8 == 0, "or a version of it would end in padding");
  return true;
}
static_assert(sound<ssmk_selective_scan_args>() && sound<ssmk_ssd_chunk_args>());
static_assert(sound<ssmk_state_update_args>() && sound<ssmk_mla_decode_args>());
static_assert(sound<ssmk_causal_conv1d_args>() && sound<ssmk_causal_conv1d_update_args>());

int main() {
  ssmk_mla_decode_args args{};
  args.size = sizeof args;
  if (ssmk_mla_decode(&args) == SSMK_OK) return 1;
  return std::strstr(ssmk_last_error(), "mla_decode") ? 0 : 1;
}
