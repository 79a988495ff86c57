// Presets: names for settings of a method that were measured (preset_table.h).
#pragma once

#include <map>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "server/attention/preset_table.h"

namespace vsprefill::attention {

/// "safe, balanced, fast".
std::string PresetNames();

/// What a preset sets, by parameter.
std::map<std::string, double> PresetParameters(const PresetEntry& preset);

/// Turns a preset into a method and parameters: sets *method where it is empty, and those
/// parameters that *parameters does not hold. INVALID_ARGUMENT, with the allowed values, for an
/// unknown preset and for a preset together with a method that it does not belong to.
absl::Status ResolvePreset(absl::string_view preset, std::string* method,
                           std::map<std::string, double>* parameters);

}  // namespace vsprefill::attention
