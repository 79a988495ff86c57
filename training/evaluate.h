// How much true attention mass VSPrefill with a given indexer covers at a given density, beside
// other selections.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/model/vs_indexer.h"
#include "training/teacher.h"

namespace vsprefill::training {

struct EvaluateOptions {
  std::vector<double> densities = {0.05, 0.10, 0.15, 0.20, 0.30};
  int64_t max_tiles = 0;  // row tiles measured per text, evenly spread; 0: all
};

/// One method at one density; means over texts of each (layer, query head), then statistics over
/// those.
struct CoverageResult {
  std::string method;
  double wanted_density = 0;
  double density = 0;       // reached; above the wanted one where forced keys alone exceed it
  double mean = 0;          // attention mass covered
  double lowest_tenth = 0;  // mean over the tenth of (layer, head) pairs that is covered worst
  double minimum = 0;
  std::vector<double> by_layer;  // mean over heads
};

struct LengthReport {
  int64_t length = 0;
  int64_t texts = 0;
  int64_t tiles = 0;  // measured per text
  std::vector<CoverageResult> results;
};

/// Measures texts of one length (all of the same size). The indexer's logits and the selections
/// come from the kernels that serve. INVALID_ARGUMENT: no texts.
absl::StatusOr<LengthReport> Evaluate(Teacher& teacher, const model::IndexerWeights& indexer,
                                      absl::Span<const absl::Span<const int32_t>> texts,
                                      const EvaluateOptions& options);

std::string FormatTable(const LengthReport& report);
/// An object with weights_id, hidden, `facts` and one entry per report.
std::string FormatJson(const std::vector<LengthReport>& reports, const std::string& weights_id,
                       int hidden, const std::map<std::string, std::string>& facts);

}  // namespace vsprefill::training
