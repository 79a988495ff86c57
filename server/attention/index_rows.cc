#include "server/attention/index_rows.h"

#include <algorithm>

#include "absl/strings/str_format.h"
#include "kernels/cpu/tile_walk.h"
#include "server/base/status_macros.h"

namespace vsprefill::attention {
namespace {

template <class T>
absl::Status CopyTo(const CopyToHostFn& copy, const T* device, int64_t count,
                    std::vector<T>* host) {
  host->resize(count);
  return count == 0 ? absl::OkStatus() : copy(device, count * sizeof(T), host->data());
}

/// One index group of a vertical-slash index in host memory.
struct HostBands {
  kernels::SparseIndexView view;
  std::vector<int32_t> verticals, bands, num_verticals, num_bands;
  std::vector<uint32_t> band_bits;

  absl::Status Copy(const kernels::SparseIndexView& index, int group, const CopyToHostFn& copy) {
    VSP_RETURN_IF_ERROR(CopyTo(copy, index.num_verticals + group, 1, &num_verticals));
    VSP_RETURN_IF_ERROR(CopyTo(copy, index.num_bands + group, 1, &num_bands));
    VSP_RETURN_IF_ERROR(CopyTo(copy, index.verticals + group * index.vertical_stride,
                               num_verticals[0], &verticals));
    VSP_RETURN_IF_ERROR(
        CopyTo(copy, index.bands + group * index.band_list_stride, num_bands[0], &bands));
    VSP_RETURN_IF_ERROR(
        CopyTo(copy, index.band_bits + group * index.band_stride, index.band_stride, &band_bits));
    view = index;
    view.num_groups = 1;
    view.verticals = verticals.data();
    view.num_verticals = num_verticals.data();
    view.bands = bands.data();
    view.num_bands = num_bands.data();
    view.band_bits = band_bits.data();
    return absl::OkStatus();
  }
};

/// One row tile of one index group of a tile index in host memory.
struct HostTile {
  kernels::TileIndexView view;
  std::vector<uint32_t> blocks, columns;

  absl::Status Copy(const kernels::TileIndexView& index, int group, int64_t tile,
                    const CopyToHostFn& copy) {
    VSP_RETURN_IF_ERROR(CopyTo(copy, index.BlocksOf(group, tile), index.block_words, &blocks));
    view = index;
    view.num_groups = 1;
    view.first_tile = tile;
    view.num_tiles = 1;
    view.blocks = blocks.data();
    if (index.columns != nullptr) {
      VSP_RETURN_IF_ERROR(CopyTo(copy, index.ColumnsOf(group, tile), index.column_words, &columns));
      view.columns = columns.data();
    }
    return absl::OkStatus();
  }
};

}  // namespace

absl::Status ForEachRow(const kernels::AttentionShape& shape,
                        const kernels::AttentionSequence& sequence,
                        absl::Span<const int64_t> positions, const CopyToHostFn& copy,
                        const RowColumnsFn& visit) {
  if (!kernels::SupportedIndex(shape, sequence)) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "an index of %d groups; allowed: %d (KV heads) or %d (query heads)",
        kernels::IndexGroups(shape, sequence), shape.num_kv_heads, shape.num_q_heads));
  }
  const int64_t q_start = sequence.kv_tokens - sequence.q_tokens;
  for (const int64_t position : positions) {
    if (position < q_start || position >= sequence.kv_tokens) {
      return absl::InvalidArgumentError(absl::StrFormat("position %d is out of range [%d, %d)",
                                                        position, q_start, sequence.kv_tokens));
    }
  }
  const int groups = kernels::IndexGroups(shape, sequence);
  const int group_size = shape.num_q_heads / groups;
  const int64_t tile_positions = kernels::RowTilePositions(group_size);
  std::vector<int32_t> columns;
  for (int group = 0; group < groups; ++group) {
    kernels::AttentionSequence host = sequence;
    HostBands bands;
    HostTile tile;
    int64_t copied = -1;  // number of the row tile that `tile` holds
    if (sequence.index != nullptr) {
      VSP_RETURN_IF_ERROR(bands.Copy(*sequence.index, group, copy));
      host.index = &bands.view;
    }
    for (const int64_t position : positions) {
      const kernels::RowTile row_tile = kernels::GetRowTile(
          group_size, sequence, position / tile_positions - q_start / tile_positions);
      if (sequence.tiles != nullptr && copied != row_tile.number) {
        VSP_RETURN_IF_ERROR(tile.Copy(*sequence.tiles, group, row_tile.number, copy));
        copied = row_tile.number;
        host.tiles = &tile.view;
      }
      columns.resize(row_tile.row_end);
      // The host views hold one group.
      kernels::ColumnStream stream(host, 0, row_tile);
      columns.resize(stream.Next(columns.data(), static_cast<int>(columns.size())));
      // The tile's own columns past the row are masked.
      columns.erase(std::remove_if(columns.begin(), columns.end(),
                                   [position](int32_t c) { return c > position; }),
                    columns.end());
      visit(group, position, columns);
    }
  }
  return absl::OkStatus();
}

}  // namespace vsprefill::attention
