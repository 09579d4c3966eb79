// SPDX-License-Identifier: MIT
#include <algorithm>
#include <cmath>
#include <vector>

#include "api/run.h"

namespace ssmk {
namespace {

// Tensors with or without an axis of T tokens after the batch, seen with it.
struct Tokens {
  Check &c;
  Dim &batch, &ntokens;
  bool axis;

  View<4> heads(const DLTensor *t, const char *name, Dim &nheads, Dim &size, bool write) const {
    return axis ? take<4>(t, name, {&batch, &ntokens, &nheads, &size}, kFloats, write)
                : spread<4>(take<3>(t, name, {&batch, &nheads, &size}, kFloats, write), {0, 2, 3});
  }
  View<3> rows(const DLTensor *t, const char *name, Dim &size, unsigned dtypes, bool write) const {
    return axis ? take<3>(t, name, {&batch, &ntokens, &size}, dtypes, write)
                : spread<3>(take<2>(t, name, {&batch, &size}, dtypes, write), {0, 2});
  }

 private:
  template <int Rank>
  View<Rank> take(const DLTensor *t, const char *name, std::initializer_list<Dim *> dims,
                  unsigned dtypes, bool write) const {
    return write ? c.out<Rank>(t, name, dims, dtypes) : c.in<Rank>(t, name, dims, dtypes);
  }
};

// One form of the cache, and what belongs to it.
void check_forms(Check &c, const ssmk_mla_decode_args &a) {
  if (a.latent) {
    c.forbidden(a.codes, "codes", "together with latent");
    c.forbidden(a.scales, "scales", "together with latent");
    c.forbidden(a.biases, "biases", "together with latent");
  } else if (!a.codes && !a.scales && !a.biases) {
    c.error(SSMK_INVALID_ARGUMENT, "latent: or codes, scales and biases are required, got NULL");
  } else {
    c.required(a.codes, "codes");
    c.required(a.scales, "scales");
    c.required(a.biases, "biases");
  }
  if (a.q_rope) c.required(a.k_rope, "k_rope");
  if (a.k_rope) c.required(a.q_rope, "q_rope");
  if (!a.new_latent) c.forbidden(a.new_rope, "new_rope", "without new_latent");
  if (!a.k_rope) c.forbidden(a.new_rope, "new_rope", "without k_rope");
  if (a.new_latent && a.k_rope) c.required(a.new_rope, "new_rope");
}

int64_t group_of(Check &c, int64_t latent, int64_t groups) {
  for (int64_t group : {32, 64, 128})
    if (groups > 0 && latent % group == 0 && latent / group == groups) return group;
  c.error(SSMK_INVALID_ARGUMENT,
          "scales: the last axis must be latent / group with latent = %lld and group 32, 64 or "
          "128, got %lld",
          (long long)latent, (long long)groups);
  return 0;
}

// On the CPU: the pages that hold a row's tokens are inside the pool, and with an append a page
// that one row writes belongs to that row alone, and stands in its table once.
void check_pages(Check &c, const MlaDecodeProblem &p, int64_t pages) {
  if (!c.reads_data() || !p.page_table.given()) return;
  std::vector<int64_t> written;
  const auto used = [&](int64_t b) {
    return (read_index(p.seqlens, b) + p.page_size - 1) / p.page_size;
  };
  const auto first_written = [&](int64_t b) {
    return (read_index(p.seqlens, b) - p.ntokens) / p.page_size;
  };
  const bool appends = p.new_latent.given() && p.ntokens > 0;
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t j = 0; j < used(b); ++j) {
      const int64_t page = read_index(p.page_table, b, j);
      if (page < 0 || page >= pages) {
        c.error(SSMK_INVALID_ARGUMENT,
                "page_table: the pages that a row uses must be 0 to pages - 1 = %lld, got %lld at "
                "page %lld of row %lld",
                (long long)(pages - 1), (long long)page, (long long)j, (long long)b);
        return;
      }
      if (appends && j >= first_written(b)) written.push_back(page);
    }
  }
  if (written.empty()) return;
  std::sort(written.begin(), written.end());

  // Most pages are only read: a bit for each of their numbers, modulo, spares most of the searches.
  uint64_t maybe[64] = {};
  for (int64_t page : written) maybe[page / 64 % 64] |= uint64_t(1) << page % 64;
  std::vector<bool> seen(written.size());
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t j = 0; j < used(b); ++j) {
      const int64_t page = read_index(p.page_table, b, j);
      if (!(maybe[page / 64 % 64] >> page % 64 & 1)) continue;
      const auto found = std::lower_bound(written.begin(), written.end(), page);
      if (found == written.end() || *found != page) continue;
      const size_t at = size_t(found - written.begin());
      if (seen[at]) {
        c.error(SSMK_INVALID_ARGUMENT,
                "page_table: a page that a row writes must not be used a second time, got page "
                "%lld again as page %lld of row %lld",
                (long long)page, (long long)j, (long long)b);
        return;
      }
      seen[at] = true;
    }
  }
}

