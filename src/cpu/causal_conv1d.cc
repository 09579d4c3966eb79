// SPDX-License-Identifier: MIT
// The short causal convolution, prefill and decode.
//
//   out_t = act(bias + sum_{w < width} weight[w] X_{t - width + 1 + w})        for every channel
//
// One read of x, one write of out and a few operations between.  The work goes along whichever
// axis of x is packed in memory, straight from x to out where dtypes and strides allow and through
// float32 scratch in L1 where they do not:
//   over time       one channel after the other; its taps are unaligned loads of one row
//   over channels   rows of up to kChannels channels, kGroup tokens at once, so that a tap is
//                   loaded once for all of them
// It is cut into blocks of channels and tokens.  A block reads the width - 1 inputs before it
// again, so blocks do not depend on each other, and one long row or a few channels keep all threads
// busy.
// Memory bounds float32; 16-bit tensors with silu are bound about as much by arithmetic.
//
// The sum runs from bias through the taps in order, one fma each, on every path: a token's bits
// depend on its inputs alone, and prefill followed by decode gives those of one long prefill.
#include "cpu/causal_conv1d_tokens.h"
#include "cpu/kernels.h"
#include "cpu/lambda.h"

namespace ssmk::cpu::SSMK_ISA {

void causal_conv1d(const CausalConv1dProblem &);
void causal_conv1d_update(const CausalConv1dUpdateProblem &);

namespace {

// ---- Prefill

struct Prefill {
  const CausalConv1dProblem &p;
  Convolution v;
  int64_t block_channels, channel_blocks, channel_shift;
  int64_t block_tokens, token_blocks;
};

// The first of n ascending values that is at least `least`; n if there is none.
int64_t lower_bound(const View<1> &values, int64_t n, int64_t least) {
  int64_t lo = 0;
  while (n > 0) {
    const int64_t half = n / 2;
    if (read_index(values, lo + half) < least) {
      lo += half + 1;
      n -= half + 1;
    } else {
      n = half;
    }
  }
  return lo;
}

Inputs inputs_of(const CausalConv1dProblem &p, const Sequence &q) {
  Inputs in{p.x, q.row, q.begin, p.seqs.seq_idx, 0, {}, q.slot, p.state_len, false, 0};
  if (q.has_initial) in.state = p.initial_states;
  return in;
}

// Where the run of tokens of one id, or of pads, that starts at t ends.
template <class Index>
int64_t run_end(const Index *ids, int64_t stride, int64_t t, int64_t end) {
  const Index id = ids[t * stride];
  do {
    ++t;
  } while (t < end && (id < 0 ? ids[t * stride] < 0 : ids[t * stride] == id));
  return t;
}

int64_t run_end(const View<2> &ids, int64_t row, int64_t t, int64_t end) {
  const char *p = ids.at(row, 0);
  return ids.dtype == DType::kI64
             ? run_end(reinterpret_cast<const int64_t *>(p), ids.stride[1], t, end)
             : run_end(reinterpret_cast<const int32_t *>(p), ids.stride[1], t, end);
}

// The first real token at or after t, or `end`.
int64_t first_real(const View<2> &ids, int64_t row, int64_t t, int64_t end) {
  while (t < end && read_index(ids, row, t) < 0) ++t;
  return t;
}

// Tokens [begin, end) of a row that seq_idx cuts up.
void convolve_runs(const Prefill &f, const Block &block, const Sequence &q, int64_t begin,
                   int64_t end) {
  const View<2> &ids = f.p.seqs.seq_idx;
  const int64_t first = first_real(ids, q.row, 0, end);
  for (int64_t t = begin, stop; t < end; t = stop) {
    stop = run_end(ids, q.row, t, end);
    Inputs in = inputs_of(f.p, q);
    in.id = read_index(ids, q.row, t);
    if (in.id < 0) {
      zero_tokens(f.v, block, q.row, t, stop);
      continue;
    }
    if (in.id != read_index(ids, q.row, first)) in.state = {};
    convolve(f.v, block, in, t, stop);
  }
}

// The state after the last token; after the last real one if there are pads.
void finish_sequence(const Prefill &f, const Block &block, const Sequence &q) {
  Inputs in = inputs_of(f.p, q);
  int64_t end = q.end;
  if (in.ids.given()) {
    while (end > q.begin && read_index(in.ids, q.row, end - 1) < 0) --end;
    if (end > q.begin) {
      in.id = read_index(in.ids, q.row, end - 1);
      const int64_t first = first_real(in.ids, q.row, q.begin, end);
      if (in.id != read_index(in.ids, q.row, first)) in.state = {};
    }
  }
  shift_state(in, end, f.p.final_states, q.slot, block);
}

// The part of one sequence that lies in tokens [t0, t1).  The block in which a sequence begins also
// takes its first width - 1 tokens, the only ones that see the initial state, and stores the final
// state, which may be the same memory.
void convolve_sequence(const Prefill &f, const Block &block, const Sequence &q, int64_t t0,
                       int64_t t1) {
  const auto edge = [&](int64_t t) {
    return t <= q.begin ? q.begin : min(q.end, max(t, q.begin + f.p.width - 1));
  };
  const int64_t begin = edge(t0), end = edge(t1);
  if (q.pad) {
    zero_tokens(f.v, block, q.row, begin, end);
    return;
  }
  if (f.p.seqs.seq_idx.given()) {
    convolve_runs(f, block, q, begin, end);
  } else {
    convolve(f.v, block, inputs_of(f.p, q), begin, end);
  }
  if (f.p.final_states.given() && q.begin >= t0) finish_sequence(f, block, q);
}

void prefill_block(const Prefill &f, int64_t task) {
  const CausalConv1dProblem &p = f.p;

  // Neighbours in memory are neighbours in time.
  const int64_t inner = f.v.over_time ? f.token_blocks : f.channel_blocks;
  const int64_t outer = f.v.over_time ? f.channel_blocks : f.token_blocks;
  const int64_t i = task % inner, o = task / inner % outer, row = task / inner / outer;
  const int64_t cb = f.v.over_time ? o : i, tb = f.v.over_time ? i : o;
  const int64_t c0 = max(cb * f.block_channels - f.channel_shift, 0);
  const int64_t c1 = min((cb + 1) * f.block_channels - f.channel_shift, p.dim);
  const int64_t t0 = tb * f.block_tokens;
  const bool last = tb + 1 == f.token_blocks;
  const int64_t t1 = last ? p.seqlen : t0 + f.block_tokens;

  const Block block(f.v, c0, c1);
  const View<1> &cuts = p.seqs.cu_seqlens;
  if (!cuts.given()) {
    convolve_sequence(f, block, sequence(p.seqs, row, p.seqlen), t0, t1);
  } else {
    int64_t s = lower_bound(cuts, p.seqs.nseq + 1, t0);
    if (s > 0 && read_index(cuts, s) > t0) --s;  // one that began in an earlier block
    for (; s < p.seqs.nseq && (last || read_index(cuts, s) < t1); ++s)
      convolve_sequence(f, block, sequence(p.seqs, s, p.seqlen), t0, t1);
  }
  if (f.v.streamed) stream_fence();
}

// ---- Decode

struct Decode {
  const CausalConv1dUpdateProblem &p;
  Convolution v;
  int64_t channel_blocks;
  bool few;  // decode_few() has room for the state and the tokens
};

// One row of a decode call.
struct Step {
  int64_t row, tokens, read_slot, write_slot, count;
  bool pad;
};

Step step_of(const CausalConv1dUpdateProblem &p, int64_t row) {
  const View<1> &in = p.state_indices, &out = p.state_indices_out;
  Step s;
  s.row = row;
  s.tokens = p.num_tokens.given() ? read_index(p.num_tokens, row) : p.ntokens;
  s.read_slot = in.given() ? read_index(in, row) : row;
  s.write_slot = out.given() ? read_index(out, row) : s.read_slot;
  s.count = p.cache_seqlens.given() ? read_index(p.cache_seqlens, row) : 0;
  s.pad = (in.given() && p.pad.is_pad(s.read_slot)) || (out.given() && p.pad.is_pad(s.write_slot));
  return s;
}

// The state in order of age and the tokens after it, as rows in scratch; the last state_len of them
// are the new state.  In a ring the oldest stands at position count mod state_len.
void decode_few(const Decode &d, const Block &block, const Step &s, const Step *next) {
  const CausalConv1dUpdateProblem &p = d.p;
  const View<3> &x = p.x, &out = p.out, &state = p.conv_state;
  const int64_t channels = block.channels, state_len = p.state_len;
  const bool ring = p.cache_seqlens.given();
  const int64_t before = ring ? state_len - s.count % state_len : 0;
  const int64_t after = ring ? state_len - (s.count + s.tokens) % state_len : 0;
  const auto group = [&](const View<3> &view, int64_t i) {
    return Group{view.at(i, block.c, 0), view.dtype, view.stride[1], view.stride[2]};
  };
  char *next_state = next ? state.at(next->read_slot, block.c, 0) : nullptr;
  char *next_x = next ? x.at(next->row, block.c, 0) : nullptr;
  alignas(64) float window[(kWidth + kFewTokens) * kChannels];
  alignas(64) float result[kFewTokens * kChannels];

  for (int64_t t = 0; t < s.tokens && out.stride[1] == 1 && !d.v.streamed; ++t)
    prefetch<1>(out.at(s.row, block.c, t), channels * size_of(out.dtype));
  read_group(window, group(state, s.read_slot), channels, state_len, before, next_state);
  read_group(window + state_len * kChannels, group(x, s.row), channels, s.tokens, 0, next_x);
  with_width(p.width, [&](auto w) {
    const float *src = window + (state_len - p.width + 1) * kChannels;
    convolve_channels<w>(result, kChannels, src, kChannels, block.weight, block.bias,
                         whole_pairs(channels), s.tokens, Way{d.v.silu, false, state.data});
  });
  write_group(group(out, s.row), result, channels, s.tokens, 0, nullptr, d.v.streamed);
  if (s.tokens > 0 || s.read_slot != s.write_slot)
    write_group(group(state, s.write_slot), window + s.tokens * kChannels, channels, state_len,
                after, next_state);
}

// Any number of states and tokens: as a prefill of one sequence.
void decode_many(const Decode &d, const Block &block, const Step &s) {
  const View<3> &state = d.p.conv_state;
  const int64_t state_len = d.p.state_len;
  const bool ring = d.p.cache_seqlens.given();
  const Inputs in{d.p.x, s.row, 0, {}, 0, state, s.read_slot, state_len, ring, s.count};
  convolve(d.v, block, in, 0, s.tokens);
  if (!ring) {
    shift_state(in, s.tokens, state, s.write_slot, block);
    return;
  }
  // Of a ring only what is new moves, or all of it to another slot.
  const int64_t oldest = s.write_slot == s.read_slot ? 0 : -state_len;
  alignas(64) float row[kChannels];
  for (int64_t t = max(oldest, s.tokens - state_len); t < s.tokens; ++t) {
    const int64_t to = ring_position(s.count, t, state_len);
    source(in, t, block.c).read(row, block.channels);
    write_row(state.at(s.write_slot, block.c, to), state.dtype, state.stride[1], row,
              block.channels);
  }
}

void decode_block(const Decode &d, int64_t task) {
  const int64_t c0 = task % d.channel_blocks * kChannels, c1 = min(c0 + kChannels, d.p.dim);
  const int64_t b0 = task / d.channel_blocks * kDecodeRows, b1 = min(b0 + kDecodeRows, d.p.batch);
  const Block block(d.v, c0, c1);
  Step s = step_of(d.p, b0);
  for (int64_t b = b0; b < b1; ++b) {
    const bool more = b + 1 < b1;
    const Step next = more ? step_of(d.p, b + 1) : s;
    zero_tokens(d.v, block, b, s.pad ? 0 : s.tokens, d.p.ntokens);
    if (!s.pad && d.few) decode_few(d, block, s, more && !next.pad ? &next : nullptr);
    if (!s.pad && !d.few) decode_many(d, block, s);
    s = next;
  }
  if (d.v.streamed) stream_fence();
}

}  // namespace

void causal_conv1d(const CausalConv1dProblem &p) {
  if (p.batch == 0 || p.dim == 0) return;
  if (p.seqlen == 0 && !p.final_states.given()) return;
  Prefill f{p, convolution(p, p.seqlen), 0, 0, 0, 0, 0};
  if (f.v.over_time) {
    f.block_tokens = kBlockTokens;
    f.block_channels = min(max(kBlockElements / min(p.seqlen, kBlockTokens), 1), kChannels);
  } else {
    f.block_tokens = min(max(kBlockElements / min(p.dim, kChannels), 16), kBlockTokens);
    f.block_channels = kChannels;
    // All blocks but the first begin at a vector's boundary, if the strides keep to those.
    f.channel_shift = past_boundary(p.out.data, size_of(p.out.dtype));
  }
  f.channel_blocks = ceil_div(p.dim + f.channel_shift, f.block_channels);
  f.token_blocks = max(ceil_div(p.seqlen, f.block_tokens), 1);
  parallel(p.batch * f.channel_blocks * f.token_blocks,
           p.batch * p.dim * max(p.seqlen, p.state_len), [&](int64_t i) { prefill_block(f, i); });
}

void causal_conv1d_update(const CausalConv1dUpdateProblem &p) {
  if (p.batch == 0 || p.dim == 0) return;
  const bool few = p.state_len <= kWidth && p.ntokens <= kFewTokens;
  Decode d{p, convolution(p, p.ntokens), ceil_div(p.dim, kChannels), few};
  if (few) d.v.over_time = false;
  parallel(ceil_div(p.batch, kDecodeRows) * d.channel_blocks,
           p.batch * p.dim * (p.ntokens + p.state_len), [&](int64_t i) { decode_block(d, i); });
}

}  // namespace ssmk::cpu::SSMK_ISA
