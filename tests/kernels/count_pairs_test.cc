// CountPairsCpu against a count over every (row, column).
#include <gtest/gtest.h>

#include "kernels/attention.h"
#include "tests/kernels/attention_test_util.h"

namespace vsprefill::kernels {
namespace {

using ::vsprefill::kernels::testing::AttentionCase;
using ::vsprefill::kernels::testing::AttentionProblem;
using ::vsprefill::kernels::testing::Selection;

PairCounts BruteForce(const AttentionShape& shape, const AttentionSequence& s) {
  PairCounts counts;
  const int g = shape.group_size();
  const int64_t m = RowTilePositions(g), q_start = s.kv_tokens - s.q_tokens;
  for (int group = 0; group < shape.num_kv_heads; ++group) {
    std::vector<bool> is_vertical(s.kv_tokens, false);
    for (int32_t i = 0; s.index != nullptr && i < s.index->num_verticals[group]; ++i) {
      is_vertical[s.index->verticals[group * s.index->vertical_stride + i]] = true;
    }
    for (int64_t first = q_start / m * m; first < s.kv_tokens; first += m) {
      const int64_t row_begin = std::max(first, q_start);
      const int64_t row_end = std::min(first + m, s.kv_tokens), tile_last = first + m - 1;
      int64_t columns = 0;
      for (int64_t c = 0; c < row_end; ++c) {
        bool read = s.index == nullptr || tile_last >= s.index->dense_from || is_vertical[c];
        if (!read) {
          const int64_t block = (tile_last - c) / kBandBlock;
          read = (s.index->band_bits[group * s.index->band_stride + block / 32] >> block % 32) & 1;
        }
        columns += read;
        for (int64_t row = row_begin; row < row_end; ++row) {
          counts.dense += (c <= row) * g;
          counts.unmasked += (read && c <= row) * g;
        }
      }
      counts.multiplied += ((row_end - row_begin) * g + 15) / 16 * 16 * ((columns + 1) / 2 * 2);
    }
  }
  return counts;
}

TEST(CountPairsTest, MatchesBruteForce) {
  for (const Selection selection : {Selection::kDense, Selection::kLocal, Selection::kAllBands,
                                    Selection::kMixed, Selection::kMixedDenseTail}) {
    for (const int g : {1, 3, 4, 16}) {
      for (const auto& [q_tokens, kv_tokens] : std::vector<std::pair<int64_t, int64_t>>{
               {1, 1}, {65, 65}, {300, 300}, {77, 411}, {1, 500}}) {
        const AttentionCase c{2 * g, 2, 16, q_tokens, kv_tokens, selection};
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
    }
  }
}

}  // namespace
}  // namespace vsprefill::kernels
