#include "bench/eval/scorer.h"

#include <torch/cuda.h>
#include <torch/utils.h>

#include <algorithm>

#include "server/base/status_macros.h"
#include "training/teacher.h"

namespace vsprefill::eval {

absl::StatusOr<std::unique_ptr<Scorer>> Scorer::Create(Lab& lab, absl::Span<const int32_t> ids,
                                                       double score_from, int64_t kl_stride) {
  const auto tokens = static_cast<int64_t>(ids.size());
  const auto first =
      std::min(static_cast<int64_t>(score_from * static_cast<double>(tokens)), tokens - 2);
  std::unique_ptr<Scorer> scorer(new Scorer(lab, ids, std::max<int64_t>(0, first), kl_stride));
  VSP_ASSIGN_OR_RETURN(scorer->cache_, lab.MakeCache(tokens));
  VSP_ASSIGN_OR_RETURN(const auto dense, lab.MakeDense());
  VSP_ASSIGN_OR_RETURN(scorer->dense_, scorer->Forward(*dense, /*is_dense=*/true));
  return scorer;
}

absl::StatusOr<Score> Scorer::Run(const Selection& selection) {
  VSP_ASSIGN_OR_RETURN(const auto method, lab_.Make(selection, /*select_only=*/false));
  return Forward(*method, /*is_dense=*/false);
}

void Scorer::Look(const model::LogitsBlock& block, bool is_dense, Sums* sums) {
  const torch::NoGradGuard no_grad;
  const int64_t skip = std::max<int64_t>(0, first_ - block.first);
  if (skip >= block.rows) return;
  const torch::TensorOptions stored =
      torch::TensorOptions()
          .device(lab_.teacher().device())
          .dtype(lab_.model().kv_layout().dtype == kernels::DType::kF32 ? torch::kFloat32
                                                                        : torch::kBFloat16);
  const torch::Tensor logits =
      torch::from_blob(const_cast<void*>(block.data),
                       {block.rows, lab_.model().config().vocab_size}, stored)
          .narrow(0, skip, block.rows - skip);
  const torch::Tensor top = logits.argmax(1);
  const int64_t begin = block.first + skip;
  // First position of the block that is a multiple of the stride.
  const int64_t kl_skip = (kl_stride_ - begin % kl_stride_) % kl_stride_;
  torch::Tensor strided;
  if (kl_skip < logits.size(0)) strided = logits.slice(0, kl_skip, logits.size(0), kl_stride_);
  if (is_dense) {
    dense_top_.push_back(top);
    dense_logits_.push_back(strided.defined() ? strided.clone() : strided);
    if (top.is_cuda()) torch::cuda::synchronize();
    return;
  }
  sums->same_top += top.eq(dense_top_[sums->block]).sum().item<int64_t>();
  if (strided.defined()) {
    const torch::Tensor p = torch::log_softmax(dense_logits_[sums->block].to(torch::kFloat32), 1);
    const torch::Tensor q = torch::log_softmax(strided.to(torch::kFloat32), 1);
    sums->kl += (p.exp() * (p - q)).sum().item<double>();
    sums->kl_positions += strided.size(0);
  }
  ++sums->block;
}

absl::StatusOr<Score> Scorer::Forward(attention::AttentionMethod& method, bool is_dense) {
  const auto tokens = static_cast<int64_t>(ids_.size());
  const int last_layer = lab_.model().config().num_layers - 1;
  VSP_ASSIGN_OR_RETURN(const Buffer counts, lab_.MakeCounts());
  cache_->set_num_tokens(0);
  model::SequenceChunk chunk;
  chunk.ids = ids_;
  chunk.prompt_tokens = tokens;
  chunk.cache = cache_.get();
  chunk.counts = static_cast<kernels::PairCounts*>(counts.data());
  Score score;
  Sums sums;
  model::ForwardOptions options;
  options.method = &method;
  options.logits = model::LogitsMode::kScores;
  const double begin = Seconds();
  options.after_layer = [&](int layer) -> absl::Status {
    if (layer < last_layer) return absl::OkStatus();
    VSP_RETURN_IF_ERROR(lab_.model().Synchronize());
    score.seconds = Seconds() - begin;
    return absl::OkStatus();
  };
  options.watch_logits = [&](const model::LogitsBlock& block) {
    Look(block, is_dense, &sums);
    return absl::OkStatus();
  };
  VSP_ASSIGN_OR_RETURN(const model::ForwardResult forward,
                       lab_.model().Forward({&chunk, 1}, options));
  VSP_ASSIGN_OR_RETURN(score.shares, lab_.ReadCounts(counts));
  const std::vector<float>& log_probs = forward.log_probs.at(0);
  score.positions = static_cast<int64_t>(log_probs.size()) - first_;
  for (size_t i = first_; i < log_probs.size(); ++i) {
    score.nll -= log_probs[i] / static_cast<double>(score.positions);
  }
  if (is_dense) return score;
  score.kl = sums.kl / static_cast<double>(std::max<int64_t>(1, sums.kl_positions));
  score.same_top = static_cast<double>(sums.same_top) / static_cast<double>(score.positions);
  return score;
}

}  // namespace vsprefill::eval
