// SPDX-License-Identifier: MIT
// Mamba-1 prefill:
//   h[n] = exp(dt' A[n]) h[n] + dt' x B[n],   y = sum_n h[n] C[n] + D x,   out = y silu(z)
//
// Vectors run over channels, so nothing is ever summed across lanes.  A task owns some vectors of
// channels of one group in one sequence and walks time in tiles:
//   read    dt, x            -> [token][channel] float32 tiles in L1, transposed on the way if time
//   is packed prepare dt' and dt' x, y = D x scan    blocks of states held in registers through the
//   tile; B and C broadcast from a [token][state] tile write   y silu(z)
// Inputs are read once and outputs written once; one exponential per token, channel and state
// bounds it.
#include "cpu/dt.h"
#include "cpu/kernels.h"
#include "cpu/lambda.h"
#include "cpu/rows.h"
#include "cpu/runs.h"

namespace ssmk::cpu::SSMK_ISA {
namespace {

// A tile is kTokens tokens of up to kMaxVectors vectors of channels, for all of which B and C are
// read once; kChunk states of A, B and C are in scratch at a time; a block of states lives in half
// of the registers that the level has.
constexpr int kTokens = 64;
constexpr int kMaxVectors = 4;
constexpr int kChunk = 64;
constexpr int kWidth = kMaxVectors * kLanes;
constexpr int kWideBlock = kLanes == 16 ? 16 : 8;
constexpr int64_t kStackStates = 2 * kMaxStackState * kLanes;

struct Scratch {
  alignas(64) float dt[kTokens * kWidth];
  alignas(64) float dtx[kTokens * kWidth];  // x before it is multiplied
  alignas(64) float y[kTokens * kWidth];
  alignas(64) float z[kTokens * kWidth];
  alignas(64) float bias[kWidth], D[kWidth];
  alignas(64) float A[2][kMaxVectors * kChunk *
                         kLanes];            // [part][vector][state][lane], real part times log2(e)
  alignas(64) float B[2][kTokens * kChunk];  // [part][token][state], or if constant as A
  alignas(64) float C[2][kTokens * kChunk];
  alignas(64) float h[kStackStates];  // [part][vector][state][lane]
};
static_assert(kTokens * kChunk >= kMaxVectors * kChunk * kLanes,
              "constant B and C fit where the tiles do");

// What the next tile will read of one tensor for this vector of channels, a cache line for each
// token of this tile: rows of channels, or pieces of rows of time.
struct Ahead {
  const char *first = nullptr;
  int64_t row = 0, line = 0;
  int shift = 0;

  SSMK_INLINE void prefetch(int64_t t) const {
    __builtin_prefetch(first + (t >> shift) * row + (t & ((1 << shift) - 1)) * line);
  }
};

// The operands of one block of states for one vector of channels.
struct Block {
  Ahead ahead[3];
  const float *dt, *dtx;
  float *y;
  const float *A[2], *B[2], *C[2];
  float *h[2];
};

template <bool kVaries>
SSMK_INLINE vf coefficient(const float *p, int64_t t, int n) {
  if constexpr (kVaries) return splat(p[t * kChunk + n]);
  return load(p + n * kLanes);
}

template <bool kBVaries, bool kCVaries, int kStates>
inline void scan_real(const Block &k, int64_t tokens) {
  vf h[kStates];
  SSMK_UNROLL
  for (int n = 0; n < kStates; ++n) h[n] = load(k.h[0] + n * kLanes);
  for (int64_t t = 0; t < tokens; ++t) {
    const vf dt = load(k.dt + t * kWidth), dtx = load(k.dtx + t * kWidth);
    vf y[2] = {load(k.y + t * kWidth), vf{}};
    SSMK_UNROLL
    for (int n = 0; n < kStates; ++n) {
      const vf decay = exp2<true>(dt * load(k.A[0] + n * kLanes));
      h[n] = fused(decay, h[n], dtx * coefficient<kBVaries>(k.B[0], t, n));
      y[n % 2] = fused(h[n], coefficient<kCVaries>(k.C[0], t, n), y[n % 2]);
    }
    store(k.y + t * kWidth, y[0] + y[1]);
    for (const Ahead &a : k.ahead) a.prefetch(t);
  }
  SSMK_UNROLL
  for (int n = 0; n < kStates; ++n) store(k.h[0] + n * kLanes, h[n]);
}

template <bool kBVaries, bool kCVaries, int kStates>
inline void scan_complex(const Block &k, int64_t tokens) {
  vf re[kStates], im[kStates];
  SSMK_UNROLL
  for (int n = 0; n < kStates; ++n) {
    re[n] = load(k.h[0] + n * kLanes);
    im[n] = load(k.h[1] + n * kLanes);
  }
  for (int64_t t = 0; t < tokens; ++t) {
    const vf dt = load(k.dt + t * kWidth), dtx = load(k.dtx + t * kWidth);
    vf y{};
    SSMK_UNROLL
    for (int n = 0; n < kStates; ++n) {
      const vf size = exp2(dt * load(k.A[0] + n * kLanes));
      vf sine, cosine;
      sincos(dt * load(k.A[1] + n * kLanes), &sine, &cosine);
      const vf a = size * cosine, b = size * sine;
      const vf r = a * re[n] - b * im[n] + dtx * coefficient<kBVaries>(k.B[0], t, n);
      const vf i = a * im[n] + b * re[n] + dtx * coefficient<kBVaries>(k.B[1], t, n);
      y += r * coefficient<kCVaries>(k.C[0], t, n) - i * coefficient<kCVaries>(k.C[1], t, n);
      re[n] = r;
      im[n] = i;
    }
    store(k.y + t * kWidth, load(k.y + t * kWidth) + (y + y));
  }
  SSMK_UNROLL
  for (int n = 0; n < kStates; ++n) {
    store(k.h[0] + n * kLanes, re[n]);
    store(k.h[1] + n * kLanes, im[n]);
  }
}

// The channels and the sequence of one task.
struct Task {
  const SelectiveScanProblem &p;
  Scratch &s;
  Sequence seq;
  int64_t group, channel, nchannels;
  int vectors;
  float *h[2];  // [vector][state][lane]

  int64_t lanes_of(int v) const {
    return nchannels - v * kLanes < kLanes ? nchannels - v * kLanes : kLanes;
  }

  // Parameters

  void read_channels(float *dst, const View<1> &v) const {
    std::memset(dst, 0, sizeof(float) * kWidth);
    if (v.given()) read_row(dst, v.at(channel), v.dtype, v.stride[0], nchannels);
  }

  // [state][lane] of every vector, for states n0 .. n0 + n of a (channel, state) view; unused lanes
  // become 0.
  template <int Rank>
  void read_states(float *dst, int64_t states, const ComplexView<Rank> &v, const char *first,
                   int part, int64_t channel_stride, int64_t state_stride, int64_t n) const {
    for (int k = 0; k < vectors; ++k) {
      float *d = dst + k * states * kLanes;
      if (lanes_of(k) < kLanes) std::memset(d, 0, sizeof(float) * size_t(n * kLanes));
      const char *src = first + (k * kLanes * channel_stride + part * v.imag) * size_of(v.dtype);
      read_tile(d, kLanes, src, v.dtype, state_stride, channel_stride, n, lanes_of(k));
    }
  }

  void read_constant(float (&dst)[2][kTokens * kChunk], const ComplexView<4> &v, int64_t n0,
                     int64_t n) const {
    for (int part = 0; part <= int(p.complex); ++part)
      read_states(dst[part], kChunk, v, v.at(0, channel, n0), part, v.stride[1], v.stride[2], n);
  }

  // Everything of states n0 .. n0 + n that does not change with time.
  void read_chunk(int64_t n0, int64_t n) const {
    for (int part = 0; part <= int(p.complex); ++part)
      read_states(s.A[part], kChunk, p.A, p.A.at(channel, n0), part, p.A.stride[0], p.A.stride[1],
                  n);
    for (int k = 0; k < vectors; ++k)
      for (int64_t i = 0; i < n * kLanes; ++i) s.A[0][k * kChunk * kLanes + i] *= kLog2e;
    if (!p.B_varies) read_constant(s.B, p.B, n0, n);
    if (!p.C_varies) read_constant(s.C, p.C, n0, n);
  }

  // State

  void clear_state() const {
    const size_t bytes = sizeof(float) * size_t(vectors * p.dstate * kLanes);
    std::memset(h[0], 0, bytes);
    if (p.complex) std::memset(h[1], 0, bytes);
  }

  void read_state() const {
    if (!p.initial_states.given() || !seq.has_initial) return clear_state();
    const auto &v = p.initial_states;
    for (int part = 0; part <= int(p.complex); ++part)
      read_states(h[part], p.dstate, v, v.at(seq.slot, channel), part, v.stride[1], v.stride[2],
                  p.dstate);
  }

  void write_state() const {
    const auto &v = p.final_states;
    if (!v.given()) return;
    for (int part = 0; part <= int(p.complex); ++part)
      for (int k = 0; k < vectors; ++k) {
        char *dst = v.at(seq.slot, channel + k * kLanes) + part * v.imag * size_of(v.dtype);
        write_tile(dst, v.dtype, v.stride[2], v.stride[1], h[part] + k * p.dstate * kLanes, kLanes,
                   p.dstate, lanes_of(k));
      }
  }

  // Time

  void zero_output(int64_t begin, int64_t end) const {
    for (int64_t c = 0; c < nchannels; ++c)
      zero_row(p.out.at(seq.row, channel + c, begin), p.out.dtype, p.out.stride[2], end - begin);
  }

  void read_tokens(float *dst, const View<3> &v, int64_t begin, int64_t tokens) const {
    read_tile(dst, kWidth, v.at(seq.row, channel, begin), v.dtype, v.stride[2], v.stride[1], tokens,
              nchannels);
  }

  void prepare(int64_t begin, int64_t tokens) const {
    read_tokens(s.dt, p.dt, begin, tokens);
    read_tokens(s.dtx, p.x, begin, tokens);
    for (int k = 0; k < vectors; ++k) {
      const vf bias = load(s.bias + k * kLanes), D = load(s.D + k * kLanes);
      for (int64_t i = k * kLanes; i < tokens * kWidth; i += kWidth) {
        const vf dt = transform_dt(p.dt_transform, load(s.dt + i) + bias);
        const vf x = load(s.dtx + i);
        store(s.dt + i, dt);
        store(s.dtx + i, dt * x);
        store(s.y + i, p.D.given() ? D * x : vf{});  // not 0 x: x may be infinite
      }
    }
  }

  void read_projection(float (&dst)[2][kTokens * kChunk], const ComplexView<4> &v, int64_t begin,
                       int64_t tokens, int64_t n0, int64_t n) const {
    for (int part = 0; part <= int(p.complex); ++part)
      read_tile(dst[part], kChunk,
                v.at(seq.row, group, n0, begin) + part * v.imag * size_of(v.dtype), v.dtype,
                v.stride[3], v.stride[2], tokens, n);
  }

  // The tile that starts at `begin`, for vector k; what is not there is read from scratch again.
  Ahead ahead(const View<3> &v, int k, int64_t begin) const {
    Ahead a;
    a.first = reinterpret_cast<const char *>(s.y);
    if (!v.given() || begin >= seq.end) return a;
    const int64_t size = size_of(v.dtype);
    if (v.stride[1] == 1) {
      a.row = v.stride[2] * size;
    } else if (v.stride[2] == 1) {
      a.row = v.stride[1] * size;
      a.line = 64;
      a.shift = size == 4 ? 2 : 1;  // lines of kTokens elements
    } else {
      return a;
    }
    a.first = v.at(seq.row, channel + k * kLanes, begin);
    return a;
  }

  template <bool kBVaries, bool kCVaries>
  void scan_states(int k, int64_t n0, int64_t n, int64_t tokens, const Ahead (&next)[3]) const {
    for (int64_t i = 0; i < n;) {
      const int64_t lanes =
          (k * kChunk + i) * kLanes;  // where a [vector][state][lane] array has state i
      Block b;
      for (int j = 0; j < 3; ++j) b.ahead[j] = next[j];
      b.dt = s.dt + k * kLanes;
      b.dtx = s.dtx + k * kLanes;
      b.y = s.y + k * kLanes;
      for (int part = 0; part < 2; ++part) {
        b.A[part] = s.A[part] + lanes;
        b.B[part] = s.B[part] + (kBVaries ? i : lanes);
        b.C[part] = s.C[part] + (kCVaries ? i : lanes);
        b.h[part] = h[part] + (k * p.dstate + n0 + i) * kLanes;
      }
      if (p.complex) {
        n - i >= 4 ? scan_complex<kBVaries, kCVaries, 4>(b, tokens)
                   : scan_complex<kBVaries, kCVaries, 1>(b, tokens);
        i += n - i >= 4 ? 4 : 1;
      } else if (n - i >= kWideBlock) {
        scan_real<kBVaries, kCVaries, kWideBlock>(b, tokens);
        i += kWideBlock;
      } else {
        n - i >= 4 ? scan_real<kBVaries, kCVaries, 4>(b, tokens)
                   : scan_real<kBVaries, kCVaries, 1>(b, tokens);
        i += n - i >= 4 ? 4 : 1;
      }
    }
  }

