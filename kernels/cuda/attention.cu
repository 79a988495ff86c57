// AttentionCuda: checks shapes, describes sequences to the kernels and picks one.
#include <algorithm>
#include <array>
#include <initializer_list>

#include "kernels/attention.h"
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/launch.h"

namespace vsprefill::kernels {
namespace {

using cuda::AttentionBatch;
using cuda::KernelChoice;
using cuda::SequenceParams;

bool Supported(const AttentionShape& shape) {
  return shape.num_kv_heads > 0 && shape.num_q_heads > 0 &&
         shape.num_q_heads % shape.num_kv_heads == 0 && shape.group_size() <= kPackedRows;
}

bool Supported(const AttentionShape& shape, const AttentionSequence& s) {
  const int64_t elements = 16 / SizeOf(shape.dtype);
  for (int64_t stride : {s.q_token_stride, s.q_head_stride, s.kv_head_stride, s.kv_token_stride,
                         s.out_token_stride, s.out_head_stride}) {
    if (stride % elements != 0) return false;
  }
  return cuda::Aligned16(s.q) && cuda::Aligned16(s.k) && cuda::Aligned16(s.v) &&
         cuda::Aligned16(s.out) && s.q_tokens >= 0 && s.q_tokens <= s.kv_tokens &&
         s.kv_tokens < (int64_t{1} << 30) && SupportedIndex(shape, s);
}

SequenceParams Describe(const AttentionSequence& s, int64_t row_tile) {
  SequenceParams p = {};
  p.q = s.q;
  p.k = s.k;
  p.v = s.v;
  p.out = s.out;
  p.q_token_stride = s.q_token_stride;
  p.q_head_stride = s.q_head_stride;
  p.kv_head_stride = s.kv_head_stride;
  p.kv_token_stride = s.kv_token_stride;
  p.out_token_stride = s.out_token_stride;
  p.out_head_stride = s.out_head_stride;
  const int64_t q_start = s.kv_tokens - s.q_tokens;
  const int64_t last_tile = (s.kv_tokens - 1) / row_tile;
  p.q_start = static_cast<int32_t>(q_start);
  p.kv_tokens = static_cast<int32_t>(s.kv_tokens);
  p.first_tile = static_cast<int32_t>(q_start / row_tile);
  p.num_tiles = static_cast<int32_t>(last_tile + 1 - p.first_tile);
  p.dense_parts = 1;
  if (s.tiles != nullptr) {
    const TileIndexView& tiles = *s.tiles;
    p.block_words = static_cast<int32_t>(tiles.block_words);
    p.blocks_stride = static_cast<int32_t>(tiles.num_tiles * tiles.block_words);
    p.blocks = tiles.blocks - tiles.first_tile * tiles.block_words;
    p.tiles_per_set = static_cast<int32_t>(tiles.tiles_per_set);
    if (tiles.columns != nullptr) {
      p.column_words = static_cast<int32_t>(tiles.column_words);
      p.columns_stride = static_cast<int32_t>(tiles.num_sets() * tiles.column_words);
      p.columns = tiles.columns - tiles.first_tile / tiles.tiles_per_set * tiles.column_words;
    }
    p.k_means = tiles.k_means;
    p.v_means = tiles.v_means;
    p.means_stride = static_cast<int32_t>(tiles.means_stride);
  }
  if (s.index == nullptr) return p;
  p.verticals = s.index->verticals;
  p.num_verticals = s.index->num_verticals;
  p.band_bits = s.index->band_bits;
  p.bands = s.index->bands;
  p.num_bands = s.index->num_bands;
  p.vertical_stride = s.index->vertical_stride;
  p.band_stride = s.index->band_stride;
  p.band_list_stride = s.index->band_list_stride;
  // Tile t is dense iff its last position, (t + 1) row_tile - 1, is at or past dense_from.
  const int64_t first_dense =
      std::max<int64_t>(std::max<int64_t>(s.index->dense_from, 0) / row_tile, p.first_tile);
  p.dense_tiles = static_cast<int32_t>(std::max<int64_t>(0, last_tile + 1 - first_dense));
  if (p.dense_tiles > 0 && s.workspace != nullptr) {
    p.partials = static_cast<float*>(s.workspace);
    p.dense_parts = DenseRowParts(s.index->dense_from);
  }
  return p;
}

/// What the Hopper kernel does not know: pseudo-keys.
bool HasMeans(const AttentionBatch& batch) {
  return std::any_of(batch.sequences, batch.sequences + batch.num_sequences,
                     [](const SequenceParams& p) { return p.k_means != nullptr; });
}

/// Numbers the work items of the batch through; returns how many there are.
int64_t NumberItems(AttentionBatch& batch) {
  int64_t items = 0;
  for (SequenceParams* p = batch.sequences; p != batch.sequences + batch.num_sequences; ++p) {
    p->item_begin = static_cast<int32_t>(items);
    items += (p->num_tiles + int64_t{p->dense_tiles} * (p->dense_parts - 1)) * batch.num_groups;
  }
  return items;
}

KernelStatus LaunchOn(KernelChoice kernel, DType dtype, AttentionBatch& batch, int head_dim,
                      cudaStream_t stream) {
  // Half of the range: persistent blocks count on past the last item.
  int64_t items = NumberItems(batch);
  if (items > INT32_MAX / 2) return KernelStatus::kUnsupportedShape;
  if (dtype == DType::kBF16 && kernel == KernelChoice::kFastest && !HasMeans(batch) &&
      cuda::DeviceIsSm90()) {
    const KernelStatus status =
        cuda::LaunchAttentionSm90(batch, static_cast<int>(items), head_dim, stream);
    if (status != KernelStatus::kUnsupportedShape) return status;
  }
  for (SequenceParams* p = batch.sequences; p != batch.sequences + batch.num_sequences; ++p) {
    p->dense_parts = 1;
  }
  items = NumberItems(batch);
  return dtype == DType::kBF16
             ? cuda::LaunchAttentionBf16(batch, static_cast<int>(items), head_dim, stream)
             : cuda::LaunchAttentionF32(batch, static_cast<int>(items), head_dim, stream);
}

/// One launch: sequences whose indexes are of one kind and for equally many groups.
KernelStatus Launch(KernelChoice kernel, const AttentionShape& shape, int num_groups,
                    const AttentionSequence** order, int count, Stream stream) {
  AttentionBatch batch = {};
  batch.num_groups = num_groups;
  batch.group_size = shape.num_q_heads / num_groups;
  batch.row_tile = RowTilePositions(batch.group_size);
  batch.groups_per_kv_head = num_groups / shape.num_kv_heads;
  batch.scale = shape.scale;
  // The longest sequence first: its late tiles are the heaviest items of the launch.
  std::stable_sort(order, order + count,
                   [](const auto* a, const auto* b) { return a->kv_tokens > b->kv_tokens; });
  for (int i = 0; i < count; ++i) batch.sequences[i] = Describe(*order[i], batch.row_tile);
  batch.num_sequences = count;
  return LaunchOn(kernel, shape.dtype, batch, shape.head_dim, cuda::AsCuda(stream));
}

}  // namespace

KernelStatus cuda::AttentionWith(KernelChoice kernel, const AttentionShape& shape,
                                 const AttentionSequence* sequences, int num_sequences,
                                 Stream stream) {
  if (!Supported(shape)) return KernelStatus::kUnsupportedShape;
  for (int i = 0; i < num_sequences; ++i) {
    if (!Supported(shape, sequences[i])) return KernelStatus::kUnsupportedShape;
  }
  // Sequences that may need different kernels never share a launch, so that no sequence's bits
  // depend on its neighbours.
  enum class Index { kVerticalSlash, kTiles, kTilesAndMeans };
  const auto index_of = [](const AttentionSequence& s) {
    return s.tiles == nullptr            ? Index::kVerticalSlash
           : s.tiles->k_means == nullptr ? Index::kTiles
                                         : Index::kTilesAndMeans;
  };
  const bool per_kv_head_only = shape.num_kv_heads == shape.num_q_heads;
  for (const bool per_query_head : {false, true}) {
    if (per_query_head && per_kv_head_only) break;
    const int num_groups = per_query_head ? shape.num_q_heads : shape.num_kv_heads;
    for (const Index kind : {Index::kVerticalSlash, Index::kTiles, Index::kTilesAndMeans}) {
      std::array<const AttentionSequence*, cuda::kSequencesPerLaunch> order;
      for (int next = 0; next < num_sequences;) {
        int count = 0;
        for (; next < num_sequences && count < cuda::kSequencesPerLaunch; ++next) {
          const AttentionSequence& s = sequences[next];
          if (s.q_tokens > 0 && IndexGroups(shape, s) == num_groups && index_of(s) == kind) {
            order[count++] = &s;
          }
        }
        if (count == 0) continue;
        const KernelStatus status = Launch(kernel, shape, num_groups, order.data(), count, stream);
        if (status != KernelStatus::kOk) return status;
      }
    }
  }
  return KernelStatus::kOk;
}

KernelStatus AttentionCuda(const AttentionShape& shape, const AttentionSequence* sequences,
                           int num_sequences, Stream stream) {
  return cuda::AttentionWith(cuda::KernelChoice::kFastest, shape, sequences, num_sequences, stream);
}

}  // namespace vsprefill::kernels
