// AttentionCpu: cuts a batch into tasks of one row tile and one index group, heaviest first, and
// feeds each task's columns to the instruction set's kernel. A batch with few row tiles (decoding,
// short chunks over a long cache) is cut along the columns too; the pieces' sums are merged
// afterwards.
#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>
#include <utility>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cpu/attention_tile.h"
#include "kernels/cpu/isa_kernels.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/scratch.h"
#include "kernels/cpu/tile_walk.h"

namespace vsprefill::kernels {
namespace {

using cpu::AttentionTile;
using cpu::Carver;
using cpu::ColumnBatch;
using cpu::IsaKernels;
using cpu::kColumnTile;

// Below this many tasks each is split along its columns. Shapes alone decide, not the number of
// threads, so results do not depend on the machine.
constexpr int64_t kFewTasks = 32;
constexpr int64_t kMaxSplits = 16;
constexpr int64_t kMinSplitBatches = 6;

struct Task {
  int sequence = 0;
  int group = 0;       // index group
  int group_size = 0;  // its query heads
  int kv_head = 0;     // whose keys they read
  RowTile tile;
  int64_t batches = 0;  // at most this many column batches
  int64_t first_batch = 0, last_batch = INT64_MAX;
  int64_t partial = -1;  // index of the partial state, or -1: this task finishes its rows itself
};

// Partial states of one task that was split.
struct Merge {
  Task task;
  int64_t first_partial = 0, count = 0;
};

template <class T>
T* At(T* base, int64_t element, DType dtype) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(base) + element * SizeOf(dtype);
}

// Pointers to the tile's rows in packed order: positions, and within a position the group's heads.
template <class T>
void PackedRows(T* base, int64_t token_stride, int64_t head_stride, const AttentionShape& shape,
                const AttentionSequence& s, const Task& task, T** rows) {
  const int g = task.group_size;
  const int64_t q_start = s.kv_tokens - s.q_tokens;
  for (int64_t p = task.tile.row_begin; p < task.tile.row_end; ++p) {
    for (int h = 0; h < g; ++h) {
      *rows++ =
          At(base, (p - q_start) * token_stride + (task.group * g + h) * head_stride, shape.dtype);
    }
  }
}

void FinishRows(const IsaKernels& kernels, const AttentionShape& shape, const AttentionSequence& s,
                const Task& task, const AttentionTile& tile) {
  void* rows[cpu::kMaxLanes];
  PackedRows<void>(s.out, s.out_token_stride, s.out_head_stride, shape, s, task, rows);
  kernels.attention_finish(tile, rows);
}

void ShapeTile(const AttentionShape& shape, const Task& task, AttentionTile* tile) {
  const int g = task.group_size;
  tile->dtype = shape.dtype;
  tile->head_dim = shape.head_dim;
  tile->rows = static_cast<int>((task.tile.row_end - task.tile.row_begin) * g);
  tile->lanes = static_cast<int>(TileLanes(g, task.tile));
  tile->scale_log2 = static_cast<float>(shape.scale * 1.4426950408889634);
}

// Feeds the columns that `stream` yields to the kernel, batches [first_batch, last_batch) only.
template <class Stream>
void RunColumns(const IsaKernels& kernels, Stream stream, const RowTile& rows, int64_t first_batch,
                int64_t last_batch, const AttentionTile& tile, ColumnBatch batch) {
  int32_t columns[kColumnTile];
  batch.columns = columns;
  for (int64_t i = 0; i < last_batch; ++i) {
    batch.count = stream.Next(columns, kColumnTile);
    if (batch.count == 0) break;
    if (i < first_batch) continue;
    batch.masked = columns[batch.count - 1] > rows.row_begin;
    if (batch.count % 2 != 0) {
      columns[batch.count++] = cpu::kPaddingColumn;
      batch.masked = true;
    }
    kernels.attention_columns(tile, batch);
  }
}

void RunTask(const IsaKernels& kernels, const AttentionShape& shape, const AttentionSequence& s,
             const Task& task, AttentionTile tile) {
  for (int i = 0; i < tile.lanes; ++i) {
    tile.positions[i] =
        static_cast<int32_t>(task.tile.row_begin + std::min(i, tile.rows - 1) / task.group_size);
  }
  const void* rows[cpu::kMaxLanes];
  PackedRows<const void>(s.q, s.q_token_stride, s.q_head_stride, shape, s, task, rows);
  kernels.attention_begin(tile, rows);

  ColumnBatch batch;
  batch.k = At(s.k, task.kv_head * s.kv_head_stride, shape.dtype);
  batch.v = At(s.v, task.kv_head * s.kv_head_stride, shape.dtype);
  batch.token_stride = s.kv_token_stride;
  RunColumns(kernels, ColumnStream(s, task.group, task.tile), task.tile, task.first_batch,
             task.last_batch, tile, batch);
  // Pseudo-keys, with the last piece of a task that was split. Their numbers are block numbers,
  // which no row's position is below.
  if (s.tiles == nullptr || s.tiles->k_means == nullptr || task.last_batch != INT64_MAX) return;
  const int64_t head = task.kv_head * s.tiles->means_stride * shape.head_dim;
  batch.k = At(s.tiles->k_means, head, shape.dtype);
  batch.v = At(s.tiles->v_means, head, shape.dtype);
  batch.token_stride = shape.head_dim;
  batch.bias_log2 = std::countr_zero(unsigned{kKeyBlock});
  RunColumns(kernels, MeanStream(s, task.group, task.tile), task.tile, 0, INT64_MAX, tile, batch);
}

// At least the tile's column batches.
int64_t ColumnBatches(const AttentionSequence& s, int group, const RowTile& tile) {
  int64_t columns = tile.row_end;
  if (!tile.dense && s.index != nullptr) {
    columns = s.index->num_verticals[group] + int64_t{s.index->num_bands[group]} * kBandBlock;
  } else if (!tile.dense) {
    const int64_t blocks = KeyBlocks(tile.row_end);
    columns = CountBits(s.tiles->BlocksOf(group, tile.number), blocks) * kKeyBlock;
    if (s.tiles->columns != nullptr) {
      columns += CountBits(s.tiles->ColumnsOf(group, tile.number), tile.row_end);
    }
  }
  return (std::min(columns, tile.row_end) + kColumnTile - 1) / kColumnTile;
}

void ListTasks(const AttentionShape& shape, const AttentionSequence* sequences, int num_sequences,
               std::vector<Task>* tasks) {
  tasks->clear();
  for (int i = 0; i < num_sequences; ++i) {
    const int groups = IndexGroups(shape, sequences[i]);
    const int group_size = shape.num_q_heads / groups;
    const int64_t tiles = NumRowTiles(group_size, sequences[i]);
    for (int64_t t = 0; t < tiles; ++t) {
      const RowTile tile = GetRowTile(group_size, sequences[i], t);
      for (int group = 0; group < groups; ++group) {
        Task& task = tasks->emplace_back();
        task.sequence = i;
        task.group = group;
        task.group_size = group_size;
        task.kv_head = group * group_size / shape.group_size();
        task.tile = tile;
        task.batches = ColumnBatches(sequences[i], group, tile);
      }
    }
  }
  std::stable_sort(tasks->begin(), tasks->end(),
                   [](const Task& a, const Task& b) { return a.batches > b.batches; });
}

// Replaces long tasks by pieces of their columns; `merges` lists what belongs together.
void SplitTasks(std::vector<Task>* tasks, std::vector<Merge>* merges) {
  std::vector<Task> pieces;
  int64_t partials = 0;
  for (const Task& task : *tasks) {
    const int64_t count = std::min(kMaxSplits, task.batches / kMinSplitBatches);
    if (count < 2) {
      pieces.push_back(task);
      continue;
    }
    merges->push_back({task, partials, count});
    for (int64_t i = 0; i < count; ++i) {
      Task& piece = pieces.emplace_back(task);
      piece.first_batch = task.batches * i / count;
      piece.last_batch = i + 1 == count ? INT64_MAX : task.batches * (i + 1) / count;
      piece.partial = partials++;
    }
  }
  *tasks = std::move(pieces);
}

}  // namespace

