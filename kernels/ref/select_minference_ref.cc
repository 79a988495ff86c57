// MInference's vertical-slash selection, literally.
#include <set>
#include <vector>

#include "kernels/ref/query_scores_ref.h"

namespace vsprefill::kernels {
namespace {

/// The `count` largest, the first `forced` before all others, ascending.
std::vector<int64_t> Top(std::vector<uint64_t> sums, int64_t forced, int64_t count) {
  const int64_t n = std::ssize(sums);
  for (int64_t i = 0; i < std::min(forced, n); ++i) sums[i] = UINT64_MAX;
  std::vector<int64_t> order = ref::Descending(sums);
  order.resize(std::min(count, n));
  std::sort(order.begin(), order.end());
  return order;
}

}  // namespace

KernelStatus SelectMInferenceRef(const QuerySelectionInput& in, const MInferenceParams& params,
                                 SparseIndexView* index, Stream) {
  if (!ref::Supported(in)) return KernelStatus::kUnsupportedShape;
  const AttentionSequence& s = in.sequence;
  const int64_t n = s.kv_tokens;
  index->num_groups = in.shape.num_q_heads;
  index->dense_from = INT64_MAX;
  const int64_t row_tile = RowTilePositions(1);
  for (int head = 0; head < in.shape.num_q_heads; ++head) {
    std::vector<uint64_t> columns(n, 0), offsets(n, 0);
    for (int64_t i = n - std::min<int64_t>(params.last_queries, s.q_tokens); i < n; ++i) {
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
    const std::vector<int64_t> verticals =
        Top(columns, params.forced_verticals,
            std::max<int64_t>(params.vertical_size, params.min_vertical));
    std::set<int64_t> bands;
    for (int64_t o : Top(offsets, params.forced_slashes,
                         std::max<int64_t>(params.slash_size, params.min_slash))) {
      // Distances of offset o in a tile: [o, o + row_tile - 1].
      for (int64_t distance = o; distance < o + row_tile; ++distance) {
        bands.insert(distance / kBandBlock);
      }
    }
    ref::WriteGroup(verticals, {bands.begin(), bands.end()}, head, index);
  }
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels
