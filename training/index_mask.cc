#include "training/index_mask.h"

#include "server/base/kernel_status.h"
#include "server/base/status_macros.h"

namespace vsprefill::training {

IndexMasker::IndexMasker(model::Transformer* model, const TileSet* tiles)
    : model_(model),
      tiles_(tiles),
      groups_(model->config().num_kv_heads),
      group_size_(model->config().num_q_heads / model->config().num_kv_heads) {
  const torch::TensorOptions ints = tiles->last.options().dtype(torch::kInt32);
  const int row_tile = kernels::RowTilePositions(group_size_);
  const int64_t blocks = kernels::BandBlocks(tiles->tokens, row_tile);
  verticals_ = torch::zeros({groups_, tiles->tokens}, ints);
  num_verticals_ = torch::zeros({groups_}, ints);
  band_bits_ = torch::zeros({groups_, kernels::BandWords(tiles->tokens, row_tile)}, ints);
  bands_ = torch::zeros({groups_, blocks}, ints);
  num_bands_ = torch::zeros({groups_}, ints);
  workspace_ = torch::zeros({kernels::SelectionWorkspaceBytes(groups_, tiles->tokens)},
                            ints.dtype(torch::kUInt8));
  block_of_ =
      (tiles->last.unsqueeze(1) - torch::arange(tiles->tokens, tiles->last.options()).unsqueeze(0))
          .clamp_min(0)
          .div(kernels::kBandBlock, "floor");
}

absl::StatusOr<torch::Tensor> IndexMasker::Mask(const torch::Tensor& vertical_logits,
                                                const torch::Tensor& slash_logits,
                                                kernels::SelectionParams params,
                                                const std::vector<float>& scale,
                                                int64_t kv_tokens) {
  const torch::Tensor vertical = vertical_logits.contiguous(), slash = slash_logits.contiguous();
  kernels::SelectionInput input;
  input.vertical_logits = vertical.data_ptr<float>();
  input.slash_logits = slash.data_ptr<float>();
  input.logit_stride = tiles_->tokens;
  input.num_groups = groups_;
  input.group_size = group_size_;
  input.kv_tokens = kv_tokens > 0 ? kv_tokens : tiles_->tokens;
  input.prompt_tokens = tiles_->tokens;
  input.threshold_scale = scale.data();
  params.last_dense_tokens = 0;
  kernels::SparseIndexView index;
  index.num_groups = groups_;
  index.verticals = verticals_.data_ptr<int32_t>();
  index.vertical_stride = verticals_.size(1);
  index.num_verticals = num_verticals_.data_ptr<int32_t>();
  index.band_bits = reinterpret_cast<uint32_t*>(band_bits_.data_ptr<int32_t>());
  index.band_stride = band_bits_.size(1);
  index.bands = bands_.data_ptr<int32_t>();
  index.band_list_stride = bands_.size(1);
  index.num_bands = num_bands_.data_ptr<int32_t>();
  // The logits come from LibTorch's stream, the kernel runs on the model's.
  if (vertical.is_cuda()) torch::cuda::synchronize();
  VSP_RETURN_IF_ERROR(FromKernelStatus(
      model_->kernels().select(input, params, workspace_.data_ptr(), &index, model_->stream()),
      "select"));
  VSP_RETURN_IF_ERROR(model_->Synchronize());

  const int64_t tokens = tiles_->tokens;
  const torch::Tensor item = torch::arange(tokens, tiles_->last.options()).unsqueeze(0);
  // List entries past the count go to a column of their own, which is cut off.
  const torch::Tensor target =
      torch::where(item < num_verticals_.unsqueeze(1), verticals_.to(torch::kInt64), tokens);
  const torch::Tensor columns =
      torch::zeros({groups_, tokens + 1}, target.options().dtype(torch::kBool))
          .scatter_(1, target, true)
          .narrow(1, 0, tokens);
  // Words past a shorter chunk's blocks hold what was selected before: no tile of the chunk looks
  // that far.
  const torch::Tensor bit = torch::arange(32, band_bits_.options());
  const torch::Tensor blocks = torch::bitwise_right_shift(band_bits_.unsqueeze(2), bit)
                                   .bitwise_and(1)
                                   .flatten(1)
                                   .to(torch::kBool);
  const torch::Tensor in_band =
      blocks.index_select(1, block_of_.flatten()).view({groups_, tiles_->num_tiles(), tokens});
  return in_band.logical_or_(columns.unsqueeze(1));
}

}  // namespace vsprefill::training
