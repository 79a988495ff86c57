// StreamingLLM's pattern, literally: every band that some row of some tile needs.
#include <vector>

#include "kernels/ref/query_scores_ref.h"

namespace vsprefill::kernels {

KernelStatus SelectWindowRef(const QuerySelectionInput& in, const WindowParams& params,
                             SparseIndexView* index, Stream) {
  if (!ref::Supported(in)) return KernelStatus::kUnsupportedShape;
  const int64_t n = in.sequence.kv_tokens;
  const int64_t row_tile = RowTilePositions(in.shape.group_size());
  std::vector<int64_t> verticals, bands;
  for (int64_t c = 0; c < n && c < params.sink_tokens; ++c) verticals.push_back(c);
  for (int64_t b = 0; b < BandBlocks(n, static_cast<int>(row_tile)); ++b) {
    // The local band is at least two blocks (sparse_index.h).
    bool needed = b < 2;
    for (int64_t row = 0; row < row_tile; ++row) {  // from the tile's last position back
      needed |= b * kBandBlock <= row + params.window_tokens - 1;
    }
    if (needed) bands.push_back(b);
  }
  index->num_groups = in.shape.num_kv_heads;
  index->dense_from = INT64_MAX;
  for (int group = 0; group < index->num_groups; ++group) {
    ref::WriteGroup(verticals, bands, group, index);
  }
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels
