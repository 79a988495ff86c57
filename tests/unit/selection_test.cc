// Selection: the CPU implementation gives the reference's index bit for bit; the reference obeys
// the rules of kernels/selection.h; an index covers each pair at most once, and the forced ones.
#include "kernels/selection.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/cpu/isa.h"
#include "kernels/selection_math.h"

namespace vsprefill::kernels {
namespace {

/// An index with its buffers, filled with garbage before each use.
struct Index {
  std::vector<int32_t> verticals, num_verticals, bands, num_bands;
  std::vector<uint32_t> bits;
  SparseIndexView view;

  Index(int num_groups, int64_t kv_tokens, int row_tile) {
    view.vertical_stride = kv_tokens + 3;
    view.band_stride = BandWords(kv_tokens, row_tile) + 1;
    view.band_list_stride = BandBlocks(kv_tokens, row_tile) + 2;
    verticals.assign(num_groups * view.vertical_stride, -7);
    bands.assign(num_groups * view.band_list_stride, -7);
    bits.assign(num_groups * view.band_stride, 0xdeadbeef);
    num_verticals.assign(num_groups, -7);
    num_bands.assign(num_groups, -7);
    view.verticals = verticals.data();
    view.num_verticals = num_verticals.data();
    view.band_bits = bits.data();
    view.bands = bands.data();
    view.num_bands = num_bands.data();
  }
  std::vector<int32_t> Verticals(int group) const {
    const int32_t* begin = view.verticals + group * view.vertical_stride;
    return {begin, begin + num_verticals[group]};
  }
  std::vector<int32_t> Bands(int group) const {
    const int32_t* begin = view.bands + group * view.band_list_stride;
    return {begin, begin + num_bands[group]};
  }
  bool Bit(int group, int64_t block) const {
    return (view.band_bits[group * view.band_stride + block / 32] >> (block % 32)) & 1;
  }
};

struct Logits {
  std::vector<float> vertical, slash;
};

using Select = KernelStatus (*)(const SelectionInput&, const SelectionParams&, void*,
                                SparseIndexView*, Stream);

struct Case {
  int num_groups = 2, group_size = 3;
  int64_t kv_tokens = 0, q_start = 0, prompt_tokens = 0;
  std::vector<float> scale;
  SelectionParams params;
  Logits logits;

  SelectionInput Input() const {
    SelectionInput input;
    input.vertical_logits = logits.vertical.data();
    input.slash_logits = logits.slash.data();
    input.logit_stride = kv_tokens + 5;
    input.num_groups = num_groups;
    input.group_size = group_size;
    input.q_start = q_start;
    input.kv_tokens = kv_tokens;
    input.prompt_tokens = std::max(prompt_tokens, kv_tokens);
    input.threshold_scale = scale.empty() ? nullptr : scale.data();
    return input;
  }
  int row_tile() const { return RowTilePositions(group_size); }

