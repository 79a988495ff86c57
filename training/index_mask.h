// Indexes as masks, so that their coverage can be measured: any method's index over chosen rows,
// and VSPrefill's selection from given logits over row tiles.
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/kernel_set.h"
#include "server/model/transformer.h"
#include "training/coverage.h"

namespace vsprefill::training {

/// Which (row, column) the index of `sequence` reads, bool [index groups, rows, kv_tokens]; what a
/// row may not see (causal mask) is false. rows: int64 positions on the index's device, in
/// [kv_tokens - q_tokens, kv_tokens). The index must be complete (the stream synchronised).
torch::Tensor ReadMask(const kernels::AttentionShape& shape,
                       const kernels::AttentionSequence& sequence, const torch::Tensor& rows);

class IndexMasker {
 public:
  /// For texts of `tiles.tokens` tokens; `model` and `tiles` outlive it.
  IndexMasker(model::Transformer* model, const TileSet* tiles);

  /// Selects by `params` (their forced last rows left out), the threshold of group g times
  /// scale[g], from logits float32 [groups, tokens] and returns which (tile, column) is read: bool
  /// [groups, tiles, tokens], columns past a tile's rows included. A prefill chunk that ends at
  /// `kv_tokens` (0: the whole text) selects among the tokens before; only its own tiles mean
  /// something then.
  absl::StatusOr<torch::Tensor> Mask(const torch::Tensor& vertical_logits,
                                     const torch::Tensor& slash_logits,
                                     kernels::SelectionParams params,
                                     const std::vector<float>& scale, int64_t kv_tokens = 0);

 private:
  model::Transformer* model_;
  const TileSet* tiles_;
  int groups_, group_size_;
  torch::Tensor verticals_, num_verticals_, band_bits_, bands_, num_bands_, workspace_;
  torch::Tensor block_of_;  // int64 [tiles, tokens]: distance block of a column; clamped to 0 right
                            // of the tile
};

}  // namespace vsprefill::training
