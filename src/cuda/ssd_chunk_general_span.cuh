// SPDX-License-Identifier: MIT
// What the rows of a block share for a span of tokens, in shared memory: made before the walk of
// ssd_chunk_general.cuh, and turned into outputs after it.
#pragma once

#include "cuda/near.cuh"
#include "cuda/state_update_mamba3_common.cuh"

namespace ssmk::cuda {

constexpr int kGeneralThreads = 256;   // at most
constexpr int kGeneralTokens = 16;     // of a span, at most
constexpr int64_t kNever = INT64_MAX;  // a token that does not come

// The cut of a call.  Offsets into shared memory count floats and are multiples of 4.
struct GeneralPlan {
  int threads, log_lanes, rows;  // rows: of a tile
  int row_tiles, state_tiles;    // of a block
  int tile_states, padded;       // states of a tile, and of all
  int block_rows, slices;        // rows of a block; blocks of a head
  int tokens, steps;             // of a span; a step is a rank of a token
  int headdim, dstate, rank, nangles;
  int log_rows, log_states, log_angles, log_tile;  // of the powers of two that hold a row of work
  bool has_psi, quads_x, quads_z, quads_B, quads_C;
  int states, K, Q, U, Y, z, kq, sine, cosine, theta, raw_theta, k_before, v_before;
  int psi, zeta, phi, D, norm, B_bias, C_bias, terms, gamma, owed, dt, scales, ids;
};

struct GeneralLaunch {
  SsdChunkProblem p;
  GeneralPlan plan;
  int64_t first_seq, first_head;
};

// One block's work.
struct Span {
  int64_t row, begin, end, slot, head, group;
  int64_t block;  // number of it in the whole call
  int first_row;
  bool pad, has_initial;
};

// In shared memory: the next token that is captured, one of its captures, and the id of the last
// token.
struct Found {
  int64_t token, capture, last;
};

struct Run {
  int tokens;
  bool pads, fresh;  // fresh: a sequence starts
};

// Of a token, for the walk.
struct alignas(16) TokenTerms {
  float decay, decay_less_1, write;
  bool slow;
};

__device__ __forceinline__ bool not_finite(float v) {
  return (__float_as_uint(v) & 0x7f800000u) == 0x7f800000u;
}

__device__ __forceinline__ double within_two(double half_turns) {
  return half_turns - 2.0 * floor(half_turns * 0.5);
}

// What a device tensor says is held within the sizes: the host cannot check it.
__device__ __forceinline__ Span span_of(const GeneralLaunch &g) {
  const SsdChunkProblem &p = g.p;
  const int64_t i = g.first_seq + blockIdx.z;
  const auto bound = [&](int64_t k) {
    const int64_t at = read_index(p.seqs.cu_seqlens, k);
    return at < 0 ? 0 : at > p.seqlen ? p.seqlen : at;
  };
  const bool packed = p.seqs.cu_seqlens.given();
  const Slot slot = slot_of(p.seqs.state_indices, p.seqs.pad, i);
  Span s;
  s.row = packed ? 0 : i;
  s.begin = packed ? bound(i) : 0;
  s.end = packed ? bound(i + 1) : p.seqlen;
  s.slot = slot.index;
  s.pad = slot.pad;
  s.has_initial =
      !p.seqs.has_initial_state.given() || *p.seqs.has_initial_state.at(i) != 0;
  s.head = g.first_head + blockIdx.y;
  s.group = s.head / (p.nheads / p.ngroups);
  s.block = (i * p.nheads + s.head) * g.plan.slices + blockIdx.x;
  s.first_row = int(blockIdx.x) * g.plan.block_rows;
  return s;
}

// Four neighbours, aligned to the bytes that they fill; 0 if they are not here.
__device__ __forceinline__ uint4 load_four(const char *p, DType dtype, bool here) {
  uint4 bits;
  asm volatile(
      "{\n.reg .pred wide, narrow;\nsetp.eq.u32 wide, %5, 2;\nsetp.eq.u32 narrow, %5, 1;\n"
      "mov.b32 %0, 0;\nmov.b32 %1, 0;\nmov.b32 %2, 0;\nmov.b32 %3, 0;\n"
      "@wide ld.global.v4.b32 {%0, %1, %2, %3}, [%4];\n"
      "@narrow ld.global.v2.b32 {%0, %1}, [%4];\n}"
      : "=&r"(bits.x), "=&r"(bits.y), "=&r"(bits.z), "=&r"(bits.w)
      : "l"(p), "r"(uint32_t(!here ? 0 : dtype == DType::kF32 ? 2 : 1))
      : "memory");
  return bits;
}

__device__ __forceinline__ float4 four_values(uint4 bits, DType dtype) {
  if (dtype == DType::kF32)
    return {__uint_as_float(bits.x), __uint_as_float(bits.y), __uint_as_float(bits.z),
            __uint_as_float(bits.w)};
  const float2 a = two_values({bits.x, 0}, dtype), b = two_values({bits.y, 0}, dtype);
  return {a.x, a.y, b.x, b.y};
}

// The thread's number, of which the compiler knows nothing: what is computed from it is not kept in
// registers from span to span, where the states need them.
__device__ __forceinline__ int this_thread() {
  int thread = threadIdx.x;
  asm volatile("" : "+r"(thread));
  return thread;
}

// f(row, column) of a table whose columns fill 2^log threads.
template <class F>
__device__ __forceinline__ void each_cell(int rows, int columns, int log, const F &f) {
  const int count = rows << log;
  for (int i = this_thread(); i < count; i += blockDim.x) {
    const int row = i >> log, column = i & ((1 << log) - 1);
    if (column < columns) f(row, column);
  }
}

// Rows and columns of a tensor of floats; strides in bytes.
struct Table {
  const char *data;
  int64_t row, column;
  DType dtype;

