#include "training/covered_mass.h"

#include <torch/cuda.h>

#include <cmath>
#include <vector>

#include "server/attention/methods.h"
#include "server/base/kernel_status.h"
#include "server/base/status_macros.h"

namespace vsprefill::training {
namespace {

constexpr int kBisections = 13;

/// Pairs that a layer's masks read / causal pairs, [groups].
torch::Tensor Density(const TileSet& tiles, const torch::Tensor& mask) {
  return (mask * tiles.visible).sum({1, 2}) / tiles.pairs;
}

}  // namespace

TrueMass MeasureTrueMass(Teacher& teacher, const Capture& capture, int64_t max_tiles,
                         int row_tile) {
  const model::ModelConfig& config = teacher.model().config();
  TrueMass text;
  if (row_tile == 0) {
    row_tile = kernels::RowTilePositions(config.num_q_heads / config.num_kv_heads);
  }
  text.tiles = MakeTiles(capture.tokens, row_tile, max_tiles, teacher.device());
  std::vector<torch::Tensor> mass;
  for (int layer = 0; layer < config.num_layers; ++layer) {
    mass.push_back(TileColumnMass(text.tiles, capture.queries[layer], capture.keys[layer],
                                  1 / std::sqrt(config.head_dim)));
  }
  text.mass = torch::stack(mass);
  return text;
}

absl::StatusOr<torch::Tensor> IndexerLogits(Teacher& teacher, const model::VsIndexer& indexer,
                                            const Capture& capture) {
  const model::ModelConfig& config = teacher.model().config();
  torch::Tensor logits = torch::zeros({2, config.num_layers, config.num_kv_heads, capture.tokens},
                                      capture.columns.options());
  if (logits.is_cuda()) torch::cuda::synchronize();
  for (int layer = 0; layer < config.num_layers; ++layer) {
    kernels::IndexerInput input;
    input.k = capture.keys[layer].data_ptr();
    input.v = capture.values[layer].data_ptr();
    input.head_stride = capture.keys[layer].stride(0);
    input.token_stride = capture.keys[layer].stride(1);
    input.dtype = teacher.model().kv_layout().dtype;
    input.token_end = capture.tokens;
    input.vertical_logits = logits[0][layer].data_ptr<float>();
    input.slash_logits = logits[1][layer].data_ptr<float>();
    input.logit_stride = capture.tokens;
    VSP_RETURN_IF_ERROR(FromKernelStatus(
        teacher.model().kernels().indexer(indexer.layer(layer), input, teacher.model().stream()),
        "indexer"));
  }
  VSP_RETURN_IF_ERROR(teacher.model().Synchronize());
  return logits;
}

MaskFn VerticalSlash(IndexMasker* masker, const torch::Tensor& logits, const torch::Tensor& scale) {
  return [masker, logits, scale](int layer, const torch::Tensor& knobs) {
    torch::Tensor scaled = knobs[layer].to(torch::kCPU, torch::kFloat32);
    if (scale.defined()) scaled = scaled * scale[layer];
    scaled = scaled.contiguous();
    kernels::SelectionParams params = attention::DefaultSelection(logits.size(3));
    params.rule = kernels::SelectionRule::kMassPerCost;
    params.threshold = 1.0f;
    return masker->Mask(
        logits[0][layer], logits[1][layer], params,
        std::vector<float>(scaled.data_ptr<float>(), scaled.data_ptr<float>() + scaled.numel()));
  };
}

absl::StatusOr<Coverage> Cover(const TrueMass& text, const MaskFn& masks,
                               const torch::Tensor& knobs) {
  const int64_t layers = text.mass.size(0), heads = text.mass.size(1);
  Coverage coverage;
  coverage.knobs = knobs;
  std::vector<torch::Tensor> covered;
  for (int64_t layer = 0; layer < layers; ++layer) {
    VSP_ASSIGN_OR_RETURN(const torch::Tensor mask, masks(layer, knobs));
    coverage.density += Density(text.tiles, mask).mean().item<double>() / layers;
    const torch::Tensor per_head = mask.repeat_interleave(heads / mask.size(0), 0);
    covered.push_back((text.mass[layer] * per_head).sum({1, 2}));
  }
  coverage.covered = torch::stack(covered).cpu().to(torch::kFloat64);
  return coverage;
}

absl::StatusOr<Coverage> Reach(const TrueMass& text, const MaskFn& masks, const KnobRange& range,
                               int64_t groups, double wanted) {
  const int64_t layers = text.mass.size(0);
  const torch::TensorOptions options = text.mass.options();
  torch::Tensor low = torch::full({layers, groups}, range.low, options);
  torch::Tensor high = torch::full({layers, groups}, range.high, options);
  auto densities = [&](const torch::Tensor& knobs) -> absl::StatusOr<torch::Tensor> {
    std::vector<torch::Tensor> all;
    for (int64_t layer = 0; layer < layers; ++layer) {
      VSP_ASSIGN_OR_RETURN(const torch::Tensor mask, masks(layer, knobs));
      all.push_back(Density(text.tiles, mask));
    }
    torch::Tensor density = torch::stack(all);
    if (!range.per_group) density = density.mean().expand_as(density);
    return density;
  };
  for (int i = 0; i < kBisections; ++i) {
    const torch::Tensor middle = (low + high) / 2;
    VSP_ASSIGN_OR_RETURN(const torch::Tensor density, densities(middle.exp2()));
    const torch::Tensor too_dense = density > wanted;
    low = torch::where(too_dense, middle, low);
    high = torch::where(too_dense, high, middle);
  }
  return Cover(text, masks, high.exp2());
}

}  // namespace vsprefill::training
