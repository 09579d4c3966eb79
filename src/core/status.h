// SPDX-License-Identifier: MIT
// Failure: a status for the caller and a text for ssmk_last_error().
#pragma once

#include <ssmk.h>

namespace ssmk {

#if defined(__GNUC__)
[[gnu::format(printf, 2, 3)]]
#endif
ssmk_status fail(ssmk_status status, const char *format, ...);

}  // namespace ssmk
