// MInference's vertical-slash selection: a task is one query head.
#include <algorithm>
#include <vector>

#include "kernels/cpu/parallel.h"
#include "kernels/cpu/query_scores.h"

namespace vsprefill::kernels {
namespace {

void SelectHead(const QuerySelectionInput& in, const MInferenceParams& params, int head,
                SparseIndexView* index) {
  const int64_t n = in.sequence.kv_tokens;
  constexpr int kRowTile = RowTilePositions(1);
  static thread_local std::vector<uint64_t> sums;
  sums.resize(2 * n);
  uint64_t *const columns = sums.data(), *const offsets = columns + n;
  cpu::LastRowSums(in, head, std::min<int64_t>(params.last_queries, in.sequence.q_tokens), columns,
                   offsets);

  std::vector<int32_t> top =
      cpu::TopPositions(columns, n, params.forced_verticals,
                        std::max<int64_t>(params.vertical_size, params.min_vertical));
  std::sort(top.begin(), top.end());
  std::copy(top.begin(), top.end(), index->verticals + head * index->vertical_stride);
  index->num_verticals[head] = static_cast<int32_t>(top.size());

  uint32_t* const bits = index->band_bits + head * index->band_stride;
  std::fill_n(bits, index->band_stride, 0u);
  for (int32_t o : cpu::TopPositions(offsets, n, params.forced_slashes,
                                     std::max<int64_t>(params.slash_size, params.min_slash))) {
    for (int64_t b = o / kBandBlock; b <= (o + kRowTile - 1) / kBandBlock; ++b) SetBit(bits, b);
  }
  int32_t* const bands = index->bands + head * index->band_list_stride;
  int32_t count = 0;
  for (int64_t b = 0; b < BandBlocks(n, kRowTile); ++b) {
    if (TestBit(bits, b)) bands[count++] = static_cast<int32_t>(b);
  }
  index->num_bands[head] = count;
}

}  // namespace

KernelStatus SelectMInferenceCpu(const QuerySelectionInput& in, const MInferenceParams& params,
                                 SparseIndexView* index, Stream /*stream*/) {
  if (!cpu::SupportedSelection(in)) return KernelStatus::kUnsupportedShape;
  index->num_groups = in.shape.num_q_heads;
  index->dense_from = INT64_MAX;
  ParallelFor(in.shape.num_q_heads, [&](int64_t head, int /*worker*/) {
    SelectHead(in, params, static_cast<int>(head), index);
  });
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels
