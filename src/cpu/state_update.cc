// SPDX-License-Identifier: MIT
// Decode of Mamba-1 and 2 (Mamba-3: state_update_mamba3.cc), T >= 1 tokens:
//   h[p,n] = exp(dt' A) h[p,n] + dt' x[p] B[n],   y[p] = sum_n h[p,n] C[n] + D x[p],   out = y
//   silu(z)
//
// A task owns a block of rows p of one head of one batch row.  What a row needs beside its states
// (dt', exp(dt' A) if A is the same for all states, the gate) is computed for the whole block, in
// vectors over the rows.  In between, vectors run over dstate, and the lane sums of kLanes rows
// become one vector of y by a single tree of shuffles. One token on packed states streams each row
// through registers, pool to pool: the state is read once and written once, which is what bounds
// it.  Several tokens, other strides and snapshots hold the rows in float32 scratch between the
// first read and the last write.
#include <type_traits>

#include "cpu/dt.h"
#include "cpu/kernels.h"
#include "cpu/lambda.h"
#include "cpu/rows.h"
#include "cpu/state_update_slots.h"

namespace ssmk::cpu::SSMK_ISA {
namespace {

constexpr int64_t kChunk = kMaxStackState;  // states whose B and C are in scratch at a time
constexpr int64_t kRows = 256;              // of a block, at the most
constexpr int64_t kBlockStates = 16384;     // of a block: 64 KB in float32
constexpr int64_t kAheadRows = 96;          // between a row of one vector and its prefetch

struct Scratch {
  alignas(64) float B[kChunk], C[kChunk], A[kChunk];
  alignas(64) float x[kRows], dt_log2e[kRows], dtx[kRows], decay[kRows], y[kRows], z[kRows],
      bias[kRows], D[kRows];
  alignas(64) float rate[kRows];  // A of rows whose A does not depend on the state
  alignas(64) float h[kBlockStates];
};
static_assert(kBlockStates >= kLanes * kMaxStackState, "a vector of rows fits");

// Where the decays of a row come from.
enum class Decay {
  kRow,      // one for all states
  kPacked,   // A in memory: float32, packed, whole vectors
  kGeneral,  // A in memory, any other way
};

struct RowTerms {
  float dt_log2e, decay, dtx;
};

// One row of n states; n need not be a multiple of kLanes if the arrays are padded to one.  Returns
// the lane sums of h C.
template <class T, bool kVectorA>
SSMK_INLINE vf update_row(const T *from, T *to, const float *A, const float *B, const float *C,
                          int64_t n, RowTerms r) {
  const vf dt = splat(r.dt_log2e), fixed = splat(r.decay), dtx = splat(r.dtx);
  const auto step = [&](int64_t j) {
    vf decay = fixed;
    if constexpr (kVectorA) decay = exp2(dt * load(A + j));
    const vf h = fused(decay, load(from + j), dtx * load(B + j));
    store(to + j, h);
    return h;
  };
  vf sum[2] = {};
  int64_t i = 0;
  for (; i + 2 * kLanes <= n; i += 2 * kLanes) {
    sum[0] = fused(step(i), load(C + i), sum[0]);
    sum[1] = fused(step(i + kLanes), load(C + i + kLanes), sum[1]);
  }
  if (i + kLanes <= n) {
    sum[0] = fused(step(i), load(C + i), sum[0]);
    i += kLanes;
  }
  // Lanes past the end are dropped, not multiplied by a padded 0: 0 * inf would be NaN.
  if (i < n) {
    const vi inside = bitcast<vi>(lane_numbers() < vi{} + int32_t(n - i));
    sum[1] = select(inside, fused(step(i), load(C + i), sum[1]), sum[1]);
  }
  return sum[0] + sum[1];
}

// The same for n a multiple of 2 kLanes, one decay for the row, B and C deinterleaved.
SSMK_INLINE vf update_row_in_pairs(const bf16 *from, bf16 *to, const float *B, const float *C,
                                   int64_t n, RowTerms r) {
  const vf decay = splat(r.decay), dtx = splat(r.dtx);
  vf sum[2] = {};
  for (int64_t i = 0; i < n; i += 2 * kLanes) {
    vf even, odd;
    load_pairs(from + i, &even, &odd);
    even = fused(decay, even, dtx * load(B + i));
    odd = fused(decay, odd, dtx * load(B + i + kLanes));
    store_pairs(to + i, even, odd);
    sum[0] = fused(even, load(C + i), sum[0]);
    sum[1] = fused(odd, load(C + i + kLanes), sum[1]);
  }
  return sum[0] + sum[1];
}

struct Task {
  const StateUpdateProblem &p;
  Scratch &s;
  float *held;  // [row][state] in float32, rows padded to whole vectors
  int64_t b, head, group;
  RowSlots slots;

