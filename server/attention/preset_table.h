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
  // dense attention, in per cent: mean over the texts, and the median text.
  double density, loss_mean, loss_median;
};

inline constexpr char kPresetMethod[] = "vsprefill";

/// In the order from the most faithful to the fastest. Thresholds that were measured, not
/// interpolated; 4.6 saves .020 of density more than 3.6 and costs +28.3 %, so it is none.
inline constexpr PresetEntry kPresets[] = {
    {"safe", 1.8, 0.224, 6.9, 2.1},
    {"balanced", 2.8, 0.145, 13.3, 5.0},
    {"fast", 3.6, 0.114, 19.0, 8.9},
};

/// Mean and median differ because one of the texts, whose dense perplexity is very low, loses 30 to
/// 70 %. Raw: docs/results/data/indexer_smollm2_scale_perplexity.json, the shipped scale.
inline constexpr char kPresetsMeasuredOn[] =
    "SmolLM2-135M-Instruct, 6 held-out texts of 8192 tokens, one NVIDIA H100, 26 November 2026";

/// "density 0.22, perplexity +6.9 % (median text +2.1 %)".
inline std::string ExpectedLoss(const PresetEntry& preset) {
  return absl::StrFormat("density %.2f, perplexity %+.1f %% (median text %+.1f %%)", preset.density,
                         preset.loss_mean, preset.loss_median);
}

}  // namespace vsprefill::attention
