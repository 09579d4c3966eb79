// SPDX-License-Identifier: MIT
// Decode over a latent cache:
//   score_i = softmax_scale (q_nope . latent_i + q_rope . k_rope_i);  p = softmax(score)
//   out     = sum_i p_i latent_i
//
// All heads of a row look at the same cache, so what costs is not its bytes but the arithmetic on
// them.  A task owns a block of queries (heads of one of the T tokens) and a piece of the row's
// tokens.  It brings a tile of tokens to float32 once and then runs two small matrix products on
// it, queries by tokens and weights by values, with the softmax between them kept relative to the
// largest score so far.  Partial outputs of the pieces lie in the workspace; they are merged in the
// order of the pieces.
//
// Three passes: tokens are appended and queries brought to float32; tasks; the merge.
#include "cpu/kernels.h"
#include "cpu/lambda.h"
#include "cpu/mla_decode_append.h"
#include "cpu/mla_decode_cache.h"
#include "cpu/mla_decode_products.h"

namespace ssmk::cpu::SSMK_ISA {
namespace {

constexpr float kNothing = -__builtin_inff();  // the largest of no scores

int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

struct Scratch {
  alignas(64) float tile[(kMlaTile + kTokenBlock) * (kMlaChannels + 16)];
  alignas(64) float scores[kMlaMostQueries * kScorePitch];
  alignas(64) float largest[kMlaMostQueries], rescale[kMlaMostQueries];
  alignas(64) float sums[kMlaMostQueries * kLanes];  // lane sums of the exponentials
  CacheScratch cache;
};

struct Call {
  const MlaDecodeProblem &p;
  const MlaDecodePlan plan;
  int64_t total = 0;  // tokens of all rows

  template <class T>
  T *workspace(uint64_t at) const {
    return reinterpret_cast<T *>(static_cast<char *>(p.workspace.data) + at);
  }
  int64_t *first_piece() const { return workspace<int64_t>(plan.pieces_at); }
  float *queries_of(int64_t b, int64_t r) const {
    return workspace<float>(plan.q_at) + (b * plan.padded_queries() + r) * plan.q_pitch;
  }
  // What a piece makes of query r.
  float *largest_of(int64_t piece, int64_t r) const {
    return workspace<float>(plan.max_at) + piece * plan.padded_queries() + r;
  }
  float *sum_of(int64_t piece, int64_t r) const {
    return workspace<float>(plan.sum_at) + piece * plan.padded_queries() + r;
  }
  float *partial(int64_t piece, int64_t r) const {
    return workspace<float>(plan.out_at) + (piece * plan.padded_queries() + r) * plan.out_pitch;
  }
  int64_t pieces(int64_t b) const { return first_piece()[b + 1] - first_piece()[b]; }

  void count_pieces() {
    for (int64_t b = 0; b < p.batch; ++b) total += read_index(p.seqlens, b);
    int64_t n = 0;
    for (int64_t b = 0; b < p.batch; ++b) {
      const int64_t seqlen = read_index(p.seqlens, b);
      const int64_t piece = plan.piece(seqlen, total);
      first_piece()[b] = n;
      n += (seqlen + piece - 1) / piece;
    }
    first_piece()[p.batch] = n;
  }

  // A block of a row's queries in float32, times what makes 2^score of the score, with zeros up to
  // the pitch and up to a whole block.
  void prepare_queries(int64_t b, int64_t block) const {
    const float scale = float(double(p.softmax_scale) * 1.44269504088896340736);
    for (int64_t r = block * plan.block; r < (block + 1) * plan.block; ++r) {
      float *q = queries_of(b, r);
      int64_t n = 0;
      if (r < plan.queries) {
        const int64_t t = r / p.nheads, head = r % p.nheads;
        read_row(q, p.q_nope.at(b, t, head), p.q_nope.dtype, p.q_nope.stride[3], p.latent);
        if (p.rope)
          read_row(q + p.latent, p.q_rope.at(b, t, head), p.q_rope.dtype, p.q_rope.stride[3],
                   p.rope);
        n = plan.width;
        for (int64_t c = 0; c < n; ++c) q[c] *= scale;
      }
      for (; n < plan.q_pitch; ++n) q[n] = 0;
    }
  }

  // Cache tokens that query r sees.
  int64_t sees(int64_t b, int64_t r) const {
    const int64_t n = read_index(p.seqlens, b) - p.ntokens + r / p.nheads + 1;
    return n < 0 ? 0 : n;
  }

  // The outputs of queries r0 .. r1 from the pieces of their row.
  void merge(int64_t b, int64_t r0, int64_t r1) const {
    const int64_t first = first_piece()[b], count = pieces(b);
    for (int64_t r = r0; r < r1; ++r) {
      const int64_t t = r / p.nheads, head = r % p.nheads;
      float most = kNothing, sum = 0;
      for (int64_t k = 0; k < count; ++k)
        most = *largest_of(first + k, r) > most ? *largest_of(first + k, r) : most;
      float weights[kMlaMostPieces];
      for (int64_t k = 0; k < count; ++k) {
        const float m = *largest_of(first + k, r);
        weights[k] = m == kNothing ? 0 : exp2(splat(m - most))[0];
        sum += weights[k] * *sum_of(first + k, r);
      }
      write_output(b, t, head, r, first, count, weights, sum);
      if (p.lse.given()) {
        const double lse = double(most) * 0.693147180559945309417 + __builtin_log(double(sum));
        *reinterpret_cast<float *>(p.lse.at(b, t, head)) = sum == 0 ? kNothing : float(lse);
      }
    }
  }

 private:
  void write_output(int64_t b, int64_t t, int64_t head, int64_t r, int64_t first, int64_t count,
                    const float *weights, float sum) const {
    if (sum == 0)  // it sees nothing
      return zero_row(p.out.at(b, t, head), p.out.dtype, p.out.stride[3], p.latent);
    alignas(64) float row[kMlaChannels];
    for (int64_t c0 = 0; c0 < p.latent; c0 += kMlaChannels) {
      const int64_t n = least(p.latent - c0, kMlaChannels);
      std::memset(row, 0, sizeof row);
      for (int64_t k = 0; k < count; ++k) {
        const float *from = partial(first + k, r) + c0;
        if (weights[k] != 0)
          for (int64_t c = 0; c < n; c += kLanes)
            store(row + c, fused(splat(weights[k]), load(from + c), load(row + c)));
      }
      for (int64_t c = 0; c < n; c += kLanes) store(row + c, load(row + c) / splat(sum));
      write_row(p.out.at(b, t, head, c0), p.out.dtype, p.out.stride[3], row, n);
    }
  }
};

// One block of queries over one piece of a row.
struct Task {
  const Call &call;
  const MlaDecodeProblem &p;
  Scratch &s;
  int64_t b, first, queries;  // of the block
  float *out;
  Cache cache;

  Task(const Call &call_, Scratch &scratch, int64_t row, int64_t piece, int64_t block)
      : call(call_),
        p(call_.p),
        s(scratch),
        b(row),
        first(block * call_.plan.block),
        queries(least(call_.plan.block, call_.plan.queries - first)),
        out(call_.partial(piece, first)),
        cache{call_.p, scratch.cache, row} {}

  // Tiles are read in columns of at most kMlaChannels; one that is all there is stays for the
  // second product.
  int64_t pitch_of(int64_t n) const { return ((n + 15) / 16 | 1) * 16; }

  template <bool kAdd>
  void score(int64_t count, int64_t c0, int64_t n, int64_t next, int64_t next_count) const {
    const int64_t pitch = pitch_of(n), q_pitch = call.plan.q_pitch, width = whole_vectors(n);
    const float *q = call.queries_of(b, first) + c0;
    for (int64_t r = 0; r < queries; r += kQueryBlock)
      for (int64_t t = 0; t < count; t += kTokenBlock) {
        score_block<kAdd>(s.scores + r * kScorePitch + t, q + r * q_pitch, q_pitch,
                          s.tile + t * pitch, pitch, width);
        if (r == 0 && t < next_count) cache.prefetch(next + t, least(kTokenBlock, next_count - t));
      }
  }

  // Turns the scores of query r into weights; n of the tile's tokens are seen.
  void soften(int64_t r, int64_t n) const {
    float *scores = s.scores + r * kScorePitch;
    vf most = splat(kNothing);
    for (int64_t t = 0; t < n; t += kLanes) {
      vf v = load(scores + t);
      if (n - t < kLanes)
        v = select(bitcast<vi>(lane_numbers() < vi{} + int32_t(n - t)), v, splat(kNothing));
      most = vmax(v, most);
    }
    float now = s.largest[r];
    for (int k = 0; k < kLanes; ++k) now = most[k] > now ? most[k] : now;
    const float zero_point = now == kNothing ? 0 : now;  // -inf - -inf is no number
    const vf rescale = exp2(splat(s.largest[r] - zero_point));
    vf sum = load(s.sums + r * kLanes) * rescale;
    for (int64_t t = 0; t < n; t += kLanes) {
      vf v = exp2(load(scores + t) - splat(zero_point));
      if (n - t < kLanes) v = select(bitcast<vi>(lane_numbers() < vi{} + int32_t(n - t)), v, vf{});
      store(scores + t, v);
      sum += v;
    }
    store(s.sums + r * kLanes, sum);
    s.largest[r] = now;
    s.rescale[r] = rescale[0];
  }

  // A query does not multiply what it does not see, not even by 0: the last tokens of a row are
  // unseen by some of its T queries, which then form runs of their own.
  void weigh(bool first_tile, int64_t i, int64_t count, int64_t c0, int64_t n) const {
    const auto seen = [&](int64_t r) {
      const int64_t k = call.sees(b, first + r) - i;
      return k < 0 ? 0 : least(k, count);
    };
    for (int64_t r = 0; r < queries;) {
      const int64_t k = seen(r);
      int64_t end = r + 1;
      while (end < queries && seen(end) == k) ++end;
      add_values(out + r * call.plan.out_pitch + c0, call.plan.out_pitch,
                 first_tile ? nullptr : s.rescale + r, s.scores + r * kScorePitch, end - r, s.tile,
                 pitch_of(n), k, whole_vectors(least(n, p.latent - c0)));
      r = end;
    }
  }

  void run(int64_t begin, int64_t end, int64_t piece) const {
    for (int64_t r = 0; r < queries; ++r) s.largest[r] = kNothing;
    std::memset(s.sums, 0, sizeof s.sums);
    const int64_t width = call.plan.width;
    for (int64_t i = begin; i < end; i += kMlaTile) {
      const int64_t count = least(end - i, kMlaTile), next = i + kMlaTile;
      const int64_t next_count = next < end ? least(end - next, kMlaTile) : 0;
      for (int64_t c0 = 0; c0 < width; c0 += kMlaChannels) {
        const int64_t n = least(width - c0, kMlaChannels);
        cache.read(s.tile, pitch_of(n), i, count, c0, n);
        // The last block of tokens may be a part of one.
        for (int64_t t = count; t % kTokenBlock; ++t)
          std::memset(s.tile + t * pitch_of(n), 0, size_t(whole_vectors(n)) * sizeof(float));
        c0 == 0 ? score<false>(count, c0, n, next, width <= kMlaChannels ? next_count : 0)
                : score<true>(count, c0, n, 0, 0);
      }
      for (int64_t r = 0; r < queries; ++r) {
        const int64_t seen = call.sees(b, first + r) - i;
        soften(r, seen < 0 ? 0 : least(seen, count));
      }
      for (int64_t c0 = 0; c0 < p.latent; c0 += kMlaChannels) {
        const int64_t n = least(width - c0, kMlaChannels);
        if (width > kMlaChannels) cache.read(s.tile, pitch_of(n), i, count, c0, n);
        weigh(i == begin, i, count, c0, n);
      }
    }
    for (int64_t r = 0; r < queries; ++r) {
      float sum = 0;
      for (int k = 0; k < kLanes; ++k) sum += s.sums[r * kLanes + k];
      *call.largest_of(piece, first + r) = s.largest[r];
      *call.sum_of(piece, first + r) = sum;
    }
  }
};

}  // namespace

void mla_decode(const MlaDecodeProblem &p) {
  Call call{p, mla_decode_plan(p)};
  const MlaDecodePlan &plan = call.plan;
  const int64_t appends = p.new_latent.given() ? p.ntokens : 0;
  if (plan.queries == 0 || p.batch == 0) {
    for (int64_t i = 0; i < p.batch * appends; ++i) append_token(p, i / appends, i % appends);
    return;
  }
  call.count_pieces();

  const int64_t per_row = plan.blocks + appends;
  parallel(p.batch * per_row, p.batch * per_row * plan.width * plan.block, [&](int64_t i) {
    const int64_t b = i / per_row, k = i % per_row;
    k < plan.blocks ? call.prepare_queries(b, k) : append_token(p, b, k - plan.blocks);
  });

  const int64_t pieces = call.first_piece()[p.batch];
  parallel(pieces * plan.blocks, call.total * plan.queries * plan.width, [&](int64_t i) {
    const int64_t piece = i / plan.blocks;
    int64_t b = 0;
    while (call.first_piece()[b + 1] <= piece) ++b;
    const int64_t seqlen = read_index(p.seqlens, b);
    const int64_t length = plan.piece(seqlen, call.total);
    const int64_t begin = (piece - call.first_piece()[b]) * length;
    Scratch scratch;
    const Task task(call, scratch, b, piece, i % plan.blocks);
    task.run(begin, least(begin + length, seqlen), piece);
    if (call.pieces(b) == 1) call.merge(b, task.first, task.first + task.queries);
  });

  // Rows of one piece are done; those of none still want their zeros.
  int64_t left = 0;
  for (int64_t b = 0; b < p.batch; ++b) left += call.pieces(b) != 1 ? call.pieces(b) + 1 : 0;
  if (left == 0) return;
  parallel(p.batch * plan.queries, left * plan.queries * p.latent, [&](int64_t i) {
    const int64_t b = i / plan.queries, r = i % plan.queries;
    if (call.pieces(b) != 1) call.merge(b, r, r + 1);
  });
}

}  // namespace ssmk::cpu::SSMK_ISA
