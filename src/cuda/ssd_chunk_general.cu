// SPDX-License-Identifier: MIT
// The path of ssd_chunk that takes every call: its cut and its launch.
#include <algorithm>

#include "core/status.h"
#include "cuda/ssd_chunk_general.cuh"
#include "cuda/ssd_chunk_path.h"

namespace ssmk::cuda {
namespace {

constexpr int64_t kMostGrid = 65535;        // blocks along y and z
constexpr int64_t kOwnShared = 4 << 10;     // what kernels have beside what they are given
constexpr int64_t kPlainShared = 48 << 10;  // bytes of shared memory that need no asking
constexpr int64_t kBlocksEach = 2;          // of a multiprocessor
constexpr int kFewThreads = 64;             // of a block
constexpr int64_t kMuchShared = 95 << 10;   // beyond it spans get shorter; every GPU has it

int log_of(int64_t n) {
  int log = 0;
  while ((int64_t(1) << log) < n) ++log;
  return log;
}

// States of a row in one thread, in fours, and of how many rows.
struct Shape {
  int chunks, log_lanes, state_tiles;

  int rows() const { return chunks == 2 ? 4 : 2; }
  int tile_states() const { return chunks * 4 << log_lanes; }
};

// Three fours a thread where that leaves fewer threads without work, or where two are too few.
Shape shape_of(int64_t dstate) {
  const int64_t packs = dstate < 1 ? 1 : (dstate + 3) / 4;
  const int two = log_of((packs + 1) / 2), three = log_of((packs + 2) / 3);
  if (three <= 5 && (two > 5 || int64_t(3) << three < int64_t(2) << two)) return {3, three, 1};
  if (two <= 5) return {2, two, 1};
  return {2, 5, int((packs + 63) / 64)};
}

// A head that is one block's: its norm is over all rows, or its angles and keys, which all rows
// read, may be replaced in place.
bool whole_head(const SsdChunkProblem &p) {
  return p.mamba3.norm_weight.given() || (p.initial.angle.given() && p.final.angle.given()) ||
         (p.initial.k.given() && p.final.k.given());
}

// The rest of a plan for spans of `tokens`; returns the bytes of shared memory.
int64_t lay_out(const SsdChunkProblem &p, int tokens, GeneralPlan *plan) {
  GeneralPlan &s = *plan;
  const Mamba3 &m = p.mamba3;
  int64_t used = 0;
  const auto take = [&](bool given, int64_t floats) {
    const int64_t at = used;
    if (given) used += (floats + 3) / 4 * 4;
    return int(at);
  };
  s.tokens = tokens;
  s.steps = int(tokens * m.rank);
  const int64_t group = 4, steps = (s.steps + group - 1) / group * group;
  const int64_t keys = m.rank * s.padded, rows = m.rank * s.block_rows;
  s.states = take(s.row_tiles * s.state_tiles == 1, s.rows * int64_t(s.tile_states));
  s.K = take(true, s.steps * int64_t(s.padded));
  s.Q = take(true, s.steps * int64_t(s.padded));
  s.U = take(true, s.steps * int64_t(s.block_rows));
  s.Y = take(true, steps * s.block_rows);
  s.zs = take(p.z.given(), tokens * int64_t(s.block_rows));
  // Room for it whether it comes ahead or not: a span is as long either way.
  const auto source = [&](int which, DType dtype, int64_t lines, int64_t columns) {
    const int64_t pitch = (columns * size_of(dtype) + 15) / 16 * 16;
    Source &to = s.sources[which];
    to.pitch = int(pitch);
    to.at = take(true, lines * pitch / 4);
    to.log = log_of(columns < 4 ? 4 : columns);
  };
  source(kKeys, p.B.dtype, s.steps, p.dstate);
  source(kQueries, p.C.dtype, s.steps, p.dstate);
  source(kX, p.x.dtype, tokens, s.block_rows);
  source(kZ, p.z.dtype, tokens, s.block_rows);
  source(kTurns, p.angles.dtype, tokens, m.nangles);
  s.kq = take(true, s.steps * m.rank);
  s.sine = take(p.angles.given(), tokens * m.nangles);
  s.cosine = take(p.angles.given(), tokens * m.nangles);
  s.theta = take(p.angles.given(), 2 * m.nangles);
  s.raw_theta = take(p.angles.given(), m.nangles);
  s.k_before = take(p.trap.given(), keys);
  s.v_before = take(p.trap.given(), 2 * int64_t(s.block_rows));
  s.psi = take(m.mimo_x.given(), rows);
  s.zeta = take(m.mimo_z.given(), rows);
  s.phi = take(m.mimo_out.given(), rows);
  s.D = take(p.D.given(), s.block_rows);
  s.norm = take(m.norm_weight.given(), s.block_rows);
  s.B_bias = take(m.B_bias.given(), keys);
  s.C_bias = take(m.C_bias.given(), keys);
  s.terms = take(true, kTermTokens * int64_t(sizeof(TokenTerms) / sizeof(float)));
  s.owed = take(true, kTermTokens);
  s.dt = take(true, kTermTokens);
  s.scales = take(m.norm_weight.given(), s.steps);
  s.ids = take(p.seqs.seq_idx.given(), 2 * tokens);
  return used * int64_t(sizeof(float));
}

// The rows of a head cut into `parts`: tiles of one block, or blocks.
void cut_rows(const SsdChunkProblem &p, const Shape &shape, int64_t parts, GeneralPlan *plan) {
  GeneralPlan &s = *plan;
  // Whole warps, and rows in fours.
  const int64_t lanes = int64_t(1) << s.log_lanes, fours = 4 / shape.rows();
  const int64_t unit = lanes < 32 / fours ? 32 / lanes : fours;
  const int64_t needed = p.headdim < 1 ? 1 : (p.headdim + shape.rows() - 1) / shape.rows();
  const int64_t most = kGeneralThreads / lanes;
  parts = std::max(parts, (needed + most - 1) / most);
  const int64_t each = ((needed + parts - 1) / parts + unit - 1) / unit * unit;
  const bool whole = whole_head(p);
  s.threads = int(each * lanes);
  s.rows = int(each * shape.rows());
  s.row_tiles = whole ? int(parts) : 1;
  s.slices = whole ? 1 : int((needed + each - 1) / each);
  s.block_rows = s.rows * s.row_tiles;
  s.log_rows = log_of(s.block_rows);
}

// What does not depend on addresses.  Rows of a head are spread over more blocks than they need
// where the call else has fewer than `blocks`; that changes no bit and no workspace.
GeneralPlan plan_of(const SsdChunkProblem &p, int64_t blocks, int64_t *shared) {
  GeneralPlan s = {};
  const Shape shape = shape_of(p.dstate);
  s.headdim = int(p.headdim), s.dstate = int(p.dstate);
  s.rank = int(p.mamba3.rank);
  s.nangles = int(p.mamba3.nangles);
  s.log_lanes = shape.log_lanes;
  s.state_tiles = shape.state_tiles;
  s.tile_states = shape.tile_states();
  s.padded = s.tile_states * s.state_tiles;
  s.log_tile = log_of(s.tile_states);
  s.log_angles = log_of(s.nangles < 4 ? 4 : s.nangles);
  s.has_psi = p.mamba3.mimo_x.given();
  cut_rows(p, shape, 1, &s);
  int tokens = s.rank >= kGeneralTokens ? 1 : kGeneralTokens / s.rank;
  while ((*shared = lay_out(p, tokens, &s)) > kMuchShared && tokens > 1) tokens = (tokens + 1) / 2;
  while (s.row_tiles * s.state_tiles == 1 && !whole_head(p) && s.threads >= 2 * kFewThreads &&
         p.seqs.nseq * p.nheads * s.slices < blocks) {
    const int before = s.slices;
    cut_rows(p, shape, 2 * before, &s);
    if (s.slices == before) break;
  }
  *shared = lay_out(p, tokens, &s);
  return s;
}

template <int kRows, int kChunks, int kLogLanes, bool kSiso>
ssmk_status run_shape(const GeneralLaunch &launch, int64_t shared, const Call &call) {
  const auto kernel = ssd_general<kRows, kChunks, kLogLanes, kSiso>;
  if (shared + kOwnShared > kPlainShared) {
    int most = 0;
    cudaError_t e =
        cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, call.device);
    if (e == cudaSuccess && shared + kOwnShared > most)
      return fail(
          SSMK_UNSUPPORTED,
          "%s: B: rank, dstate and headdim of one token of a head must fit into %d bytes of "
          "shared memory on this device, and take %lld",
          call.op, most - int(kOwnShared), (long long)shared);
    if (e == cudaSuccess)
      e = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (e != cudaSuccess) return device_error(call, "preparing a kernel on", e);
  }
  GeneralLaunch g = launch;
  const int64_t nseq = g.p.seqs.nseq, nheads = g.p.nheads;
  for (g.first_seq = 0; g.first_seq < nseq; g.first_seq += kMostGrid)
    for (g.first_head = 0; g.first_head < nheads; g.first_head += kMostGrid) {
      const int64_t seqs = nseq - g.first_seq, heads = nheads - g.first_head;
      const dim3 grid(unsigned(g.plan.slices), unsigned(heads < kMostGrid ? heads : kMostGrid),
                      unsigned(seqs < kMostGrid ? seqs : kMostGrid));
      const ssmk_status status =
          ::ssmk::cuda::launch(call, kernel, grid, g.plan.threads, size_t(shared), g);
      if (status != SSMK_OK) return status;
    }
  return SSMK_OK;
}

// The lanes of the usual sizes are known when compiling.
ssmk_status run_any(const GeneralLaunch &g, int64_t shared, const Call &call) {
  const bool two = shape_of(g.p.dstate).chunks == 2;
  if (g.p.mamba3.rank > 1)
    return two ? run_shape<4, 2, -1, false>(g, shared, call)
               : run_shape<2, 3, -1, false>(g, shared, call);
  if (!two) return run_shape<2, 3, -1, true>(g, shared, call);
  if (g.plan.log_lanes == 3) return run_shape<4, 2, 3, true>(g, shared, call);
  if (g.plan.log_lanes == 4) return run_shape<4, 2, 4, true>(g, shared, call);
  return run_shape<4, 2, -1, true>(g, shared, call);
}

const char *refuses(const SsdChunkProblem &, int) { return nullptr; }

ssmk_status run(const SsdChunkProblem &p, const Call &call) {
  GeneralLaunch g = {};
  int64_t shared = 0;
  g.p = p;
  int multiprocessors = 0;
  const cudaError_t e =
      cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, call.device);
  if (e != cudaSuccess) return device_error(call, "asking about", e);
  g.plan = plan_of(p, kBlocksEach * multiprocessors, &shared);
  const int64_t slice = g.plan.slices > 1 ? g.plan.block_rows : 0;
  // Axes: batch, token, rank (or -1), group or head, column.
  const auto source = [&](int which, const auto &v, const int (&axes)[5], int64_t size,
                          int64_t first) {
    Source &to = g.plan.sources[which];
    const int64_t item = size_of(v.dtype);
    const auto stride = [&](int i) { return axes[i] < 0 ? 0 : v.stride[axes[i]] * item; };
    to.data = v.data, to.dtype = v.dtype;
    to.batch = stride(0), to.token = stride(1), to.rank = stride(2), to.inner = stride(3);
    to.column = stride(4);
    to.ahead =
        v.given() && size * item % 16 == 0 && first * item % 16 == 0 && packs_along(v, axes[4], 16);
  };
  source(kKeys, p.B, {0, 1, 2, 3, 4}, p.dstate, 0);
  source(kQueries, p.C, {0, 1, 2, 3, 4}, p.dstate, 0);
  source(kX, p.x, {0, 1, -1, 2, 3}, p.headdim, slice);
  source(kZ, p.z, {0, 1, -1, 2, 3}, p.headdim, slice);
  source(kTurns, p.angles, {0, 1, -1, 2, 3}, p.mamba3.nangles, 0);
  return run_any(g, shared, call);
}

// The states of tiles that wait for their turn.
uint64_t workspace(const SsdChunkProblem &p) {
  int64_t shared = 0;
  const GeneralPlan s = plan_of(p, 0, &shared);
  const int64_t tiles = int64_t(s.row_tiles) * s.state_tiles;
  if (tiles == 1) return 0;
  const Shape shape = shape_of(p.dstate);
  return uint64_t(p.seqs.nseq) * uint64_t(p.nheads) * uint64_t(s.slices * tiles) *
         uint64_t(shape.rows() * shape.chunks) * uint64_t(s.threads) * 16;
}

}  // namespace

const SsdPath kSsdGeneral = {"general", refuses, run, workspace};

}  // namespace ssmk::cuda
