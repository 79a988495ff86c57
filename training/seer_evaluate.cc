#include "training/seer_evaluate.h"

#include <torch/cuda.h>
#include <torch/utils.h>

#include <cmath>
#include <utility>

#include "absl/strings/str_format.h"
#include "kernels/select_seer.h"
#include "server/base/kernel_status.h"
#include "server/base/status_macros.h"
#include "server/model/rope.h"
#include "training/covered_mass.h"
#include "training/progress.h"

namespace vsprefill::training {
namespace {

using kernels::kKeyBlock;

/// Tile rows, one head each: the row tiles of a per-head block index.
constexpr int kTileRows = 128;

/// Runs the selection kernel on a capture and turns its blocks into masks over measured tiles.
class SeerMasker {
 public:
  /// All outlive it; `capture` holds queries.
  SeerMasker(Teacher* teacher, const model::SeerGate* gate, const Capture* capture,
             const TileSet* tiles)
      : teacher_(teacher), gate_(gate), capture_(capture), tiles_(tiles) {
    const model::ModelConfig& config = teacher->model().config();
    model::RopeTable table(config.rope, config.head_dim);
    table.Grow(capture->tokens);
    const auto rotations = [&](const float* data) {
      return torch::from_blob(const_cast<float*>(data), {capture->tokens, config.head_dim / 2},
                              torch::kFloat32)
          .to(teacher->device(), torch::kFloat32, /*non_blocking=*/false, /*copy=*/true);
    };
    cos_ = rotations(table.cos());
    sin_ = rotations(table.sin());
    const torch::TensorOptions ints = tiles->last.options().dtype(torch::kInt32);
    blocks_ = torch::zeros({config.num_q_heads, kernels::KeyBlocks(capture->tokens),
                            kernels::KeyBlockWords(capture->tokens)},
                           ints);
    workspace_ =
        torch::zeros({kernels::SeerWorkspaceBytes(Input(0).base)}, ints.dtype(torch::kUInt8));
    std::vector<int64_t> measured;
    for (int64_t begin : tiles->begins) measured.push_back(begin / kTileRows);
    measured_ = torch::tensor(measured, torch::kInt64).to(teacher->device());
  }

  /// Which (tile, column) each head of a layer reads: bool [q heads, tiles, tokens].
  absl::StatusOr<torch::Tensor> Mask(int layer, const kernels::SeerParams& params) {
    kernels::TileIndexView index;
    index.blocks = reinterpret_cast<uint32_t*>(blocks_.data_ptr<int32_t>());
    index.block_words = blocks_.size(2);
    if (blocks_.is_cuda()) torch::cuda::synchronize();
    model::Transformer& model = teacher_->model();
    VSP_RETURN_IF_ERROR(FromKernelStatus(
        model.kernels().select_seer(Input(layer), params, &index, model.stream()), "select_seer"));
    VSP_RETURN_IF_ERROR(model.Synchronize());
    const torch::Tensor bit = torch::arange(32, blocks_.options());
    return torch::bitwise_right_shift(blocks_.index_select(1, measured_).unsqueeze(3), bit)
        .bitwise_and(1)
        .flatten(2)
        .to(torch::kBool)
        .repeat_interleave(kKeyBlock, 2)
        .narrow(2, 0, capture_->tokens);
  }

 private:
  kernels::SeerInput Input(int layer) {
    const model::ModelConfig& config = teacher_->model().config();
    const torch::Tensor queries = capture_->queries[layer];
    const torch::Tensor& keys = capture_->keys[layer];
    kernels::SeerInput input;
    input.base.shape = {config.num_q_heads, config.num_kv_heads, config.head_dim,
                        teacher_->model().kv_layout().dtype,
                        1 / std::sqrt(static_cast<float>(config.head_dim))};
    kernels::AttentionSequence& sequence = input.base.sequence;
    sequence.q = queries.data_ptr();
    sequence.q_token_stride = queries.stride(0);
    sequence.q_head_stride = queries.stride(1);
    sequence.k = keys.data_ptr();
    sequence.kv_head_stride = keys.stride(0);
    sequence.kv_token_stride = keys.stride(1);
    sequence.q_tokens = sequence.kv_tokens = input.base.prompt_tokens = capture_->tokens;
    input.base.workspace = workspace_.defined() ? workspace_.data_ptr() : nullptr;
    input.gate = gate_->layers()[layer];
    input.rope_cos = cos_.data_ptr<float>();
    input.rope_sin = sin_.data_ptr<float>();
    return input;
  }

