#include "training/index_mask.h"

#include <torch/cuda.h>

#include <algorithm>

#include "server/base/kernel_status.h"
#include "server/base/status_macros.h"

namespace vsprefill::training {
namespace {

using kernels::SparseIndexView;
using kernels::TileIndexView;

/// An index's words or list entries as a tensor over its memory, int32.
torch::Tensor Ints(const void* data, torch::IntArrayRef shape, torch::IntArrayRef strides,
                   torch::Device device) {
  return torch::from_blob(const_cast<void*>(data), shape, strides,
                          torch::TensorOptions(torch::kInt32).device(device));
}

/// Bits of int32 words, bool [..., 32 * words].
torch::Tensor Bits(const torch::Tensor& words) {
  const torch::Tensor bit = torch::arange(32, words.options());
  return torch::bitwise_right_shift(words.unsqueeze(-1), bit)
      .bitwise_and(1)
      .flatten(-2)
      .to(torch::kBool);
}

/// The distance block of every column, int64 [rows, tokens], seen from the positions `last`; 0
/// right of them.
torch::Tensor DistanceBlocks(const torch::Tensor& last, int64_t tokens) {
  return (last.unsqueeze(1) - torch::arange(tokens, last.options()).unsqueeze(0))
      .clamp_min(0)
      .div(kernels::kBandBlock, "floor");
}

/// Columns and bands of an index, bool [groups, rows, tokens]; `block_of` from DistanceBlocks.
/// Nothing is said about the causal mask and dense_from.
torch::Tensor VerticalSlashMask(const SparseIndexView& index, const torch::Tensor& block_of) {
  const int64_t tokens = block_of.size(1), groups = index.num_groups;
  const torch::Device device = block_of.device();
  const torch::Tensor count = Ints(index.num_verticals, {groups}, {1}, device);
  const torch::Tensor verticals =
      Ints(index.verticals, {groups, std::min(index.vertical_stride, tokens)},
           {index.vertical_stride, 1}, device);
  const torch::Tensor item = torch::arange(verticals.size(1), block_of.options()).unsqueeze(0);
  // List entries past the count go to a column of their own, which is cut off.
  const torch::Tensor target =
      torch::where(item < count.unsqueeze(1), verticals.to(torch::kInt64), tokens);
  const torch::Tensor columns =
      torch::zeros({groups, tokens + 1}, target.options().dtype(torch::kBool))
          .scatter_(1, target, true)
          .narrow(1, 0, tokens);
  // Words past a shorter chunk's blocks hold what was selected before: no tile of the chunk looks
  // that far.
  const torch::Tensor blocks =
      Bits(Ints(index.band_bits, {groups, index.band_stride}, {index.band_stride, 1}, device));
  const torch::Tensor in_band =
      blocks.index_select(1, block_of.flatten()).view({groups, block_of.size(0), tokens});
  return in_band.logical_or_(columns.unsqueeze(1));
}

/// Blocks and single columns of an index, bool [groups, rows, tokens]; tile: int64 [rows].
torch::Tensor TileMask(const TileIndexView& index, const torch::Tensor& tile, int64_t tokens) {
  const torch::Device device = tile.device();
  const torch::Tensor words =
      Ints(index.blocks, {index.num_groups, index.num_tiles, index.block_words},
           {index.num_tiles * index.block_words, index.block_words, 1}, device);
  torch::Tensor mask = Bits(words.index_select(1, tile - index.first_tile))
                           .narrow(2, 0, kernels::KeyBlocks(tokens))
                           .repeat_interleave(kernels::kKeyBlock, 2)
                           .narrow(2, 0, tokens);
  if (index.columns == nullptr) return mask;
  const torch::Tensor columns =
      Ints(index.columns, {index.num_groups, index.num_sets(), index.column_words},
           {index.num_sets() * index.column_words, index.column_words, 1}, device);
  const torch::Tensor set =
      tile.div(index.tiles_per_set, "floor") - index.first_tile / index.tiles_per_set;
  return mask.logical_or(Bits(columns.index_select(1, set)).narrow(2, 0, tokens));
}

}  // namespace

torch::Tensor ReadMask(const kernels::AttentionShape& shape,
                       const kernels::AttentionSequence& sequence, const torch::Tensor& rows) {
  const int64_t tokens = sequence.kv_tokens, groups = kernels::IndexGroups(shape, sequence);
  const torch::Tensor causal =
      (torch::arange(tokens, rows.options()).unsqueeze(0) <= rows.unsqueeze(1)).unsqueeze(0);
  if (sequence.dense()) return causal.expand({groups, rows.size(0), tokens});
  const int64_t positions = kernels::RowTilePositions(static_cast<int>(shape.num_q_heads / groups));
  const torch::Tensor tile = rows.div(positions, "floor");
  if (sequence.tiles != nullptr) {
    return TileMask(*sequence.tiles, tile, tokens).logical_and_(causal);
  }
  const SparseIndexView& index = *sequence.index;
  const torch::Tensor last = tile * positions + (positions - 1);
  torch::Tensor mask = VerticalSlashMask(index, DistanceBlocks(last, tokens));
  if (index.dense_from < tokens) {
    mask.logical_or_((last.clamp_max(tokens - 1) >= index.dense_from).view({1, -1, 1}));
  }
  return mask.logical_and_(causal);
}

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
  block_of_ = DistanceBlocks(tiles->last, tiles->tokens);
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
  return VerticalSlashMask(index, block_of_);
}

}  // namespace vsprefill::training
