#include "bench/eval/captured_text.h"

#include <torch/cuda.h>
#include <torch/utils.h>

#include <algorithm>
#include <cmath>
#include <utility>

#include "server/base/status_macros.h"
#include "training/coverage.h"
#include "training/covered_mass.h"
#include "training/index_mask.h"

namespace vsprefill::eval {
namespace {

/// `count` rows spread over the text, in no step with tiles and blocks.
torch::Tensor SpreadRows(int64_t tokens, int64_t count, torch::Device device) {
  constexpr double kGoldenRatio = 0.6180339887498949;
  count = std::min(count, tokens);
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < count; ++i) {
    const double within = std::fmod(static_cast<double>(i) * kGoldenRatio, 1.0);
    rows.push_back(static_cast<int64_t>((static_cast<double>(i) + within) *
                                        static_cast<double>(tokens) / static_cast<double>(count)));
  }
  return torch::tensor(rows, torch::kInt64).to(device);
}

double LowestTenth(const torch::Tensor& values) {
  const int64_t tenth = std::max<int64_t>(1, values.numel() / 10);
  return std::get<0>(values.flatten().topk(tenth, 0, /*largest=*/false)).mean().item<double>();
}

std::vector<double> List(const torch::Tensor& values) {
  const torch::Tensor list = values.to(torch::kCPU, torch::kFloat64).contiguous();
  return {list.data_ptr<double>(), list.data_ptr<double>() + list.numel()};
}

/// covered: [layers, heads, rows].
void Summarise(const torch::Tensor& covered, Fidelity* fidelity) {
  const torch::Tensor heads = covered.mean(2);
  fidelity->mass_mean = heads.mean().item<double>();
  fidelity->mass_lowest_tenth = LowestTenth(heads);
  fidelity->mass_minimum = heads.min().item<double>();
  fidelity->row_lowest_tenth = LowestTenth(covered);
  fidelity->row_minimum = covered.min().item<double>();
  fidelity->mass_by_layer = List(heads.mean(1));
  fidelity->lowest_by_layer = List(std::get<0>(heads.min(1)));
}

void WaitForTorch(const torch::Tensor& tensor) {
  if (tensor.is_cuda()) torch::cuda::synchronize();
}

}  // namespace

absl::StatusOr<std::unique_ptr<CapturedText>> CapturedText::Create(Lab& lab,
                                                                   absl::Span<const int32_t> ids) {
  const torch::NoGradGuard no_grad;
  VSP_ASSIGN_OR_RETURN(training::Capture capture, lab.teacher().Run(ids, /*with_queries=*/true));
  std::unique_ptr<CapturedText> text(new CapturedText(lab, std::move(capture)));
  text->out_ = torch::empty_like(text->capture_.queries[0]);
  text->truth_ =
      (torch::stack({text->capture_.columns, text->capture_.diagonals}) + 1e-12).log().contiguous();
  if (lab.indexer() != nullptr) VSP_RETURN_IF_ERROR(text->RunIndexer());
  WaitForTorch(text->out_);
  return text;
}

absl::Status CapturedText::RunIndexer() {
  VSP_ASSIGN_OR_RETURN(logits_, training::IndexerLogits(lab_.teacher(), *lab_.indexer(), capture_));
  return absl::OkStatus();
}

kernels::AttentionShape CapturedText::Shape() const {
  const model::ModelConfig& config = lab_.model().config();
  kernels::AttentionShape shape;
  shape.num_q_heads = config.num_q_heads;
  shape.num_kv_heads = config.num_kv_heads;
  shape.head_dim = config.head_dim;
  shape.dtype = lab_.model().kv_layout().dtype;
  shape.scale = 1.0f / std::sqrt(static_cast<float>(config.head_dim));
  return shape;
}

absl::Status CapturedText::Attend(attention::AttentionMethod& method, bool true_sums, int layer,
                                  void* out, kernels::PairCounts* counts,
                                  attention::SequenceCall* done) {
  const torch::Tensor &queries = capture_.queries[layer], &keys = capture_.keys[layer];
  attention::SequenceCall sequence;
  kernels::AttentionSequence& s = sequence.attention;
  s.q = queries.data_ptr();
  s.q_token_stride = queries.stride(0);
  s.q_head_stride = queries.stride(1);
  s.k = keys.data_ptr();
  s.v = capture_.values[layer].data_ptr();
  s.kv_head_stride = keys.stride(0);
  s.kv_token_stride = keys.stride(1);
  s.out = out;
  s.out_token_stride = queries.stride(0);
  s.out_head_stride = queries.stride(1);
  s.q_tokens = s.kv_tokens = sequence.prompt_tokens = capture_.tokens;
  if (const torch::Tensor& logits = true_sums ? truth_ : logits_; logits.defined()) {
    sequence.vertical_logits = logits[0][layer].data_ptr<float>();
    sequence.slash_logits = logits[1][layer].data_ptr<float>();
    sequence.logit_stride = capture_.tokens;
  }
  if (counts != nullptr) sequence.counts = counts + layer;
  attention::AttentionCall call;
  call.layer = layer;
  call.shape = Shape();
  call.sequences = absl::MakeSpan(&sequence, 1);
  call.stream = lab_.model().stream();
  call.rope_cos = lab_.rope_cos();
  call.rope_sin = lab_.rope_sin();
  VSP_RETURN_IF_ERROR(method.Attend(call));
  if (done != nullptr) *done = sequence;
  return absl::OkStatus();
}

