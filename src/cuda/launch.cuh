// SPDX-License-Identifier: MIT
// Launching kernels so that one call's begin while those before it end.
#pragma once

#include <cuda_runtime.h>

#include <utility>

#include "cuda/device.h"

namespace ssmk::cuda {

// Every kernel calls this before it touches memory: on GPUs since 9.0 it may have been started
// while the kernels before it in the stream still ran.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The same, once these addresses are known: a kernel that is up early has its arguments at hand.
template <class... Pointers>
__device__ __forceinline__ void wait_with(const Pointers *...p) {
#if __CUDA_ARCH__ >= 900
  const auto known = [](const void *q) { asm volatile("" ::"l"(q)); };
  (known(p), ...);
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Brings memory to the second-level cache: a kernel may do so before it waits.
__device__ __forceinline__ void fetch(const void *p) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(p) : "memory");
}

// The next kernel in the stream may be brought up; it waits for this one's end all the same.
__device__ __forceinline__ void start_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Puts a kernel on the call's stream.  A grid without blocks is nothing to do.
template <class... Parameters, class... Arguments>
ssmk_status launch(const Call &call, void (*kernel)(Parameters...), dim3 grid, dim3 block,
                   size_t shared, Arguments &&...arguments) {
  if (grid.x == 0 || grid.y == 0 || grid.z == 0) return SSMK_OK;
  int major = 0;
  cudaError_t error =
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, call.device);
  if (error != cudaSuccess) return device_error(call, "asking about", error);
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = grid;
  config.blockDim = block;
  config.dynamicSmemBytes = shared;
  config.stream = static_cast<cudaStream_t>(call.stream);
  config.attrs = &attribute;
  config.numAttrs = major >= 9 ? 1 : 0;
  error = cudaLaunchKernelEx(&config, kernel, std::forward<Arguments>(arguments)...);
  return error == cudaSuccess ? SSMK_OK : device_error(call, "launching on", error);
}

}  // namespace ssmk::cuda
