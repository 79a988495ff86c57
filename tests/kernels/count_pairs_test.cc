// CountPairsCpu against a count over every (row, column).
#include <gtest/gtest.h>

#include <algorithm>

#include "kernels/attention.h"
#include "tests/kernels/attention_test_util.h"

namespace vsprefill::kernels {
namespace {

using ::vsprefill::kernels::testing::AttentionCase;
using ::vsprefill::kernels::testing::AttentionProblem;
using ::vsprefill::kernels::testing::Selection;

bool Reads(const AttentionSequence& s, int group, int64_t tile, int64_t tile_last, int64_t c) {
  if (s.dense()) return true;
  if (s.tiles != nullptr) {
    return TestBit(s.tiles->BlocksOf(group, tile), c / kKeyBlock) ||
           (s.tiles->columns != nullptr && TestBit(s.tiles->ColumnsOf(group, tile), c));
  }
  if (tile_last >= s.index->dense_from) return true;
  const int32_t* verticals = s.index->verticals + group * s.index->vertical_stride;
  if (std::binary_search(verticals, verticals + s.index->num_verticals[group], c)) return true;
  return TestBit(s.index->band_bits + group * s.index->band_stride, (tile_last - c) / kBandBlock);
}

PairCounts BruteForce(const AttentionShape& shape, const AttentionSequence& s) {
  PairCounts counts;
  const int groups = IndexGroups(shape, s), g = shape.num_q_heads / groups;
  const int64_t m = RowTilePositions(g), q_start = s.kv_tokens - s.q_tokens;
  for (int group = 0; group < groups; ++group) {
    for (int64_t first = q_start / m * m; first < s.kv_tokens; first += m) {
      const int64_t row_begin = std::max(first, q_start);
      const int64_t row_end = std::min(first + m, s.kv_tokens), tile_last = first + m - 1;
      int64_t columns = 0, means = 0;
      for (int64_t c = 0; c < row_end; ++c) {
        const bool read = Reads(s, group, first / m, tile_last, c);
        columns += read;
        for (int64_t row = row_begin; row < row_end; ++row) {
          counts.dense += (c <= row) * g;
          counts.unmasked += (read && c <= row) * g;
        }
      }
      if (s.tiles != nullptr && s.tiles->k_means != nullptr) {
        for (int64_t b = 0; (b + 1) * kKeyBlock <= first; ++b) {
          means += !TestBit(s.tiles->BlocksOf(group, first / m), b);
        }
      }
      counts.multiplied += ((row_end - row_begin) * g + 15) / 16 * 16 *
                           ((columns + 1) / 2 * 2 + (means + 1) / 2 * 2);
    }
  }
  return counts;
}

void ExpectExact(const AttentionCase& c) {
  const AttentionProblem problem(c, DType::kBF16);
  const PairCounts expected = BruteForce(problem.shape(), problem.sequence());
  PairCounts counts;
  ASSERT_EQ(CountPairsCpu(problem.shape(), problem.sequence(), &counts, nullptr),
            KernelStatus::kOk);
  EXPECT_EQ(counts.dense, expected.dense) << c.ToString();
  EXPECT_EQ(counts.unmasked, expected.unmasked) << c.ToString();
  EXPECT_EQ(counts.multiplied, expected.multiplied) << c.ToString();
  // A second call adds.
  ASSERT_EQ(CountPairsCpu(problem.shape(), problem.sequence(), &counts, nullptr),
            KernelStatus::kOk);
  EXPECT_EQ(counts.unmasked, 2 * expected.unmasked) << c.ToString();
}

TEST(CountPairsTest, MatchesBruteForce) {
  for (const Selection selection :
       {Selection::kDense, Selection::kLocal, Selection::kAllBands, Selection::kMixed,
        Selection::kMixedDenseTail, Selection::kBlocks, Selection::kAllBlocks, Selection::kColumns,
        Selection::kMeans}) {
    for (const int g : {1, 3, 4, 16}) {
      for (const auto& [q_tokens, kv_tokens] : std::vector<std::pair<int64_t, int64_t>>{
               {1, 1}, {65, 65}, {300, 300}, {77, 411}, {1, 500}}) {
        ExpectExact({2 * g, 2, 16, q_tokens, kv_tokens, selection});
        if (g == 3) ExpectExact({2 * g, 2, 16, q_tokens, kv_tokens, selection, 0, 1, true});
      }
    }
  }
}

}  // namespace
}  // namespace vsprefill::kernels