absl::StatusOr<Shares> CapturedText::Count(const Selection& selection) {
  VSP_ASSIGN_OR_RETURN(const auto method, lab_.Make(selection, /*select_only=*/true));
  VSP_ASSIGN_OR_RETURN(const Buffer counts, lab_.MakeCounts());
  for (int layer = 0; layer < lab_.model().config().num_layers; ++layer) {
    VSP_RETURN_IF_ERROR(Attend(*method, selection.plan->true_sums, layer, nullptr,
                               static_cast<kernels::PairCounts*>(counts.data()), nullptr));
  }
  return lab_.ReadCounts(counts);
}

absl::StatusOr<std::vector<Fidelity>> CapturedText::Measure(
    const std::vector<Selection>& selections, int64_t rows) {
  const torch::NoGradGuard no_grad;
  const torch::Tensor positions = SpreadRows(capture_.tokens, rows, out_.device());
  const int num_layers = lab_.model().config().num_layers;
  const kernels::AttentionShape shape = Shape();
  struct Running {
    std::unique_ptr<attention::AttentionMethod> method;
    Buffer counts;
    std::vector<torch::Tensor> covered;
  };
  std::vector<Running> running(selections.size());
  for (size_t i = 0; i < selections.size(); ++i) {
    VSP_ASSIGN_OR_RETURN(running[i].method, lab_.Make(selections[i], /*select_only=*/false));
    VSP_ASSIGN_OR_RETURN(running[i].counts, lab_.MakeCounts());
  }
  VSP_ASSIGN_OR_RETURN(const auto dense, lab_.MakeDense());
  std::vector<Fidelity> results(selections.size());
  for (int layer = 0; layer < num_layers; ++layer) {
    VSP_RETURN_IF_ERROR(Attend(*dense, false, layer, out_.data_ptr(), nullptr, nullptr));
    const torch::Tensor mass = training::RowAttention(capture_.queries[layer], capture_.keys[layer],
                                                      positions, shape.scale);
    VSP_RETURN_IF_ERROR(lab_.model().Synchronize());
    const torch::Tensor dense_out = out_.to(torch::kFloat32);
    const double dense_norm = dense_out.norm().item<double>();
    for (size_t i = 0; i < selections.size(); ++i) {
      WaitForTorch(out_);
      attention::SequenceCall done;
      VSP_RETURN_IF_ERROR(
          Attend(*running[i].method, selections[i].plan->true_sums, layer, out_.data_ptr(),
                 static_cast<kernels::PairCounts*>(running[i].counts.data()), &done));
      VSP_RETURN_IF_ERROR(lab_.model().Synchronize());
      const torch::Tensor read = training::ReadMask(shape, done.attention, positions);
      running[i].covered.push_back(
          (mass * read.repeat_interleave(shape.num_q_heads / read.size(0), 0)).sum(2));
      const double error = (out_.to(torch::kFloat32) - dense_out).norm().item<double>();
      results[i].error_by_layer.push_back(error / std::max(dense_norm, 1e-30));
    }
  }
  for (size_t i = 0; i < selections.size(); ++i) {
    Fidelity& result = results[i];
    Summarise(torch::stack(running[i].covered), &result);
    for (const double error : result.error_by_layer) result.error += error / num_layers;
    VSP_ASSIGN_OR_RETURN(result.shares, lab_.ReadCounts(running[i].counts));
  }
  return results;
}

absl::StatusOr<OpTimes> CapturedText::Time(const Selection& selection) {
  const int num_layers = lab_.model().config().num_layers;
  VSP_ASSIGN_OR_RETURN(const auto select, lab_.Make(selection, /*select_only=*/true));
  VSP_ASSIGN_OR_RETURN(const auto whole, lab_.Make(selection, /*select_only=*/false));
  const bool true_sums = selection.plan->true_sums;
  // The first call allocates.
  VSP_RETURN_IF_ERROR(Attend(*select, true_sums, 0, nullptr, nullptr, nullptr));
  VSP_RETURN_IF_ERROR(Attend(*whole, true_sums, 0, out_.data_ptr(), nullptr, nullptr));
  VSP_RETURN_IF_ERROR(lab_.model().Synchronize());
  OpTimes times;
  double begin = Seconds();
  if (select->needs_indexer_logits() && !true_sums) {
    VSP_RETURN_IF_ERROR(RunIndexer());
    times.select = Seconds() - begin;
    begin = Seconds();
  }
  const double indexer = times.select;
  for (int layer = 0; layer < num_layers; ++layer) {
    VSP_RETURN_IF_ERROR(Attend(*select, true_sums, layer, nullptr, nullptr, nullptr));
  }
  VSP_RETURN_IF_ERROR(lab_.model().Synchronize());
  times.select += Seconds() - begin;
  begin = Seconds();
  for (int layer = 0; layer < num_layers; ++layer) {
    VSP_RETURN_IF_ERROR(Attend(*whole, true_sums, layer, out_.data_ptr(), nullptr, nullptr));
  }
  VSP_RETURN_IF_ERROR(lab_.model().Synchronize());
  times.op = indexer + Seconds() - begin;
  return times;
}

absl::StatusOr<OpTimes> CapturedText::TimeDense() {
  VSP_ASSIGN_OR_RETURN(const auto dense, lab_.MakeDense());
  VSP_RETURN_IF_ERROR(Attend(*dense, false, 0, out_.data_ptr(), nullptr, nullptr));
  VSP_RETURN_IF_ERROR(lab_.model().Synchronize());
  OpTimes times;
  const double begin = Seconds();
  for (int layer = 0; layer < lab_.model().config().num_layers; ++layer) {
    VSP_RETURN_IF_ERROR(Attend(*dense, false, layer, out_.data_ptr(), nullptr, nullptr));
  }
  VSP_RETURN_IF_ERROR(lab_.model().Synchronize());
  times.op = Seconds() - begin;
  return times;
}

}  // namespace vsprefill::eval