  __device__ __forceinline__ Table(const char *first, DType type, int64_t row_stride,
                                   int64_t column_stride)
      : data(first), dtype(type) {
    const int64_t item = type == DType::kF32 ? 4 : 2;
    row = row_stride * item, column = column_stride * item;
  }
  __device__ __forceinline__ const char *at(int r, int c) const {
    return data + r * row + c * column;
  }
};

// The same for cells that come from memory: several loads are under way at once.
template <class Put>
__device__ __forceinline__ void each_loaded(const Table &from, int rows, int columns, int log,
                                            const Put &put) {
  constexpr int kAtOnce = 4;
  const int count = rows << log;
#pragma unroll 1
  for (int first = this_thread(); first < count; first += kAtOnce * blockDim.x) {
    uint32_t bits[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first + j * blockDim.x, row = i >> log, column = i & ((1 << log) - 1);
      if (i < count && column < columns) bits[j] = load_bits(from.at(row, column), from.dtype);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first + j * blockDim.x, row = i >> log, column = i & ((1 << log) - 1);
      if (i < count && column < columns) put(row, column, value_of(bits[j], from.dtype));
    }
  }
}

// In fours of neighbours: `columns` of them.
template <class Put>
__device__ __forceinline__ void each_four(const Table &from, int rows, int columns, int log,
                                          const Put &put) {
  constexpr int kAtOnce = 4;
  const int count = rows << log;
#pragma unroll 1
  for (int first = this_thread(); first < count; first += kAtOnce * blockDim.x) {
    uint4 bits[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first + j * blockDim.x, row = i >> log, column = i & ((1 << log) - 1);
      bits[j] = load_four(from.at(row, 4 * column), from.dtype, i < count && column < columns);
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int i = first + j * blockDim.x, row = i >> log, column = i & ((1 << log) - 1);
      if (i < count && column < columns) put(row, 4 * column, four_values(bits[j], from.dtype));
    }
  }
}

template <bool kSiso>
struct SpanWork {
  const SsdChunkProblem &p;
  const GeneralPlan &s;
  float *const shared;
  const Span &span;  // in shared memory
  Found &found;
  bool has_before = false;  // k_before and v_before are those of a token
  bool turned = false;      // theta has seen a token; before, it is as the caller gave it

  __device__ __forceinline__ SpanWork(const SsdChunkProblem &problem, const GeneralPlan &plan,
                                      float *memory, const Span &here, Found &captures)
      : p(problem), s(plan), shared(memory), span(here), found(captures) {}

  __device__ __forceinline__ int ranks() const { return kSiso ? 1 : s.rank; }
  __device__ __forceinline__ int token_of(int step) const { return kSiso ? step : step / s.rank; }
  __device__ __forceinline__ int rank_of(int step) const { return kSiso ? 0 : step % s.rank; }
  // Rows of this block that there are.
  __device__ __forceinline__ int rows() const {
    const int left = s.headdim - span.first_row;
    return left < s.block_rows ? left : s.block_rows;
  }
  __device__ __forceinline__ double *theta() const {
    return reinterpret_cast<double *>(shared + s.theta);
  }

  __device__ __forceinline__ void zero_output(int64_t begin, int64_t end) const {
    const int outputs = p.out.stride[2] ? int(p.mamba3.rank) : 1, count = rows();
    for (int64_t t = begin; t < end; ++t)
      each_cell(outputs, count, s.log_rows, [&](int r, int i) {
        store_at(p.out, 0.0f, span.row, t, r, span.head, span.first_row + i);
      });
  }

  // ---- Parameters

  __device__ __forceinline__ void read_ranks(int to, const View<3> &v) const {
    if (v.given())
      each_cell(ranks(), s.block_rows, s.log_rows, [&](int r, int i) {
        shared[to + r * s.block_rows + i] =
            i < rows() ? load_at(v, span.head, r, span.first_row + i) : 0.0f;
      });
  }
  __device__ __forceinline__ void read_rows(int to, const View<2> &v) const {
    if (v.given())
      for (int i = this_thread(); i < s.block_rows; i += blockDim.x)
        shared[to + i] = i < rows() ? load_at(v, span.head, span.first_row + i) : 0.0f;
  }
  __device__ __forceinline__ void read_bias(int to, const View<3> &v) const {
    if (v.given())
      for (int r = 0; r < ranks(); ++r)
        for (int i = this_thread(); i < s.dstate; i += blockDim.x)
          shared[to + r * s.padded + i] = load_at(v, span.head, r, i);
  }

  // States past the end stay zeros in all keys and queries.
  __device__ __forceinline__ void read_parameters() const {
    const Mamba3 &m = p.mamba3;
    for (int i = this_thread(); i < s.steps * s.padded; i += blockDim.x)
      shared[s.K + i] = shared[s.Q + i] = 0.0f;
    for (int i = this_thread(); p.trap.given() && i < ranks() * s.padded; i += blockDim.x)
      shared[s.k_before + i] = 0.0f;
    read_ranks(s.psi, m.mimo_x);
    read_ranks(s.zeta, m.mimo_z);
    read_ranks(s.phi, m.mimo_out);
    read_rows(s.D, p.D);
    read_rows(s.norm, m.norm_weight);
    read_bias(s.B_bias, m.B_bias);
    read_bias(s.C_bias, m.C_bias);
    __syncthreads();
  }

  // ---- Small states: angles, keys and values before.  A thread always has the same ones.

  template <class F>
  __device__ __forceinline__ void each_key(const F &f) const {
    for (int r = 0; r < ranks(); ++r)
      for (int n = this_thread(); n < s.dstate; n += blockDim.x)
        f(shared[s.k_before + r * s.padded + n], r, n);
  }
  template <class F>
  __device__ __forceinline__ void each_value(const F &f) const {
    for (int i = this_thread(); i < s.block_rows; i += blockDim.x) f(shared[s.v_before + i], i);
  }
  template <class F>
  __device__ __forceinline__ void each_angle(const F &f) const {
    for (int j = this_thread(); j < s.nangles; j += blockDim.x) f(j);
  }

  __device__ __forceinline__ void set_angle(int j, float radians) const {
    shared[s.raw_theta + j] = radians;
    theta()[j] = double(radians) * 0.31830988618379067154;
  }

  __device__ __forceinline__ void clear() {
    has_before = turned = false;
    each_angle([&](int j) { set_angle(j, 0.0f); });
  }

  // True if something is not finite.
  __device__ __forceinline__ bool read_initial() {
    const HeadStates &from = p.initial;
    bool bad = false;
    clear();
    if (from.angle.given())
      each_angle([&](int j) { set_angle(j, load_at(from.angle, span.slot, span.head, j)); });
    has_before = from.k.given() || from.v.given();
    if (!has_before) return bad;
    each_key([&](float &k, int r, int n) {
      k = from.k.given() ? load_at(from.k, span.slot, r, span.head, n) : 0.0f;
      bad |= not_finite(k);
    });
    each_value([&](float &v, int i) {
      v = from.v.given() && i < rows() ? load_at(from.v, span.slot, span.head, span.first_row + i)
                                       : 0.0f;
      bad |= not_finite(v);
    });
    return bad;
  }

  __device__ __forceinline__ void write_small(const HeadStates &to, int64_t entry) const {
    const bool first = span.first_row == 0;
    if (to.angle.given() && first)
      each_angle([&](int j) {
        float radians = shared[s.raw_theta + j];
        if (turned) {
          radians = float(theta()[j] * 3.14159265358979323846);
          if (radians >= kTwoPi) radians = 0.0f;
        }
        store_at(to.angle, radians, entry, span.head, j);
      });
    if (to.k.given() && first)
      each_key([&](float &k, int r, int n) {
        store_at(to.k, has_before ? k : 0.0f, entry, r, span.head, n);
      });
    if (to.v.given())
      each_value([&](float &v, int i) {
        if (i < rows())
          store_at(to.v, has_before ? v : 0.0f, entry, span.head, span.first_row + i);
      });
  }

  // ---- Captures and runs

  // The least of all threads' values, in shared memory.
  __device__ __forceinline__ int64_t least(int64_t *to, int64_t value) const {
    unsigned long long *const best = reinterpret_cast<unsigned long long *>(to);
    __syncthreads();
    if (this_thread() == 0) *best = kNever;
    __syncthreads();
    if (value < kNever) atomicMin(best, (unsigned long long)value);
    __syncthreads();
    return *to;
  }

  // Puts the first captured token from t on into `found`.
  __device__ __forceinline__ void find_capture(int64_t t) const {
    int64_t first = kNever;
    for (int64_t i = this_thread(); i < p.ncaptures; i += blockDim.x) {
      const int64_t at = read_index(p.capture_positions, i) - span.row * p.seqlen;
      if (at >= t && at < span.end && at < first) first = at;
    }
    least(&found.token, first);
  }

  // The first capture of that token, from number i on.
  __device__ __forceinline__ int64_t next_capture(int64_t i) const {
    int64_t first = kNever;
    for (i += this_thread(); i < p.ncaptures && first == kNever; i += blockDim.x)
      if (read_index(p.capture_positions, i) == span.row * p.seqlen + found.token) first = i;
    return least(&found.capture, first);
  }

  // Tokens from t on, at most `most`, with one id or all pads.
  __device__ __forceinline__ Run next_run(int64_t t, int most) const {
    int64_t *const ids = reinterpret_cast<int64_t *>(shared + s.ids);
    __syncthreads();
    const int i = this_thread();
    if (i < most) {
      const int64_t id = read_index(p.seqs.seq_idx, span.row, t + i);
      ids[i] = id < 0 ? -1 : id;
    }
    __syncthreads();
    Run run = {1, ids[0] < 0, found.last >= 0 && ids[0] != found.last};
    while (run.tokens < most && ids[run.tokens] == ids[0]) ++run.tokens;
    return run;
  }
  __device__ __forceinline__ void end_run() const {
    if (this_thread() == 0) found.last = *reinterpret_cast<const int64_t *>(shared + s.ids);
  }

  // ---- Before the walk

  // dt', decays and weights, by the first warp.
  __device__ __forceinline__ bool prepare_terms(int64_t t, int tokens) const {
    const int i = this_thread();
    if (i >= 32) return false;
    float dt = 0.0f, gamma = 0.0f, owed = 0.0f, a = 0.0f;
    if (i < tokens) {
      dt = load_at(p.dt, span.row, t + i, span.head);
      if (p.dt_bias.given()) dt += load_at(p.dt_bias, span.head);
      dt = transform_dt(p.dt_transform, dt);
      gamma = dt;
      if (p.trap.given()) {
        const Trapezoid f =
            trapezoid(p.mamba3.trap_sigmoid, load_at(p.trap, span.row, t + i, span.head));
        gamma = __fmul_rn(f.now, dt), owed = __fmul_rn(f.then, dt);
      }
      a = p.adt.given() ? load_at(p.adt, span.row, t + i, span.head)
                        : __fmul_rn(dt, load_at(p.A, span.head));
    }
    const float next = __shfl_down_sync(~0u, owed, 1);
    if (i >= tokens) return false;
    TokenTerms terms;
    terms.decay = expf(a);
    terms.decay_less_1 = expm1f(a);
    terms.slow = fabsf(a) < 0.69f;
    // The span's last token leaves what the next one owes to be added when that comes.
    terms.write = i + 1 < tokens ? gamma + next : gamma;
    reinterpret_cast<TokenTerms *>(shared + s.terms)[i] = terms;
    shared[s.gamma + i] = gamma, shared[s.owed + i] = owed, shared[s.dt + i] = dt;
    return not_finite(terms.decay) || not_finite(terms.write) || not_finite(gamma) ||
           not_finite(owed);
  }

  // Keys (with their bias), or queries, rank by rank; true if one is not finite.
  __device__ __forceinline__ bool stage_projection(int to, const View<5> &from, bool quads,
                                                   bool biased, int bias, int64_t t,
                                                   int tokens) const {
    bool bad = false;
    for (int r = 0; r < ranks(); ++r) {
      const Table table(from.at(span.row, t, r, span.group), from.dtype, from.stride[1],
                        from.stride[4]);
      const float *const add = shared + bias + r * s.padded;
      float *const rank = shared + to + r * s.padded;
      const int step = ranks() * s.padded;
      if (quads) {
        each_four(table, tokens, s.dstate / 4, s.log_states - 2, [&](int token, int n, float4 v) {
          if (biased) {
            const float4 b = *reinterpret_cast<const float4 *>(add + n);
            v.x += b.x, v.y += b.y, v.z += b.z, v.w += b.w;
          }
          bad |= not_finite(v.x) || not_finite(v.y) || not_finite(v.z) || not_finite(v.w);
          *reinterpret_cast<float4 *>(rank + token * step + n) = v;
        });
      } else {
        each_loaded(table, tokens, s.dstate, s.log_states, [&](int token, int n, float v) {
          if (biased) v += add[n];
          bad |= not_finite(v);
          rank[token * step + n] = v;
        });
      }
    }
    return bad;
  }

  // f(token, i, value) of a tensor's rows, 0 where there are none.
  template <class F>
  __device__ __forceinline__ void stage_rows(const View<4> &from, bool quads, int64_t t, int tokens,
                                             const F &f) const {
    const int count = rows();
    const Table table(from.at(span.row, t, span.head, span.first_row), from.dtype, from.stride[1],
                      from.stride[3]);
    if (quads) {
      each_four(table, tokens, count / 4, s.log_rows - 2, [&](int token, int i, float4 v) {
        f(token, i, v.x), f(token, i + 1, v.y), f(token, i + 2, v.z), f(token, i + 3, v.w);
      });
    } else {
      each_loaded(table, tokens, count, s.log_rows, f);
    }
    if (count < s.block_rows)
      each_cell(tokens, s.block_rows - count, s.log_rows,
                [&](int token, int i) { f(token, count + i, 0.0f); });
  }

  __device__ __forceinline__ bool stage_values(int64_t t, int tokens) const {
    bool bad = false;
    const int ranks = this->ranks();
    stage_rows(p.x, s.quads_x, t, tokens, [&](int token, int i, float x) {
      bad |= not_finite(x);
      for (int r = 0; r < ranks; ++r)
        shared[s.U + (token * ranks + r) * s.block_rows + i] =
            s.has_psi ? __fmul_rn(x, shared[s.psi + r * s.block_rows + i]) : x;
    });
    if (p.z.given())
      stage_rows(p.z, s.quads_z, t, tokens,
                 [&](int token, int i, float z) { shared[s.z + token * s.block_rows + i] = z; });
    return bad;
  }

  // theta in half turns is exact to its double; its sine and cosine are those of a float and of
  // what that leaves.
  __device__ __forceinline__ void turn_keys(int tokens, int steps) {
    turned = true;
    each_angle([&](int j) {
      double at = theta()[j];
      for (int i = 0; i < tokens; ++i) {
        at += double(shared[s.sine + i * s.nangles + j]) * double(shared[s.dt + i]);
        const double reduced = within_two(at);
        const float high = float(reduced);
        shared[s.sine + i * s.nangles + j] = high;
        shared[s.cosine + i * s.nangles + j] = float(reduced - double(high));
      }
      theta()[j] = within_two(at);
    });
    __syncthreads();
    for (int i = this_thread(); i < tokens * s.nangles; i += blockDim.x) {
      const float low = shared[s.cosine + i] * 3.14159265f;
      float sine, cosine;
      sincospif(shared[s.sine + i], &sine, &cosine);
      shared[s.sine + i] = fmaf(low, cosine, sine);
      shared[s.cosine + i] = fmaf(-low, sine, cosine);
    }
    __syncthreads();
    const bool half = p.mamba3.rotary_half;
    const int other = half ? s.dstate / 2 : 1;
    each_cell(steps, s.nangles, s.log_angles, [&](int step, int j) {
      const int at = token_of(step) * s.nangles + j;
      const float sine = shared[s.sine + at], cosine = shared[s.cosine + at];
      float *const k = shared + s.K + step * s.padded + (half ? j : 2 * j);
      float *const q = shared + s.Q + step * s.padded + (half ? j : 2 * j);
      turn_pair(k, k + other, sine, cosine);
      turn_pair(q, q + other, sine, cosine);
    });
    __syncthreads();
  }

  // q^r . k^r' of each token.
  __device__ __forceinline__ void multiply_keys(int tokens) const {
    const int ranks = this->ranks(), square = ranks * ranks, warps = blockDim.x / 32;
    for (int i = this_thread() / 32; i < tokens * square; i += warps) {
      const int token = kSiso ? i : i / square, pair = kSiso ? 0 : i % square;
      const float *const q =
          shared + s.Q + (token * ranks + (kSiso ? 0 : pair / ranks)) * s.padded;
      const float *const k =
          shared + s.K + (token * ranks + (kSiso ? 0 : pair % ranks)) * s.padded;
      float sum = 0.0f;
      for (int n = this_thread() % 32; n < s.dstate; n += 32) sum = fmaf(q[n], k[n], sum);
      for (int off = 16; off; off >>= 1) sum += __shfl_xor_sync(~0u, sum, off);
      if (this_thread() % 32 == 0) shared[s.kq + i] = sum;
    }
  }

  // True if something that goes into the states is not finite.
  __device__ __forceinline__ bool prepare(int64_t t, int tokens) {
    const int steps = tokens * ranks();
    __syncthreads();
    bool bad = prepare_terms(t, tokens);
    const Mamba3 &m = p.mamba3;
    bad |= stage_projection(s.K, p.B, s.quads_B, m.B_bias.given(), s.B_bias, t, tokens);
    stage_projection(s.Q, p.C, s.quads_C, m.C_bias.given(), s.C_bias, t, tokens);
    bad |= stage_values(t, tokens);
    if (p.angles.given()) {
      const Table table(p.angles.at(span.row, t, span.head), p.angles.dtype, p.angles.stride[1],
                        p.angles.stride[3]);
      each_loaded(table, tokens, s.nangles, s.log_angles, [&](int i, int j, float v) {
        shared[s.sine + i * s.nangles + j] = tanhf(v);
      });
    }
    bad = __syncthreads_or(bad);
    if (p.angles.given()) turn_keys(tokens, steps);
    multiply_keys(tokens);
    return bad;
  }

  // ---- After the walk

  // y of a rank of a token, D included.
  __device__ __forceinline__ float output(int token, int r, int i) const {
    const int ranks = this->ranks(), step = token * ranks + r;
    const float *const kq = shared + s.kq + step * ranks;
    float now = 0.0f;
    for (int k = 0; k < ranks; ++k)
      now = fmaf(kq[k], shared[s.U + (token * ranks + k) * s.block_rows + i], now);
    const float before = __fmul_rn(reinterpret_cast<const TokenTerms *>(shared + s.terms)[token].decay,
                                   shared[s.Y + step * s.block_rows + i]);
    const float y = fmaf(shared[s.gamma + token], now, before);
    return p.D.given() ? fmaf(shared[s.D + i], shared[s.U + step * s.block_rows + i], y) : y;
  }

  __device__ __forceinline__ void normalise(int tokens) const {
    const int steps = tokens * ranks();
    each_cell(tokens, rows(), s.log_rows, [&](int token, int i) {
      for (int r = 0; r < ranks(); ++r)
        shared[s.Y + (token * ranks() + r) * s.block_rows + i] = output(token, r, i);
    });
    __syncthreads();
    for (int step = this_thread() / 32; step < steps; step += blockDim.x / 32) {
      const float scale =
          norm_scale(shared + s.Y + step * s.block_rows, s.headdim, p.mamba3.norm_eps);
      if (this_thread() % 32 == 0) shared[s.scales + step] = scale;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void finish(int64_t t, int tokens) const {
    const Mamba3 &m = p.mamba3;
    const bool normed = m.norm_weight.given(), summed = m.mimo_out.given();
    if (normed) normalise(tokens);
    each_cell(tokens, rows(), s.log_rows, [&](int token, int i) {
      const int row = span.first_row + i;
      float total = 0.0f;
      for (int r = 0; r < ranks(); ++r) {
        const int step = token * ranks() + r;
        float o = normed ? shared[s.Y + step * s.block_rows + i] * shared[s.scales + step] *
                               shared[s.norm + i]
                         : output(token, r, i);
        if (p.z.given()) {
          const float z = shared[s.z + token * s.block_rows + i];
          o *= silu(m.mimo_z.given() ? __fmul_rn(shared[s.zeta + r * s.block_rows + i], z) : z);
        }
        if (summed) {
          const float part = __fmul_rn(shared[s.phi + r * s.block_rows + i], o);
          total = r ? total + part : part;
        } else {
          store_at(p.out, o, span.row, t + token, r, span.head, row);
        }
      }
      if (summed) store_at(p.out, total, span.row, t + token, 0, span.head, row);
    });
  }

  // For the next span, and for the states.
  __device__ __forceinline__ void keep_last(int64_t t, int tokens) {
    if (!p.trap.given()) return;
    const int first = (tokens - 1) * ranks();
    each_key([&](float &k, int r, int n) { k = shared[s.K + (first + r) * s.padded + n]; });
    each_value([&](float &v, int i) {
      v = i < rows() ? load_at(p.x, span.row, t + tokens - 1, span.head, span.first_row + i) : 0.0f;
    });
    has_before = true;
  }
};

}  // namespace ssmk::cuda
