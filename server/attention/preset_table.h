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
  // dense attention, in per cent: mean over the texts, median text, and the text that lost most of
  // all that were looked at; it is not among those of the mean.
  double density, loss_mean, loss_median, loss_worst;
};

inline constexpr char kPresetMethod[] = "vsprefill";

/// In the order from the most faithful to the fastest. Made by bench/eval/preset_losses.py; raw:
/// docs/results/data/preset_losses.json.
inline constexpr PresetEntry kPresets[] = {
    {"safe", 1.8, 0.217, 2.2, 2.3, 71.1},
    {"balanced", 2.8, 0.142, 4.9, 4.9, 94.8},
    {"fast", 3.6, 0.112, 7.6, 8.2, 138.4},
};

/// The worst text repeats numbers and names in any order (docs/results/fidelity.md).
inline constexpr char kPresetsMeasuredOn[] =
    "SmolLM2-135M-Instruct, 11 held-out texts of 8192 tokens, five kinds; the worst text is one of "
    "18 others; Intel Xeon, 26 November 2026";

/// "density 0.22, perplexity +2.2 % (median text +2.3 %, worst text +71 %)".
inline std::string ExpectedLoss(const PresetEntry& preset) {
  return absl::StrFormat(
      "density %.2f, perplexity %+.1f %% (median text %+.1f %%, worst text %+.0f %%)",
      preset.density, preset.loss_mean, preset.loss_median, preset.loss_worst);
}

}  // namespace vsprefill::attention
