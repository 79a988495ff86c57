#include "training/coverage.h"

#include <algorithm>
#include <limits>

namespace vsprefill::training {
namespace {

/// Rows of the tiles that exist, [rows] int64, and the tile of each.
struct TileRows {
  torch::Tensor position, tile;
};

TileRows RowsOf(const TileSet& tiles, torch::Device device) {
  std::vector<int64_t> position, tile;
  for (int64_t t = 0; t < tiles.num_tiles(); ++t) {
    const int64_t end = std::min(tiles.begins[t] + tiles.row_tile, tiles.tokens);
    for (int64_t i = tiles.begins[t]; i < end; ++i) {
      position.push_back(i);
      tile.push_back(t);
    }
  }
  return {torch::tensor(position, torch::kInt64).to(device),
          torch::tensor(tile, torch::kInt64).to(device)};
}

/// Queries of one group and some rows, float32 [heads of the group, rows, head_dim].
torch::Tensor GroupQueries(const torch::Tensor& queries, int64_t group, int64_t group_size,
                           const torch::Tensor& positions) {
  return queries.narrow(1, group * group_size, group_size)
      .index_select(0, positions)
      .to(torch::kFloat32)
      .transpose(0, 1);
}

/// Causal softmax of some rows, float32 [heads, rows, tokens].
torch::Tensor CausalSoftmax(const torch::Tensor& queries, const torch::Tensor& keys,
                            const torch::Tensor& positions, double scale) {
  torch::Tensor scores =
      torch::matmul(queries * scale, keys.to(torch::kFloat32).transpose(0, 1).unsqueeze(0));
  const torch::Tensor hidden =
      torch::arange(keys.size(0), positions.options()).unsqueeze(0) > positions.unsqueeze(1);
  scores.masked_fill_(hidden, -std::numeric_limits<float>::infinity());
  return torch::softmax(scores, -1);
}

}  // namespace

TileSet MakeTiles(int64_t tokens, int row_tile, int64_t max_tiles, torch::Device device) {
  TileSet tiles;
  tiles.tokens = tokens;
  tiles.row_tile = row_tile;
  const int64_t total = (tokens + row_tile - 1) / row_tile;
  const int64_t count = max_tiles > 0 ? std::min(max_tiles, total) : total;
  std::vector<int64_t> last;
  for (int64_t i = 0; i < count; ++i) {
    // The middle of each of `count` equal stretches.
    const int64_t tile = (2 * i + 1) * total / (2 * count);
    tiles.begins.push_back(tile * row_tile);
    last.push_back(tile * row_tile + row_tile - 1);
  }
  tiles.last = torch::tensor(last, torch::kInt64).to(device);
  const torch::Tensor begin = torch::tensor(tiles.begins, torch::kInt64).to(device).unsqueeze(1);
  const torch::Tensor column = torch::arange(tokens, begin.options()).unsqueeze(0);
  tiles.visible = ((begin + row_tile).clamp_max(tokens) - torch::maximum(column, begin))
                      .clamp_min(0)
                      .to(torch::kFloat32);
  tiles.pairs = tiles.visible.sum(torch::kFloat64).item<double>();
  return tiles;
}

torch::Tensor TileColumnMass(const TileSet& tiles, const torch::Tensor& queries,
                             const torch::Tensor& keys, double scale) {
  const TileRows rows = RowsOf(tiles, keys.device());
  const int64_t groups = keys.size(0), group_size = queries.size(1) / groups;
  std::vector<torch::Tensor> heads;
  for (int64_t g = 0; g < groups; ++g) {
    const torch::Tensor p = CausalSoftmax(GroupQueries(queries, g, group_size, rows.position),
                                          keys[g], rows.position, scale);
    heads.push_back(torch::zeros({group_size, tiles.num_tiles(), tiles.tokens}, p.options())
                        .index_add_(1, rows.tile, p));
  }
  return torch::cat(heads) / rows.position.size(0);
}

torch::Tensor RowAttention(const torch::Tensor& queries, const torch::Tensor& keys,
                           const torch::Tensor& rows, double scale) {
  const int64_t groups = keys.size(0), group_size = queries.size(1) / groups;
  std::vector<torch::Tensor> heads;
  for (int64_t g = 0; g < groups; ++g) {
    heads.push_back(
        CausalSoftmax(GroupQueries(queries, g, group_size, rows), keys[g], rows, scale));
  }
  return torch::cat(heads);
}

torch::Tensor SumsOfLastRows(const torch::Tensor& queries, const torch::Tensor& keys, double scale,
                             int64_t rows) {
  const int64_t groups = keys.size(0), tokens = keys.size(1), group_size = queries.size(1) / groups;
  rows = std::min(rows, tokens);
  const torch::Tensor positions = torch::arange(
      tokens - rows, tokens, torch::TensorOptions(keys.device()).dtype(torch::kInt64));
  // Column j is seen by the rows at positions >= j, offset o exists in the rows at positions >= o:
  // one fall-off.
  const torch::Tensor item = torch::arange(tokens, positions.options());
  const torch::Tensor column_rows = (tokens - item).clamp_max(rows).to(torch::kFloat32);
  const torch::Tensor all_rows = (tokens - item).to(torch::kFloat32) / tokens;
  torch::Tensor sums = torch::zeros({2, groups, tokens}, all_rows.options());
  for (int64_t g = 0; g < groups; ++g) {
    const torch::Tensor p =
        CausalSoftmax(GroupQueries(queries, g, group_size, positions), keys[g], positions, scale)
            .mean(0);  // [rows, tokens]
    sums[0][g] = p.sum(0) / column_rows * all_rows;
    torch::Tensor slash = torch::zeros({tokens}, all_rows.options());
    for (int64_t r = 0; r < rows; ++r) {
      const int64_t length = tokens - rows + r + 1;
      slash.narrow(0, 0, length) += p[r].narrow(0, 0, length).flip(0);
    }
    sums[1][g] = slash / column_rows * all_rows;
  }
  return sums;
}

torch::Tensor MeanPooledScores(const TileSet& tiles, const torch::Tensor& queries,
                               const torch::Tensor& keys, double scale, int64_t block) {
  const TileRows rows = RowsOf(tiles, keys.device());
  const int64_t groups = keys.size(0), group_size = queries.size(1) / groups;
  const int64_t blocks = (tiles.tokens + block - 1) / block;
  const torch::Tensor index = torch::arange(tiles.tokens, rows.position.options()) / block;
  const torch::Tensor block_of = index.to(torch::kInt64);
  const torch::Tensor sizes = torch::bincount(block_of, {}, blocks).to(torch::kFloat32);
  const torch::Tensor first = torch::tensor(tiles.begins, torch::kInt64).to(keys.device());
  const torch::Tensor block_begin = torch::arange(blocks, rows.position.options()) * block;
  const torch::Tensor block_last = block_begin + block - 1;
  const torch::Tensor row_sees = block_last.unsqueeze(0) <= rows.position.unsqueeze(1);
  const torch::Tensor partly = block_last.unsqueeze(0) > first.unsqueeze(1);
  const torch::Tensor beyond = block_begin.unsqueeze(0) > tiles.last.unsqueeze(1);
  std::vector<torch::Tensor> scores;
  for (int64_t g = 0; g < groups; ++g) {
    const torch::Tensor wide = keys[g].to(torch::kFloat32);
    const torch::Tensor pooled =
        torch::zeros({blocks, wide.size(1)}, wide.options()).index_add_(0, block_of, wide) /
        sizes.unsqueeze(1);
    torch::Tensor x = torch::matmul(GroupQueries(queries, g, group_size, rows.position) * scale,
                                    pooled.transpose(0, 1).unsqueeze(0));
    x.masked_fill_(~row_sees, -std::numeric_limits<float>::infinity());
    // One maximum per tile keeps the ratio of its blocks; -1e4 where a tile scores no block.
    const torch::Tensor row_max = x.amax(-1).amax(0);
    const torch::Tensor tile_max =
        torch::full({tiles.num_tiles()}, -1e4, row_max.options())
            .scatter_reduce_(0, rows.tile, row_max.clamp_min(-1e4), "amax");
    const torch::Tensor sums =
        torch::zeros({tiles.num_tiles(), blocks}, x.options())
            .index_add_(0, rows.tile,
                        torch::exp(x - tile_max.index_select(0, rows.tile).unsqueeze(1)).sum(0));
    torch::Tensor score = sums / sums.amax(-1, true).clamp_min(1e-30);
    score.masked_fill_(partly, 2.0);
    score.masked_fill_(beyond, -1.0);
    scores.push_back(score);
  }
  return torch::stack(scores);
}

}  // namespace vsprefill::training
