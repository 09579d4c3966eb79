// SPDX-License-Identifier: MIT
// From a checked Problem to the backend of its device.
#pragma once

#include <cstdlib>

#include "api/slots.h"
#include "cpu/kernels.h"

namespace ssmk {

template <class Problem>
ssmk_status run(Check &c, void (*cpu::Kernels::*cpu_kernel)(const Problem &),
                const Problem &problem) {
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

}  // namespace ssmk
