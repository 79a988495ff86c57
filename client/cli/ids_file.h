// Reads an ids file: a JSON array of token ids, e.g. [1, 4093, 253].
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace vsprefill::cli {

/// INVALID_ARGUMENT with line and column, "ids.json:1:8: ...", for anything but a non-empty JSON
/// array of integers in [0, 2^31).
absl::StatusOr<std::vector<int32_t>> ParseIds(absl::string_view text, absl::string_view source);

/// The file's ids; "-" reads standard input. NOT_FOUND where it cannot be read.
absl::StatusOr<std::vector<int32_t>> ReadIdsFile(const std::string& path);

}  // namespace vsprefill::cli
