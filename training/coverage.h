// Which share of the true attention mass a selection covers, measured on row tiles of one text.
//
// All selections here decide per row tile (kernels/sparse_index.h): a tile of M query positions
// reads a set of columns. So the mass of a tile per column and a mask over (tile, column) say
// everything, for every method alike.
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <vector>

namespace vsprefill::training {

/// The row tiles that are measured, evenly spread over the text.
struct TileSet {
  int64_t tokens = 0;
  int row_tile = 0;             // positions of a tile
  std::vector<int64_t> begins;  // first position of each tile
  torch::Tensor last;  // int64 [tiles]: position that distances count from (may lie past the end)
  torch::Tensor visible;  // float32 [tiles, tokens]: rows of the tile that see the column
  double pairs = 0;       // sum of visible

  int64_t num_tiles() const { return static_cast<int64_t>(begins.size()); }
};

/// max_tiles 0: all.
TileSet MakeTiles(int64_t tokens, int row_tile, int64_t max_tiles, torch::Device device);

/// True attention of one layer: sum over a tile's rows of the causal softmax, divided by the number
/// of measured rows: float32 [num_q_heads, tiles, tokens], each head sums to 1. queries [tokens,
/// num_q_heads, head_dim], keys [groups, tokens, head_dim].
torch::Tensor TileColumnMass(const TileSet& tiles, const torch::Tensor& queries,
                             const torch::Tensor& keys, double scale);

/// True attention of one layer in chosen rows: the causal softmax, float32 [num_q_heads, rows,
/// tokens]. queries and keys as above, rows int64 positions.
torch::Tensor RowAttention(const torch::Tensor& queries, const torch::Tensor& keys,
                           const torch::Tensor& rows, double scale);

/// Columns and diagonals estimated from the attention of the last `rows` rows, in the form of the
/// teacher's sums: what each column and offset would hold if all rows behaved like these. float32
/// [2, groups, tokens].
torch::Tensor SumsOfLastRows(const torch::Tensor& queries, const torch::Tensor& keys, double scale,
                             int64_t rows);

/// Scores of key blocks by mean-pooled keys (FlashPrefill): per tile and group the sum over its
/// rows of exp(scale * q . mean key), divided by the largest; blocks that a tile's first row does
/// not see whole have none and get 2 (always kept), blocks beyond the tile -1. float32 [groups,
/// tiles, blocks].
torch::Tensor MeanPooledScores(const TileSet& tiles, const torch::Tensor& queries,
                               const torch::Tensor& keys, double scale, int64_t block);

}  // namespace vsprefill::training
