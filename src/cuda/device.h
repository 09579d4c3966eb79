// SPDX-License-Identifier: MIT
// The device of a call, and what the CUDA runtime says when something fails.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/kernels.h"

namespace ssmk::cuda {

// SSMK_DEVICE_ERROR with the runtime's own words.  An error that belongs to one call is cleared, so
// that the next call starts afresh; after one that lost the device every call reports it.
ssmk_status device_error(const Call &, const char *what, cudaError_t);

// 10 times the major number of the device's compute capability, and the minor one.
ssmk_status compute_capability(const Call &, int *);

// Makes the call's device current for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(const Call &);
  ~OnDevice();
  OnDevice(const OnDevice &) = delete;
  OnDevice &operator=(const OnDevice &) = delete;

  ssmk_status status() const { return status_; }

 private:
  ssmk_status status_ = SSMK_OK;
  int before_ = -1;  // -1: nothing to restore
};

template <class Problem, ssmk_status (*kRun)(const Problem &, const Call &)>
ssmk_status on_device(const Problem &problem, const Call &call) {
  const OnDevice here(call);
  return here.status() ? here.status() : kRun(problem, call);
}

}  // namespace ssmk::cuda
