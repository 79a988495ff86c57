// The fidelity harness: an index as a mask against a brute-force reading of its definition and
// against the pair counts, the search for a density, plans and results files.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/types.h>

#include <cmath>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <random>
#include <vector>

#include "bench/eval/density_search.h"
#include "bench/eval/plan.h"
#include "bench/eval/results.h"
#include "kernels/attention.h"
#include "training/index_mask.h"

namespace vsprefill::eval {
namespace {

using kernels::AttentionSequence;
using kernels::AttentionShape;
using ::testing::HasSubstr;

AttentionShape Shape(int q_heads, int kv_heads) {
  AttentionShape shape;
  shape.num_q_heads = q_heads;
  shape.num_kv_heads = kv_heads;
  shape.head_dim = 16;
  shape.scale = 0.25f;
  return shape;
}

AttentionSequence Sequence(int64_t tokens) {
  AttentionSequence sequence;
  sequence.q_tokens = sequence.kv_tokens = tokens;
  return sequence;
}

/// A block-sparse index in memory of its own; every row's own blocks are set, single columns lie
/// left of the tile's set.
struct TileIndex {
  TileIndex(int groups, int64_t positions, int64_t tokens, int64_t tiles_per_set, bool columns,
            std::mt19937& random) {
    view.num_groups = groups;
    view.num_tiles = (tokens - 1) / positions + 1;
    view.block_words = kernels::KeyBlockWords(tokens) + 1;  // a stride that is not the content
    view.column_words = (tokens + 31) / 32 + 2;
    view.tiles_per_set = tiles_per_set;
    blocks.resize(groups * view.num_tiles * view.block_words);
    view.blocks = blocks.data();
    if (columns) {
      column_bits.resize(groups * view.num_sets() * view.column_words);
      view.columns = column_bits.data();
    }
    std::bernoulli_distribution often(0.3), seldom(0.05);
    for (int g = 0; g < groups; ++g) {
      for (int64_t t = 0; t < view.num_tiles; ++t) {
        const int64_t begin = t * positions, end = std::min(tokens, begin + positions);
        for (int64_t b = 0; b < kernels::KeyBlocks(tokens); ++b) {
          const bool own = (b + 1) * kernels::kKeyBlock > begin && b * kernels::kKeyBlock < end;
          if (own || often(random)) kernels::SetBit(view.BlocksOf(g, t), b);
        }
        if (!columns || t % tiles_per_set != 0) continue;
        for (int64_t c = 0; c < begin; ++c) {
          if (seldom(random)) kernels::SetBit(view.ColumnsOf(g, t), c);
        }
      }
    }
  }
  kernels::TileIndexView view;
  std::vector<uint32_t> blocks, column_bits;
};

struct BandIndex {
  BandIndex(int groups, int64_t positions, int64_t tokens, std::mt19937& random) {
    const int64_t total = kernels::BandBlocks(tokens, static_cast<int>(positions));
    view.num_groups = groups;
    view.vertical_stride = tokens + 3;
    view.band_stride = kernels::BandWords(tokens, static_cast<int>(positions)) + 1;
    view.band_list_stride = total;
    verticals.resize(groups * view.vertical_stride, 7);
    counts.resize(2 * groups);
    bits.resize(groups * view.band_stride);
    bands.resize(groups * total);
    view.verticals = verticals.data();
    view.num_verticals = counts.data();
    view.num_bands = counts.data() + groups;
    view.band_bits = bits.data();
    view.bands = bands.data();
    std::bernoulli_distribution often(0.2), seldom(0.03);
    for (int g = 0; g < groups; ++g) {
      for (int64_t b = 0; b < total; ++b) {
        if (b >= 2 && !often(random)) continue;  // two blocks: the local band
        kernels::SetBit(view.band_bits + g * view.band_stride, b);
        view.bands[g * total + view.num_bands[g]++] = static_cast<int32_t>(b);
      }
      for (int64_t c = 0; c < tokens; ++c) {
        if (seldom(random)) {
          view.verticals[g * view.vertical_stride + view.num_verticals[g]++] =
              static_cast<int32_t>(c);
        }
      }
    }
  }
  kernels::SparseIndexView view;
  std::vector<int32_t> verticals, counts, bands;
  std::vector<uint32_t> bits;
};

/// Whether row i of the group reads column c, by the words of tile_index.h and sparse_index.h.
bool Reads(const AttentionShape& shape, const AttentionSequence& s, int group, int64_t i,
           int64_t c) {
  if (c > i) return false;
  if (s.dense()) return true;
  const int groups = kernels::IndexGroups(shape, s);
  const int64_t positions = kernels::RowTilePositions(shape.num_q_heads / groups);
  const int64_t tile = i / positions;
  if (s.tiles != nullptr) {
    if (kernels::TestBit(s.tiles->BlocksOf(group, tile), c / kernels::kKeyBlock)) return true;
    return s.tiles->columns != nullptr && kernels::TestBit(s.tiles->ColumnsOf(group, tile), c);
  }
  const kernels::SparseIndexView& index = *s.index;
  const int64_t last = tile * positions + positions - 1;
  if (std::min(last, s.kv_tokens - 1) >= index.dense_from) return true;
  if (kernels::TestBit(index.band_bits + group * index.band_stride,
                       (last - c) / kernels::kBandBlock)) {
    return true;
  }
  const int32_t* begin = index.verticals + group * index.vertical_stride;
  return std::find(begin, begin + index.num_verticals[group], c) !=
         begin + index.num_verticals[group];
}

void ExpectMaskIsRight(const AttentionShape& shape, const AttentionSequence& s) {
  const int groups = kernels::IndexGroups(shape, s);
  const torch::Tensor rows = torch::arange(s.kv_tokens, torch::kInt64);
  const torch::Tensor mask = training::ReadMask(shape, s, rows).contiguous();
  ASSERT_EQ(mask.sizes(), torch::IntArrayRef({groups, s.kv_tokens, s.kv_tokens}));
  const bool* values = mask.data_ptr<bool>();
  for (int g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < s.kv_tokens; ++i) {
      for (int64_t c = 0; c < s.kv_tokens; ++c) {
        ASSERT_EQ(*values++, Reads(shape, s, g, i, c))
            << "group " << g << " row " << i << " column " << c;
      }
    }
  }
  kernels::PairCounts counts;
  ASSERT_EQ(kernels::CountPairsCpu(shape, s, &counts, nullptr), kernels::KernelStatus::kOk);
  EXPECT_EQ(mask.sum().item<int64_t>() * (shape.num_q_heads / groups), counts.unmasked);
  // Some rows, in any order.
  const torch::Tensor some = torch::tensor({s.kv_tokens - 1, int64_t{0}, s.kv_tokens / 2});
  EXPECT_TRUE(torch::equal(training::ReadMask(shape, s, some), mask.index_select(1, some)));
}

TEST(ReadMaskTest, BlockSparse) {
  std::mt19937 random(3);
  for (const auto& [groups, tiles_per_set, columns] :
       {std::tuple{2, 1, false}, {2, 1, true}, {6, 1, false}, {6, 2, true}, {6, 3, true}}) {
    for (const int64_t tokens : {1, 128, 300, 517}) {
      const AttentionShape shape = Shape(6, 2);
      AttentionSequence sequence = Sequence(tokens);
      TileIndex index(groups, kernels::RowTilePositions(6 / groups), tokens, tiles_per_set, columns,
                      random);
      sequence.tiles = &index.view;
      ExpectMaskIsRight(shape, sequence);
    }
  }
}

TEST(ReadMaskTest, VerticalSlash) {
  std::mt19937 random(4);
  for (const int groups : {2, 6}) {
    for (const int64_t tokens : {1, 130, 411}) {
      const AttentionShape shape = Shape(6, 2);
      AttentionSequence sequence = Sequence(tokens);
      BandIndex index(groups, kernels::RowTilePositions(6 / groups), tokens, random);
      sequence.index = &index.view;
      ExpectMaskIsRight(shape, sequence);
      index.view.dense_from = tokens - 20;
      ExpectMaskIsRight(shape, sequence);
    }
  }
}

TEST(ReadMaskTest, DenseIsCausal) { ExpectMaskIsRight(Shape(4, 2), Sequence(70)); }

TEST(DensityCurveTest, ReachesASmoothDensityInFewMeasurements) {
  int measured = 0;
  DensityCurve curve([&](double t) -> absl::StatusOr<double> {
    ++measured;
    return 0.02 + 0.9 * std::pow(t, 6);
  });
  for (const double wanted : {0.05, 0.1, 0.15, 0.2, 0.3}) {
    const auto t = curve.Reach(wanted, 0.5, 0.01, 8);
    ASSERT_TRUE(t.ok());
    EXPECT_NEAR(*curve.At(*t), wanted, 0.01 * wanted);
  }
  EXPECT_LE(measured, 25);
}

TEST(DensityCurveTest, TakesTheNearestStepAndTheEnds) {
  const auto steps = [](double t) -> absl::StatusOr<double> {
    return 0.1 + 0.05 * std::floor(8 * t);
  };
  DensityCurve curve(steps);
  EXPECT_NEAR(*curve.At(*curve.Reach(0.21, 0.5, 0.001, 12)), 0.2, 1e-9);
  EXPECT_EQ(*curve.Reach(0.01, 0.5, 0.01, 8), 0);
  EXPECT_EQ(*curve.Reach(0.9, 0.5, 0.01, 8), 1);
}

TEST(DensityCurveTest, PassesErrorsOn) {
  DensityCurve curve([](double) -> absl::StatusOr<double> { return absl::InternalError("lost"); });
  EXPECT_THAT(std::string(curve.Reach(0.1, 0.5, 0.01, 3).status().message()), HasSubstr("lost"));
}

TEST(SettingTest, KnobsSetTheirParameters) {
  Setting setting;
  setting.parameters = {{"sink_tokens", 4}};
  setting.knob = {{"vertical_size", 1000}, {"slash_size", 6096}};
  setting.range = {0.001, 10, /*logarithmic=*/true};
  setting.whole = true;
  EXPECT_EQ(setting.At(0.75),
            (std::map<std::string, double>{
                {"sink_tokens", 4}, {"vertical_size", 1000}, {"slash_size", 6096}}));
  EXPECT_EQ(setting.At(0).at("slash_size"), 6);
}

TEST(KnobTableTest, TakesTheMeanOfTheLastSetting) {
  MethodPlan plan;
  plan.name = "m";
  KnobTable table;
  Selection selection = {&plan, 0.1};
  EXPECT_EQ(table.Find("g", &selection).code(), absl::StatusCode::kNotFound);
  table.Add("g", "m", 0.1, 0, 0.9);
  table.Add("g", "m", 0.1, 1, 0.2);
  table.Add("g", "m", 0.1, 1, 0.4);
  table.Add("g", "m", 0.1, 0, 0.8);
  table.Add("other", "m", 0.1, 2, 0.7);
  ASSERT_TRUE(table.Find("g", &selection).ok());
  EXPECT_EQ(selection.setting, 1);
  EXPECT_NEAR(selection.t, 0.3, 1e-12);
}

TEST(ResultsTest, GoesOnAfterALineThatWasCutOff) {
  const std::string path = ::testing::TempDir() + "/eval_results.jsonl";
  std::ofstream(path) << R"({"item":"a","method":"m","wanted":0.1})"
                      << "\n"
                      << R"({"item":"b","method":"m","wan)";
  {
    const auto results = Results::Open(path);
    ASSERT_TRUE(results.ok()) << results.status();
    EXPECT_TRUE((*results)->Has("a", "m", 0.1));
    EXPECT_FALSE((*results)->Has("a", "m", 0.2));
    EXPECT_FALSE((*results)->Has("b", "m", 0.1));
    ASSERT_TRUE((*results)
                    ->Append({{"item", "b"},
                              {"method", "m"},
                              {"wanted", 0.1},
                              {"group", "g"},
                              {"setting", 0},
                              {"t", 0.5}})
                    .ok());
  }
  const auto results = Results::Open(path);
  ASSERT_TRUE(results.ok());
  EXPECT_EQ((*results)->size(), 2);
  MethodPlan plan;
  plan.name = "m";
  Selection selection = {&plan, 0.1};
  EXPECT_TRUE((*results)->knobs().Find("g", &selection).ok());
  std::filesystem::remove(path);
}

}  // namespace
}  // namespace vsprefill::eval
