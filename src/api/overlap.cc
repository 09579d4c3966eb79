// SPDX-License-Identifier: MIT
// Do two strided tensors share a byte?  Asked only when the spans of their addresses meet.
//
// Element (i1, i2, ..) of a tensor starts at base + sum i_k s_k.  Two elements of a and b share a
// byte exactly if
//     -size_a < (base_a - base_b) + sum_k d_k s_k < size_b
// where for every distinct stride s_k the difference d_k of the indices runs through an interval.
// The search walks the strides from the largest down; what the smaller ones can still add leaves
// few candidates for each d_k, one or two for the nested strides of ordinary tensors.  It gives up,
// and says "yes", after a fixed number of steps.
#include <algorithm>
#include <cstdint>

#include "api/check.h"

namespace ssmk {
namespace {

struct Term {
  int64_t stride, lo, hi;
};

struct Search {
  Term terms[16];
  int64_t reach_lo[17], reach_hi[17];  // what terms k.. can add
  int count = 0;
  int64_t below, above;  // a sum strictly between these is a hit
  int steps = 4096;

  void add(int64_t stride, int64_t lo, int64_t hi) {
    if (stride == 0) return;
    for (int k = 0; k < count; ++k)
      if (terms[k].stride == stride) {
        terms[k].lo += lo;
        terms[k].hi += hi;
        return;
      }
    int i = count++;
    for (; i > 0 && terms[i - 1].stride < stride; --i) terms[i] = terms[i - 1];
    terms[i] = {stride, lo, hi};
  }

  void prepare() {
    reach_lo[count] = reach_hi[count] = 0;
    for (int k = count; k-- > 0;) {
      reach_lo[k] = reach_lo[k + 1] + terms[k].lo * terms[k].stride;
      reach_hi[k] = reach_hi[k + 1] + terms[k].hi * terms[k].stride;
    }
  }

  static int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b != 0 && (a ^ b) < 0); }

  // Is there a hit with the terms from k on?  `nonzero`: some earlier difference was not 0, or none
  // needs to be.
  bool hit(int k, int64_t sum, bool nonzero) {
    if (--steps < 0) return true;
    if (sum + reach_hi[k] <= below || sum + reach_lo[k] >= above) return false;
    if (k == count) return nonzero;
    const Term &t = terms[k];
    const int64_t least = below - sum - reach_hi[k + 1], most = above - sum - reach_lo[k + 1];
    int64_t lo = std::max(t.lo, floor_div(least, t.stride) + 1);
    const int64_t hi = std::min(t.hi, -floor_div(-most, t.stride) - 1);
    if (!nonzero) lo = std::max<int64_t>(lo, 0);  // d and -d are the same pair of elements
    for (int64_t d = lo; d <= hi; ++d)
      if (hit(k + 1, sum + d * t.stride, nonzero || d != 0)) return true;
    return false;
  }
};

struct Axes {
  int64_t base;
  int64_t stride[8], size[8];
  int count = 0;
  bool empty = false;
};

// Axes of more than one element, in bytes, strides made positive, the smallest first.
Axes axes_of(const DLTensor &t) {
  Axes a;
  const int64_t item = t.dtype.bits / 8;
  a.base = int64_t(reinterpret_cast<intptr_t>(t.data) + static_cast<intptr_t>(t.byte_offset));
  int64_t compact = 1;
  for (int k = t.ndim; k-- > 0;) {
    const int64_t n = t.shape[k], s = (t.strides ? t.strides[k] : compact) * item;
    compact *= n;
    if (n == 0) a.empty = true;
    if (n <= 1) continue;
    if (s < 0) a.base += (n - 1) * s;
    const int64_t stride = s < 0 ? -s : s;
    int i = a.count++;
    for (; i > 0 && a.stride[i - 1] > stride; --i) {
      a.stride[i] = a.stride[i - 1];
      a.size[i] = a.size[i - 1];
    }
    a.stride[i] = stride;
    a.size[i] = n;
  }
  return a;
}

}  // namespace

bool tensors_overlap(const DLTensor &ta, const DLTensor &tb) {
  const Axes a = axes_of(ta), b = axes_of(tb);
  if (a.empty || b.empty) return false;
  Search search;
  search.below = -int64_t(ta.dtype.bits / 8);
  search.above = tb.dtype.bits / 8;
  for (int k = 0; k < a.count; ++k) search.add(a.stride[k], 0, a.size[k] - 1);
  for (int k = 0; k < b.count; ++k) search.add(b.stride[k], -(b.size[k] - 1), 0);
  search.prepare();
  return search.hit(0, a.base - b.base, true);
}

bool overlaps_itself(const DLTensor &t) {
  const Axes a = axes_of(t);
  if (a.empty) return false;
  const int64_t item = t.dtype.bits / 8;

  // Nested strides, the usual case: each is at least the span of all smaller ones.
  int64_t span = item;
  bool nested = true;
  for (int k = 0; k < a.count; ++k) {
    nested = nested && a.stride[k] >= span;
    span += a.stride[k] * (a.size[k] - 1);
  }
  if (nested) return false;

  Search search;
  search.below = -item;
  search.above = item;
  for (int k = 0; k < a.count; ++k) {
    if (a.stride[k] == 0) return true;
    for (int j = 0; j < k; ++j)
      if (a.stride[j] == a.stride[k]) return true;
    search.add(a.stride[k], -(a.size[k] - 1), a.size[k] - 1);
  }
  search.prepare();
  return search.hit(0, 0, false);
}

}  // namespace ssmk
