// The presets of method vsprefill, and what each is expected to cost: the one place that holds
// these numbers, for the server, for --help of both programs and for GetModelInfo. Header only, so
// that clients may show it without linking the methods.
#pragma once

#include <string>

#include "absl/strings/str_format.h"

namespace vsprefill::attention {

struct PresetEntry {
  const char* name;
  double
      threshold;  // parameter of method vsprefill; the other parameters keep the server's defaults
  // Measured (kPresetsMeasuredOn): pairs read / causal pairs, and the change of perplexity against
  // dense attention, in per cent: mean over the texts, median text, and the text that lost most.
  double density, loss_mean, loss_median, loss_worst;
};

inline constexpr char kPresetMethod[] = "vsprefill";

/// In the order from the most faithful to the fastest. Made by bench/eval/preset_losses.py; raw:
/// docs/results/data/preset_losses.json.
inline constexpr PresetEntry kPresets[] = {
    {"safe", 1.8, 0.217, 4.8, 2.3, 70.3},
    {"balanced", 2.8, 0.142, 8.7, 5.2, 94.8},
    {"fast", 3.6, 0.113, 13.1, 8.3, 138.7},
};

/// The worst text repeats numbers and names in any order (docs/results/fidelity.md); it makes a
/// third to half of the means.
inline constexpr char kPresetsMeasuredOn[] =
    "SmolLM2-135M-Instruct, 29 held-out texts of 8192 tokens, five kinds; NVIDIA H100, 26 November "
    "2026";

/// "density 0.22, perplexity +4.8 % (median text +2.3 %, worst text +70 %)".
inline std::string ExpectedLoss(const PresetEntry& preset) {
  return absl::StrFormat(
      "density %.2f, perplexity %+.1f %% (median text %+.1f %%, worst text %+.0f %%)",
      preset.density, preset.loss_mean, preset.loss_median, preset.loss_worst);
}

}  // namespace vsprefill::attention
