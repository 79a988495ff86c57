// What the attention kernels get as their launch parameter: up to kSequencesPerLaunch sequences, by
// value, so that no descriptor is copied to the device.
#pragma once

#include <cstdint>

#include "kernels/attention.h"

namespace vsprefill::kernels::cuda {

inline constexpr int kSequencesPerLaunch = 16;

struct SequenceParams {
  const void* q;
  const void* k;
  const void* v;
  void* out;
  int64_t q_token_stride, q_head_stride;
  int64_t kv_head_stride, kv_token_stride;
  int64_t out_token_stride, out_head_stride;
  // Index, device memory; vertical-slash or block-sparse, all null for a dense sequence.
  const int32_t* verticals;
  const int32_t* num_verticals;
  const uint32_t* band_bits;
  const int32_t* bands;
  const int32_t* num_bands;
  int64_t vertical_stride, band_stride, band_list_stride;
  // Block-sparse. Row tile t of group g: blocks + g * blocks_stride + t * block_words, its columns
  // likewise by t / tiles_per_set; the pointers are moved so that t counts from position 0.
  const uint32_t* blocks;
  const uint32_t* columns;
  const void* k_means;
  const void* v_means;
  int32_t block_words, blocks_stride, column_words, columns_stride;  // words
  int32_t tiles_per_set, means_stride;
  float* partials;  // what these leave, see sm90/attention_sm90.h
  int32_t q_start, kv_tokens;
  int32_t first_tile, num_tiles;  // row tiles that hold a query position
  int32_t dense_tiles;            // of those, the last ones that attend densely
  int32_t dense_parts;            // work items that each of them is divided into, by columns
  int32_t item_begin;             // number of work items of the sequences before this one
};

struct AttentionBatch {
  SequenceParams sequences[kSequencesPerLaunch];
  int32_t num_sequences;
  int32_t num_groups, group_size, row_tile;
  int32_t groups_per_kv_head;  // 1, or the KV group's query heads where an index is per head
  float scale;
};
// Launch parameters of more than 4 KB need a driver and an architecture that take them.
static_assert(sizeof(AttentionBatch) <= 4096);

/// One (sequence, index group, row tile); of a divided dense row tile one part of the columns.
struct WorkItem {
  int sequence, group, tile, part;
};

/// Work items of a sequence: the dense row tiles of all groups first, then group by group (key
/// reuse in L2), late tiles before early ones: the heavy ones lead.
__device__ __forceinline__ WorkItem FindWorkItem(const AttentionBatch& batch, int item) {
  int sequence = batch.num_sequences - 1;
  while (sequence > 0 && batch.sequences[sequence].item_begin > item) --sequence;
  const SequenceParams& s = batch.sequences[sequence];
  item -= s.item_begin;
  const int last_tile = s.first_tile + s.num_tiles - 1;
  const int dense_items = s.dense_tiles * batch.num_groups;
  if (item < dense_items * s.dense_parts) {
    const int unit = item / s.dense_parts;
    return {sequence, unit % batch.num_groups, last_tile - unit / batch.num_groups,
            item % s.dense_parts};
  }
  item -= dense_items * s.dense_parts;
  const int sparse_tiles = s.num_tiles - s.dense_tiles;
  return {sequence, item / sparse_tiles, last_tile - s.dense_tiles - item % sparse_tiles, 0};
}

}  // namespace vsprefill::kernels::cuda
