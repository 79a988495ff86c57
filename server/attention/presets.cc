#include "server/attention/presets.h"

#include <algorithm>
#include <iterator>

#include "absl/strings/str_join.h"

namespace vsprefill::attention {

std::string PresetNames() {
  return absl::StrJoin(kPresets, ", ", [](std::string* out, const PresetEntry& preset) {
    out->append(preset.name);
  });
}

std::map<std::string, double> PresetParameters(const PresetEntry& preset) {
  return {{"threshold", preset.threshold}};
}

absl::Status ResolvePreset(absl::string_view preset, std::string* method,
                           std::map<std::string, double>* parameters) {
  const auto* const entry = std::find_if(std::begin(kPresets), std::end(kPresets),
                                         [&](const PresetEntry& p) { return p.name == preset; });
  if (entry == std::end(kPresets)) {
    return absl::InvalidArgumentError(
        absl::StrFormat("unknown preset \"%s\"; allowed: %s", preset, PresetNames()));
  }
  if (!method->empty() && *method != kPresetMethod) {
    return absl::InvalidArgumentError(
        absl::StrFormat("preset \"%s\" with method \"%s\"; allowed with a preset: method \"%s\" or "
                        "none",
                        preset, *method, kPresetMethod));
  }
  *method = kPresetMethod;
  parameters->merge(PresetParameters(*entry));
  return absl::OkStatus();
}

}  // namespace vsprefill::attention