  int64_t padded() const { return (p.dstate + kLanes - 1) / kLanes * kLanes; }

  States pool(int64_t slot) const {
    return {p.state.at(slot, head), p.state.dtype, p.state.stride[2], p.state.stride[3]};
  }
  States snapshot(int64_t t) const {
    return {p.intermediate.at(slots.intermediate, t, head), p.intermediate.dtype,
            p.intermediate.stride[3], p.intermediate.stride[4]};
  }
  States source() const { return slots.start >= 0 ? snapshot(slots.start) : pool(slots.in); }

  void zero_output(int64_t first, int64_t rows, int64_t from_token) const {
    for (int64_t t = from_token; t < p.ntokens; ++t)
      zero_row(p.out.at(b, t, 0, head, first), p.out.dtype, p.out.stride[4], rows);
  }

  // Rows: dt', decay, gate

  void read_rows(float *dst, const View<4> &v, int64_t t, int64_t first, int64_t rows) const {
    read_row(dst, v.at(b, t, head, first), v.dtype, v.stride[3], rows);
    for (int64_t r = rows; r % kLanes; ++r) dst[r] = 0;
  }

  template <class V>
  void read_parameter(float *dst, const V &v, int64_t first, int64_t rows) const {
    if (v.given()) read_row(dst, v.at(head, first), v.dtype, v.stride[1], rows);
    for (int64_t r = v.given() ? rows : 0; r < rows || r % kLanes; ++r) dst[r] = 0;
  }

  bool one_decay() const { return p.A.stride[2] == 0 || p.dstate == 1; }

  void read_parameters(int64_t first, int64_t rows) const {
    read_parameter(s.bias, p.dt_bias, first, rows);
    read_parameter(s.D, p.D, first, rows);
    if (one_decay()) read_parameter(s.rate, p.A, first, rows);
  }

  void prepare(int64_t t, int64_t first, int64_t rows) const {
    read_rows(s.x, p.x, t, first, rows);
    read_rows(s.dt_log2e, p.dt, t, first, rows);
    for (int64_t r = 0; r < rows; r += kLanes) {
      const vf dt = transform_dt(p.dt_transform, load(s.dt_log2e + r) + load(s.bias + r));
      store(s.dt_log2e + r, dt * kLog2e);
      store(s.dtx + r, dt * load(s.x + r));
      // Without D not 0 x: x may be infinite.
      store(s.y + r, p.D.given() ? load(s.D + r) * load(s.x + r) : vf{});
      if (one_decay()) store(s.decay + r, exp2(dt * (load(s.rate + r) * kLog2e)));
    }
  }

  void finish(int64_t t, int64_t first, int64_t rows) const {
    if (p.z.given()) {
      read_rows(s.z, p.z, t, first, rows);
      for (int64_t r = 0; r < rows; r += kLanes)
        store(s.y + r, load(s.y + r) * silu(load(s.z + r)));
    }
    write_row(p.out.at(b, t, 0, head, first), p.out.dtype, p.out.stride[4], s.y, rows);
  }

  // States

  // Packed bfloat16 states are updated in pairs, which sums h C in another order.  That order
  // belongs to the dtype and sizes, not to the strides, so every path keeps it and a call's bits do
  // not depend on where its states lie.
  bool in_pairs() const {
    return p.state.dtype == DType::kBF16 && one_decay() && p.dstate % (2 * kLanes) == 0;
  }

  void read_projections(int64_t t, int64_t n0, int64_t n) const {
    const auto read = [&](float *dst, const View<5> &v) {
      read_row(dst, v.at(b, t, 0, group, n0), v.dtype, v.stride[4], n);
      for (int64_t i = n; i % kLanes; ++i) dst[i] = 0;
      for (int64_t i = 0; in_pairs() && i < n; i += 2 * kLanes) deinterleave(dst + i, dst + i);
    };
    read(s.B, p.B);
    read(s.C, p.C);
  }

