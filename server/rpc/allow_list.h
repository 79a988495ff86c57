// Which push targets callers may name (--push_allow). Without it the server would be a relay into
// the network it stands in.
#pragma once

#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"

namespace vsprefill::rpc {

class AllowList {
 public:
  /// Entries "host:port" (this port only) or "host" (any port). Empty: nothing is allowed.
  /// INVALID_ARGUMENT: an entry that is neither.
  static absl::StatusOr<AllowList> Create(const std::vector<std::string>& entries);

  /// PERMISSION_DENIED names the target and what is allowed. INVALID_ARGUMENT: not "host:port".
  absl::Status Check(const std::string& target) const;

 private:
  std::vector<std::string> entries_;
};

}  // namespace vsprefill::rpc
