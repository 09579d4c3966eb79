// SPDX-License-Identifier: MIT
// Decode on the GPU: which kernel, how many blocks.  Nothing here depends on anything but sizes,
// dtypes and strides, so a captured launch stays right.
#include "cuda/state_update_heads.cuh"
#include "cuda/state_update_mamba3.cuh"
#include "cuda/state_update_packed.cuh"
#ifdef BENCH
extern int g_rows, g_threads, g_rows_any;
#endif

namespace ssmk::cuda {
namespace {

constexpr int64_t kMostGrid = 65535;      // blocks along y and z
constexpr int64_t kStageBytes = 24 << 10;  // of tokens in shared memory at a time

// One decay for all states of a row.
bool one_decay(const StateUpdateProblem &q) { return q.A.stride[2] == 0 || q.dstate == 1; }

// Runs a kernel so that it is set up while its predecessor ends; it waits for that itself.
template <class Params>
cudaError_t launch(void (*kernel)(Params), dim3 grid, int threads, int64_t shared,
                   cudaStream_t stream, const Params &params) {
  if (shared > 48 << 10) {
    const cudaError_t e = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (e != cudaSuccess) return e;
  }
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = dim3(unsigned(threads));
  config.dynamicSmemBytes = size_t(shared);
  config.stream = stream;
  cudaLaunchAttribute attribute[1];
  attribute[0].id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute[0].val.programmaticStreamSerializationAllowed = 1;
  config.attrs = attribute;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, params);
}

// A view for Near: false if its strides do not fit.
template <int To, int From>
bool near(const View<From> &v, const int (&axes)[To], Near<To> *to) {
  to->data = v.data;
  to->dtype = v.dtype;
  for (int k = 0; k < To; ++k) {
    const int64_t bytes = v.stride[axes[k]] * size_of(v.dtype);
    to->stride[k] = int32_t(bytes);
    if (to->stride[k] != bytes) return false;
  }
  return true;
}

// One launch after another where there are more rows or heads than a grid takes.
template <class Problem, class Kernel>
cudaError_t each_grid(Problem p, Kernel kernel, int64_t blocks, int64_t nheads, int64_t batch,
                      int threads, int64_t shared, cudaStream_t stream) {
  for (int64_t b = 0; b < batch; b += kMostGrid)
    for (int64_t h = 0; h < nheads; h += kMostGrid) {
      p.first_batch = b;
      p.first_head = decltype(p.first_head)(h);
      const dim3 grid(unsigned(blocks), unsigned(nheads - h < kMostGrid ? nheads - h : kMostGrid),
                      unsigned(batch - b < kMostGrid ? batch - b : kMostGrid));
      const cudaError_t e = launch(kernel, grid, threads, shared, stream, p);
      if (e != cudaSuccess) return e;
    }
  return cudaSuccess;
}

template <class S, int kRows, int kChunks, bool kOneDecay, Work kWork, int kThreads>
cudaError_t run_packed(const PackedProblem &p, const StateUpdateProblem &q, cudaStream_t stream) {
  const int64_t rows = int64_t(kThreads >> p.log_lanes) * kRows;
  return each_grid(p, update_packed<S, kRows, kChunks, kOneDecay, kWork, kThreads>,
                   (q.headdim + rows - 1) / rows, q.nheads, q.batch, kThreads, 0, stream);
}

template <class S>
cudaError_t run_heads(const Cut &cut, const StateUpdateProblem &q, cudaStream_t stream) {
  HeadsProblem p = {};
  p.x = q.x, p.dt = q.dt, p.z = q.z, p.out = q.out;
  p.A = q.A, p.B = q.B, p.C = q.C, p.D = q.D, p.dt_bias = q.dt_bias;
  p.state = q.state, p.intermediate = q.intermediate, p.slots = q.slots;
  p.dt_transform = q.dt_transform;
  p.ntokens = int(q.ntokens), p.headdim = int(q.headdim), p.dstate = int(q.dstate);
  p.heads_per_group = int(q.nheads / q.ngroups);
  p.packs = cut.packs, p.log_lanes = cut.log_lanes;
  p.padded = cut.lanes() * cut.chunks * kPack<S>;
  p.one_decay = one_decay(q);
  const int rows = kHeadsThreads >> cut.log_lanes;
  const int64_t token = heads_token_bytes(rows, p.padded);
  p.stage = int(kStageBytes / token < 1 ? 1 : kStageBytes / token);
  if (p.stage > p.ntokens) p.stage = p.ntokens;
  return each_grid(p, update_heads<kPack<S>>, (q.headdim + rows - 1) / rows, q.nheads, q.batch,
                   kHeadsThreads, token * p.stage, stream);
}

// For the packed kernel, if it can do the call.
template <class S>
bool packed(const Cut &cut, const StateUpdateProblem &q, PackedProblem *p) {
  constexpr int64_t kMost = INT32_MAX;
  const auto packs = [](const View<5> &v) {
    const int64_t bytes = kPack<S> * size_of(v.dtype);
    return bytes <= 16 && packs_along(v, 4, bytes);
  };
  if (q.dstate % kPack<S> || cut.chunks > 3 || !packs_along(q.state, 3, 16) || !packs(q.B) ||
      !packs(q.C))
    return false;
  if (q.intermediate.given() &&
      (q.intermediate.dtype != q.state.dtype || !packs_along(q.intermediate, 4, 16)))
    return false;
  if (!one_decay(q) && (q.A.dtype != DType::kF32 || !packs_along(q.A, 2, 16))) return false;
  if (q.slots.pad.entries > kMost || q.slots.intermediate_entries > kMost) return false;
  p->slots = q.slots;
  p->dt_transform = q.dt_transform;
  p->ntokens = int(q.ntokens), p->headdim = int(q.headdim);
  p->heads_per_group = int(q.nheads / q.ngroups);
  p->packs = cut.packs, p->log_lanes = cut.log_lanes;
  return near(q.x, {0, 1, 2, 3}, &p->x) && near(q.dt, {0, 1, 2, 3}, &p->dt) &&
         near(q.z, {0, 1, 2, 3}, &p->z) && near(q.out, {0, 1, 3, 4}, &p->out) &&
         near(q.A, {0, 1, 2}, &p->A) && near(q.B, {0, 1, 3, 4}, &p->B) &&
         near(q.C, {0, 1, 3, 4}, &p->C) && near(q.D, {0, 1}, &p->D) &&
         near(q.dt_bias, {0, 1}, &p->dt_bias) && near(q.state, {0, 1, 2, 3}, &p->state) &&
         near(q.intermediate, {0, 1, 2, 3, 4}, &p->intermediate);
}

template <class S>
cudaError_t heads(const StateUpdateProblem &q, cudaStream_t stream) {
  const Cut cut = cut_of(q.dstate, kPack<S>);
  PackedProblem p = {};
  if (!packed<S>(cut, q, &p)) return run_heads<S>(cut, q, stream);
  const Slots &s = q.slots;
  const bool one = q.ntokens == 1 && !s.num_tokens.given() && !s.num_accepted.given() &&
                   !s.out_per_token && !q.intermediate.given();
#ifdef BENCH
  {
    const int R = one ? g_rows : cut.lanes() >= 4 && cut.chunks == 1 ? g_rows_any : cut.lanes() < 2 || cut.chunks > 1 ? 1 : 2, NT = g_threads;
    const int RR = cut.chunks > 1 || cut.lanes() < 2 ? 1 : cut.lanes() < R ? cut.lanes() : R;
#define V(r, c, d, w, nt) if (RR == r && NT == nt && one == (w == Work::kOne) && one_decay(q) == d && cut.chunks == c) return run_packed<S, r, c, d, w, nt>(p, q, stream);
    V(1,1,true,Work::kOne,128) V(2,1,true,Work::kOne,128) V(4,1,true,Work::kOne,128) V(1,1,true,Work::kOne,256) V(2,1,true,Work::kOne,256)
    V(1,2,true,Work::kOne,128) V(1,3,true,Work::kOne,128) V(1,2,true,Work::kAny,128) V(1,3,true,Work::kAny,128)
    V(1,1,true,Work::kAny,128) V(2,1,true,Work::kAny,128) V(4,1,true,Work::kAny,128)
    V(1,1,false,Work::kOne,128) V(2,1,false,Work::kOne,128) V(4,1,false,Work::kOne,128) V(1,1,false,Work::kOne,256) V(2,1,false,Work::kOne,256)
    V(1,2,false,Work::kOne,128) V(1,3,false,Work::kOne,128) V(1,2,false,Work::kAny,128) V(1,3,false,Work::kAny,128)
    V(1,1,false,Work::kAny,128) V(2,1,false,Work::kAny,128) V(4,1,false,Work::kAny,128)
    return cudaErrorInvalidConfiguration;
  }
#endif
  return cudaErrorInvalidValue;
}

template <class S, int kRows, int kChunks, bool kPacked>
cudaError_t run_mamba3(const Cut &cut, const StateUpdateProblem &q, cudaStream_t stream) {
  Mamba3Launch p = {};
  p.p = q;
  p.packs = cut.packs, p.log_lanes = cut.log_lanes;
  p.padded = cut.lanes() * cut.chunks * kPack<S>;
  p.one_decay = q.adt.given() || one_decay(q);
  const int64_t rows = int64_t(kMamba3Threads >> cut.log_lanes) * kRows;
  p.passes = int((q.headdim + rows - 1) / rows);
  const int64_t shared = mamba3_shared_floats(q, p.padded, p.passes) * int64_t(sizeof(float));
  return each_grid(p, update_mamba3<S, kRows, kChunks, kPacked>, 1, q.nheads, q.batch,
                   kMamba3Threads, shared, stream);
}

template <class S>
cudaError_t mamba3(const StateUpdateProblem &q, cudaStream_t stream) {
  const Cut cut = cut_of(q.dstate, kPack<S>);
  const bool packed =
      q.dstate % kPack<S> == 0 && packs_along(q.state, 3, 16) &&
      (q.adt.given() || one_decay(q)) &&
      (!q.intermediate.given() ||
       (q.intermediate.dtype == q.state.dtype && packs_along(q.intermediate, 4, 16)));
  if (packed && cut.chunks == 1 && cut.lanes() >= 4)
    return run_mamba3<S, 4, 1, true>(cut, q, stream);
  if (packed && cut.chunks == 1 && cut.lanes() == 2)
    return run_mamba3<S, 2, 1, true>(cut, q, stream);
  if (packed && cut.chunks == 2) return run_mamba3<S, 1, 2, true>(cut, q, stream);
  if (packed && cut.chunks == 3 && cut.lanes() >= 2)
    return run_mamba3<S, 2, 3, true>(cut, q, stream);
  return run_mamba3<S, 1, kMostChunks, false>(cut, q, stream);
}

}  // namespace

cudaError_t state_update(const StateUpdateProblem &p, cudaStream_t stream) {
  if (p.batch == 0 || p.nheads == 0 || p.headdim == 0) return cudaSuccess;
  if (p.is_mamba3()) {
    if (p.state.dtype == DType::kF32) return mamba3<float>(p, stream);
    if (p.state.dtype == DType::kF16) return mamba3<__half>(p, stream);
    return mamba3<__nv_bfloat16>(p, stream);
  }
  if (p.state.dtype == DType::kF32) return heads<float>(p, stream);
  if (p.state.dtype == DType::kF16) return heads<__half>(p, stream);
  return heads<__nv_bfloat16>(p, stream);
}

}  // namespace ssmk::cuda