  void scan_tile(int64_t begin, int64_t tokens) const {
    prepare(begin, tokens);
    for (int64_t n0 = 0; n0 < p.dstate; n0 += kChunk) {
      const int64_t n = p.dstate - n0 < kChunk ? p.dstate - n0 : kChunk;
      if (p.dstate > kChunk) read_chunk(n0, n);
      if (p.B_varies) read_projection(s.B, p.B, begin, tokens, n0, n);
      if (p.C_varies) read_projection(s.C, p.C, begin, tokens, n0, n);
      for (int k = 0; k < vectors; ++k) {
        const int64_t after = n0 == 0 ? begin + kTokens : seq.end;
        const Ahead next[3] = {ahead(p.dt, k, after), ahead(p.x, k, after), ahead(p.z, k, after)};
        if (p.B_varies) {
          p.C_varies ? scan_states<true, true>(k, n0, n, tokens, next)
                     : scan_states<true, false>(k, n0, n, tokens, next);
        } else {
          p.C_varies ? scan_states<false, true>(k, n0, n, tokens, next)
                     : scan_states<false, false>(k, n0, n, tokens, next);
        }
      }
    }
    if (p.z.given()) {
      read_tokens(s.z, p.z, begin, tokens);
      for (int k = 0; k < vectors; ++k)
        for (int64_t i = k * kLanes; i < tokens * kWidth; i += kWidth)
          store(s.y + i, load(s.y + i) * silu(load(s.z + i)));
    }
    write_tile(p.out.at(seq.row, channel, begin), p.out.dtype, p.out.stride[2], p.out.stride[1],
               s.y, kWidth, tokens, nchannels);
  }

  void scan(int64_t begin, int64_t end) const {
    for (int64_t t = begin; t < end; t += kTokens)
      scan_tile(t, end - t < kTokens ? end - t : kTokens);
  }

  // Pads do nothing; a new id starts from zeros, the first one from the initial state.
  void scan_runs() const {
    each_run(
        p.seqs.seq_idx, seq.row, seq.begin, seq.end,
        [&](int64_t begin, int64_t end) { zero_output(begin, end); },
        [&](int64_t begin, int64_t end, bool fresh) {
          if (fresh) clear_state();
          scan(begin, end);
        });
  }

  void run() const {
    if (seq.pad) return zero_output(seq.begin, seq.end);
    read_channels(s.bias, p.dt_bias);
    read_channels(s.D, p.D);
    if (nchannels < vectors * kLanes) {
      std::memset(s.dt, 0, sizeof s.dt);
      std::memset(s.dtx, 0, sizeof s.dtx);
      std::memset(s.z, 0, sizeof s.z);
    }
    if (p.dstate <= kChunk) read_chunk(0, p.dstate);
    read_state();
    p.seqs.seq_idx.given() ? scan_runs() : scan(seq.begin, seq.end);
    write_state();
  }
};

}  // namespace

void selective_scan(const SelectiveScanProblem &p) {
  if (p.seqs.nseq == 0 || p.dim == 0) return;
  if (p.seqlen == 0 && (!p.final_states.given() || p.dstate == 0)) return;
  const int64_t per_group = p.dim / p.ngroups, parts = p.complex ? 2 : 1;

  // As many vectors to a task as their states fit the stack, but enough tasks for the threads.
  int vectors = kMaxVectors;
  const auto tasks_per_group = [&] {
    return (per_group + vectors * kLanes - 1) / (vectors * kLanes);
  };
  while (vectors > 1 && (vectors * p.dstate * kLanes * parts > kStackStates ||
                         (vectors - 1) * kLanes >= per_group ||
                         p.seqs.nseq * p.ngroups * tasks_per_group() < 4 * num_threads()))
    vectors /= 2;
  const int64_t blocks = tasks_per_group();
  const bool in_workspace = p.dstate > kMaxStackState;
  const int64_t padded = (per_group + 15) / 16 * 16;

  parallel(p.seqs.nseq * p.ngroups * blocks, p.batch * p.dim * p.seqlen * (p.dstate + 8),
           [&](int64_t i) {
             Scratch scratch;
             const int64_t block = i % blocks, group = i / blocks % p.ngroups,
                           s = i / blocks / p.ngroups;
             Task task{p, scratch, sequence(p.seqs, s, p.seqlen), group, 0, 0, vectors, {}};
             const int64_t first = block * vectors * kLanes;
             task.channel = group * per_group + first;
             task.nchannels =
                 per_group - first < vectors * kLanes ? per_group - first : vectors * kLanes;
             task.vectors = int((task.nchannels + kLanes - 1) / kLanes);
             float *states = scratch.h;
             if (in_workspace)
               states = static_cast<float *>(p.workspace.data) +
                        ((s * p.ngroups + group) * padded + first) * p.dstate * parts;
             task.h[0] = states;
             task.h[1] = states + task.vectors * p.dstate * kLanes;
             task.run();
           });
}

}  // namespace ssmk::cpu::SSMK_ISA