void read_problem(Check &c, const ssmk_mla_decode_args *user, MlaDecodeProblem *p) {
  ssmk_mla_decode_args a;
  c.args(user, &a);
  Dim batch{"batch"}, ntokens{"T"}, nheads{"nheads"}, latent{"latent"}, rope{"rope"},
      words{"latent / 8"}, groups{"latent / group"}, pages{"pages"}, positions{"capacity"},
      max_pages{"max_pages"};

  c.required(a.q_nope, "q_nope");
  c.required(a.seqlens, "seqlens");
  c.required(a.out, "out");
  check_forms(c, a);
  c.rank_is(a.q_nope, "q_nope", {3, 4}, "(batch, [T,] nheads, latent)");
  const bool has_time = a.q_nope && a.q_nope->ndim == 4;
  if (!has_time) ntokens.value = 1;
  const Tokens tokens{c, batch, ntokens, has_time};

  p->q_nope = tokens.heads(a.q_nope, "q_nope", nheads, latent, false);
  if (c.ok()) c.that(latent.value > 0, "q_nope", "latent must be at least 1", latent.value);
  p->q_rope = tokens.heads(a.q_rope, "q_rope", nheads, rope, false);
  p->seqlens = c.in<1>(a.seqlens, "seqlens", {&batch}, kIndices);
  p->page_table = c.in<2>(a.page_table, "page_table", {&batch, &max_pages}, kIndices);

  // the cache
  const bool paged = a.page_table != nullptr, write = a.new_latent != nullptr;
  Dim &rows = paged ? pages : batch;
  if (paged) positions.name = "page_size";
  const auto cache = [&](const DLTensor *t, const char *name, Dim &size, unsigned dtypes) {
    const std::initializer_list<Dim *> dims = {&rows, &positions, &size};
    return write ? c.out<3>(t, name, dims, dtypes) : c.in<3>(t, name, dims, dtypes);
  };
  p->values = cache(a.latent, "latent", latent, kFloats);
  if (a.codes && c.ok()) {
    c.that(latent.value % 8 == 0, "q_nope", "latent must be a multiple of 8 with codes",
           latent.value);
    words.value = latent.value / 8;
    p->codes = cache(a.codes, "codes", words, set_of(DType::kU32));
    p->scales = cache(a.scales, "scales", groups, kFloats);
    if (c.ok()) p->group = group_of(c, latent.value, groups.value);
    p->biases = cache(a.biases, "biases", groups, kFloats);
  }
  p->k_rope = cache(a.k_rope, "k_rope", rope, kFloats);
  if (paged && c.ok() && (positions.value < 16 || (positions.value & (positions.value - 1)) != 0))
    c.error(SSMK_INVALID_ARGUMENT, "%s: page_size must be a power of two of at least 16, got %lld",
            a.latent ? "latent" : "codes", (long long)positions.value);

  p->new_latent = tokens.rows(a.new_latent, "new_latent", latent, kFloats, false);
  p->new_rope = tokens.rows(a.new_rope, "new_rope", rope, kFloats, false);
  p->out = tokens.heads(a.out, "out", nheads, latent, true);
  p->lse = tokens.rows(a.lse, "lse", nheads, set_of(DType::kF32), true);

  // scalars
  const bool scaled = a.softmax_scale != 0;
  if (!std::isfinite(a.softmax_scale))
    c.error(SSMK_INVALID_ARGUMENT, "softmax_scale: must be finite, got %g",
            double(a.softmax_scale));
  c.that(a.reserved == 0, "reserved", "must be 0", a.reserved);
  only_flags(c, a.flags, SSMK_BATCH_INVARIANT);
  p->batch_invariant = (a.flags & SSMK_BATCH_INVARIANT) != 0;
  p->workspace = {a.workspace, a.workspace_bytes};
  c.overlaps();
  if (!c.ok()) return;

  p->batch = batch.value;
  p->ntokens = ntokens.value;
  p->nheads = nheads.value;
  p->latent = latent.value;
  p->rope = rope.bound() ? rope.value : 0;
  p->page_size = paged ? positions.value : 0;
  p->capacity = positions.value;
  if (paged && (__builtin_mul_overflow(max_pages.value, positions.value, &p->capacity) ||
                p->capacity > INT64_MAX / 2))
    p->capacity = INT64_MAX / 2;
  p->softmax_scale =
      scaled ? a.softmax_scale : float(1 / std::sqrt(double(p->latent) + double(p->rope)));

  // data
  const int64_t least = write ? p->ntokens : 0;
  check_range(
      c, p->seqlens, "seqlens", p->batch, least, p->capacity,
      write ? "T to the row's capacity (new_latent is counted)" : "0 to the row's capacity");
  check_pages(c, *p, pages.value);
}

constexpr Operation<ssmk_mla_decode_args, MlaDecodeProblem> kOperation = {
    "mla_decode", read_problem, cpu::mla_decode_workspace, &cpu::Kernels::mla_decode};

}  // namespace
}  // namespace ssmk

extern "C" {

SSMK_API ssmk_status ssmk_mla_decode(const ssmk_mla_decode_args *args) {
  return ssmk::kOperation.run(args);
}

SSMK_API ssmk_status ssmk_mla_decode_workspace(const ssmk_mla_decode_args *args, uint64_t *bytes) {
  return ssmk::kOperation.workspace(args, bytes);
}

}  // extern "C"
