// SPDX-License-Identifier: MIT
// From a checked Problem to the backend of its device.
#pragma once

#include <cstdlib>

#include "api/slots.h"
#include "cpu/kernels.h"
#include "cuda/kernels.h"

namespace ssmk {

// An entry point and its workspace query: the arguments are read into a Problem, checked on the
// way, and handed to the backend of their device.
template <class Args, class Problem>
struct Operation {
  const char *name;
  void (*read)(Check &, const Args *, Problem *);
  uint64_t (*cpu_workspace)(const Problem &);
  void (*cpu::Kernels::*cpu_kernel)(const Problem &);
  cuda::Entry<Problem> cuda::Kernels::*cuda_entry = nullptr;  // nullptr: not on CUDA

  ssmk_status run(const Args *args) const {
    Check c(name, false);
    Problem problem;
    read(c, args, &problem);
    if (c.ok()) check_workspace(c, problem.workspace, needed(c, problem));
    if (!c.ok()) return c.status();
    if (c.device() == Device::kCuda)
      return on_cuda().run(problem, {name, c.device_id(), c.stream()});
    const cpu::Kernels *kernels = cpu::kernels();
    if (!kernels) {
      const char *wanted = std::getenv("SSMK_ISA");
      return c.error(SSMK_UNSUPPORTED,
                     "SSMK_ISA: must be one of %s on this machine and build, got %s",
                     cpu::available_levels(), wanted ? wanted : "nothing");
    }
    (kernels->*cpu_kernel)(problem);
    return SSMK_OK;
  }

  ssmk_status workspace(const Args *args, uint64_t *bytes) const {
    Check c(name, true);
    if (!bytes) return c.error(SSMK_INVALID_ARGUMENT, "bytes: must not be NULL");
    Problem problem;
    read(c, args, &problem);
    const uint64_t n = c.ok() ? needed(c, problem) : 0;
    if (c.ok()) *bytes = n;
    return c.status();
  }

 private:
  cuda::Entry<Problem> on_cuda() const {
    return cuda_entry ? cuda::kernels().*cuda_entry : cuda::Entry<Problem>{};
  }

  // Bytes of workspace on the device of the call, which fails here if its backend lacks the
  // operation.
  uint64_t needed(Check &c, const Problem &problem) const {
    if (c.on_cpu()) return cpu_workspace(problem);
    const cuda::Entry<Problem> entry = on_cuda();
    if (!entry.run) c.unsupported("is not available on CUDA in this version");
    return c.ok() && entry.workspace ? entry.workspace(problem) : 0;
  }
};

}  // namespace ssmk
