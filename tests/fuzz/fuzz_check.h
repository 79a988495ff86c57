// What every reader of untrusted files owes its caller.
#pragma once

#include <cstdio>
#include <cstdlib>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"

namespace vsprefill {

/// Aborts (a finding, for a fuzzer) unless `status` is OK or one printable line.
inline void CheckOneClearLine(const absl::Status& status) {
  if (status.ok()) return;
  bool clear = !status.message().empty();
  for (const char c : status.message()) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte == 0x7f) clear = false;
  }
  if (clear) return;
  std::fprintf(stderr, "not one clear line: %s\n", status.ToString().c_str());
  std::abort();
}

}  // namespace vsprefill