KernelStatus AttentionCpu(const AttentionShape& shape, const AttentionSequence* sequences,
                          int num_sequences, Stream /*stream*/) {
  if (!cpu::SupportedShape(shape)) return KernelStatus::kUnsupportedShape;
  for (int i = 0; i < num_sequences; ++i) {
    if (!SupportedIndex(shape, sequences[i])) return KernelStatus::kUnsupportedShape;
  }
  const IsaKernels& kernels = cpu::ActiveKernels();
  static thread_local std::vector<Task> tasks;
  static thread_local cpu::Scratch partial_memory;
  ListTasks(shape, sequences, num_sequences, &tasks);
  std::vector<Merge> merges;
  if (std::ssize(tasks) < kFewTasks) SplitTasks(&tasks, &merges);

  // Every partial state has room for the most lanes.
  std::vector<AttentionTile> partials(
      merges.empty() ? 0 : merges.back().first_partial + merges.back().count);
  Carver measure(nullptr);
  for (AttentionTile& partial : partials) {
    cpu::CarveSums(measure, shape.head_dim, cpu::kMaxLanes, &partial);
  }
  Carver carver(partial_memory.Get(measure.bytes()));
  for (AttentionTile& partial : partials) {
    cpu::CarveSums(carver, shape.head_dim, cpu::kMaxLanes, &partial);
  }

  // The lambda runs on other threads, which have thread_local variables of their own.
  const std::vector<Task>& shared_tasks = tasks;
  ParallelFor(std::ssize(tasks), [&](int64_t i, int /*worker*/) {
    static thread_local cpu::Scratch memory;
    const Task& task = shared_tasks[i];
    const AttentionSequence& s = sequences[task.sequence];
    AttentionTile tile;
    ShapeTile(shape, task, &tile);
    Carver size(nullptr);
    cpu::CarveTile(size, &tile);
    Carver working(memory.Get(size.bytes()));
    cpu::CarveTile(working, &tile);
    if (task.partial >= 0) {
      AttentionTile& partial = partials[task.partial];
      tile.sum_out = partial.sum_out;
      tile.max = partial.max;
      tile.sum = partial.sum;
    }
    RunTask(kernels, shape, s, task, tile);
    if (task.partial < 0) FinishRows(kernels, shape, s, task, tile);
  });
  ParallelFor(std::ssize(merges), [&](int64_t i, int /*worker*/) {
    const Merge& merge = merges[i];
    AttentionTile* const first = &partials[merge.first_partial];
    for (int64_t j = 0; j < merge.count; ++j) ShapeTile(shape, merge.task, first + j);
    kernels.attention_merge(first, static_cast<int>(merge.count));
    FinishRows(kernels, shape, sequences[merge.task.sequence], merge.task, *first);
  });
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels
