// SPDX-License-Identifier: MIT
#include "api/slots.h"

#include <algorithm>
#include <cmath>
#include <vector>

namespace ssmk {

DtTransform dt_transform(Check &c, int32_t softplus, float lo, float hi) {
  DtTransform t;
  t.softplus = softplus != 0;
  t.clamp = lo != 0 || hi != 0;
  t.lo = lo;
  t.hi = hi;
  if (!(lo <= hi))
    c.error(SSMK_INVALID_ARGUMENT, "dt_min: must be at most dt_max = %g, got %g", double(hi),
            double(lo));
  return t;
}

PadRule pad_rule(uint64_t flags, int64_t pad_slot, int64_t entries) {
  PadRule r;
  r.has_pad_slot = (flags & SSMK_PAD_SLOT) != 0;
  r.pad_slot = pad_slot;
  r.entries = entries;
  return r;
}

void only_flags(Check &c, uint64_t flags, uint64_t known) {
  if (flags & ~known)
    c.error(SSMK_INVALID_ARGUMENT,
            "flags: must be among the bits 0x%llx of this operation, got 0x%llx",
            (unsigned long long)known, (unsigned long long)flags);
}

ssmk_status check_workspace(Check &c, const Workspace &given, uint64_t needed) {
  if (!c.ok() || needed == 0) return c.status();
  if (!given.data || given.bytes < needed)
    return c.error(
        SSMK_OUT_OF_MEMORY, "workspace: must have %llu bytes (ssmk_%s_workspace), got %llu",
        (unsigned long long)needed, c.op(), (unsigned long long)(given.data ? given.bytes : 0));
  if (reinterpret_cast<uintptr_t>(given.data) % 64)
    return c.error(SSMK_INVALID_ARGUMENT, "workspace: must be aligned to 64 bytes, got %p",
                   given.data);
  return c.status();
}

Sequences sequences(Check &c, const SequenceArgs &a, Dim &batch, Dim &seqlen, Dim &slots) {
  Sequences s;
  if (a.cu_seqlens) {
    c.forbidden(a.seq_idx, "seq_idx", "together with cu_seqlens");
    Dim bounds{"nseq + 1"};
    s.cu_seqlens = c.in<1>(a.cu_seqlens, "cu_seqlens", {&bounds}, kIndices);
    if (!c.ok()) return s;
    c.that(bounds.value >= 1, "cu_seqlens", "must have at least one element", bounds.value);
    c.that(batch.value == 1, "cu_seqlens", "needs batch = 1 (packed tokens)", batch.value);
    s.nseq = bounds.value - 1;
  } else {
    s.seq_idx = c.in<2>(a.seq_idx, "seq_idx", {&batch, &seqlen}, kIndices);
    s.nseq = batch.value;
  }
  Dim nseq{"nseq", s.nseq};
  s.state_indices = c.in<1>(a.state_indices, "state_indices", {&nseq}, kIndices);
  s.has_initial_state = c.in<1>(a.has_initial_state, "has_initial_state", {&nseq}, kBools);
  if (a.state_indices && !a.initial_states && !a.final_states)
    c.forbidden(a.state_indices, "state_indices",
                "without initial_states or final_states: they index nothing");
  if (!a.initial_states)
    c.forbidden(a.has_initial_state, "has_initial_state", "without initial_states");
  slots = a.state_indices ? Dim{"entries"} : nseq;
  return s;
}

void finish_sequences(Check &c, Sequences &s, const Dim &slots, const Dim &seqlen, uint64_t flags,
                      int64_t pad_slot, bool writes_states) {
  s.pad = pad_rule(flags, pad_slot, slots.value);
  if (!c.reads_data()) return;
  if (s.cu_seqlens.given()) {
    int64_t last = 0;
    for (int64_t i = 0; i <= s.nseq; ++i) {
      const int64_t now = read_index(s.cu_seqlens, i);
      if (i == 0 ? now != 0 : now < last) {
        c.error(
            SSMK_INVALID_ARGUMENT,
            "cu_seqlens: must start at 0 and never decrease, got %lld after %lld at element %lld",
            (long long)now, (long long)last, (long long)i);
        return;
      }
      last = now;
    }
    c.that(last == seqlen.value, "cu_seqlens", "must end at seqlen, the number of packed tokens",
           last);
  }
  if (!s.state_indices.given()) return;
  SlotUse use;
  use.in.data = s.state_indices.data;
  use.in.dtype = s.state_indices.dtype;
  use.in.stride[0] = s.state_indices.stride[0];
  use.out = use.in;
  use.batch = s.nseq;
  use.choices = use.outs = 1;
  use.writes = writes_states;
  use.in_name = use.out_name = "state_indices";
  check_slots(c, use, s.pad);
}

void check_range(Check &c, const View<1> &v, const char *name, int64_t n, int64_t lo, int64_t hi,
                 const char *expected) {
  if (!c.reads_data() || !v.given()) return;
  for (int64_t i = 0; i < n; ++i) {
    const int64_t x = read_index(v, i);
    if (x < lo || x > hi) {
      c.error(SSMK_INVALID_ARGUMENT, "%s: must be %s, got %lld at element %lld", name, expected,
              (long long)x, (long long)i);
      return;
    }
  }
}

void check_slots(Check &c, const SlotUse &use, const PadRule &pad) {
  if (!c.reads_data()) return;
  struct Touch {
    int64_t slot, row;
    bool write;
  };
  const auto pads = [&](int64_t slot) {
    return slot < 0 || (pad.has_pad_slot && slot == pad.pad_slot);
  };
  const auto inside = [&](int64_t slot, const char *name, int64_t row) {
    if (slot < pad.entries || pads(slot)) return true;
    c.error(SSMK_INVALID_ARGUMENT,
            "%s: must be below the pool's entries = %lld, got %lld in row %lld", name,
            (long long)pad.entries, (long long)slot, (long long)row);
    return false;
  };

  // Every slot that a row may read is checked, also those that its accepted count passes over.
  for (int64_t b = 0; b < use.batch; ++b) {
    for (int64_t k = 0; use.in.given() && k < use.choices; ++k)
      if (!inside(read_index(use.in, b, k), use.in_name, b)) return;
    for (int64_t k = 0; use.out.given() && k < use.outs; ++k)
      if (!inside(read_index(use.out, b, k), use.out_name, b)) return;
  }
  if (!use.writes || (!use.in.given() && !use.out.given())) return;

  // Sorted by slot: a slot with a writer has one row only.
  Touch few[128];
  std::vector<Touch> many;
  const int64_t most = use.batch * (1 + use.outs);
  Touch *all = few;
  if (most > 128) {
    many.resize(size_t(most));
    all = many.data();
  }
  int64_t n = 0;
  for (int64_t b = 0; b < use.batch; ++b) {
    int64_t k = 0;
    if (use.choices > 1 && use.num_accepted.given())
      k = std::max<int64_t>(read_index(use.num_accepted, b), 1) - 1;
    const int64_t in = use.in.given() ? read_index(use.in, b, k) : b;
    const bool one_out = use.outs == 1;
    const int64_t out = !use.out.given() ? in : one_out ? read_index(use.out, b, 0) : 0;
    if (pads(in) || (one_out && pads(out))) continue;
    if (use.out.given()) {
      all[n++] = {in, b, false};
      for (int64_t t = 0; t < use.outs; ++t)
        if (!pads(read_index(use.out, b, t))) all[n++] = {read_index(use.out, b, t), b, true};
    } else {
      all[n++] = {in, b, true};
    }
  }
  std::sort(all, all + n, [](const Touch &a, const Touch &b) { return a.slot < b.slot; });
  for (int64_t i = 0; i < n;) {
    int64_t j = i;
    bool written = false, shared = false;
    for (; j < n && all[j].slot == all[i].slot; ++j) {
      written |= all[j].write;
      shared |= all[j].row != all[i].row;
    }
    if (written && shared) {
      c.error(
          SSMK_INVALID_ARGUMENT,
          "%s: a slot that one row writes must not be read or written by another, got slot %lld in "
          "rows %lld and %lld",
          use.out.given() ? use.out_name : use.in_name, (long long)all[i].slot,
          (long long)all[i].row, (long long)all[j - 1].row);
      return;
    }
    i = j;
  }
}

}  // namespace ssmk