  Teacher* teacher_;
  const model::SeerGate* gate_;
  const Capture* capture_;
  const TileSet* tiles_;
  torch::Tensor cos_, sin_;  // [tokens, head_dim / 2]
  torch::Tensor blocks_;     // int32 [q heads, tiles, words]
  torch::Tensor workspace_;
  torch::Tensor measured_;  // int64: numbers of the measured tiles
};

struct Method {
  std::string name;
  MaskFn mask;
  KnobRange range;
};

MaskFn ByThreshold(SeerMasker* masker) {
  return [masker](int layer, const torch::Tensor& knobs) {
    return masker->Mask(layer, {knobs[layer][0].item<float>(), 0, 0});
  };
}

/// Knob x: a density of 1 / x.
MaskFn ByDensity(SeerMasker* masker) {
  return [masker](int layer, const torch::Tensor& knobs) {
    return masker->Mask(layer, {0, 1 / knobs[layer][0].item<double>(), 0});
  };
}

/// Blocks of the largest true mass per pair, of all heads alike; the own block always.
MaskFn TrueBlocks(const TrueMass* text) {
  return [text](int layer, const torch::Tensor& knobs) -> absl::StatusOr<torch::Tensor> {
    const TileSet& tiles = text->tiles;
    const int64_t blocks = kernels::KeyBlocks(tiles.tokens),
                  padding = blocks * kKeyBlock - tiles.tokens;
    const auto by_block = [&](const torch::Tensor& x) {
      return torch::constant_pad_nd(x, {0, padding}).unflatten(-1, {blocks, kKeyBlock}).sum(-1);
    };
    const torch::Tensor pairs = by_block(tiles.visible);
    const torch::Tensor mean = by_block(text->mass[layer]) / pairs.clamp_min(1) * tiles.pairs;
    torch::Tensor keep = mean >= knobs[layer].view({-1, 1, 1});
    const torch::Tensor own = tiles.last.div(kKeyBlock, "floor").unsqueeze(1) ==
                              torch::arange(blocks, tiles.last.options()).unsqueeze(0);
    keep.logical_or_(own);
    return keep.repeat_interleave(kKeyBlock, 2).narrow(2, 0, tiles.tokens);
  };
}

}  // namespace

absl::StatusOr<LengthReport> EvaluateSeer(Teacher& teacher, const model::SeerGateWeights& weights,
                                          absl::Span<const absl::Span<const int32_t>> texts,
                                          const EvaluateOptions& options) {
  if (texts.empty()) return absl::InvalidArgumentError("no held-out text is long enough");
  torch::NoGradGuard no_grad;
  const model::ModelConfig& config = teacher.model().config();
  VSP_ASSIGN_OR_RETURN(const std::unique_ptr<model::SeerGate> gate,
                       model::SeerGate::Create(weights, config.rope, config.max_position_embeddings,
                                               teacher.model().device()));
  ReportBuilder builder(texts);
  Progress progress(texts.size(), 0);
  for (size_t i = 0; i < texts.size(); ++i) {
    VSP_ASSIGN_OR_RETURN(const Capture capture,
                         teacher.Run(texts[i], /*with_queries=*/true, /*with_sums=*/false));
    const TrueMass text = MeasureTrueMass(teacher, capture, options.max_tiles, kTileRows);
    SeerMasker masker(&teacher, gate.get(), &capture, &text.tiles);
    const double longest = std::log2(capture.tokens);
    const std::vector<Method> methods = {
        {"seer_attention, by threshold", ByThreshold(&masker), {-30, 0}},
        {"seer_attention, by density", ByDensity(&masker), {0, longest}},
        {"oracle, blocks of 128 (true mass)", TrueBlocks(&text), {-20, 20}},
        {"sinks + window", SinksAndWindow(&text.tiles), {0, longest}},
    };
    builder.BeginText(text.tiles.num_tiles());
    for (const Method& method : methods) {
      for (double density : options.densities) {
        VSP_ASSIGN_OR_RETURN(const Coverage outcome,
                             Reach(text, method.mask, method.range, config.num_q_heads, density));
        builder.Add(method.name, density, outcome);
      }
    }
    // The served default, whatever density it has; its dense last rows left out.
    const auto served = [&](int layer, const torch::Tensor&) {
      kernels::SeerParams params;
      params.last_dense_blocks = 0;
      return masker.Mask(layer, params);
    };
    VSP_ASSIGN_OR_RETURN(const Coverage outcome, Cover(text, served, {}));
    builder.Add("the served default, whole prompt", 0, outcome);
    progress.Update(i + 1, absl::StrFormat("evaluating %d tokens", texts[i].size()));
  }
  return builder.Finish();
}

}  // namespace vsprefill::training
