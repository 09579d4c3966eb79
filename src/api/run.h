// SPDX-License-Identifier: MIT
// From a checked Problem to the backend of its device.
#pragma once

#include <cstdlib>

#include "api/slots.h"
#include "cpu/kernels.h"

namespace ssmk {

// An entry point and its workspace query: the arguments are read into a Problem, checked on the
// way, and handed to the backend of their device.
template <class Args, class Problem>
struct Operation {
  const char *name;
  void (*read)(Check &, const Args *, Problem *);
  uint64_t (*cpu_workspace)(const Problem &);
  void (*cpu::Kernels::*cpu_kernel)(const Problem &);

  ssmk_status run(const Args *args) const {
    Check c(name, false);
    Problem problem;
    read(c, args, &problem);
    if (c.ok()) check_workspace(c, problem.workspace, cpu_workspace(problem));
    if (!c.ok()) return c.status();
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
    if (c.ok()) *bytes = cpu_workspace(problem);
    return c.status();
  }
};

}  // namespace ssmk
