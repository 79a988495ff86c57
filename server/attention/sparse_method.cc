#include "server/attention/sparse_method.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_format.h"
#include "kernels/cpu/tile_walk.h"
#include "server/attention/crossover.h"
#include "server/attention/execute.h"
#include "server/base/kernel_status.h"
#include "server/base/status_macros.h"

namespace vsprefill::attention {
namespace {

/// Hands out consecutive 256-byte aligned pieces of one block; measures with a null base.
class Layout {
 public:
  explicit Layout(char* base = nullptr) : base_(base) {}
  template <class T>
  T* Take(int64_t bytes) {
    T* const piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + bytes_);
    bytes_ += (bytes + 255) / 256 * 256;
    return piece;
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* base_;
  int64_t bytes_ = 0;
};

/// Points the view's buffers into `layout`, tile and word counts being set.
void LayOut(kernels::TileIndexView& view, bool columns, const kernels::AttentionShape& shape,
            Layout& layout) {
  view.blocks = layout.Take<uint32_t>(view.num_groups * view.num_tiles * view.block_words * 4);
  if (columns) {
    view.columns = layout.Take<uint32_t>(view.num_groups * view.num_sets() * view.column_words * 4);
  }
  if (view.means_stride > 0) {
    const int64_t bytes =
        shape.num_kv_heads * view.means_stride * shape.head_dim * kernels::SizeOf(shape.dtype);
    view.k_means = layout.Take<void>(bytes);
    view.v_means = layout.Take<void>(bytes);
  }
}

}  // namespace

SparseMethod::SparseMethod(absl::string_view name, const MethodContext& context,
                           const std::map<std::string, double>& parameters)
    : name_(name), context_(context), parameters_(parameters) {
  dense_layers_ = whole("dense_layers");
  dense_below_ = whole("dense_below");
  dense_fallback_ = whole("dense_fallback") != 0;
  fell_back_.resize(context.num_layers);
}

int SparseMethod::dense_fallback_layers() const {
  return static_cast<int>(std::count(fell_back_.begin(), fell_back_.end(), true));
}

bool SparseMethod::TooShortToPay(int64_t prompt_tokens) const {
  return dense_fallback_ && !on_cpu() &&
         prompt_tokens < CudaMinTokens(context_.num_q_heads, context_.head_dim);
}

absl::StatusOr<bool> SparseMethod::DenseIsFaster(const kernels::AttentionShape& shape,
                                                 const kernels::AttentionSequence& sequence) const {
  const int group_size = shape.num_q_heads / kernels::IndexGroups(shape, sequence);
  // Rows that the index reads densely anyway leave nothing to decide.
  if (kernels::GetRowTile(group_size, sequence, 0).dense) return false;
  kernels::AttentionSequence without = sequence;
  without.index = nullptr;
  without.tiles = nullptr;
  kernels::PairCounts index, dense;
  VSP_RETURN_IF_ERROR(FromKernelStatus(kernels().count_pairs(shape, sequence, &index, nullptr),
                                       "count_pairs of an index"));
  VSP_RETURN_IF_ERROR(FromKernelStatus(kernels().count_pairs(shape, without, &dense, nullptr),
                                       "count_pairs without an index"));
  return !IndexPaysOnCpu(index, dense);
}

IndexStatistics SparseMethod::index_statistics() const { return statistics_; }

absl::Status SparseMethod::Attend(const AttentionCall& call) {
  while (indexes_.size() < call.sequences.size()) indexes_.push_back(std::make_unique<Index>());
  for (size_t i = 0; i < call.sequences.size(); ++i) {
    SequenceCall& sequence = call.sequences[i];
    sequence.attention.index = nullptr;
    sequence.attention.tiles = nullptr;
    const bool wanted_dense = call.layer < dense_layers_ || sequence.prompt_tokens < dense_below_;
    const bool too_short = !wanted_dense && TooShortToPay(sequence.prompt_tokens);
    if (too_short) fell_back_[call.layer] = true;
    if (wanted_dense || too_short) {
      if (i == 0) statistics_.num_verticals = statistics_.num_bands = nullptr;
      continue;
    }
    const auto start = std::chrono::steady_clock::now();
    VSP_RETURN_IF_ERROR(Select(call, i));
    if (!on_cpu()) continue;
    if (dense_fallback_) {
      VSP_ASSIGN_OR_RETURN(const bool dense, DenseIsFaster(call.shape, sequence.attention));
      if (dense) {
        sequence.attention.index = nullptr;
        sequence.attention.tiles = nullptr;
        fell_back_[call.layer] = true;
        if (i == 0) statistics_.num_verticals = statistics_.num_bands = nullptr;
      }
    }
    statistics_.select_seconds +=
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  }
  return Execute(context_, call);
}

absl::StatusOr<kernels::QuerySelectionInput> SparseMethod::QueryInput(
    const AttentionCall& call, size_t i,
    int64_t (*workspace_bytes)(const kernels::QuerySelectionInput&)) {
  kernels::QuerySelectionInput input = {call.shape, call.sequences[i].attention,
                                        call.sequences[i].prompt_tokens};
  if (workspace_bytes == nullptr || on_cpu()) return input;
  if (workspace_.bytes() < workspace_bytes(input)) {
    // For the whole prompt at once, so that later chunks fit.
    kernels::QuerySelectionInput last = input;
    last.sequence.kv_tokens = std::max(last.sequence.kv_tokens, last.prompt_tokens);
    VSP_ASSIGN_OR_RETURN(workspace_, Buffer::Create(*context_.allocator, workspace_bytes(last)));
  }
  input.workspace = workspace_.data();
  return input;
}

absl::Status SparseMethod::Checked(kernels::KernelStatus status, const AttentionCall& call,
                                   size_t i) const {
  const SequenceCall& sequence = call.sequences[i];
  return FromKernelStatus(
      status, absl::StrFormat("%s selection (%d query heads, %d KV heads, rows %d to %d of %d)",
                              name_, call.shape.num_q_heads, call.shape.num_kv_heads,
                              sequence.attention.kv_tokens - sequence.attention.q_tokens,
                              sequence.attention.kv_tokens, sequence.prompt_tokens));
}

absl::StatusOr<char*> SparseMethod::Memory(Index& index, int64_t bytes) {
  if (index.memory.bytes() < bytes) {
    VSP_ASSIGN_OR_RETURN(index.memory, Buffer::Create(*context_.allocator, bytes));
  }
  return static_cast<char*>(index.memory.data());
}

absl::StatusOr<kernels::SparseIndexView*> SparseMethod::NewVerticalSlash(const AttentionCall& call,
                                                                         size_t i, int num_groups) {
  SequenceCall& sequence = call.sequences[i];
  kernels::SparseIndexView& view = indexes_[i]->vertical_slash;
  const int row_tile = kernels::RowTilePositions(call.shape.num_q_heads / num_groups);
  // For the whole prompt at once, so that later chunks fit.
  view.num_groups = num_groups;
  view.vertical_stride = sequence.prompt_tokens;
  view.band_stride = kernels::BandWords(sequence.prompt_tokens, row_tile);
  view.band_list_stride = kernels::BandBlocks(sequence.prompt_tokens, row_tile);
  const int64_t words =
      num_groups * (view.vertical_stride + view.band_stride + view.band_list_stride + 2);
  VSP_ASSIGN_OR_RETURN(char* const memory, Memory(*indexes_[i], words * 4));
  auto* next = reinterpret_cast<int32_t*>(memory);
  const auto take = [&next](int64_t count) { return std::exchange(next, next + count); };
  view.verticals = take(num_groups * view.vertical_stride);
  view.band_bits = reinterpret_cast<uint32_t*>(take(num_groups * view.band_stride));
  view.bands = take(num_groups * view.band_list_stride);
  view.num_verticals = take(num_groups);
  view.num_bands = take(num_groups);
  sequence.attention.index = &view;
  return &view;
}

absl::StatusOr<kernels::TileIndexView*> SparseMethod::NewTiles(const AttentionCall& call, size_t i,
                                                               int num_groups,
                                                               const TileOptions& options) {
  SequenceCall& sequence = call.sequences[i];
  const int64_t kv_tokens = sequence.attention.kv_tokens;
  kernels::TileIndexView& view = indexes_[i]->tiles;
  view = {};
  const int64_t positions = kernels::RowTilePositions(call.shape.num_q_heads / num_groups);
  view.num_groups = num_groups;
  view.first_tile = (kv_tokens - sequence.attention.q_tokens) / positions;
  view.num_tiles = (kv_tokens - 1) / positions + 1 - view.first_tile;
  // Rows for the whole prompt, so that chunks of one size need the same memory.
  const int64_t tokens = std::max(kv_tokens, sequence.prompt_tokens);
  view.block_words = kernels::KeyBlockWords(tokens);
  view.column_words = (tokens + 31) / 32;
  view.tiles_per_set = std::max<int64_t>(1, options.tiles_per_set);
  if (options.means) view.means_stride = kernels::KeyBlocks(tokens);
  Layout size;
  LayOut(view, options.tiles_per_set > 0, call.shape, size);
  VSP_ASSIGN_OR_RETURN(char* const memory, Memory(*indexes_[i], size.bytes()));
  Layout layout(memory);
  LayOut(view, options.tiles_per_set > 0, call.shape, layout);
  sequence.attention.tiles = &view;
  return &view;
}

void AddDenseParameters(MethodSpec& spec, double dense_below, bool dense_fallback) {
  spec.parameters.push_back(
      {"dense_layers", 0, 0, 1e4, "first layers that stay dense", /*whole=*/true});
  spec.parameters.push_back({"dense_below", dense_below, 0, kMaxTokens,
                             "prompts with fewer tokens are computed densely", /*whole=*/true});
  spec.parameters.push_back({"dense_fallback", dense_fallback ? 1.0 : 0.0, 0, 1,
                             "1: dense where the index would be slower; 0: never",
                             /*whole=*/true});
}

}  // namespace vsprefill::attention
