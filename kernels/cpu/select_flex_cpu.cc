// FlexPrefill's selection: a task is one query head.
#include <algorithm>
#include <functional>
#include <vector>

#include "kernels/cpu/isa_kernels.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/query_scores.h"

namespace vsprefill::kernels {
namespace {

using cpu::QueryLanes;

/// Entries, largest first, whose running sum is within gamma of `rows` rows' mass.
int64_t Within(std::vector<uint64_t> values, double gamma, int64_t rows) {
  std::sort(values.begin(), values.end(), std::greater<>());
  uint64_t sum = 0;
  int64_t count = 0;
  for (; count < std::ssize(values); ++count) {
    sum += values[count];
    if (!selection::WithinGamma(sum, gamma, rows)) break;
  }
  return count;
}

std::vector<uint64_t> ByBlocks(const std::vector<uint64_t>& values) {
  std::vector<uint64_t> blocks(KeyBlocks(std::ssize(values)), 0);
  for (size_t i = 0; i < values.size(); ++i) blocks[i / kKeyBlock] += values[i];
  return blocks;
}

/// Softmax shares of mean queries with the mean keys, [queries, blocks]; query i sees visible[i].
std::vector<uint64_t> BlockShares(const QueryLanes& queries, const std::vector<float>& mean_keys,
                                  float scale, std::vector<int64_t> visible) {
  const int64_t blocks = std::ssize(mean_keys) / queries.depth(), count = std::ssize(visible);
  visible.resize(queries.lanes(), 0);
  std::vector<float> logits(blocks * queries.lanes());
  cpu::RowLogits(mean_keys.data(), blocks, queries, scale, logits.data());
  std::vector<uint64_t> all(count * blocks);
  cpu::ForShares(logits.data(), blocks, queries.lanes(), visible.data(),
                 [&](int64_t b, const uint64_t* shares) {
                   for (int64_t i = 0; i < count; ++i) all[i * blocks + b] = shares[i];
                 });
  return all;
}

class HeadSelector {
 public:
  HeadSelector(const QuerySelectionInput& in, const FlexParams& params, int head,
               TileIndexView* index)
      : in_(in),
        params_(params),
        head_(head),
        index_(index),
        n_(in.sequence.kv_tokens),
        blocks_(KeyBlocks(n_)),
        last_rows_(std::min<int64_t>(kKeyBlock, in.sequence.q_tokens)),
        tiles_(selection::TilesOf(in.sequence, 1)) {}

  void Run() {
    std::vector<uint64_t> columns(n_), offsets(n_);
    cpu::LastRowSums(in_, head_, last_rows_, columns.data(), offsets.data());
    const std::vector<uint64_t> column_blocks = ByBlocks(columns),
                                offset_blocks = ByBlocks(offsets);
    PoolKeys();
    int64_t num_columns, num_offsets;
    if (QueryAware(column_blocks)) {
      num_columns = num_offsets = MinimumBlocks();
      AddLargestPairs();
    } else {
      num_columns = Blocks(std::move(columns));
      num_offsets = Blocks(std::move(offsets));
    }
    for (int32_t c : cpu::TopPositions(column_blocks.data(), blocks_, 1, num_columns)) {
      for (int64_t t = std::max<int64_t>(tiles_.first, c); t < tiles_end(); ++t) Read(t, c);
    }
    for (int32_t o : cpu::TopPositions(offset_blocks.data(), blocks_, 1, num_offsets)) {
      for (int64_t t = std::max<int64_t>(tiles_.first, o); t < tiles_end(); ++t) Read(t, t - o);
    }
  }

 private:
  int64_t tiles_end() const { return tiles_.first + tiles_.count; }
  void Read(int64_t tile, int64_t block) { SetBit(index_->BlocksOf(head_, tile), block); }

  int64_t Blocks(std::vector<uint64_t> sums) const {
    return selection::FlexBlocks(1 + Within(std::move(sums), params_.gamma, last_rows_), params_,
                                 blocks_);
  }
  int64_t MinimumBlocks() const {
    FlexParams least = params_;
    least.max_budget = least.min_budget;
    return selection::FlexBlocks(0, least, blocks_);
  }

  void PoolKeys() {
    const AttentionSequence& s = in_.sequence;
    const int d = in_.shape.head_dim;
    mean_keys_.resize(blocks_ * d);
    for (int64_t b = 0; b < blocks_; ++b) {
      const int64_t first = b * kKeyBlock;
      cpu::MeanRow(s.k,
                   head_ / in_.shape.group_size() * s.kv_head_stride + first * s.kv_token_stride,
                   s.kv_token_stride, std::min<int64_t>(kKeyBlock, n_ - first), d, in_.shape.dtype,
                   mean_keys_.data() + b * d);
    }
  }
  void SetMeanQuery(QueryLanes& lanes, int lane, int64_t begin, int64_t end) const {
    float mean[cpu::kMaxHeadDim];
    cpu::MeanRow(in_.sequence.q, cpu::QueryOffset(in_.sequence, head_, begin),
                 in_.sequence.q_token_stride, end - begin, in_.shape.head_dim, in_.shape.dtype,
                 mean);
    lanes.Set(lane, 0, mean, in_.shape.head_dim);
  }

  bool QueryAware(const std::vector<uint64_t>& column_blocks) const {
    QueryLanes query(1, in_.shape.head_dim);
    SetMeanQuery(query, 0, n_ - last_rows_, n_);
    const std::vector<uint64_t> estimated =
        BlockShares(query, mean_keys_, in_.shape.scale, {blocks_});
    const double one = static_cast<double>(selection::kShareOne);
    return selection::SqrtJsDivergence(estimated.data(), one, column_blocks.data(),
                                       one * static_cast<double>(last_rows_),
                                       blocks_) < params_.tau;
  }

  /// Of all (block row, block) pairs of the mean queries' softmax, the largest.
  void AddLargestPairs() {
    QueryLanes queries(tiles_.count, in_.shape.head_dim);
    std::vector<int64_t> visible;
    for (int64_t i = 0; i < tiles_.count; ++i) {
      const selection::TileRows rows = selection::RowsOf(in_.sequence, tiles_, tiles_.first + i);
      SetMeanQuery(queries, static_cast<int>(i), rows.begin, rows.end);
      visible.push_back(tiles_.first + i + 1);
    }
    const std::vector<uint64_t> pairs =
        BlockShares(queries, mean_keys_, in_.shape.scale, std::move(visible));
    const int64_t kept = Within(pairs, params_.gamma, tiles_.count);
    for (int32_t pair : cpu::TopPositions(pairs.data(), std::ssize(pairs), 0, kept)) {
      const int64_t tile = tiles_.first + pair / blocks_, block = pair % blocks_;
      if (block <= tile) Read(tile, block);
    }
  }

  const QuerySelectionInput& in_;
  const FlexParams& params_;
  const int head_;
  TileIndexView* const index_;
  const int64_t n_, blocks_, last_rows_;
  const selection::ChunkTiles tiles_;
  std::vector<float> mean_keys_;  // [blocks, head_dim]
};

}  // namespace

KernelStatus SelectFlexCpu(const QuerySelectionInput& in, const FlexParams& params,
                           TileIndexView* index, Stream /*stream*/) {
  if (!cpu::SupportedSelection(in)) return KernelStatus::kUnsupportedShape;
  cpu::ClearBlocks(in.sequence, in.shape.num_q_heads, 1, index);
  ParallelFor(in.shape.num_q_heads, [&](int64_t head, int /*worker*/) {
    HeadSelector(in, params, static_cast<int>(head), index).Run();
  });
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels
