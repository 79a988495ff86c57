#include "training/threshold_scale.h"

#include <torch/utils.h>

#include <fstream>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_format.h"
#include "server/attention/methods.h"
#include "server/base/status_macros.h"
#include "training/covered_mass.h"
#include "training/progress.h"

namespace vsprefill::training {
namespace {

constexpr int kIterations = 8;
constexpr double kLeastUnread = 1e-3;  // keeps a group that is read whole from running away
constexpr KnobRange kThreshold = {-12, 16};

/// Divided by its geometric mean.
torch::Tensor Centred(const torch::Tensor& scale) { return scale / scale.log().mean().exp(); }

/// 1 / unread mass of the groups at this density, centred; [layers, groups] float32.
absl::StatusOr<torch::Tensor> FitCoverage(const TrueMass& text, IndexMasker* masker,
                                          const torch::Tensor& logits, double density) {
  const int64_t layers = logits.size(1), groups = logits.size(2);
  torch::Tensor scale = torch::ones({layers, groups});
  for (int i = 0; i < kIterations; ++i) {
    VSP_ASSIGN_OR_RETURN(const Coverage coverage, Reach(text, VerticalSlash(masker, logits, scale),
                                                        kThreshold, groups, density));
    const torch::Tensor unread = (1 - coverage.covered).view({layers, groups, -1}).mean(2);
    // Halfway in the logarithm: full steps swing.
    scale = Centred((scale / unread.clamp_min(kLeastUnread).to(torch::kFloat32)).sqrt());
  }
  return scale;
}

absl::StatusOr<torch::Tensor> CappedOutputScale(const ScaleOptions& options,
                                                const model::ModelConfig& config) {
  const int64_t layers = config.num_layers, groups = config.num_kv_heads;
  torch::Tensor output_scale = torch::ones({layers, groups});
  if (options.output_scale.empty()) return output_scale;
  if (static_cast<int64_t>(options.output_scale.size()) != layers) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "the output scale has %d layers, the model %d", options.output_scale.size(), layers));
  }
  for (int64_t layer = 0; layer < layers; ++layer) {
    const std::vector<float>& row = options.output_scale[layer];
    if (static_cast<int64_t>(row.size()) != groups) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "layer %d of the output scale has %d groups, the model %d", layer, row.size(), groups));
    }
    for (int64_t group = 0; group < groups; ++group) {
      if (!(row[group] > 0)) {
        return absl::InvalidArgumentError(absl::StrFormat(
            "the output scale of layer %d, group %d is %g, not above 0", layer, group, row[group]));
      }
      output_scale[layer][group] = row[group];
    }
  }
  return output_scale.clamp_max(options.output_scale_cap);
}

}  // namespace

absl::StatusOr<std::vector<std::vector<float>>> FitThresholdScale(
    Teacher& teacher, const model::IndexerWeights& weights,
    absl::Span<const absl::Span<const int32_t>> texts, const ScaleOptions& options) {
  if (texts.empty()) return absl::InvalidArgumentError("no text is long enough to fit the scale");
  torch::NoGradGuard no_grad;
  const model::ModelConfig& config = teacher.model().config();
  VSP_ASSIGN_OR_RETURN(const torch::Tensor output_scale, CappedOutputScale(options, config));
  VSP_ASSIGN_OR_RETURN(const std::unique_ptr<model::VsIndexer> indexer,
                       model::VsIndexer::Create(weights, teacher.model().device()));
  // First the shape, then, over the same texts, the unit: what the default threshold gives.
  torch::Tensor log_coverage = torch::zeros({config.num_layers, config.num_kv_heads});
  torch::Tensor scale;
  double log_unit = 0;
  const double count = static_cast<double>(texts.size());
  Progress progress(2 * texts.size(), 0);
  for (size_t i = 0; i < 2 * texts.size(); ++i) {
    const absl::Span<const int32_t> ids = texts[i % texts.size()];
    VSP_ASSIGN_OR_RETURN(const Capture capture, teacher.Run(ids, /*with_queries=*/true));
    const TrueMass text = MeasureTrueMass(teacher, capture, options.max_tiles);
    VSP_ASSIGN_OR_RETURN(const torch::Tensor logits, IndexerLogits(teacher, *indexer, capture));
    IndexMasker masker(&teacher.model(), &text.tiles);
    if (i < texts.size()) {
      VSP_ASSIGN_OR_RETURN(const torch::Tensor coverage,
                           FitCoverage(text, &masker, logits, options.density));
      log_coverage += coverage.log() / count;
    } else {
      if (!scale.defined()) scale = Centred(output_scale * log_coverage.exp());
      VSP_ASSIGN_OR_RETURN(const Coverage reached,
                           Reach(text, VerticalSlash(&masker, logits, scale), kThreshold,
                                 config.num_kv_heads, options.density));
      log_unit += reached.knobs.log().mean().item<double>() / count;
    }
    progress.Update(i + 1, "fitting threshold_scale");
  }
  const float threshold = attention::DefaultSelection(texts[0].size()).threshold;
  scale = (scale * (std::exp(log_unit) / threshold)).contiguous();
  std::vector<std::vector<float>> result;
  for (int64_t layer = 0; layer < scale.size(0); ++layer) {
    const float* row = scale[layer].data_ptr<float>();
    result.emplace_back(row, row + scale.size(1));
  }
  return result;
}

absl::StatusOr<std::vector<std::vector<float>>> ReadOutputScale(const std::string& path) {
  std::ifstream file(path);
  if (!file) return absl::NotFoundError(absl::StrFormat("cannot read %s", path));
  try {
    return nlohmann::json::parse(file).get<std::vector<std::vector<float>>>();
  } catch (const nlohmann::json::exception& e) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s is not a JSON array [layers][groups] of numbers: %s", path, e.what()));
  }
}

}  // namespace vsprefill::training
