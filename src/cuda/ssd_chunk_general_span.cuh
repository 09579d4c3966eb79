// SPDX-License-Identifier: MIT
// What the rows of a block share for a span of tokens, in shared memory: made before the walk of
// ssd_chunk_general.cuh, and turned into outputs after it.
#pragma once

#include "cuda/ssd_chunk_general_plan.cuh"

namespace ssmk::cuda {

template <bool kSiso>
struct SpanWork {
  const SsdChunkProblem &p;
  const GeneralPlan &s;
  float *const shared;
  Span &span;  // in shared memory
  Found &found;
  // In one register.
  struct Flags {
    unsigned has_before : 1;  // k_before and v_before are those of a token
    unsigned turned : 1;      // theta has seen a token; before, it is as the caller gave it
    unsigned terms_bad : 1;   // terms that are there are not all finite
    unsigned sent : 1;        // for the next token and some after it
    unsigned parity : 1;      // which of two v_before it is
    unsigned careful : 1;     // states may not be finite
  } flags = {};

  __device__ __forceinline__ SpanWork(const SsdChunkProblem &problem, const GeneralPlan &plan,
                                      float *memory, Span &here, Found &captures)
      : p(problem), s(plan), shared(memory), span(here), found(captures) {}

  __device__ __forceinline__ int ranks() const { return kSiso ? 1 : s.rank; }
  __device__ __forceinline__ int token_of(int step) const { return kSiso ? step : step / s.rank; }
  __device__ __forceinline__ int rank_of(int step) const { return kSiso ? 0 : step % s.rank; }
  // Rows of this block that there are.
  __device__ __forceinline__ int rows() const {
    const int left = s.headdim - span.first_row;
    return left < s.block_rows ? left : s.block_rows;
  }
  __device__ __forceinline__ float *v_before() const {
    return shared + s.v_before + flags.parity * s.block_rows;
  }
  __device__ __forceinline__ const TokenTerms *terms() const {
    return reinterpret_cast<const TokenTerms *>(shared + s.terms) + found.first_term;
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
    for (int i = this_thread(); i < s.block_rows; i += blockDim.x) f(v_before()[i], i);
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
    flags.has_before = flags.turned = flags.careful = 0;
    each_angle([&](int j) { set_angle(j, 0.0f); });
  }

  // True if something is not finite.
  __device__ __forceinline__ bool read_initial() {
    const HeadStates &from = p.initial;
    bool bad = false;
    clear();
    if (from.angle.given())
      each_angle([&](int j) { set_angle(j, load_at(from.angle, span.slot, span.head, j)); });
    flags.has_before = from.k.given() || from.v.given();
    if (!flags.has_before) return bad;
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
        if (flags.turned) {
          radians = float(theta()[j] * 3.14159265358979323846);
          if (radians >= kTwoPi) radians = 0.0f;
        }
        store_at(to.angle, radians, entry, span.head, j);
      });
    if (to.k.given() && first)
      each_key([&](float &k, int r, int n) {
        store_at(to.k, flags.has_before ? k : 0.0f, entry, r, span.head, n);
      });
    if (to.v.given())
      each_value([&](float &v, int i) {
        if (i < rows())
          store_at(to.v, flags.has_before ? v : 0.0f, entry, span.head, span.first_row + i);
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
  // By one thread, between two barriers.
  __device__ __forceinline__ void advance(int tokens) {
    span.begin += tokens;
    found.first_term = found.first_term < kTermTokens ? found.first_term + tokens : kTermTokens;
  }

  __device__ __forceinline__ int64_t id() const {
    return *reinterpret_cast<const int64_t *>(shared + s.ids);
  }

  // ---- Before the walk

  // Decays and weights of tokens from t on.
  __device__ __forceinline__ void make_terms(int64_t t) {
    const int count = span.end - t < kTermTokens ? int(span.end - t) : kTermTokens;
    TokenTerms *const terms = reinterpret_cast<TokenTerms *>(shared + s.terms);
    const bool trap = p.trap.given();
    bool bad = false;
    for (int i = this_thread(); i < count; i += blockDim.x) {
      // All are under way before one is used.
      const uint32_t dt_bits = load_given(p.dt.at(span.row, t + i, span.head), p.dt.dtype),
                     bias = load_given(p.dt_bias.at(span.head), p.dt_bias.dtype),
                     rate = load_given(p.A.at(span.head), p.A.dtype),
                     adt = load_given(p.adt.at(span.row, t + i, span.head), p.adt.dtype),
                     logit = load_given(p.trap.at(span.row, t + i, span.head), p.trap.dtype);
      float dt = value_of(dt_bits, p.dt.dtype);
      if (p.dt_bias.given()) dt += value_of(bias, p.dt_bias.dtype);
      dt = transform_dt(p.dt_transform, dt);
      float owed = 0.0f;
      TokenTerms term;
      term.gamma = dt;
      if (trap) {
        const Trapezoid f = trapezoid(p.mamba3.trap_sigmoid, value_of(logit, p.trap.dtype));
        term.gamma = __fmul_rn(f.now, dt), owed = __fmul_rn(f.then, dt);
      }
      term.write = term.gamma;
      const float a =
          p.adt.given() ? value_of(adt, p.adt.dtype) : __fmul_rn(dt, value_of(rate, p.A.dtype));
      term.decay = expf(a);
      term.decay_less_1 = expm1f(a);
      bad |= not_finite(term.decay) || not_finite(term.gamma) || not_finite(owed);
      terms[i] = term;
      shared[s.owed + i] = owed, shared[s.dt + i] = dt;
    }
    flags.terms_bad = __syncthreads_or(bad) != 0;
    if (this_thread() == 0) found.nterms = count, found.first_term = 0;
    if (trap)
      for (int i = this_thread(); i + 1 < count; i += blockDim.x)
        terms[i].write = terms[i].gamma + shared[s.owed + i + 1];
  }

  // ---- Tensors on their way to shared memory

  // Of a tensor's rank r, from token t on.
  __device__ __forceinline__ Table part_of(const Source &from, int which, int64_t t, int r) const {
    const bool keys = which <= kQueries, rows = which == kX || which == kZ;
    const char *const first = from.data + span.row * from.batch + t * from.token + r * from.rank +
                              (keys ? span.group : span.head) * from.inner +
                              (rows ? span.first_row : 0) * from.column;
    return {const_cast<char *>(first), from.token, from.column, from.dtype};
  }
  __device__ __forceinline__ int columns_of(int which) const {
    return which <= kQueries ? s.dstate : which == kTurns ? s.nangles : rows();
  }

  // f(tensor, team) of all tensors that there are.  Each is the work of some warps only, so that a
  // warp has the addresses of few to compute.
  template <class F>
  __device__ __forceinline__ void each_source(const F &f) const {
    const bool z = p.z.given();
    const int thread = this_thread(), warp = thread / 32, warps = blockDim.x / 32;
    const int count = 3 + z + p.angles.given(), teams = count < warps ? count : warps;
    const int mine = warp % teams, mates = (warps - mine + teams - 1) / teams;
    const Team team = {warp / teams * 32 + (thread & 31), 32 * mates};
#pragma unroll 1
    for (int i = mine; i < count; i += teams) f(i < 3 ? i : i == 3 && z ? kZ : kTurns, team);
  }

  // Sends for the tokens of a span.
  __device__ __forceinline__ void send_for(int64_t t) {
    const int tokens = span.end - t < s.tokens ? int(span.end - t) : s.tokens;
    flags.sent = true;
    each_source([&](int which, Team team) {
      const Source &from = s.sources[which];
      if (!from.ahead) return;
      const int ranks = which <= kQueries ? this->ranks() : 1, pitch = from.pitch,
                log_each = from.dtype == DType::kF32 ? 2 : 3;
      for (int r = 0; r < ranks; ++r) {
        const Table table = part_of(from, which, t, r);
        char *const to = reinterpret_cast<char *>(shared + from.at) + r * pitch;
        each_cell(team, tokens, columns_of(which) >> log_each, from.log - log_each,
                  [&](int row, int i) {
                    copy_ahead(to + row * ranks * pitch + i * 16, table.at(row) + i * 16);
                  });
      }
    });
  }

  // put(row, column, values) of rank r: four neighbours that came ahead, or one where they did not.
  template <class Put>
  __device__ __forceinline__ void each_staged(Team team, int which, int64_t t, int tokens,
                                              int ranks, int r, const Put &put) const {
    const Source &from = s.sources[which];
    const int columns = columns_of(which);
    if (!from.ahead)
      return each_loaded(team, part_of(from, which, t, r), tokens, columns, from.log, put);
    const char *const base = reinterpret_cast<const char *>(shared + from.at) + r * from.pitch;
    const int pitch = ranks * from.pitch;
    const DType dtype = from.dtype;
    const int four = dtype == DType::kF32 ? 16 : 8;
    each_cell(team, tokens, columns / 4, from.log - 2, [&](int row, int i) {
      put(row, 4 * i, read_four(base + row * pitch + i * four, dtype));
    });
  }

  // Keys or queries with their biases.  Returns NaN if one is not finite, else 0.
  __device__ __forceinline__ float stage_keys(Team team, int which, int64_t t, int tokens) const {
    const int ranks = this->ranks(), padded = s.padded;
    const bool keys = which == kKeys;
    const bool biased = (keys ? p.mamba3.B_bias : p.mamba3.C_bias).given();
    const float *const biases = shared + (keys ? s.B_bias : s.C_bias);
    float *const to = shared + (keys ? s.K : s.Q);
    float sum = 0.0f;
    for (int r = 0; r < ranks; ++r) {
      const float *const bias = biases + r * padded;
      each_staged(team, which, t, tokens, ranks, r, [&](int token, int n, auto v) {
        using Values = decltype(v);
        constexpr int kCount = int(sizeof(v) / sizeof(float));
        if (biased) {
          const Values b = *reinterpret_cast<const Values *>(bias + n);
#pragma unroll
          for (int e = 0; e < kCount; ++e) v.v[e] += b.v[e];
        }
#pragma unroll
        for (int e = 0; e < kCount; ++e) sum = fmaf(v.v[e], 0.0f, sum);
        *reinterpret_cast<Values *>(to + (token * ranks + r) * padded + n) = v;
      });
    }
    return sum;
  }

  // x times psi, or z; zeros in rows that there are not.  Returns NaN if one is not finite, else 0.
  __device__ __forceinline__ float stage_values(Team team, int which, int64_t t, int tokens) const {
    const int block_rows = s.block_rows, count = rows();
    // Of the last token, for the next span.
    float *const kept = shared + s.v_before + (1 - flags.parity) * block_rows;
    const float *const psi = shared + s.psi;
    const bool x = which == kX, keeps = x && p.trap.given(), has_psi = x && s.has_psi;
    const int ranks = x ? this->ranks() : 1;
    float *const to = shared + (x ? s.U : s.zs);
    float sum = 0.0f;
    const auto put = [&](int token, int i, auto v) {
      using Values = decltype(v);
      constexpr int kCount = int(sizeof(v) / sizeof(float));
#pragma unroll
      for (int e = 0; e < kCount; ++e) sum = fmaf(v.v[e], 0.0f, sum);
      if (keeps && token == tokens - 1) *reinterpret_cast<Values *>(kept + i) = v;
      for (int r = 0; r < ranks; ++r) {
        Values u = v;
        if (has_psi) {
          const Values by = *reinterpret_cast<const Values *>(psi + r * block_rows + i);
#pragma unroll
          for (int e = 0; e < kCount; ++e) u.v[e] = __fmul_rn(v.v[e], by.v[e]);
        }
        *reinterpret_cast<Values *>(to + (token * ranks + r) * block_rows + i) = u;
      }
    };
    each_staged(team, which, t, tokens, 1, 0, put);
    if (count < block_rows)
      each_cell(team, tokens, block_rows - count, s.log_rows,
                [&](int token, int i) { put(token, count + i, Pack<float, 1>{{0.0f}}); });
    return sum;
  }

  __device__ __forceinline__ void stage_angles(Team team, int64_t t, int tokens) const {
    each_staged(team, kTurns, t, tokens, 1, 0, [&](int i, int j, auto v) {
#pragma unroll
      for (int e = 0; e < int(sizeof(v) / sizeof(float)); ++e)
        shared[s.sine + i * s.nangles + j + e] = tanhf(v.v[e]);
    });
  }

  // theta in half turns is exact to its double; its sine and cosine are those of a float and of
  // what that leaves.
  __device__ __forceinline__ void turn_keys(int tokens, int steps) {
    flags.turned = true;
    each_angle([&](int j) {
      double at = theta()[j];
      for (int i = 0; i < tokens; ++i) {
        at += double(shared[s.sine + i * s.nangles + j]) *
              double(shared[s.dt + found.first_term + i]);
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
    const int padded = s.padded, thread = this_thread(), lane = thread & 31;
    const float *const queries = shared + s.Q + 4 * lane, *const keys = shared + s.K + 4 * lane;
    float *const kq = shared + s.kq;
#pragma unroll 1
    for (int i = thread / 32; i < tokens * square; i += warps) {
      const int token = kSiso ? i : i / square, pair = kSiso ? 0 : i % square;
      const float *const q = queries + (token * ranks + (kSiso ? 0 : pair / ranks)) * padded;
      const float *const k = keys + (token * ranks + (kSiso ? 0 : pair % ranks)) * padded;
      float sum = 0.0f;
#pragma unroll 1
      for (int n = 0; n < padded - 4 * lane; n += 128) {
        const float4 a = *reinterpret_cast<const float4 *>(q + n),
                     b = *reinterpret_cast<const float4 *>(k + n);
        sum = fmaf(a.x, b.x, sum), sum = fmaf(a.y, b.y, sum);
        sum = fmaf(a.z, b.z, sum), sum = fmaf(a.w, b.w, sum);
      }
#pragma unroll
      for (int off = 16; off; off >>= 1) sum += __shfl_xor_sync(~0u, sum, off);
      if (lane == 0) kq[i] = sum;
    }
  }

  // True if something that goes into the states is not finite.
  __device__ __forceinline__ bool prepare(int tokens) {
    const int64_t t = span.begin;
    __syncthreads();
    if (found.first_term + tokens > found.nterms) make_terms(t);
    if (!flags.sent) send_for(t);
    wait_for_copies();
    __syncthreads();
    float sum = 0.0f;  // NaN if something that goes into the states is not finite
    each_source([&](int which, Team team) {
      if (which <= kQueries) {
        const float any = stage_keys(team, which, t, tokens);
        if (which == kKeys) sum += any;
      } else if (which <= kZ) {
        const float any = stage_values(team, which, t, tokens);
        if (which == kX) sum += any;
      } else {
        stage_angles(team, t, tokens);
      }
    });
    const bool bad = __syncthreads_or(sum != 0.0f);
    flags.sent = false;
    if (t + tokens < span.end) send_for(t + tokens);
    if (p.angles.given()) turn_keys(tokens, tokens * ranks());
    multiply_keys(tokens);
    return bad || flags.terms_bad;
  }

  // ---- After the walk

  // Four rows from i on: y of a rank of a token, D included.
  __device__ __forceinline__ void output(int token, int r, int i, float (&y)[4]) const {
    const int ranks = this->ranks(), block_rows = s.block_rows, step = token * ranks + r;
    const auto four = [&](int at) {
      return *reinterpret_cast<const Pack<float, 4> *>(shared + at);
    };
    const float *const kq = shared + s.kq + step * ranks;
    const TokenTerms term = terms()[token];
    float now[4] = {};
    for (int k = 0; k < ranks; ++k) {
      const Pack<float, 4> u = four(s.U + (token * ranks + k) * block_rows + i);
#pragma unroll
      for (int e = 0; e < 4; ++e) now[e] = fmaf(kq[k], u.v[e], now[e]);
    }
    const Pack<float, 4> before = four(s.Y + step * block_rows + i);
#pragma unroll
    for (int e = 0; e < 4; ++e) y[e] = fmaf(term.gamma, now[e], __fmul_rn(term.decay, before.v[e]));
    if (!p.D.given()) return;
    const Pack<float, 4> D = four(s.D + i), u = four(s.U + step * block_rows + i);
#pragma unroll
    for (int e = 0; e < 4; ++e) y[e] = fmaf(D.v[e], u.v[e], y[e]);
  }

  __device__ __forceinline__ void normalise(int tokens) const {
    const int steps = tokens * ranks();
    each_cell(tokens, s.block_rows / 4, s.log_rows - 2, [&](int token, int four) {
      for (int r = 0; r < ranks(); ++r) {
        Pack<float, 4> y;
        output(token, r, 4 * four, y.v);
        *reinterpret_cast<Pack<float, 4> *>(shared + s.Y + (token * ranks() + r) * s.block_rows +
                                            4 * four) = y;
      }
    });
    __syncthreads();
    for (int step = this_thread() / 32; step < steps; step += blockDim.x / 32) {
      const float scale =
          norm_scale(shared + s.Y + step * s.block_rows, s.headdim, p.mamba3.norm_eps);
      if (this_thread() % 32 == 0) shared[s.scales + step] = scale;
    }
    __syncthreads();
  }

  __device__ __forceinline__ void finish(int tokens) const {
    const Mamba3 &m = p.mamba3;
    const bool normed = m.norm_weight.given(), summed = m.mimo_out.given(), gated = p.z.given(),
               zeta = m.mimo_z.given(), quads = s.out_quads;
    if (normed) normalise(tokens);
    const Table out =
        table_of(p.out, p.out.at(span.row, span.begin, 0, span.head, span.first_row), 1, 4);
    const int64_t rank = p.out.stride[2] * (out.dtype == DType::kF32 ? 4 : 2);
    const int count = rows(), ranks = this->ranks(), block_rows = s.block_rows;
    const auto four = [&](int at) {
      return *reinterpret_cast<const Pack<float, 4> *>(shared + at);
    };
    each_cell(tokens, (count + 3) / 4, s.log_rows - 2, [&](int token, int column) {
      const int i = 4 * column;
      char *const to = out.at(token, i);
      const auto put = [&](char *first, const float (&v)[4]) {
        if (quads) return store_four(first, out.dtype, v);
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (i + e < count) store(first + e * out.column, out.dtype, v[e]);
      };
      float total[4];
      for (int r = 0; r < ranks; ++r) {
        const int step = token * ranks + r;
        float o[4];
        if (normed) {
          const Pack<float, 4> y = four(s.Y + step * block_rows + i), by = four(s.norm + i);
          const float scale = shared[s.scales + step];
#pragma unroll
          for (int e = 0; e < 4; ++e) o[e] = y.v[e] * scale * by.v[e];
        } else {
          output(token, r, i, o);
        }
        if (gated) {
          Pack<float, 4> z = four(s.zs + token * block_rows + i);
          if (zeta) {
            const Pack<float, 4> by = four(s.zeta + r * block_rows + i);
#pragma unroll
            for (int e = 0; e < 4; ++e) z.v[e] = __fmul_rn(by.v[e], z.v[e]);
          }
#pragma unroll
          for (int e = 0; e < 4; ++e) o[e] *= silu(z.v[e]);
        }
        if (summed) {
          const Pack<float, 4> phi = four(s.phi + r * block_rows + i);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const float part = __fmul_rn(phi.v[e], o[e]);
            total[e] = r ? total[e] + part : part;
          }
        } else {
          put(to + r * rank, o);
        }
      }
      if (summed) put(to, total);
    });
  }

  // Pads came next.
  __device__ __forceinline__ void skip() {
    wait_for_copies();
    flags.sent = false;
  }

  // For the next span, and for the states.
  __device__ __forceinline__ void keep_last(int tokens) {
    if (!p.trap.given()) return;
    const int first = (tokens - 1) * ranks();
    each_key([&](float &k, int r, int n) { k = shared[s.K + (first + r) * s.padded + n]; });
    flags.parity ^= 1;
    flags.has_before = true;
  }
};

}  // namespace ssmk::cuda
