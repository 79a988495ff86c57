// Parsing of untrusted JSON: no exceptions, bounded depth, no duplicate keys.
#pragma once

#include <nlohmann/json.hpp>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace vsprefill {

inline constexpr int kMaxJsonDepth = 16;

/// INVALID_ARGUMENT, beginning with `source` (a file name), where `text` is not valid JSON, nests
/// deeper than `max_depth` or holds an object with the same key twice.
absl::StatusOr<nlohmann::json> ParseJson(absl::string_view text, absl::string_view source,
                                         int max_depth = kMaxJsonDepth);

/// `value` as text for an error message: one line, at most about 100 characters.
std::string ShortJson(const nlohmann::json& value);

}  // namespace vsprefill
