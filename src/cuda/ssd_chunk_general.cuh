// SPDX-License-Identifier: MIT
// Prefill of Mamba-2 and 3 on any layout, dtype and size, token by token in float32; the formulas
// stand in ssmk.h.
//
// A block owns some rows p of one head of one sequence, with their states, and takes
// its tokens in short spans.  What a span's rows share comes to shared memory first: keys and
// queries of all ranks (biased and rotated once), u = psi x, decays.  With w = (1 - lambda) dt' and
// gamma = lambda dt', of the token after as well, and g the states with what the next token owes
// to this one (g = h without trap, and at the end of a span):
//
//   y_t^r = d_t g_{t-1} q_t^r + gamma_t sum_r' (q_t^r . k_t^r') u_t^r'
//   g_t   = d_t g_{t-1} + s_t sum_r' u_t^r' (k_t^r')^T,   s_t = gamma_t + w_{t+1}
//
// so a state element costs 2 rank + 1 multiply-adds a token, and y_t sees nothing of later tokens.
// The next span begins by adding what its first token owes to the last.  A span ends where it is
// full, where its sequence ends, and after a token whose state is captured.
//
// Slow decays are multiplied as h + (d - 1) h, where d - 1 has all its digits: a long sequence is
// as exact as a short one.
//
// States are in registers for the walk over a span only, which leaves these free for what comes
// before and after.  Where a head has more rows or states than the block has threads for they are
// tiles, kept in the workspace between their turns, not in shared memory.
#pragma once

#include "cuda/ssd_chunk_general_span.cuh"

namespace ssmk::cuda {

// Stores a sum to shared memory if it is `here`, added to what stands there if `add`; without a
// branch, so that what follows is not held up by what came before.
__device__ __forceinline__ void add_shared(uint32_t at, float sum, bool here, bool add) {
  asm volatile(
      "{\n.reg .pred here, add;\n.reg .f32 old;\nsetp.ne.u32 here, %2, 0;\n"
      "setp.ne.and.u32 add, %3, 0, here;\nmov.f32 old, 0f00000000;\n"
      "@add ld.shared.f32 old, [%0];\nadd.f32 old, old, %1;\n@here st.shared.f32 [%0], old;\n}"
      :
      : "r"(at), "f"(sum), "r"(uint32_t(here)), "r"(uint32_t(add)));
}

// How the tokens of a span are walked: all decays are slow, or one is not, or something may not be
// finite.  The bits are the same.
enum Walk { kSlow, kMixed, kCareful };

template <int kRows, int kChunks, int kLogLanes, bool kSiso>
struct GeneralBlock {
  const GeneralLaunch &g;
  const SsdChunkProblem &p;
  const GeneralPlan &s;
  float *const shared;
  const Span &span;            // in shared memory
  int lane, mine;              // of a row; the row of threads
  float h[kRows][kChunks][4];  // during a walk

  __device__ __forceinline__ GeneralBlock(const GeneralLaunch &launch, float *memory,
                                          const Span &here)
      : g(launch), p(launch.p), s(launch.plan), shared(memory), span(here) {}

  // ---- States, between walks: a tile's are the registers of its threads, in fours

  // Known when compiling, or -1.
  __device__ __forceinline__ int log_lanes() const {
    return kLogLanes < 0 ? s.log_lanes : kLogLanes;
  }
  __device__ __forceinline__ int tiles() const { return s.row_tiles * s.state_tiles; }
  __device__ __forceinline__ int tile_floats() const { return blockDim.x * kRows * kChunks * 4; }

  __device__ __forceinline__ float *tile(int row_tile, int state_tile) const {
    if (tiles() == 1) return shared + s.states;
    return reinterpret_cast<float *>(p.workspace.data) +
           (span.block * tiles() + row_tile * s.state_tiles + state_tile) * tile_floats();
  }

  // f(four states, p, n) of all tiles.
  template <class F>
  __device__ __forceinline__ void each_four(const F &f) const {
    const int lanes = 1 << log_lanes();
    for (int j = 0; j < s.state_tiles; ++j)
      for (int k = 0; k < s.row_tiles; ++k) {
        float *const states = tile(k, j);
        const int first_row = span.first_row + k * s.rows, first = j * s.tile_states;
        each_cell(s.rows, s.tile_states / 4, s.log_tile - 2, [&](int i, int four) {
          const int thread = i / kRows * lanes + (four & (lanes - 1)),
                    c = i % kRows * kChunks + (four >> log_lanes());
          f(*reinterpret_cast<Pack<float, 4> *>(states + (c * blockDim.x + thread) * 4),
            first_row + i, first + 4 * four);
        });
      }
  }

