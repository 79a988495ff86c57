// StreamingLLM's pattern in closed form; the same for all groups.
#include <algorithm>

#include "kernels/cpu/query_scores.h"

namespace vsprefill::kernels {

KernelStatus SelectWindowCpu(const QuerySelectionInput& in, const WindowParams& params,
                             SparseIndexView* index, Stream /*stream*/) {
  if (!cpu::SupportedSelection(in)) return KernelStatus::kUnsupportedShape;
  const int64_t n = in.sequence.kv_tokens;
  const int row_tile = RowTilePositions(in.shape.group_size());
  const int64_t sinks = std::min<int64_t>(params.sink_tokens, n);
  const int64_t bands =
      selection::WindowBands(params.window_tokens, row_tile, BandBlocks(n, row_tile));
  index->num_groups = in.shape.num_kv_heads;
  index->dense_from = INT64_MAX;
  for (int group = 0; group < index->num_groups; ++group) {
    int32_t* const verticals = index->verticals + group * index->vertical_stride;
    for (int64_t c = 0; c < sinks; ++c) verticals[c] = static_cast<int32_t>(c);
    index->num_verticals[group] = static_cast<int32_t>(sinks);
    int32_t* const list = index->bands + group * index->band_list_stride;
    uint32_t* const bits = index->band_bits + group * index->band_stride;
    std::fill_n(bits, index->band_stride, 0u);
    for (int64_t b = 0; b < bands; ++b) {
      list[b] = static_cast<int32_t>(b);
      SetBit(bits, b);
    }
    index->num_bands[group] = static_cast<int32_t>(bands);
  }
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels
