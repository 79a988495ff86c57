// Fits an indexer's threshold_scale: how much one layer and KV group is spared or spends at the
// same threshold.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/model/vs_indexer.h"
#include "training/teacher.h"

namespace vsprefill::training {

struct ScaleOptions {
  double density = 0.125;  // that the default threshold is to give, last rows left out
  int64_t max_tiles = 0;   // row tiles measured per text, evenly spread; 0: all
  /// Scale fitted to the error of the output (bench/eval/selection_study.py allocate),
  /// [layers][groups]; empty: not known. Values above `output_scale_cap` count as it.
  std::vector<std::vector<float>> output_scale;
  double output_scale_cap = 1.4;
};

/// The scale [layers][groups] that replaces the one in `indexer`:
///   scale = min(output scale, cap) * coverage * unit.
/// coverage = 1 / (mass that the selection leaves unread in the group), a fixed point: the more of
/// a group is unread, the lower its cut. Columns and diagonals are counted once each by the scores,
/// so a group that both cover is over-served by one threshold and a spread one is left behind; what
/// is unread says how far, and it is a property of the group more than of the text. `unit` makes
/// DefaultSelection's threshold give `density` on average.
/// Texts: training texts, all of one length. INVALID_ARGUMENT: no texts, or an output scale of
/// another shape or not above 0.
absl::StatusOr<std::vector<std::vector<float>>> FitThresholdScale(
    Teacher& teacher, const model::IndexerWeights& indexer,
    absl::Span<const absl::Span<const int32_t>> texts, const ScaleOptions& options);

/// Reads an output scale: a JSON array [layers][groups] of numbers.
absl::StatusOr<std::vector<std::vector<float>>> ReadOutputScale(const std::string& path);

}  // namespace vsprefill::training
