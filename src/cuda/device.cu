// SPDX-License-Identifier: MIT
#include "cuda/device.h"

#include "core/status.h"

namespace ssmk::cuda {

int device_count() {
  int n = 0;
  if (cudaGetDeviceCount(&n) == cudaSuccess) return n;
  cudaGetLastError();
  return 0;
}

ssmk_status device_error(const Call &call, const char *what, cudaError_t error) {
  cudaGetLastError();
  return fail(SSMK_DEVICE_ERROR, "%s: %s cuda:%d failed: %s (%s)", call.op, what, call.device,
              cudaGetErrorString(error), cudaGetErrorName(error));
}

ssmk_status compute_capability(const Call &call, int *capability) {
  int major = 0, minor = 0;
  cudaError_t error =
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, call.device);
  if (error == cudaSuccess)
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, call.device);
  if (error != cudaSuccess) return device_error(call, "asking about", error);
  *capability = 10 * major + minor;
  return SSMK_OK;
}

OnDevice::OnDevice(const Call &call) {
  int current = -1;
  cudaError_t error = cudaGetDevice(&current);
  if (error == cudaSuccess && current != call.device) {
    error = cudaSetDevice(call.device);
    if (error == cudaSuccess) before_ = current;
  }
  if (error != cudaSuccess) status_ = device_error(call, "selecting", error);
}

OnDevice::~OnDevice() {
  if (before_ >= 0) cudaSetDevice(before_);
}

}  // namespace ssmk::cuda
