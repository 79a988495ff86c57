// AttentionSumsCpu: pass 1 finds every row's log-sum-exp; pass 2 recomputes the scores and adds the
// probabilities to column and diagonal sums. Each KV group is cut into a fixed number of slices
// that own their sums and are added in order, so the result does not depend on the threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/isa_kernels.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"
#include "kernels/distill.h"

namespace vsprefill::kernels {
namespace {

using cpu::AttentionTile;
using cpu::Carver;
using cpu::ColumnBatch;
using cpu::kColumnTile;

constexpr int64_t kTileRows = 128;
constexpr int64_t kSlices = 8;
constexpr int64_t kMargin = 160;  // see IsaKernels::attention_sums
constexpr double kLog2E = 1.4426950408889634;

class Runner {
 public:
  explicit Runner(const AttentionSumsArgs& args)
      : args_(args), n_(args.sequence.kv_tokens), kernels_(cpu::ActiveKernels()) {}

  int64_t num_tiles() const { return (n_ + kTileRows - 1) / kTileRows; }

  void Normalise(int head, int64_t tile_index) const {
    AttentionTile tile = Begin(head, tile_index);
    ForColumns(head, tile_index, tile, nullptr, nullptr);
    float* lse = args_.lse + head * n_ + tile_index * kTileRows;
    for (int i = 0; i < tile.rows; ++i) {
      lse[i] = static_cast<float>((double{tile.max[i]} + std::log2(double{tile.sum[i]})) / kLog2E);
    }
  }

  /// columns: [n], diagonals: offset 0 of [kMargin + n + kMargin].
  void Accumulate(int head, int64_t tile_index, float* columns, float* diagonals) const {
    AttentionTile tile = Begin(head, tile_index);
    const float* lse = args_.lse + head * n_ + tile_index * kTileRows;
    for (int i = 0; i < tile.lanes; ++i) {
      tile.max[i] = static_cast<float>(double{lse[std::min(i, tile.rows - 1)]} * kLog2E);
    }
    ForColumns(head, tile_index, tile, columns, diagonals);
  }

 private:
  AttentionTile Begin(int head, int64_t tile_index) const {
    static thread_local cpu::Scratch memory;
    const AttentionSequence& s = args_.sequence;
    const int64_t first = tile_index * kTileRows;
    AttentionTile tile;
    tile.dtype = args_.shape.dtype;
    tile.head_dim = args_.shape.head_dim;
    tile.rows = static_cast<int>(std::min(kTileRows, n_ - first));
    tile.lanes = (tile.rows + 15) / 16 * 16;
    tile.scale_log2 = static_cast<float>(args_.shape.scale * kLog2E);
    Carver size(nullptr);
    cpu::CarveTile(size, &tile);
    Carver carver(memory.Get(size.bytes()));
    cpu::CarveTile(carver, &tile);
    const void* rows[kTileRows];
    for (int i = 0; i < tile.lanes; ++i) {
      const int64_t row = first + std::min(i, tile.rows - 1);
      tile.positions[i] = static_cast<int32_t>(row);
      rows[i] = static_cast<const char*>(s.q) +
                (row * s.q_token_stride + head * s.q_head_stride) * SizeOf(tile.dtype);
    }
    kernels_.attention_begin(tile, rows);
    return tile;
  }

  void ForColumns(int head, int64_t tile_index, const AttentionTile& tile, float* columns,
                  float* diagonals) const {
    const AttentionSequence& s = args_.sequence;
    const int64_t first = tile_index * kTileRows, end = first + tile.rows;
    const int group = head / args_.shape.group_size();
    int32_t list[kColumnTile];
    float sums[kColumnTile];
    ColumnBatch batch;
    batch.k = static_cast<const char*>(s.k) + group * s.kv_head_stride * SizeOf(tile.dtype);
    batch.token_stride = s.kv_token_stride;
    batch.columns = list;
    for (int64_t c = 0; c < end; c += kColumnTile) {
      const int live = static_cast<int>(std::min<int64_t>(kColumnTile, end - c));
      for (int i = 0; i < live; ++i) list[i] = static_cast<int32_t>(c + i);
      batch.count = live;
      batch.masked = c + live - 1 > first;
      if (live % 2 != 0) {
        list[batch.count++] = cpu::kPaddingColumn;
        batch.masked = true;
      }
      std::fill(sums, sums + batch.count, 0.0f);
      kernels_.attention_sums(tile, batch, columns == nullptr ? nullptr : sums, diagonals);
      if (columns == nullptr) continue;
      for (int i = 0; i < live; ++i) columns[c + i] += sums[i];
    }
  }

  const AttentionSumsArgs& args_;
  const int64_t n_;
  const cpu::IsaKernels& kernels_;
};

}  // namespace

KernelStatus AttentionSumsCpu(const AttentionSumsArgs& args, Stream /*stream*/) {
  const AttentionShape& shape = args.shape;
  if (!cpu::SupportedShape(shape) || args.sequence.q_tokens != args.sequence.kv_tokens) {
    return KernelStatus::kUnsupportedShape;
  }
  const Runner runner(args);
  const int64_t n = args.sequence.kv_tokens, tiles = runner.num_tiles();
  const int g = shape.group_size();
  ParallelFor(tiles * shape.num_q_heads, [&](int64_t i, int /*worker*/) {
    runner.Normalise(static_cast<int>(i % shape.num_q_heads), tiles - 1 - i / shape.num_q_heads);
  });

  const int64_t slice_elements = n + kMargin + n + kMargin;
  std::vector<float> sums(shape.num_kv_heads * kSlices * slice_elements, 0.0f);
  ParallelFor(shape.num_kv_heads * kSlices, [&](int64_t i, int /*worker*/) {
    const int64_t group = i / kSlices;
    float* const columns = sums.data() + i * slice_elements;
    float* const diagonals = columns + n + kMargin;
    // Tiles dealt round: every slice gets early and late ones.
    for (int64_t item = i % kSlices; item < g * tiles; item += kSlices) {
      runner.Accumulate(static_cast<int>(group * g + item / tiles), item % tiles, columns,
                        diagonals);
    }
  });
  const double mean = 1.0 / (static_cast<double>(n) * g);
  for (int64_t group = 0; group < shape.num_kv_heads; ++group) {
    for (int64_t j = 0; j < n; ++j) {
      double column = 0, diagonal = 0;
      for (int64_t slice = 0; slice < kSlices; ++slice) {
        const float* columns = sums.data() + (group * kSlices + slice) * slice_elements;
        column += double{columns[j]};
        diagonal += double{columns[n + kMargin + j]};
      }
      args.columns[group * n + j] = static_cast<float>(column * mean);
      args.diagonals[group * n + j] = static_cast<float>(diagonal * mean);
    }
  }
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels
