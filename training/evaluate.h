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
#include "training/covered_mass.h"
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

/// Collects what methods covered of each text, in the same order for every text.
class ReportBuilder {
 public:
  /// All of the same size; at least one.
  explicit ReportBuilder(absl::Span<const absl::Span<const int32_t>> texts);
  void BeginText(int64_t tiles);
  void Add(const std::string& method, double wanted_density, const Coverage& outcome);
  LengthReport Finish();

 private:
  LengthReport report_;
  std::vector<torch::Tensor> covered_;  // per result, summed over texts
  size_t slot_ = 0;
};

/// StreamingLLM's pattern as a method with a knob x: 4 sinks and a window of tokens / x. `tiles`
/// outlives the result.
MaskFn SinksAndWindow(const TileSet* tiles);

/// Measures texts of one length (all of the same size). The indexer's logits and the selections
/// come from the kernels that serve. INVALID_ARGUMENT: no texts.
absl::StatusOr<LengthReport> Evaluate(Teacher& teacher, const model::IndexerWeights& indexer,
                                      absl::Span<const absl::Span<const int32_t>> texts,
                                      const EvaluateOptions& options);

std::string FormatTable(const LengthReport& report);
/// An object with weights_id, `facts`, what was measured ("hidden": 512, say) and one entry per
/// report.
std::string FormatJson(const std::vector<LengthReport>& reports, const std::string& weights_id,
                       const std::string& size_name, int size,
                       const std::map<std::string, std::string>& facts);

}  // namespace vsprefill::training
