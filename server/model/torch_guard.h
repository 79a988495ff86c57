// Turns LibTorch's exceptions into absl::Status. No torch header: c10::Error is a std::exception.
#pragma once

#include <exception>
#include <new>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace vsprefill::model {

/// Runs `body` (returning absl::Status); an exception becomes INTERNAL, or RESOURCE_EXHAUSTED where
/// memory ran out, with the first line of its message.
template <typename Body>
absl::Status TorchGuard(absl::string_view operation, const Body& body) noexcept {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return absl::ResourceExhaustedError(absl::StrCat(operation, ": out of memory"));
  } catch (const std::exception& error) {
    const absl::string_view what = error.what();
    const absl::string_view line = what.substr(0, what.find('\n'));
    const std::string message = absl::StrCat(operation, ": ", line);
    if (line.find("out of memory") != absl::string_view::npos ||
        line.find("can't allocate memory") != absl::string_view::npos) {
      return absl::ResourceExhaustedError(message);
    }
    return absl::InternalError(message);
  }
}

}  // namespace vsprefill::model
