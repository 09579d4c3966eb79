// SPDX-License-Identifier: MIT
// What the library is and what it found: version, backends, devices, instruction set, threads.
#include <ssmk.h>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cuda/kernels.h"

extern "C" {

SSMK_API uint32_t ssmk_version(void) {
  return SSMK_VERSION_MAJOR << 16 | SSMK_VERSION_MINOR << 8 | SSMK_VERSION_PATCH;
}

SSMK_API int32_t ssmk_backend_built(int32_t device_type) {
  if (device_type == kDLCUDA) return ssmk::cuda::built();
  return device_type == kDLCPU;
}

SSMK_API int32_t ssmk_device_count(int32_t device_type) {
  if (device_type == kDLCUDA) return ssmk::cuda::device_count();
  return device_type == kDLCPU;
}

SSMK_API const char *ssmk_cpu_isa(void) {
  const ssmk::cpu::Kernels *k = ssmk::cpu::kernels();
  return k ? k->isa : "invalid";
}

SSMK_API void ssmk_set_num_threads(int32_t n) { ssmk::cpu::set_num_threads(n); }
SSMK_API int32_t ssmk_num_threads(void) { return ssmk::cpu::num_threads(); }

}  // extern "C"
