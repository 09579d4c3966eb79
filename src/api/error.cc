// SPDX-License-Identifier: MIT
// The text behind ssmk_last_error().
#include <cstdarg>
#include <cstdio>

#include "core/status.h"

namespace ssmk {
namespace {
thread_local char last_error[512];
}

ssmk_status fail(ssmk_status status, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(last_error, sizeof last_error, format, arguments);
  va_end(arguments);
  return status;
}

}  // namespace ssmk

extern "C" {

SSMK_API const char *ssmk_last_error(void) { return ssmk::last_error; }

SSMK_API const char *ssmk_status_name(ssmk_status status) {
  switch (status) {
    case SSMK_OK: return "SSMK_OK";
    case SSMK_INVALID_ARGUMENT: return "SSMK_INVALID_ARGUMENT";
    case SSMK_UNSUPPORTED: return "SSMK_UNSUPPORTED";
    case SSMK_DEVICE_ERROR: return "SSMK_DEVICE_ERROR";
    case SSMK_OUT_OF_MEMORY: return "SSMK_OUT_OF_MEMORY";
  }
  return "unknown";
}

}  // extern "C"