  const float *general_rates(int64_t row, int64_t n0, int64_t n) const {
    read_row(s.A, p.A.at(head, row, n0), p.A.dtype, p.A.stride[2], n);
    for (int64_t i = n; i % kLanes; ++i) s.A[i] = 0;
    return s.A;
  }

  // States n0 .. n0 + n of every row; adds sum h C to y.  kVectors: n in vectors where that is
  // small and known, else 0.
  template <Decay kDecay, bool kPairs, int kVectors, class T>
  void update_rows(const T *from, int64_t from_row, T *to, int64_t to_row, int64_t first,
                   int64_t rows, int64_t n0, int64_t states) const {
    const int64_t n = kVectors ? kVectors * kLanes : states;
    const float *packed_A = kDecay == Decay::kPacked
                                ? reinterpret_cast<const float *>(p.A.at(head, first, n0))
                                : nullptr;
    const int64_t A_row = p.A.stride[1];
    const auto row = [&](int64_t r) {
      const RowTerms terms = {s.dt_log2e[r], s.decay[r], s.dtx[r]};
      const T *source = from + r * from_row + n0;
      T *target = to + r * to_row + n0;
      if constexpr (kPairs) {
        return update_row_in_pairs(source, target, s.B, s.C, n, terms);
      } else {
        const float *A = nullptr;
        if constexpr (kDecay == Decay::kGeneral) A = general_rates(first + r, n0, n);
        if constexpr (kDecay == Decay::kPacked) A = packed_A + r * A_row;
        if constexpr (kVectors == 1) {
          // Rows of one vector: the block is over before the processor has seen a stream in it.
          __builtin_prefetch(source + kAheadRows * from_row);
          __builtin_prefetch(A + kAheadRows * A_row);
        }
        return update_row<T, kDecay != Decay::kRow>(source, target, A, s.B, s.C, n, terms);
      }
    };
    int64_t r0 = 0;
    for (; r0 + kLanes <= rows; r0 += kLanes) {
      vf sums[kLanes];
      if constexpr (kVectors == 1) {
        SSMK_UNROLL
        for (int i = 0; i < kLanes; ++i) sums[i] = row(r0 + i);
      } else {
        for (int i = 0; i < kLanes; ++i) sums[i] = row(r0 + i);
      }
      store(s.y + r0, load(s.y + r0) + sum_each(sums));
    }
    if (r0 < rows) {
      vf sums[kLanes] = {};
      for (int64_t i = 0; i < rows - r0; ++i) sums[i] = row(r0 + i);
      store(s.y + r0, load(s.y + r0) + sum_each(sums));
    }
  }

  template <class T>
  void update_token(int64_t t, const T *from, int64_t from_row, T *to, int64_t to_row,
                    int64_t first, int64_t rows) const {
    prepare(t, first, rows);
    for (int64_t n0 = 0; n0 < p.dstate; n0 += kChunk) {
      const int64_t n = p.dstate - n0 < kChunk ? p.dstate - n0 : kChunk;
      read_projections(t, n0, n);
      if (in_pairs() && std::is_same_v<T, bf16>) {
        if constexpr (std::is_same_v<T, bf16>)
          update_rows<Decay::kRow, true, 0>(from, from_row, to, to_row, first, rows, n0, n);
      } else if (one_decay()) {
        update_rows<Decay::kRow, false, 0>(from, from_row, to, to_row, first, rows, n0, n);
      } else if (p.A.dtype == DType::kF32 && p.A.stride[2] == 1 && n % kLanes == 0) {
        n == kLanes
            ? update_rows<Decay::kPacked, false, 1>(from, from_row, to, to_row, first, rows, n0, n)
        : n == 2 * kLanes
            ? update_rows<Decay::kPacked, false, 2>(from, from_row, to, to_row, first, rows, n0, n)
            : update_rows<Decay::kPacked, false, 0>(from, from_row, to, to_row, first, rows, n0, n);
      } else {
        update_rows<Decay::kGeneral, false, 0>(from, from_row, to, to_row, first, rows, n0, n);
      }
    }
    finish(t, first, rows);
  }

  void read_held(const States &from, int64_t first, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      float *h = held + r * padded();
      read_row(h, from.at(first + r, 0), from.dtype, from.state, p.dstate);
      for (int64_t i = p.dstate; i < padded(); ++i) h[i] = 0;
      for (int64_t i = 0; in_pairs() && i < p.dstate; i += 2 * kLanes) deinterleave(h + i, h + i);
    }
  }

  void write_held(const States &to, int64_t first, int64_t rows) const {
    for (int64_t r = 0; r < rows; ++r) {
      const float *h = held + r * padded();
      if (!in_pairs()) {
        write_row(to.at(first + r, 0), to.dtype, to.state, h, p.dstate);
        continue;
      }
      for (int64_t n = 0; n < p.dstate; n += 2 * kLanes) {
        alignas(64) float whole[2 * kLanes];
        interleave(whole, h + n);
        write_row(to.at(first + r, n), to.dtype, to.state, whole, 2 * kLanes);
      }
    }
  }

  bool can_stream() const {
    return p.ntokens == 1 && slots.tokens == 1 && !p.intermediate.given() &&
           !p.slots.out_per_token && !p.slots.keep_state && p.state.stride[3] == 1 &&
           p.dstate % kLanes == 0;
  }

  void run(int64_t first, int64_t rows) const {
    if (slots.pad) return zero_output(first, rows, 0);
    read_parameters(first, rows);
    if (can_stream()) {
      const States from = pool(slots.in), to = pool(slots.out);
      with_type(p.state.dtype, [&](auto *type) {
        using T = std::remove_pointer_t<decltype(type)>;
        update_token(0, reinterpret_cast<const T *>(from.at(first, 0)), from.row,
                     reinterpret_cast<T *>(to.at(first, 0)), to.row, first, rows);
      });
      return;
    }
    read_held(source(), first, rows);
    for (int64_t t = 0; t < slots.tokens; ++t) {
      update_token<float>(t, held, padded(), held, padded(), first, rows);
      if (slots.intermediate >= 0) write_held(snapshot(t), first, rows);
      if (p.slots.out_per_token && !p.slots.keep_state) {
        const int64_t slot = read_index(p.slots.out, b, t);
        if (!p.slots.pad.is_pad(slot)) write_held(pool(slot), first, rows);
      }
    }
    zero_output(first, rows, slots.tokens);
    if (!p.slots.keep_state && !p.slots.out_per_token &&
        !(slots.tokens == 0 && source() == pool(slots.out)))
      write_held(pool(slots.out), first, rows);
  }
};

}  // namespace

void state_update(const StateUpdateProblem &p) {
  if (p.batch == 0 || p.nheads == 0 || p.headdim == 0) return;
  if (p.ntokens == 0 && p.dstate == 0) return;
  if (p.is_mamba3()) return state_update_mamba3(p);

  // Blocks of the states that scratch holds, fewer rows where that leaves threads idle.  dstate
  // beyond the stack: the workspace holds one vector of rows for each task.
  const int64_t padded = (p.dstate + kLanes - 1) / kLanes * kLanes;
  int64_t rows = padded > kBlockStates / kRows ? kBlockStates / padded / kLanes * kLanes : kRows;
  if (rows < kLanes) rows = kLanes;
  const auto blocks_per_head = [&] { return (p.headdim + rows - 1) / rows; };
  while (rows > kLanes && p.batch * p.nheads * blocks_per_head() < 4 * num_threads())
    rows = (rows / 2 + kLanes - 1) / kLanes * kLanes;
  const int64_t blocks = blocks_per_head(), padded_rows = (p.headdim + 15) / 16 * 16;

  parallel(p.batch * p.nheads * blocks, p.batch * p.nheads * p.headdim * (p.dstate + 8) * p.ntokens,
           [&](int64_t i) {
             Scratch scratch;
             const int64_t first = i % blocks * rows, head = i / blocks % p.nheads,
                           b = i / blocks / p.nheads;
             float *held = scratch.h;
             if (p.dstate > kMaxStackState)
               held = static_cast<float *>(p.workspace.data) +
                      ((b * p.nheads + head) * padded_rows + first) * ((p.dstate + 15) / 16 * 16);
             const Task task{
                 p, scratch, held, b, head, head / (p.nheads / p.ngroups), row_slots(p, b)};
             task.run(first, p.headdim - first < rows ? p.headdim - first : rows);
           });
}

}  // namespace ssmk::cpu::SSMK_ISA
