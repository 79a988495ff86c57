// The block-sparse index: which keys each row tile reads, tile by tile. For selections that differ
// from row tile to row tile in any way (FlashPrefill, FlexPrefill, XAttention, AnchorAttention);
// vertical-slash selections have a smaller form (sparse_index.h).
//
// Row tiles are those of sparse_index.h: RowTilePositions(group size) query positions of one index
// group, aligned to absolute position 0. Keys are cut into blocks of kKeyBlock tokens, aligned to
// token 0 as well. A row reads the visible (causal) keys of every block whose bit is set, and the
// columns whose bit is set and that no such block holds.
//
// Index groups. An index is either per KV group (num_groups == num_kv_heads: rows of all its query
// heads are packed into a tile) or per query head (num_groups == num_q_heads: a tile holds 128
// positions of one head).
//
// REQUIRES: in every row tile, each row's own block is set, so no row is empty; columns that no
// block of the tile holds lie left of the tile.
#pragma once

#include <cstdint>

#include "kernels/sparse_index.h"

namespace vsprefill::kernels {

inline constexpr int kKeyBlock = 128;

constexpr int64_t KeyBlocks(int64_t kv_tokens) { return (kv_tokens + kKeyBlock - 1) / kKeyBlock; }
constexpr int64_t KeyBlockWords(int64_t kv_tokens) { return (KeyBlocks(kv_tokens) + 31) / 32; }

/// One sequence's index for one layer. All pointers are in the memory of the device that executes
/// it.
struct TileIndexView {
  int num_groups = 0;
  /// The row tiles that are listed: all that hold a query of the call.
  int64_t first_tile = 0, num_tiles = 0;
  /// Bit b % 32 of word b / 32: block b. uint32 [num_groups, num_tiles, block_words],
  /// block_words >= KeyBlockWords(kv_tokens). Bits of blocks right of the tile are ignored.
  uint32_t* blocks = nullptr;
  int64_t block_words = 0;
  /// Single columns, shared by the row tiles of a set: row tile t uses set t / tiles_per_set -
  /// first_tile / tiles_per_set. uint32 [num_groups, num_sets, column_words], bit c % 32 of word
  /// c / 32: column c. Null: none.
  uint32_t* columns = nullptr;
  int64_t column_words = 0;
  int64_t tiles_per_set = 1;
  /// Mean correction: every block that is not set and lies wholly left of the tile is read as one
  /// pseudo-key, its mean key, with ln(kKeyBlock) added to the scaled logit and its mean value as
  /// value. Element type of k, [num_kv_heads, means_stride, head_dim]; null: none.
  /// Ref: FlashPrefill V2 (arXiv 2608.19758).
  const void* k_means = nullptr;
  const void* v_means = nullptr;
  int64_t means_stride = 0;  // blocks; head_dim elements each

  constexpr int64_t num_sets() const {
    return (first_tile + num_tiles - 1) / tiles_per_set - first_tile / tiles_per_set + 1;
  }
  constexpr const uint32_t* BlocksOf(int group, int64_t tile) const {
    return blocks + (group * num_tiles + tile - first_tile) * block_words;
  }
  constexpr uint32_t* BlocksOf(int group, int64_t tile) {
    return blocks + (group * num_tiles + tile - first_tile) * block_words;
  }
  constexpr const uint32_t* ColumnsOf(int group, int64_t tile) const {
    return columns +
           (group * num_sets() + tile / tiles_per_set - first_tile / tiles_per_set) * column_words;
  }
  constexpr uint32_t* ColumnsOf(int group, int64_t tile) {
    return columns +
           (group * num_sets() + tile / tiles_per_set - first_tile / tiles_per_set) * column_words;
  }
};

/// Whether bit i of a set is on.
constexpr bool TestBit(const uint32_t* words, int64_t i) {
  return (words[i / 32] >> (i % 32)) & 1u;
}
/// Bits of [0, count) that are on.
constexpr int64_t CountBits(const uint32_t* words, int64_t count) {
  int64_t bits = 0;
  for (int64_t w = 0; w < count / 32; ++w) bits += __builtin_popcount(words[w]);
  for (int64_t i = count / 32 * 32; i < count; ++i) bits += TestBit(words, i);
  return bits;
}
constexpr void SetBit(uint32_t* words, int64_t i) { words[i / 32] |= uint32_t{1} << (i % 32); }

}  // namespace vsprefill::kernels
