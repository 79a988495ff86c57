// The file half of the indexer: needs no LibTorch, so tools and fuzzers link it alone.
#include <utility>

#include "absl/strings/escaping.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_format.h"
#include "server/base/status_macros.h"
#include "server/model/checked_tensors.h"
#include "server/model/safetensors.h"
#include "server/model/vs_indexer.h"

namespace vsprefill::model {
namespace {

constexpr int kMaxHidden = 65536;

std::string LayerName(int layer, absl::string_view part) {
  return absl::StrFormat("layers.%d.%s", layer, part);
}

}  // namespace

absl::StatusOr<IndexerWeights> ReadIndexer(const std::string& path,
                                           const IndexerExpectation& expectation) {
  VSP_ASSIGN_OR_RETURN(const SafetensorsReader reader, SafetensorsReader::OpenFile(path));
  IndexerWeights weights;
  weights.facts = reader.metadata();
  auto take = [&](const char* key) {
    const auto it = weights.facts.find(key);
    if (it == weights.facts.end()) return std::string();
    std::string value = it->second;
    weights.facts.erase(it);
    return value;
  };
  const std::string format = take("format");
  if (format != kIndexerFormat) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: not an indexer file: metadata format is '%s', expected '%s'", path,
                        absl::CHexEscape(format), kIndexerFormat));
  }
  weights.weights_id = take("weights_id");
  if (!expectation.weights_id.empty() && weights.weights_id != expectation.weights_id) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "%s: the indexer was distilled for weights_id %s, the model has %s: distil one for this "
        "model with vsprefill-distill",
        path, absl::CHexEscape(weights.weights_id), expectation.weights_id));
  }
  const std::string hidden = take("hidden");
  if (!absl::SimpleAtoi(hidden, &weights.hidden) || weights.hidden < 1 ||
      weights.hidden > kMaxHidden) {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: metadata hidden is '%s', expected a number in [1, %d]", path,
                        absl::CHexEscape(hidden), kMaxHidden));
  }
  const int64_t groups = expectation.num_groups, width = weights.hidden;
  const int64_t features = 2 * int64_t{expectation.head_dim};
  weights.num_groups = expectation.num_groups;
  weights.head_dim = expectation.head_dim;
  if (reader.Find(LayerName(expectation.num_layers, "w1")) != nullptr) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "%s: the indexer has more layers than the model's %d", path, expectation.num_layers));
  }
  weights.layers.resize(expectation.num_layers);
  for (int i = 0; i < expectation.num_layers; ++i) {
    IndexerWeights::Layer& layer = weights.layers[i];
    VSP_RETURN_IF_ERROR(
        ReadBFloat16(reader, LayerName(i, "w1"), {groups, width, features}, &layer.w1));
    VSP_RETURN_IF_ERROR(ReadFloats(reader, LayerName(i, "b1"), {groups, width}, &layer.b1));
    VSP_RETURN_IF_ERROR(ReadFloats(reader, LayerName(i, "w2"), {groups, 2, width}, &layer.w2));
    VSP_RETURN_IF_ERROR(ReadFloats(reader, LayerName(i, "b2"), {groups, 2}, &layer.b2));
    VSP_RETURN_IF_ERROR(ReadFloats(reader, LayerName(i, "slash_prior"),
                                   {groups, kernels::kSlashBuckets}, &layer.slash_prior));
  }
  if (reader.Find("threshold_scale") != nullptr) {
    std::vector<float> flat;
    VSP_RETURN_IF_ERROR(
        ReadFloats(reader, "threshold_scale", {expectation.num_layers, groups}, &flat));
    for (int i = 0; i < expectation.num_layers; ++i) {
      weights.threshold_scale.emplace_back(flat.begin() + i * groups,
                                           flat.begin() + (i + 1) * groups);
      for (float value : weights.threshold_scale.back()) {
        if (value <= 0) {
          return absl::InvalidArgumentError(absl::StrFormat(
              "%s: threshold_scale holds %g, expected values above 0", path, value));
        }
      }
    }
  }
  return weights;
}

absl::Status WriteIndexer(const std::string& path, const IndexerWeights& weights) {
  const int64_t groups = weights.num_groups, width = weights.hidden;
  const int64_t features = 2 * int64_t{weights.head_dim};
  TensorMap tensors;
  for (int i = 0; i < weights.num_layers(); ++i) {
    const IndexerWeights::Layer& layer = weights.layers[i];
    const auto add = [&](absl::string_view part, std::vector<int64_t> shape, const auto& values) {
      return AddTensor("indexer", LayerName(i, part), std::move(shape), values, &tensors);
    };
    VSP_RETURN_IF_ERROR(add("w1", {groups, width, features}, layer.w1));
    VSP_RETURN_IF_ERROR(add("b1", {groups, width}, layer.b1));
    VSP_RETURN_IF_ERROR(add("w2", {groups, 2, width}, layer.w2));
    VSP_RETURN_IF_ERROR(add("b2", {groups, 2}, layer.b2));
    VSP_RETURN_IF_ERROR(add("slash_prior", {groups, kernels::kSlashBuckets}, layer.slash_prior));
  }
  std::vector<float> scale;
  if (!weights.threshold_scale.empty()) {
    for (const std::vector<float>& row : weights.threshold_scale) {
      scale.insert(scale.end(), row.begin(), row.end());
    }
    VSP_RETURN_IF_ERROR(
        AddTensor("indexer", "threshold_scale", {weights.num_layers(), groups}, scale, &tensors));
  }
  std::map<std::string, std::string> metadata = weights.facts;
  metadata["format"] = std::string(kIndexerFormat);
  metadata["weights_id"] = weights.weights_id;
  metadata["hidden"] = std::to_string(weights.hidden);
  return WriteSafetensors(path, tensors, metadata);
}

}  // namespace vsprefill::model
