// SPDX-License-Identifier: MIT
// What a GPU's memory can do, as `ssmk.bench.cuda` measures it beside the operations: 16 bytes a
// thread, many light threads, each kernel brought up while the one before it ends.
#include "cuda/launch.cuh"

namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads) update(uint4 *p, size_t n) {
  ssmk::cuda::wait_for_previous();
  const size_t i = size_t(blockIdx.x) * kThreads + threadIdx.x;
  ssmk::cuda::start_next();
  if (i >= n) return;
  uint4 v = __ldcs(p + i);
  v.x += 1, v.y ^= v.x, v.z += v.y, v.w ^= v.z;
  __stcs(p + i, v);
}

__global__ void __launch_bounds__(kThreads) copy(uint4 *to, const uint4 *from, size_t n) {
  ssmk::cuda::wait_for_previous();
  const size_t i = size_t(blockIdx.x) * kThreads + threadIdx.x;
  ssmk::cuda::start_next();
  if (i < n) __stcs(to + i, __ldcs(from + i));
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
