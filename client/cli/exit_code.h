// Exit codes of the client programs; docs/clients.md lists them.
#pragma once

#include <string>

#include "absl/status/status.h"

namespace vsprefill::cli {

enum ExitCode : int {
  kExitOk = 0,
  kExitFailed = 1,    // INTERNAL, UNKNOWN, and what goes wrong on this side (a file, memory)
  kExitUsage = 2,     // command line or ids file
  kExitRefused = 3,   // the request can never succeed as it is
  kExitRetry = 4,     // UNAVAILABLE, RESOURCE_EXHAUSTED, ABORTED: try again
  kExitTime = 5,      // DEADLINE_EXCEEDED, CANCELLED
  kExitDataLoss = 6,  // the cache did not come through intact
};

/// The exit code for a call that ended with `status`.
ExitCode ExitCodeFor(const absl::Status& status);
/// "UNAVAILABLE: message", on one line.
std::string StatusLine(const absl::Status& status);

}  // namespace vsprefill::cli