  Index Run(Select select) const {
    Index index(num_groups, kv_tokens, row_tile());
    std::vector<char> workspace(SelectionWorkspaceBytes(num_groups, kv_tokens) + 256);
    void* memory = workspace.data();
    size_t space = workspace.size();
    std::align(256, space - 256, memory, space);
    EXPECT_EQ(select(Input(), params, memory, &index.view, nullptr), KernelStatus::kOk);
    return index;
  }
  std::string Describe() const {
    return "n=" + std::to_string(kv_tokens) + " g=" + std::to_string(group_size) +
           " q_start=" + std::to_string(q_start) +
           " rule=" + std::to_string(static_cast<int>(params.rule)) +
           " threshold=" + std::to_string(params.threshold) +
           " tau=" + std::to_string(params.tau_vertical) + "/" + std::to_string(params.tau_slash) +
           " sinks=" + std::to_string(params.sink_tokens) +
           " local=" + std::to_string(params.local_tokens) +
           " min=" + std::to_string(params.min_vertical_ratio) + "/" +
           std::to_string(params.min_slash_ratio) + " cap=" + std::to_string(params.max_density);
  }
};

enum class Shape { kNormal, kHeavy, kEqual, kSpike, kLowest, kNotFinite, kDecay };

Logits MakeLogits(Shape shape, int num_groups, int64_t n, std::mt19937& rng) {
  Logits logits;
  std::normal_distribution<float> normal;
  for (std::vector<float>* out : {&logits.vertical, &logits.slash}) {
    for (int64_t i = 0; i < num_groups * (n + 5); ++i) {
      const float x = normal(rng);
      float value = 0;
      switch (shape) {
        case Shape::kNormal:
          value = 2 * x;
          break;
        case Shape::kHeavy:
          value = x * x * x * 2;
          break;
        case Shape::kEqual:
          value = 1.5f;
          break;
        case Shape::kSpike:
          value = i % (n + 5) == n / 2 ? 30.0f : 0.01f * x;
          break;
        case Shape::kLowest:
          value = i % 3 == 0 ? x : -3.0e38f;
          break;
        case Shape::kNotFinite:
          value = i % 5 == 0   ? std::numeric_limits<float>::quiet_NaN()
                  : i % 5 == 1 ? std::numeric_limits<float>::infinity()
                  : i % 5 == 2 ? -std::numeric_limits<float>::infinity()
                               : x;
          break;
        case Shape::kDecay:
          value = x - 1.2f * std::log1p(static_cast<float>(i % (n + 5)));
          break;
      }
      out->push_back(value);
    }
  }
  return logits;
}

/// Counted from the definition in kernels/sparse_index.h, per query head.
struct Coverage {
  int64_t pairs = 0, dense = 0;
};

/// How often row `row` reads column `column` (dense tiles left out).
int TimesRead(const Index& index, int group, int64_t row, int64_t column, int row_tile) {
  const int64_t delta = row / row_tile * row_tile + row_tile - 1 - column;
  const bool band = index.Bit(group, delta / kBandBlock);
  const int32_t* verticals = index.view.verticals + group * index.view.vertical_stride;
  const int64_t listed = std::count(verticals, verticals + index.num_verticals[group], column);
  return (band ? 1 : 0) + (band ? 0 : static_cast<int>(listed));
}

Coverage Count(const Index& index, int group, const Case& c) {
  Coverage coverage;
  const auto list = index.Verticals(group);
  std::vector<char> vertical(c.kv_tokens, 0);
  for (int32_t j : list) vertical[j] = 1;
  for (int64_t row = c.q_start; row < c.kv_tokens; ++row) {
    const int64_t tile = row / c.row_tile() * c.row_tile();
    const bool dense = tile + c.row_tile() > index.view.dense_from;
    for (int64_t j = 0; j <= row; ++j) {
      const int64_t delta = tile + c.row_tile() - 1 - j;
      coverage.pairs += dense || vertical[j] || index.Bit(group, delta / kBandBlock);
    }
    coverage.dense += row + 1;
  }
  return coverage;
}

void ExpectWellFormed(const Index& index, const Case& c) {
  const int64_t blocks = BandBlocks(c.kv_tokens, c.row_tile());
  for (int group = 0; group < c.num_groups; ++group) {
    const auto verticals = index.Verticals(group);
    const auto bands = index.Bands(group);
    EXPECT_TRUE(std::is_sorted(verticals.begin(), verticals.end(), std::less_equal<>()) &&
                (verticals.empty() || (verticals.front() >= 0 && verticals.back() < c.kv_tokens)));
    EXPECT_EQ(std::set<int32_t>(verticals.begin(), verticals.end()).size(), verticals.size());
    EXPECT_EQ(std::set<int32_t>(bands.begin(), bands.end()).size(), bands.size());
    EXPECT_TRUE(std::is_sorted(bands.begin(), bands.end()));
    ASSERT_GE(bands.size(), static_cast<size_t>(std::min<int64_t>(2, blocks)));
    EXPECT_LT(bands.back(), blocks);
    size_t next = 0;
    for (int64_t b = 0; b < BandWords(c.kv_tokens, c.row_tile()) * 32; ++b) {
      const bool listed = next < bands.size() && bands[next] == b;
      EXPECT_EQ(index.Bit(group, b), listed) << "block " << b;
      next += listed;
    }
    // The rest of the caller's buffers is left alone.
    EXPECT_EQ(index.view.band_bits[group * index.view.band_stride + index.view.band_stride - 1],
              0xdeadbeef);
  }
}

void ExpectEqual(const Index& a, const Index& b, const Case& c) {
  EXPECT_EQ(a.view.dense_from, b.view.dense_from);
  EXPECT_EQ(a.view.num_groups, b.view.num_groups);
  EXPECT_EQ(a.bits, b.bits);
  for (int group = 0; group < c.num_groups; ++group) {
    EXPECT_EQ(a.Verticals(group), b.Verticals(group));
    EXPECT_EQ(a.Bands(group), b.Bands(group));
  }
}

TEST(SelectionMath, WeightIsExp) {
  std::mt19937 rng(1);
  std::uniform_real_distribution<float> uniform(-24.0f, 0.0f);
  for (int i = 0; i < 100000; ++i) {
    const float x = uniform(rng);
    const double exact = std::exp(static_cast<double>(x)) * 68719476736.0;
    EXPECT_NEAR(static_cast<double>(selection::Weight(x, 0.0f)), exact, exact * 3e-6 + 1.0) << x;
  }
  EXPECT_EQ(selection::Weight(-1.0e30f, 0.0f), 0u);
  EXPECT_EQ(selection::Weight(selection::Sanitize(NAN), 3.0e38f), 0u);
}

TEST(SelectionMath, WeightIsMonotone) {
  uint64_t last = uint64_t{1} << 36;
  for (float x = 0; x > -26.0f; x -= 0.00037f) {
    const uint64_t weight = selection::Weight(x, 0.0f);
    ASSERT_LE(weight, last) << x;
    last = weight;
  }
}

TEST(SelectionMath, BlockOverlapsSumToRowTile) {
  for (int64_t row_tile : {1, 16, 42, 128}) {
    for (int64_t offset : {0, 1, 63, 64, 1000}) {
      int64_t sum = 0;
      for (int64_t b = 0; b < 30; ++b) sum += selection::BlockOverlap(b, offset, row_tile);
      EXPECT_EQ(sum, row_tile);
    }
  }
}

class Selection : public testing::TestWithParam<int64_t> {};

TEST_P(Selection, CpuEqualsRef) {
  const int64_t n = GetParam();
  std::mt19937 rng(static_cast<unsigned>(n));
  auto pick = [&rng](std::initializer_list<double> values) {
    return *(values.begin() + rng() % values.size());
  };
  const int runs = n > 1000 ? 60 : 400;
  for (int run = 0; run < runs; ++run) {
    Case c;
    c.num_groups = 1 + static_cast<int>(rng() % 3);
    c.group_size = static_cast<int>(pick({1, 2, 3, 4, 7, 8, 128}));
    c.kv_tokens = n;
    c.q_start = static_cast<int64_t>(static_cast<double>(n - 1) * pick({0, 0, 0.3, 0.9, 1}));
    c.prompt_tokens = n + static_cast<int64_t>(pick({0, 0, 10, 5000}));
    c.params.rule = rng() % 2 == 0 ? SelectionRule::kMassPerCost : SelectionRule::kCumulative;
    c.params.threshold = static_cast<float>(pick({0, 0.5, 3, 10, 1000}));
    c.params.tau_vertical = static_cast<float>(pick({0, 0.3, 0.9, 0.999, 1}));
    c.params.tau_slash = static_cast<float>(pick({0, 0.3, 0.9, 0.999, 1}));
    c.params.sink_tokens = static_cast<int>(pick({0, 1, 64, 10000}));
    c.params.local_tokens = static_cast<int>(pick({128, 129, 500, 100000}));
    c.params.last_dense_tokens = static_cast<int>(pick({0, 1, 64, 100000}));
    c.params.min_vertical_ratio = static_cast<float>(pick({0, 0, 0.01, 0.3, 1}));
    c.params.min_slash_ratio = static_cast<float>(pick({0, 0, 0.01, 0.3, 1}));
    c.params.max_density = static_cast<float>(pick({1, 1, 0.5, 0.15, 0.01}));
    if (rng() % 2 == 0) {
      for (int g = 0; g < c.num_groups; ++g) c.scale.push_back(static_cast<float>(pick({0.3, 4})));
    }
    c.logits = MakeLogits(static_cast<Shape>(rng() % 7), c.num_groups, n, rng);
    SCOPED_TRACE(c.Describe());
    const Index ref = c.Run(SelectRef);
    for (CpuIsa isa : {CpuIsa::kAvx2, CpuIsa::kAvx512}) {
      if (!SetCpuIsa(isa)) continue;
      const Index cpu = c.Run(SelectCpu);
      ExpectWellFormed(cpu, c);
      ExpectEqual(ref, cpu, c);
    }
    SetCpuIsa(DetectCpuIsa());
    if (testing::Test::HasFailure()) return;
  }
}

TEST(SelectionRules, DensityStaysWithinCap) {
  const int64_t n = 5000;
  std::mt19937 rng(7);
  for (Shape shape : {Shape::kNormal, Shape::kEqual, Shape::kDecay, Shape::kSpike}) {
    for (SelectionRule rule : {SelectionRule::kMassPerCost, SelectionRule::kCumulative}) {
      for (int64_t q_start : {int64_t{0}, n / 2}) {
        Case c;
        c.num_groups = 1;
        c.kv_tokens = n;
        c.q_start = q_start;
        c.params.rule = rule;
        c.params.threshold = 0.1f;
        c.params.max_density = 0.3f;
        c.logits = MakeLogits(shape, 1, n, rng);
        SCOPED_TRACE(c.Describe());
        const Coverage coverage = Count(c.Run(SelectCpu), 0, c);
        EXPECT_LE(coverage.pairs, 0.3 * coverage.dense);
        c.params.max_density = 1.0f;
        const Coverage uncapped = Count(c.Run(SelectCpu), 0, c);
        if (shape == Shape::kNormal || shape == Shape::kEqual) {
          EXPECT_GT(uncapped.pairs, 0.5 * coverage.dense) << "the cap was not needed";
          // As much as fits: the estimate counts overlaps twice, hence the slack.
          EXPECT_GT(coverage.pairs, 0.2 * coverage.dense);
        } else {
          EXPECT_GE(uncapped.pairs, coverage.pairs);
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Lengths, Selection,
                         testing::Values(1, 2, 63, 64, 65, 127, 128, 191, 300, 5000));

class Short : public testing::TestWithParam<int64_t> {};

TEST_P(Short, KeepingEverythingCoversEachPairOnce) {
  const int64_t n = GetParam();
  std::mt19937 rng(3);
  for (int group_size : {1, 3, 8}) {
    for (SelectionRule rule : {SelectionRule::kMassPerCost, SelectionRule::kCumulative}) {
      Case c;
      c.group_size = group_size;
      c.kv_tokens = n;
      c.params.rule = rule;
      c.params.threshold = 0.0f;
      c.params.tau_vertical = c.params.tau_slash = 1.0f;
      c.params.last_dense_tokens = 0;
      c.logits = MakeLogits(Shape::kHeavy, c.num_groups, n, rng);
      const Index index = c.Run(SelectCpu);
      EXPECT_EQ(index.view.dense_from, INT64_MAX);
      for (int64_t row = 0; row < n; ++row) {
        for (int64_t j = 0; j <= row; ++j) {
          ASSERT_EQ(TimesRead(index, 1, row, j, c.row_tile()), 1) << row << "," << j;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Lengths, Short, testing::Values(1, 2, 63, 64, 65, 127, 128, 191, 300));

TEST(SelectionRules, ShortPromptIsReadWhole) {
  std::mt19937 rng(5);
  for (int64_t n : {1, 40, 64, 100, 128, 170, 191}) {
    Case c;
    c.kv_tokens = n;
    c.params.threshold = 1e9f;  // nothing beyond the forced part
    c.params.max_density = 0.01f;
    c.params.last_dense_tokens = 0;
    c.logits = MakeLogits(Shape::kNormal, c.num_groups, n, rng);
    const Coverage coverage = Count(c.Run(SelectCpu), 0, c);
    if (n + c.row_tile() - 1 <= 64 + 128) {
      EXPECT_EQ(coverage.pairs, coverage.dense) << n;
    }
    EXPECT_EQ(c.Run(SelectCpu).Verticals(0).size(),
              std::min<size_t>(64, std::max<int64_t>(0, (n + 41) / 42 * 42 - 128)));
  }
}

TEST(SelectionRules, SpikesAreFoundAndEverySinkAndLocalBlockKept) {
  const int64_t n = 4000;
  Case c;
  c.num_groups = 1;
  c.kv_tokens = n;
  c.logits.vertical.assign(n + 5, 0.0f);
  c.logits.slash.assign(n + 5, 0.0f);
  // The same mean per pair everywhere: mass falls with the number of rows.
  for (int64_t i = 0; i < n; ++i) {
    c.logits.vertical[i] = c.logits.slash[i] = std::log(1.0f - static_cast<float>(i) / n);
  }
  c.logits.vertical[1234] += 5.0f;
  c.logits.slash[999] += 7.0f;
  c.params.threshold = 6.0f;
  const Index index = c.Run(SelectCpu);
  std::vector<int32_t> expected(64);
  for (int i = 0; i < 64; ++i) expected[i] = i;
  expected.push_back(1234);
  EXPECT_EQ(index.Verticals(0), expected);
  // Offset 999 meets distances 999 .. 999 + 41, all in block 15 (960 .. 1023) but the last 17.
  EXPECT_EQ(index.Bands(0), (std::vector<int32_t>{0, 1, 15, 16}));
  EXPECT_EQ(index.view.dense_from, n - 64);
}

TEST(SelectionRules, ColumnsAreDiscountedByTheLocalBand) {
  // All mass is local: every diagonal below 64 equal, nothing else, and columns equal. No column
  // deserves to be listed, though late ones have few rows and so a high mean per pair.
  const int64_t n = 4096;
  Case c;
  c.num_groups = 1;
  c.kv_tokens = n;
  c.logits.vertical.assign(n + 5, 0.0f);
  c.logits.slash.assign(n + 5, -100.0f);
  std::fill_n(c.logits.slash.begin(), 64, 0.0f);
  c.params.threshold = 0.5f;
  const Index index = c.Run(SelectCpu);
  EXPECT_EQ(index.Verticals(0).size(), 64u);
  EXPECT_EQ(index.Bands(0).size(), 2u);
}

TEST(SelectionRules, CumulativeReachesTauWithTheFewestColumns) {
  const int64_t n = 3000;
  std::mt19937 rng(11);
  Case c;
  c.num_groups = 1;
  c.kv_tokens = n;
  c.params.rule = SelectionRule::kCumulative;
  c.params.tau_vertical = 0.8f;
  c.params.sink_tokens = 0;
  c.logits = MakeLogits(Shape::kNormal, 1, n, rng);
  const Index index = c.Run(SelectCpu);
  double total = 0, reached = 0, smallest = 1e30;
  std::vector<double> p(n);
  for (int64_t j = 0; j < n; ++j) total += p[j] = std::exp(c.logits.vertical[j]);
  const int64_t columns_end = (n + 41) / 42 * 42 - 128;
  for (int64_t j = columns_end; j < n; ++j) reached += p[j];
  for (int32_t j : index.Verticals(0)) {
    reached += p[j];
    smallest = std::min(smallest, p[j]);
  }
  EXPECT_GE(reached, 0.8 * total * (1 - 1e-6));
  EXPECT_LT(reached - smallest, 0.8 * total);
}

TEST(SelectionRules, MinimaGrowWithTheLength) {
  std::mt19937 rng(13);
  for (int64_t n : {2000, 4000}) {
    Case c;
    c.num_groups = 1;
    c.kv_tokens = n;
    c.params.threshold = 1e9f;
    c.params.min_vertical_ratio = 0.0625f;
    c.params.min_slash_ratio = 0.125f;
    c.logits = MakeLogits(Shape::kNormal, 1, n, rng);
    const Index index = c.Run(SelectCpu);
    EXPECT_EQ(index.Verticals(0).size(), static_cast<size_t>(n / 16));
    EXPECT_EQ(index.Bands(0).size(),
              static_cast<size_t>(std::ceil(0.125 * BandBlocks(n, c.row_tile()))));
  }
}

TEST(SelectionRules, ThresholdScaleActsPerGroup) {
  const int64_t n = 2000;
  std::mt19937 rng(17);
  Case c;
  c.kv_tokens = n;
  c.logits = MakeLogits(Shape::kNormal, 1, n, rng);
  c.logits.vertical.insert(c.logits.vertical.end(), c.logits.vertical.begin(),
                           c.logits.vertical.begin() + n + 5);
  c.logits.slash.insert(c.logits.slash.end(), c.logits.slash.begin(),
                        c.logits.slash.begin() + n + 5);
  const Index plain = c.Run(SelectCpu);
  EXPECT_EQ(plain.Verticals(0), plain.Verticals(1));
  c.scale = {1.0f, 2.0f};
  const Index scaled = c.Run(SelectCpu);
  EXPECT_EQ(scaled.Verticals(0), plain.Verticals(0));
  c.params.threshold *= 2;
  c.scale.clear();
  EXPECT_EQ(scaled.Verticals(1), c.Run(SelectCpu).Verticals(1));
  EXPECT_LT(scaled.Verticals(1).size(), plain.Verticals(1).size());
}

TEST(SelectionRules, RefusesSizesOutOfRange) {
  for (Select select : {SelectRef, SelectCpu}) {
    SelectionInput input;
    input.num_groups = 1;
    input.group_size = 3;
    SparseIndexView view;
    for (auto [q_start, kv, prompt] : {std::tuple<int64_t, int64_t, int64_t>{0, 0, 0},
                                       {5, 5, 5},
                                       {-1, 5, 5},
                                       {0, 5, 4},
                                       {0, kMaxSelectionTokens + 1, kMaxSelectionTokens + 1}}) {
      input.q_start = q_start;
      input.kv_tokens = kv;
      input.prompt_tokens = prompt;
      EXPECT_EQ(select(input, {}, nullptr, &view, nullptr), KernelStatus::kUnsupportedShape);
    }
    input.q_start = 0;
    input.kv_tokens = input.prompt_tokens = 5;
    input.group_size = 129;
    EXPECT_EQ(select(input, {}, nullptr, &view, nullptr), KernelStatus::kUnsupportedShape);
  }
}

}  // namespace
}  // namespace vsprefill::kernels
