// FlexPrefill's selection, literally.
#include <vector>

#include "kernels/ref/query_scores_ref.h"

namespace vsprefill::kernels {
namespace {

/// Number of entries, largest first, whose running sum is within gamma of `rows` rows' mass.
int64_t Within(const std::vector<uint64_t>& values, double gamma, int64_t rows) {
  int64_t count = 0;
  uint64_t sum = 0;
  for (int64_t i : ref::Descending(values)) {
    sum += values[i];
    if (!selection::WithinGamma(sum, gamma, rows)) break;
    ++count;
  }
  return count;
}

std::vector<uint64_t> ByBlocks(const std::vector<uint64_t>& values) {
  std::vector<uint64_t> blocks(KeyBlocks(std::ssize(values)), 0);
  for (size_t i = 0; i < values.size(); ++i) blocks[i / kKeyBlock] += values[i];
  return blocks;
}

/// The `count` largest, the first before all others.
std::vector<int64_t> TopBlocks(std::vector<uint64_t> values, int64_t count) {
  values[0] = UINT64_MAX;
  std::vector<int64_t> order = ref::Descending(values);
  order.resize(std::min<int64_t>(count, std::ssize(order)));
  return order;
}

}  // namespace

KernelStatus SelectFlexRef(const QuerySelectionInput& in, const FlexParams& params,
                           TileIndexView* index, Stream) {
  if (!ref::Supported(in)) return KernelStatus::kUnsupportedShape;
  const AttentionSequence& s = in.sequence;
  const int64_t n = s.kv_tokens, blocks = KeyBlocks(n);
  const int64_t last_rows = std::min<int64_t>(kKeyBlock, s.q_tokens);
  ref::Clear(s, in.shape.num_q_heads, 1, index);
  const selection::ChunkTiles tiles = selection::TilesOf(s, 1);
  for (int head = 0; head < in.shape.num_q_heads; ++head) {
    std::vector<uint64_t> columns(n, 0), offsets(n, 0);
    for (int64_t i = n - last_rows; i < n; ++i) {
      ref::Vector logits;
      for (int64_t c = 0; c <= i; ++c) {
        logits.push_back(ref::Logit(in, ref::Query(in, head, i), ref::Key(in, head, c)));
      }
      const std::vector<uint64_t> shares = ref::Shares(logits);
      for (int64_t c = 0; c <= i; ++c) {
        columns[c] += shares[c];
        offsets[i - c] += shares[c];
      }
    }
    int64_t num_columns =
        selection::FlexBlocks(1 + Within(columns, params.gamma, last_rows), params, blocks);
    int64_t num_offsets =
        selection::FlexBlocks(1 + Within(offsets, params.gamma, last_rows), params, blocks);

    std::vector<ref::Vector> mean_keys;
    for (int64_t b = 0; b < blocks; ++b) mean_keys.push_back(ref::MeanKey(in, head, b));
    const auto block_shares = [&](const ref::Vector& mean_query, int64_t count) {
      ref::Vector logits;
      for (int64_t b = 0; b < count; ++b) {
        logits.push_back(ref::Logit(in, mean_query, mean_keys[b]));
      }
      return ref::Shares(logits);
    };
    const std::vector<uint64_t> column_blocks = ByBlocks(columns);
    const std::vector<uint64_t> estimated =
        block_shares(ref::MeanQuery(in, head, n - last_rows, n), blocks);
    const double divergence = selection::SqrtJsDivergence(
        estimated.data(), static_cast<double>(selection::kShareOne), column_blocks.data(),
        static_cast<double>(selection::kShareOne) * static_cast<double>(last_rows), blocks);
    if (divergence < params.tau) {
      num_columns = num_offsets = selection::FlexBlocks(
          0, {params.gamma, params.tau, params.min_budget, params.min_budget}, blocks);
      std::vector<uint64_t> flat;  // [block row, block], with the invisible ones at 0
      for (int64_t t = tiles.first; t < tiles.first + tiles.count; ++t) {
        const selection::TileRows rows = selection::RowsOf(s, tiles, t);
        std::vector<uint64_t> shares =
            block_shares(ref::MeanQuery(in, head, rows.begin, rows.end), t + 1);
        shares.resize(blocks, 0);
        flat.insert(flat.end(), shares.begin(), shares.end());
      }
      const std::vector<int64_t> order = ref::Descending(flat);
      for (int64_t i = 0; i < Within(flat, params.gamma, tiles.count); ++i) {
        const int64_t t = tiles.first + order[i] / blocks, b = order[i] % blocks;
        if (b <= t) SetBit(index->BlocksOf(head, t), b);
      }
    }
    for (int64_t t = tiles.first; t < tiles.first + tiles.count; ++t) {
      uint32_t* const bits = index->BlocksOf(head, t);
      for (int64_t c : TopBlocks(column_blocks, num_columns)) {
        if (c <= t) SetBit(bits, c);
      }
      for (int64_t o : TopBlocks(ByBlocks(offsets), num_offsets)) {
        if (o <= t) SetBit(bits, t - o);
      }
    }
  }
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels
