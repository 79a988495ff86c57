// Attention problems for the kernel suites: shapes, selections, and owners of what they need.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/attention.h"
#include "tests/kernels/kernel_test_util.h"

namespace vsprefill::kernels::testing {

enum class Selection {
  kDense,           // no index
  kLocal,           // the forced local band alone
  kAllVerticals,    // every column, bands only local
  kAllBands,        // every block of distances
  kMixed,           // some of both
  kMixedDenseTail,  // the same, the last positions dense
  kBlocks,          // block-sparse: each row's own block and some others
  kAllBlocks,       // every block
  kColumns,         // some blocks, and single columns shared by three row tiles
  kMeans,           // some blocks, the others through their means
};

inline const char* Name(Selection selection) {
  switch (selection) {
    case Selection::kDense:
      return "dense";
    case Selection::kLocal:
      return "local";
    case Selection::kAllVerticals:
      return "all_verticals";
    case Selection::kAllBands:
      return "all_bands";
    case Selection::kMixed:
      return "mixed";
    case Selection::kMixedDenseTail:
      return "mixed_dense_tail";
    case Selection::kBlocks:
      return "blocks";
    case Selection::kAllBlocks:
      return "all_blocks";
    case Selection::kColumns:
      return "columns";
    case Selection::kMeans:
      return "means";
  }
  return "";
}

/// A SparseIndexView with its memory, in the form that Select* guarantees: local band of 128
/// distances, lists ascending.
class OwnedIndex {
 public:
  OwnedIndex(Selection selection, int groups, int group_size, int64_t kv_tokens, uint32_t seed)
      : OwnedIndex(selection == Selection::kAllVerticals ? 1.0
                   : selection >= Selection::kMixed      ? 0.2
                                                         : 0.0,
                   selection == Selection::kAllBands ? 1.0
                   : selection >= Selection::kMixed  ? 0.3
                                                     : 0.0,
                   groups, group_size, kv_tokens, seed) {
    if (selection == Selection::kMixedDenseTail) view_.dense_from = kv_tokens * 2 / 3;
  }

  /// Each vertical and each band is selected with the given probability.
  OwnedIndex(double verticals, double bands, int groups, int group_size, int64_t kv_tokens,
             uint32_t seed) {
    const int tile = RowTilePositions(group_size);
    const int64_t blocks = BandBlocks(kv_tokens, tile);
    view_.num_groups = groups;
    // Strides larger than needed: nothing may assume tight rows.
    view_.vertical_stride = kv_tokens + 5;
    view_.band_stride = BandWords(kv_tokens, tile) + 1;
    view_.band_list_stride = blocks + 3;
    verticals_.resize(groups * view_.vertical_stride, -1);
    num_verticals_.resize(groups);
    bits_.resize(groups * view_.band_stride);
    bands_.resize(groups * view_.band_list_stride, -1);
    num_bands_.resize(groups);
    std::mt19937 generator(seed);
    std::uniform_real_distribution<double> uniform(0.0, 1.0);
    for (int g = 0; g < groups; ++g) {
      for (int64_t c = 0; c < kv_tokens; ++c) {
        if (uniform(generator) < verticals) {
          verticals_[g * view_.vertical_stride + num_verticals_[g]++] = static_cast<int32_t>(c);
        }
      }
      for (int64_t b = 0; b < blocks; ++b) {
        if (b < 2 || uniform(generator) < bands) {
          bands_[g * view_.band_list_stride + num_bands_[g]++] = static_cast<int32_t>(b);
          bits_[g * view_.band_stride + b / 32] |= 1u << (b % 32);
        }
      }
    }
    view_.verticals = verticals_.data();
    view_.num_verticals = num_verticals_.data();
    view_.band_bits = bits_.data();
    view_.bands = bands_.data();
    view_.num_bands = num_bands_.data();
  }
  OwnedIndex(const OwnedIndex&) = delete;
  OwnedIndex& operator=(const OwnedIndex&) = delete;
  const SparseIndexView& view() const { return view_; }

 private:
  SparseIndexView view_;
  std::vector<int32_t> verticals_, num_verticals_, bands_, num_bands_;
  std::vector<uint32_t> bits_;
};

/// A TileIndexView with its memory. Means are random numbers: execution must not care.
class OwnedTiles {
 public:
  OwnedTiles(Selection selection, int groups, int group_size, int kv_heads, int head_dim,
             DType dtype, int64_t q_tokens, int64_t kv_tokens, uint32_t seed)
      : k_means_(kv_heads * (KeyBlocks(kv_tokens) + 2) * head_dim, dtype, seed + 1),
        v_means_(kv_heads * (KeyBlocks(kv_tokens) + 2) * head_dim, dtype, seed + 2) {
    const int64_t positions = RowTilePositions(group_size);
    view_.num_groups = groups;
    view_.first_tile = (kv_tokens - q_tokens) / positions;
    view_.num_tiles = (kv_tokens - 1) / positions + 1 - view_.first_tile;
    view_.block_words = KeyBlockWords(kv_tokens) + 1;
    view_.tiles_per_set = 3;
    view_.column_words = (kv_tokens + 31) / 32 + 2;
    blocks_.resize(groups * view_.num_tiles * view_.block_words);
    columns_.resize(groups * view_.num_sets() * view_.column_words);
    view_.blocks = blocks_.data();
    if (selection == Selection::kColumns) view_.columns = columns_.data();
    if (selection == Selection::kMeans) {
      view_.k_means = k_means_.data();
      view_.v_means = v_means_.data();
      view_.means_stride = KeyBlocks(kv_tokens) + 2;
    }
    std::mt19937 generator(seed);
    std::uniform_real_distribution<double> uniform(0.0, 1.0);
    const double share = selection == Selection::kAllBlocks ? 1.0 : 0.3;
    for (int g = 0; g < groups; ++g) {
      for (int64_t t = view_.first_tile; t < view_.first_tile + view_.num_tiles; ++t) {
        uint32_t* const bits = view_.BlocksOf(g, t);
        const int64_t first = t * positions, last = std::min(first + positions, kv_tokens) - 1;
        for (int64_t b = 0; b < KeyBlocks(kv_tokens); ++b) {
          const bool own = b >= first / kKeyBlock && b <= last / kKeyBlock;
          if (own || uniform(generator) < share) SetBit(bits, b);
        }
        if (view_.columns == nullptr) continue;
        // Left of the first row tile of the set.
        const int64_t end = t / view_.tiles_per_set * view_.tiles_per_set * positions;
        for (int64_t c = 0; c < end; ++c) {
          if (uniform(generator) < 0.1) SetBit(view_.ColumnsOf(g, t), c);
        }
      }
    }
  }
  OwnedTiles(const OwnedTiles&) = delete;
  OwnedTiles& operator=(const OwnedTiles&) = delete;
  const TileIndexView& view() const { return view_; }

 private:
  Tensor k_means_, v_means_;
  std::vector<uint32_t> blocks_, columns_;
  TileIndexView view_;
};

struct AttentionCase {
  int q_heads = 1, kv_heads = 1, head_dim = 64;
  int64_t q_tokens = 1, kv_tokens = 1;
  Selection selection = Selection::kDense;
  int64_t extra_stride = 0;  // added to every token stride
  uint32_t seed = 1;
  bool per_head = false;  // the index is per query head, not per KV group

  std::string ToString() const {
    return "q_heads " + std::to_string(q_heads) + ", kv_heads " + std::to_string(kv_heads) +
           ", head_dim " + std::to_string(head_dim) + ", q_tokens " + std::to_string(q_tokens) +
           ", kv_tokens " + std::to_string(kv_tokens) + ", " + Name(selection) + ", extra_stride " +
           std::to_string(extra_stride) + ", seed " + std::to_string(seed) +
           (per_head ? ", per head" : "");
  }
};

/// One sequence with its tensors. Queries are scaled so that the softmax is neither flat nor a
/// single spike.
class AttentionProblem {
 public:
  AttentionProblem(const AttentionCase& c, DType dtype)
      : q_stride_(int64_t{c.q_heads} * c.head_dim + c.extra_stride),
        kv_stride_(c.head_dim + c.extra_stride),
        q_(c.q_tokens * q_stride_, dtype, c.seed, 2.0f),
        k_(c.kv_heads * c.kv_tokens * kv_stride_, dtype, c.seed + 1),
        v_(c.kv_heads * c.kv_tokens * kv_stride_, dtype, c.seed + 2),
        out_(c.q_tokens * q_stride_, dtype, c.seed + 3) {
    shape_ = {c.q_heads, c.kv_heads, c.head_dim, dtype,
              1.0f / std::sqrt(static_cast<float>(c.head_dim))};
    sequence_.q = q_.data();
    sequence_.k = k_.data();
    sequence_.v = v_.data();
    sequence_.q_token_stride = sequence_.out_token_stride = q_stride_;
    sequence_.q_head_stride = sequence_.out_head_stride = c.head_dim;
    sequence_.kv_token_stride = kv_stride_;
    sequence_.kv_head_stride = c.kv_tokens * kv_stride_;
    sequence_.q_tokens = c.q_tokens;
    sequence_.kv_tokens = c.kv_tokens;
    const int groups = c.per_head ? c.q_heads : c.kv_heads;
    if (c.selection >= Selection::kBlocks) {
      tiles_ = std::make_unique<OwnedTiles>(c.selection, groups, c.q_heads / groups, c.kv_heads,
                                            c.head_dim, dtype, c.q_tokens, c.kv_tokens, c.seed + 4);
      sequence_.tiles = &tiles_->view();
    } else if (c.selection != Selection::kDense) {
      index_ = std::make_unique<OwnedIndex>(c.selection, groups, c.q_heads / groups, c.kv_tokens,
                                            c.seed + 4);
      sequence_.index = &index_->view();
    }
  }

  const AttentionShape& shape() const { return shape_; }
  /// The sequence, writing to `out`, which starts as a copy of what untouched elements must keep.
  AttentionSequence Writing(Tensor* out) const {
    AttentionSequence s = sequence_;
    *out = out_;
    s.out = out->data();
    return s;
  }
  const AttentionSequence& sequence() const { return sequence_; }
  const Tensor& initial_out() const { return out_; }

 private:
  int64_t q_stride_, kv_stride_;
  Tensor q_, k_, v_, out_;
  AttentionShape shape_;
  AttentionSequence sequence_;
  std::unique_ptr<OwnedIndex> index_;
  std::unique_ptr<OwnedTiles> tiles_;
};

/// docs/numerics.md: attention output.
inline Tolerance AttentionTolerance(DType dtype) {
  return dtype == DType::kBF16 ? Tolerance{6e-3, 1.0 / 96} : Tolerance{1e-5, 1e-5};
}

}  // namespace vsprefill::kernels::testing