  __device__ __forceinline__ void clear() const {
    each_four([](Pack<float, 4> &v, int, int) { v = {}; });
  }

  // True if a value is not finite.
  __device__ __forceinline__ bool read_initial() const {
    float sum = 0.0f;
    const bool given = p.initial.h.given();
    const Table from = table_of(p.initial.h, p.initial.h.at(span.slot, span.head), 2, 3);
    each_four([&](Pack<float, 4> &v, int row, int n) {
      v = {};
      uint32_t bits[4];
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (given && row < s.headdim && n + e < s.dstate)
          bits[e] = load_bits(from.at(row, n + e), from.dtype);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (given && row < s.headdim && n + e < s.dstate) {
          v.v[e] = value_of(bits[e], from.dtype);
          sum = fmaf(v.v[e], 0.0f, sum);
        }
    });
    return sum != 0.0f;
  }

  __device__ __forceinline__ void write_states(const View<4> &to, int64_t entry, bool quads) const {
    if (!to.given()) return;
    const Table table = table_of(to, to.at(entry, span.head), 2, 3);
    each_four([&](const Pack<float, 4> &v, int row, int n) {
      if (row >= s.headdim) return;
      char *const first = table.at(row, n);
      if (quads) return store_four(first, table.dtype, v.v);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (n + e < s.dstate) store(first + e * table.column, table.dtype, v.v[e]);
    });
  }

  // To registers, and back.
  __device__ __forceinline__ void bring(const float *states) {
    const float4 *const from = reinterpret_cast<const float4 *>(states) + this_thread();
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
        const float4 v = from[(r * kChunks + c) * blockDim.x];
        h[r][c][0] = v.x, h[r][c][1] = v.y, h[r][c][2] = v.z, h[r][c][3] = v.w;
      }
  }
  __device__ __forceinline__ void put_back(float *states) const {
    float4 *const to = reinterpret_cast<float4 *>(states) + this_thread();
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
        to[(r * kChunks + c) * blockDim.x] =
            make_float4(h[r][c][0], h[r][c][1], h[r][c][2], h[r][c][3]);
  }

  // ---- Tokens

  __device__ __forceinline__ void read_states(const float *from, int log_lanes,
                                              float (&to)[kChunks][4]) const {
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const float4 v = *reinterpret_cast<const float4 *>(from + (c << (log_lanes + 2)));
      to[c][0] = v.x, to[c][1] = v.y, to[c][2] = v.z, to[c][3] = v.w;
    }
  }

  // h <- h + (weight u) key^T, for the rows and states of the thread.
  template <Walk kWalk>
  __device__ __forceinline__ void add_product(const float (&key)[kChunks][4], float weight,
                                              const float (&values)[kRows], int state,
                                              int log_lanes) {
    float u[kRows];
#pragma unroll
    for (int r = 0; r < kRows; ++r) u[r] = __fmul_rn(weight, values[r]);
#pragma unroll
    for (int c = 0; c < kChunks; ++c)
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        // States past the end are left out, not multiplied by a padded 0.
        if (kWalk == kCareful && state + (c << (log_lanes + 2)) + e >= s.dstate) continue;
#pragma unroll
        for (int r = 0; r < kRows; ++r) h[r][c][e] = fmaf(u[r], key[c][e], h[r][c][e]);
      }
  }

  template <class F>
  __device__ __forceinline__ void each(const F &f) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int c = 0; c < kChunks; ++c)
#pragma unroll
        for (int e = 0; e < 4; ++e) f(h[r][c][e]);
  }

  template <Walk kWalk>
  __device__ __forceinline__ void decay(const TokenTerms &term) {
    if (kWalk == kCareful) {
      // What is infinite stays so, and what is not has the bits that it has below.
      each([&](float &v) {
        v = term.slow() && !not_finite(v) ? fmaf(term.decay_less_1, v, v)
                                          : __fmul_rn(term.decay, v);
      });
    } else if (kWalk == kSlow || term.slow()) {
      each([&](float &v) { v = fmaf(term.decay_less_1, v, v); });
    } else {
      each([&](float &v) { v = __fmul_rn(term.decay, v); });
    }
  }

  __device__ __forceinline__ void read_rows(const float *from, float (&to)[kRows]) const {
    const Pack<float, kRows> rows = *reinterpret_cast<const Pack<float, kRows> *>(from);
#pragma unroll
    for (int r = 0; r < kRows; ++r) to[r] = rows.v[r];
  }

  // Sums over the lanes of a row, to Y.  Each halving leaves a lane with half of the thread's rows;
  // neighbours first, whatever the number of lanes.
  __device__ __forceinline__ void sum_up(float (&y)[kRows], float *to, int log_lanes, bool add) {
    int first = 0;
    halve<kRows / 2>(y, log_lanes, &first);
    const int count = kRows >> log_lanes;
    const uint32_t at = shared_address(to + first);
#pragma unroll
    for (int j = 0; j < kRows; ++j)
      if (j == 0 || kLogLanes < 0)
        add_shared(at + 4 * j, y[j], lane < kRows && (j == 0 || j < count), add);
  }

  // While there are lanes to add: 2 kHalf values become kHalf.
  template <int kHalf>
  __device__ __forceinline__ void halve(float (&y)[kRows], int log_lanes, int *first) {
    constexpr int kOff = kHalf ? kRows / 2 / kHalf : kRows;
    if constexpr (kHalf == 0) {
#pragma unroll
      for (int off = kOff; off < 32; off <<= 1)
        if (off < 1 << log_lanes) y[0] += __shfl_xor_sync(~0u, y[0], off);
    } else if (kOff < 1 << log_lanes) {
      const bool upper = lane & kOff;
#pragma unroll
      for (int j = 0; j < kHalf; ++j) {
        const float sent = upper ? y[j] : y[j + kHalf], kept = upper ? y[j + kHalf] : y[j];
        y[j] = kept + __shfl_xor_sync(~0u, sent, kOff);
      }
      *first += upper ? kHalf : 0;
      halve<kHalf / 2>(y, log_lanes, first);
    }
  }

  template <Walk kWalk>
  __device__ __forceinline__ void walk(int tokens, const TokenTerms *terms, int row_tile,
                                       int state_tile) {
    // Copies: what stands in shared memory may change with every store.
    const int padded = s.padded, block_rows = s.block_rows, ranks = kSiso ? 1 : s.rank;
    const int log_lanes = this->log_lanes();
    const int state = state_tile * s.tile_states + lane * 4;
    const float *queries = shared + s.Q + state, *keys = shared + s.K + state;
    const float *values = shared + s.U + row_tile * s.rows + mine * kRows;
    float *sums = shared + s.Y + row_tile * s.rows + mine * kRows;
#pragma unroll 1
    for (int left = tokens; left; --left) {
      float y[kRows];
#pragma unroll 1
      for (int k = 0; k < ranks; ++k) {
        // Those of the rank before are added up while this one's are multiplied.
        if (!kSiso && k > 0) {
          sum_up(y, sums, log_lanes, state_tile > 0);
          sums += block_rows;
        }
        float q[kChunks][4];
        read_states(queries, log_lanes, q);
#pragma unroll
        for (int r = 0; r < kRows; ++r) y[r] = 0.0f;
#pragma unroll
        for (int c = 0; c < kChunks; ++c)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            if (kWalk == kCareful && state + (c << (log_lanes + 2)) + e >= s.dstate) continue;
#pragma unroll
            for (int r = 0; r < kRows; ++r) y[r] = fmaf(h[r][c][e], q[c][e], y[r]);
          }
        queries += padded;
      }
      const TokenTerms term = *terms++;
      decay<kWalk>(term);
      // The span's last token leaves what the next one owes to be added when that comes.
      const float write = left > 1 ? term.write : term.gamma;
#pragma unroll 1
      for (int k = 0; k < ranks; ++k) {
        float u[kRows], key[kChunks][4];
        read_rows(values, u);
        if (kSiso && kLogLanes >= 0) read_states(keys, log_lanes, key);
        // In the shadow of the products.
        if (k == 0) sum_up(y, sums, log_lanes, state_tile > 0);
        if (!kSiso || kLogLanes < 0) read_states(keys, log_lanes, key);
        add_product<kWalk>(key, write, u, state, log_lanes);
        keys += padded, values += block_rows;
      }
      sums += block_rows;
    }
  }

  // What the span's first token owes to the one before it.
  template <Walk kWalk>
  __device__ __forceinline__ void add_before(float share, const float *v, int row_tile,
                                             int state_tile) {
    const int row = row_tile * s.rows + mine * kRows, ranks = kSiso ? 1 : s.rank;
    const int state = state_tile * s.tile_states + lane * 4;
#pragma unroll 1
    for (int i = 0; i < ranks; ++i) {
      float u[kRows];
      read_rows(v + row, u);
      if (s.has_psi)
#pragma unroll
        for (int r = 0; r < kRows; ++r)
          u[r] = __fmul_rn(u[r], shared[s.psi + i * s.block_rows + row + r]);
      float key[kChunks][4];
      read_states(shared + s.k_before + i * s.padded + state, log_lanes(), key);
      add_product<kWalk>(key, share, u, state, log_lanes());
    }
  }

  // All tokens of a span, after `work` has prepared them.
  __device__ __forceinline__ void run(int tokens, const SpanWork<kSiso> &work) {
    const int thread = this_thread();
    lane = thread & ((1 << log_lanes()) - 1), mine = thread >> log_lanes();
    const bool before = work.flags.has_before && p.trap.given();
    const bool slow = __all_sync(~0u, (thread & 31) >= tokens || work.terms()[thread & 31].slow());
    const float share = before ? shared[s.owed + work.found.first_term] : 0.0f;
    for (int i = 0; i < s.row_tiles; ++i)
      for (int j = 0; j < s.state_tiles; ++j) {
        bring(tile(i, j));
        if (work.flags.careful) {
          if (before) add_before<kCareful>(share, work.v_before(), i, j);
          walk<kCareful>(tokens, work.terms(), i, j);
        } else {
          if (before) add_before<kMixed>(share, work.v_before(), i, j);
          if (slow) {
            walk<kSlow>(tokens, work.terms(), i, j);
          } else {
            walk<kMixed>(tokens, work.terms(), i, j);
          }
        }
        put_back(tile(i, j));
      }
  }
};

template <int kRows, int kChunks, int kLogLanes, bool kSiso>
__global__ void __launch_bounds__(kGeneralThreads, 2)
    ssd_general(const __grid_constant__ GeneralLaunch given) {
  extern __shared__ float4 memory[];
  using Block = GeneralBlock<kRows, kChunks, kLogLanes, kSiso>;
  begin();
  float *const shared = reinterpret_cast<float *>(memory);
  // In shared memory, from where the compiler reads them when they are used: what it would compute
  // ahead from parameters for all spans fills more registers than there are.
  __shared__ alignas(16) uint32_t copy[sizeof(GeneralLaunch) / 4];
  __shared__ Span span;
  __shared__ Found found;
  for (int i = threadIdx.x; i < sizeof(GeneralLaunch) / 4; i += blockDim.x)
    copy[i] = reinterpret_cast<const uint32_t *>(&given)[i];
  __syncthreads();
  const GeneralLaunch &launch = reinterpret_cast<const GeneralLaunch &>(copy);
  const SsdChunkProblem &p = launch.p;
  const GeneralPlan &s = launch.plan;
  if (threadIdx.x == 0) span = span_of(launch);
  __syncthreads();
  SpanWork<kSiso> work(p, s, shared, span, found);
  if (span.pad) return work.zero_output(span.begin, span.end);

  Block block(launch, shared, span);
  work.read_parameters();
  if (span.has_initial) {
    const bool bad = work.read_initial();
    work.flags.careful = __syncthreads_or(block.read_initial() || bad) != 0;
  } else {
    block.clear();
    work.clear();
  }

  if (threadIdx.x == 0) found.last = -1, found.nterms = found.first_term = 0;
  work.find_capture(span.begin);
  for (;;) {
    __syncthreads();
    const bool end = span.begin >= span.end;
    int tokens = end ? 0 : span.end - span.begin < s.tokens ? int(span.end - span.begin) : s.tokens;
    if (!end && p.seqs.seq_idx.given()) {
      const Run run = work.next_run(span.begin, tokens);
      tokens = run.tokens;
      if (run.pads) {
        work.zero_output(span.begin, span.begin + tokens);
        work.skip();
        __syncthreads();
        if (threadIdx.x == 0) work.advance(tokens);
        continue;
      }
      if (run.fresh) {
        block.clear();
        work.clear();
      }
    }
    if (found.token < span.begin) work.find_capture(span.begin);
    const bool captured = found.token - span.begin < tokens;
    if (captured) tokens = int(found.token - span.begin) + 1;
    if (!end) {
      // Where something was not finite the states may not be either, until they are cleared.
      if (work.prepare(tokens)) work.flags.careful = 1;
      block.run(tokens, work);
      __syncthreads();
      work.finish(tokens);
      work.keep_last(tokens);
      __syncthreads();
      if (threadIdx.x == 0) {
        work.advance(tokens);
        if (p.seqs.seq_idx.given()) found.last = work.id();
      }
    }
    // The states after this token, or after all.
    const HeadStates &to = end ? p.final : p.captured;
    for (int64_t i = end        ? 0
                     : captured ? work.next_capture(0)
                                : kNever;
         i != kNever; i = end ? kNever : work.next_capture(i + 1)) {
      const int64_t entry = end ? span.slot : i;
      block.write_states(to.h, entry, end ? s.final_quads : s.captured_quads);
      work.write_small(to, entry);
    }
    if (end) return;
  }
}

}  // namespace ssmk::cuda
