// SPDX-License-Identifier: MIT
// What a GPU's memory can do, as `ssmk.bench.cuda` measures it beside the operations: 16 bytes a
// thread, many light threads, each kernel brought up while the one before it ends.
#include "cuda/launch.cuh"

namespace {

constexpr int kThreads = 256;

// Cheap, and no value stays as it is.
__device__ __forceinline__ void change(uint4 &v) { v.x += 1, v.y ^= v.x, v.z += v.y, v.w ^= v.z; }

__global__ void __launch_bounds__(kThreads) update(uint4 *p, size_t n) {
  ssmk::cuda::wait_for_previous();
  const size_t i = size_t(blockIdx.x) * kThreads + threadIdx.x;
  ssmk::cuda::start_next();
  if (i >= n) return;
  uint4 v = __ldcs(p + i);
  change(v);
  __stcs(p + i, v);
}

__global__ void __launch_bounds__(kThreads) copy(uint4 *to, const uint4 *from, size_t n) {
  ssmk::cuda::wait_for_previous();
  const size_t i = size_t(blockIdx.x) * kThreads + threadIdx.x;
  ssmk::cuda::start_next();
  if (i < n) __stcs(to + i, __ldcs(from + i));
}

// Slots of n * 16 bytes, one after another as `slots` names them: 32 bytes a thread were fastest.
constexpr int kSlotThreads = 128;

__global__ void __launch_bounds__(kSlotThreads)
    update_slots(uint4 *p, unsigned n, const int *slots) {
  ssmk::cuda::wait_for_previous();
  const unsigned i = blockIdx.x * (2 * kSlotThreads) + threadIdx.x / 32 * 64 + threadIdx.x % 32;
  ssmk::cuda::start_next();
  p += size_t(slots[blockIdx.y]) * n;
  uint4 v[2];
#pragma unroll
  for (int k = 0; k < 2; ++k)
    if (i + k * 32 < n) v[k] = __ldcs(p + i + k * 32);
#pragma unroll
  for (int k = 0; k < 2; ++k) {
    change(v[k]);
    if (i + k * 32 < n) __stcs(p + i + k * 32, v[k]);
  }
}

ssmk::cuda::Call call_of(int device, void *stream) {
  ssmk::cuda::Call call;
  call.op = "ceiling";
  call.device = device;
  call.stream = stream;
  return call;
}

dim3 blocks(size_t n) { return dim3(unsigned((n + kThreads - 1) / kThreads)); }

}  // namespace

// bytes is a multiple of 16.  The device is the current one.
extern "C" __attribute__((visibility("default"))) int ceiling_update(void *p, size_t bytes,
                                                                     int device, void *stream) {
  return ssmk::cuda::launch(call_of(device, stream), update, blocks(bytes / 16), dim3(kThreads), 0,
                            static_cast<uint4 *>(p), bytes / 16);
}

extern "C" __attribute__((visibility("default"))) int ceiling_copy(void *to, const void *from,
                                                                   size_t bytes, int device,
                                                                   void *stream) {
  return ssmk::cuda::launch(call_of(device, stream), copy, blocks(bytes / 16), dim3(kThreads), 0,
                            static_cast<uint4 *>(to), static_cast<const uint4 *>(from), bytes / 16);
}

// A pool of slots of `bytes`, a multiple of 16; slots: int32 of `batch` on the device, at most
// 65535.
extern "C" __attribute__((visibility("default"))) int ceiling_update_slots(
    void *p, size_t bytes, const int *slots, unsigned batch, int device, void *stream) {
  const unsigned n = unsigned(bytes / 16);
  const dim3 grid((n + 2 * kSlotThreads - 1) / (2 * kSlotThreads), batch);
  return ssmk::cuda::launch(call_of(device, stream), update_slots, grid, dim3(kSlotThreads), 0,
                            static_cast<uint4 *>(p), n, slots);
}
