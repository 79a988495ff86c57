// Selections that look at queries and keys: the CPU gives the reference's index sets bit for bit,
// on every instruction set, for odd lengths, GQA ratios, chunk offsets and ties; and the rules of
// kernels/query_selection.h that can be checked without the reference hold.
#include "kernels/query_selection.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "kernels/query_selection_math.h"
#include "kernels/select_seer.h"
#include "tests/kernels/kernel_test_util.h"
#include "tests/kernels/seer_test_gate.h"

namespace vsprefill::kernels {
namespace {

using ::vsprefill::kernels::testing::kAllIsas;
using ::vsprefill::kernels::testing::ScopedIsa;
using ::vsprefill::kernels::testing::SeerTestGate;
using ::vsprefill::kernels::testing::Tensor;

struct Case {
  int group = 1, kv_heads = 1;
  int64_t q_tokens = 1, kv_tokens = 1, prompt_tokens = 1;
  bool ties = false;
  DType dtype = DType::kF32;

  std::string ToString() const {
    return "group " + std::to_string(group) + ", kv_heads " + std::to_string(kv_heads) + ", rows " +
           std::to_string(kv_tokens - q_tokens) + " to " + std::to_string(kv_tokens) + " of " +
           std::to_string(prompt_tokens) + (ties ? ", ties, " : ", ") + Name(dtype);
  }
};

// Every GQA ratio from 1 to 8, whole prompts and chunks, lengths around the block size.
std::vector<Case> Cases() {
  std::vector<Case> cases;
  const Case shapes[] = {{1, 2, 300, 300, 300}, {2, 1, 129, 517, 700}, {3, 1, 385, 385, 385},
                         {4, 1, 1, 386, 386},   {5, 1, 77, 333, 333},  {6, 1, 50, 640, 641},
                         {7, 1, 128, 256, 256}, {8, 1, 200, 201, 900}, {1, 1, 1, 1, 1},
                         {2, 2, 127, 127, 127}};
  for (Case c : shapes) {
    c.dtype = cases.size() % 2 == 0 ? DType::kBF16 : DType::kF32;
    cases.push_back(c);
    c.ties = true;
    cases.push_back(c);
  }
  return cases;
}

/// Queries and keys with some structure (sinks, a few strong keys, locality), or small whole
/// numbers that make many scores equal.
class Problem {
 public:
  static constexpr int kHeadDim = 16;

  explicit Problem(const Case& c)
      : q_(c.q_tokens * c.group * c.kv_heads * kHeadDim, c.dtype),
        k_(c.kv_heads * c.kv_tokens * kHeadDim, c.dtype),
        v_(c.kv_heads * c.kv_tokens * kHeadDim, c.dtype, 3) {
    std::mt19937 rng(static_cast<uint32_t>(c.kv_tokens * 10 + c.group));
    std::normal_distribution<float> normal;
    for (Tensor* tensor : {&q_, &k_}) {
      for (int64_t i = 0; i < tensor->size(); ++i) {
        const float x = c.ties ? static_cast<float>(static_cast<int>(rng() % 3) - 1) : normal(rng);
        tensor->Set(i, x);
      }
    }
    if (!c.ties) {
      for (int64_t head = 0; head < c.kv_heads; ++head) {
        for (int64_t j = 0; j < c.kv_tokens; ++j) {
          const float factor = j < 4 || j % 97 == 13 ? 3.0f : 1.0f;
          for (int e = 0; e < kHeadDim; ++e) {
            const int64_t at = (head * c.kv_tokens + j) * kHeadDim + e;
            k_.Set(at, factor * k_[at] + (e < 2 ? 1.0f : 0.0f));
          }
        }
      }
    }
    input_.shape = {c.group * c.kv_heads, c.kv_heads, kHeadDim, c.dtype, 0.25f};
    AttentionSequence& s = input_.sequence;
    s.q = q_.data();
    s.k = k_.data();
    s.v = v_.data();
    s.q_token_stride = int64_t{c.group} * c.kv_heads * kHeadDim;
    s.q_head_stride = s.kv_token_stride = kHeadDim;
    s.kv_head_stride = c.kv_tokens * kHeadDim;
    s.q_tokens = c.q_tokens;
    s.kv_tokens = c.kv_tokens;
    input_.prompt_tokens = c.prompt_tokens;
  }
  const QuerySelectionInput& input() const { return input_; }

 private:
  Tensor q_, k_, v_;
  QuerySelectionInput input_;
};

/// A block-sparse index with its memory, garbage before it is filled.
struct Tiles {
  TileIndexView view;
  std::vector<uint32_t> blocks, columns;
  Tensor k_means{0, DType::kF32}, v_means{0, DType::kF32};

  Tiles(const QuerySelectionInput& in, bool per_head, int64_t tiles_per_set = 0) {
    const int groups = per_head ? in.shape.num_q_heads : in.shape.num_kv_heads;
    const selection::ChunkTiles tiles =
        selection::TilesOf(in.sequence, in.shape.num_q_heads / groups);
    view.num_groups = groups;
    view.first_tile = tiles.first;
    view.num_tiles = tiles.count;
    view.block_words = KeyBlockWords(in.sequence.kv_tokens) + 1;
    view.column_words = (in.sequence.kv_tokens + 31) / 32 + 1;
    view.tiles_per_set = std::max<int64_t>(1, tiles_per_set);
    blocks.assign(groups * tiles.count * view.block_words, 0xdeadbeef);
    view.blocks = blocks.data();
    if (tiles_per_set > 0) {
      columns.assign(groups * view.num_sets() * view.column_words, 0xdeadbeef);
      view.columns = columns.data();
    }
    view.means_stride = KeyBlocks(in.sequence.kv_tokens) + 1;
    const int64_t size = in.shape.num_kv_heads * view.means_stride * in.shape.head_dim;
    k_means = Tensor(size, in.shape.dtype);
    v_means = Tensor(size, in.shape.dtype);
    view.k_means = k_means.data();
    view.v_means = v_means.data();
  }
  bool operator==(const Tiles& other) const {
    return blocks == other.blocks && columns == other.columns;
  }
  int64_t Kept() const {
    int64_t kept = 0;
    for (int g = 0; g < view.num_groups; ++g) {
      for (int64_t t = view.first_tile; t < view.first_tile + view.num_tiles; ++t) {
        kept += CountBits(view.BlocksOf(g, t), view.block_words * 32);
      }
    }
    return kept;
  }
};

/// A vertical-slash index with its memory.
struct Lists {
  SparseIndexView view;
  std::vector<int32_t> verticals, num_verticals, bands, num_bands;
  std::vector<uint32_t> bits;

  Lists(const QuerySelectionInput& in, int groups) {
    const int64_t n = in.sequence.kv_tokens;
    const int row_tile = RowTilePositions(in.shape.num_q_heads / groups);
    view.vertical_stride = n + 3;
    view.band_stride = BandWords(n, row_tile) + 1;
    view.band_list_stride = BandBlocks(n, row_tile) + 2;
    verticals.assign(groups * view.vertical_stride, -7);
    bands.assign(groups * view.band_list_stride, -7);
    bits.assign(groups * view.band_stride, 0xdeadbeef);
    num_verticals.assign(groups, -7);
    num_bands.assign(groups, -7);
    view.verticals = verticals.data();
    view.num_verticals = num_verticals.data();
    view.band_bits = bits.data();
    view.bands = bands.data();
    view.num_bands = num_bands.data();
  }
  bool operator==(const Lists& other) const {
    return verticals == other.verticals && num_verticals == other.num_verticals &&
           bands == other.bands && num_bands == other.num_bands && bits == other.bits &&
           view.num_groups == other.view.num_groups && view.dense_from == other.view.dense_from;
  }
};

constexpr KernelStatus kOk = KernelStatus::kOk;

class QuerySelectionTest : public ::testing::TestWithParam<CpuIsa> {
 protected:
  QuerySelectionTest() : isa_(GetParam()) {}
  void SetUp() override {
    if (!isa_.supported()) GTEST_SKIP() << "this processor lacks it";
  }

 private:
  ScopedIsa isa_;
};

TEST_P(QuerySelectionTest, MeansAreTheReferences) {
  for (const Case& c : Cases()) {
    const Problem p(c);
    Tiles expected(p.input(), false), actual(p.input(), false);
    ASSERT_EQ(PoolBlocksRef(p.input(), expected.k_means.data(), expected.v_means.data(),
                            expected.view.means_stride, nullptr),
              kOk);
    ASSERT_EQ(PoolBlocksCpu(p.input(), actual.k_means.data(), actual.v_means.data(),
                            actual.view.means_stride, nullptr),
              kOk);
    EXPECT_TRUE(actual.k_means == expected.k_means) << c.ToString();
    EXPECT_TRUE(actual.v_means == expected.v_means) << c.ToString();
  }
}

TEST_P(QuerySelectionTest, WindowIsTheReferences) {
  for (const Case& c : Cases()) {
    const Problem p(c);
    for (const WindowParams& params :
         {WindowParams{4, 1}, WindowParams{0, 130}, WindowParams{70, 200}, WindowParams{}}) {
      Lists expected(p.input(), c.kv_heads), actual(p.input(), c.kv_heads);
      ASSERT_EQ(SelectWindowRef(p.input(), params, &expected.view, nullptr), kOk);
      ASSERT_EQ(SelectWindowCpu(p.input(), params, &actual.view, nullptr), kOk);
      EXPECT_TRUE(actual == expected) << c.ToString() << ", window " << params.window_tokens;
    }
  }
}

TEST_P(QuerySelectionTest, FlashIsTheReferences) {
  for (const Case& c : Cases()) {
    const Problem p(c);
    for (const bool per_head : {false, true}) {
      for (FlashParams params :
           {FlashParams{0.1, false, 2, 4, 8, 0}, FlashParams{0.3, false, 0, 1, 0, 0},
            FlashParams{0.9, false, 1, 1, 1, 2}, FlashParams{0, false, 0, 1, 0, 0}}) {
        params.whole_blocks = per_head;
        Tiles expected(p.input(), per_head), actual(p.input(), per_head);
        for (Tiles* tiles : {&expected, &actual}) {
          ASSERT_EQ(PoolBlocksRef(p.input(), tiles->k_means.data(), nullptr,
                                  tiles->view.means_stride, nullptr),
                    kOk);
        }
        ASSERT_EQ(SelectFlashRef(p.input(), params, &expected.view, nullptr), kOk);
        ASSERT_EQ(SelectFlashCpu(p.input(), params, &actual.view, nullptr), kOk);
        EXPECT_TRUE(actual == expected) << c.ToString() << ", alpha " << params.alpha;
      }
    }
  }
}

TEST_P(QuerySelectionTest, MInferenceIsTheReferences) {
  for (const Case& c : Cases()) {
    const Problem p(c);
    for (const MInferenceParams& params :
         {MInferenceParams{}, MInferenceParams{40, 60}, MInferenceParams{0, 150, 128, 5, 50, 0, 50},
          MInferenceParams{200, 0, 1, 0, 100, 30, 120}}) {
      Lists expected(p.input(), c.group * c.kv_heads), actual(p.input(), c.group * c.kv_heads);
      ASSERT_EQ(SelectMInferenceRef(p.input(), params, &expected.view, nullptr), kOk);
      ASSERT_EQ(SelectMInferenceCpu(p.input(), params, &actual.view, nullptr), kOk);
      EXPECT_TRUE(actual == expected) << c.ToString() << ", verticals " << params.vertical_size;
    }
  }
}

TEST_P(QuerySelectionTest, FlexIsTheReferences) {
  bool aware = false, slashed = false;
  for (const Case& c : Cases()) {
    const Problem p(c);
    for (const FlexParams& params : {FlexParams{0.9, 0.1, 128}, FlexParams{0.5, 1.0, 1},
                                     FlexParams{0.7, 0, 1, 256}, FlexParams{0.2, 0.35, 1}}) {
      Tiles expected(p.input(), true), actual(p.input(), true);
      ASSERT_EQ(SelectFlexRef(p.input(), params, &expected.view, nullptr), kOk);
      ASSERT_EQ(SelectFlexCpu(p.input(), params, &actual.view, nullptr), kOk);
      EXPECT_TRUE(actual == expected) << c.ToString() << ", gamma " << params.gamma;
      Tiles other(p.input(), true);
      FlexParams never = params;
      never.tau = 0;
      ASSERT_EQ(SelectFlexCpu(p.input(), never, &other.view, nullptr), kOk);
      (actual == other ? slashed : aware) = true;
    }
  }
  EXPECT_TRUE(aware && slashed) << "both kinds of heads must have been seen";
}

TEST_P(QuerySelectionTest, XAttentionIsTheReferences) {
  for (const Case& c : Cases()) {
    const Problem p(c);
    for (const XAttentionParams& params :
         {XAttentionParams{}, XAttentionParams{4, 0.5}, XAttentionParams{16, 0.97},
          XAttentionParams{64, 0.7}, XAttentionParams{32, 1}}) {
      Tiles expected(p.input(), true), actual(p.input(), true);
      ASSERT_EQ(SelectXAttentionRef(p.input(), params, &expected.view, nullptr), kOk);
      ASSERT_EQ(SelectXAttentionCpu(p.input(), params, &actual.view, nullptr), kOk);
      EXPECT_TRUE(actual == expected) << c.ToString() << ", stride " << params.stride;
    }
  }
}

TEST_P(QuerySelectionTest, AnchorIsTheReferences) {
  for (const Case& c : Cases()) {
    const Problem p(c);
    for (const auto& [params, step] : {std::pair{AnchorParams{2, 1}, 1},
                                       {AnchorParams{3, 0, 0}, 2},
                                       {AnchorParams{12, 1}, 16},
                                       {AnchorParams{1, 3, 2}, 1}}) {
      Tiles expected(p.input(), true, step), actual(p.input(), true, step);
      ASSERT_EQ(SelectAnchorRef(p.input(), params, &expected.view, nullptr), kOk);
      ASSERT_EQ(SelectAnchorCpu(p.input(), params, &actual.view, nullptr), kOk);
      EXPECT_TRUE(actual == expected) << c.ToString() << ", theta " << params.theta;
    }
  }
}

TEST_P(QuerySelectionTest, SeerIsTheReferences) {
  int64_t kept = 0, all = 0;
  for (const Case& c : Cases()) {
    const Problem p(c);
    for (const int gate_dim : {2, 24, 128}) {
      const SeerTestGate gate(p.input(), gate_dim, c.ties);
      for (const SeerParams& params : {SeerParams{}, SeerParams{0.15, 0, 0}, SeerParams{0.3, 0, 1},
                                       SeerParams{0.9, 0.4, 0}, SeerParams{0, 0, 2}}) {
        Tiles expected(p.input(), true), actual(p.input(), true), everything(p.input(), true);
        ASSERT_EQ(SelectSeerRef(gate.Input(p.input()), params, &expected.view, nullptr), kOk);
        ASSERT_EQ(SelectSeerCpu(gate.Input(p.input()), params, &actual.view, nullptr), kOk);
        EXPECT_TRUE(actual == expected)
            << c.ToString() << ", gate_dim " << gate_dim << ", threshold " << params.threshold;
        ASSERT_EQ(SelectSeerCpu(gate.Input(p.input()), {0, 0, 0}, &everything.view, nullptr), kOk);
        kept += actual.Kept();
        all += everything.Kept();
      }
    }
  }
  EXPECT_LT(kept, all) << "something must have been left out";
}

// What the reference cannot be wrong about.

TEST(QuerySelectionRules, WindowCoversEveryRow) {
  const Problem p({3, 1, 500, 500, 500});
  for (const int window : {1, 64, 100, 333}) {
    Lists lists(p.input(), 1);
    ASSERT_EQ(SelectWindowCpu(p.input(), {5, window}, &lists.view, nullptr), kOk);
    EXPECT_EQ(lists.num_verticals[0], 5);
    for (int64_t row = 0; row < 500; ++row) {
      const int64_t last = row / 42 * 42 + 41;
      for (int64_t c = std::max<int64_t>(0, row - window + 1); c <= row; ++c) {
        ASSERT_TRUE(TestBit(lists.bits.data(), (last - c) / kBandBlock)) << row << ", " << c;
      }
      // No more than a tile and two blocks of distances beyond it.
      const int64_t beyond = row - window - 41 - 2 * kBandBlock;
      if (beyond < 0) continue;
      EXPECT_FALSE(TestBit(lists.bits.data(), (last - beyond) / kBandBlock));
    }
  }
}

/// Sets a key far from all others, so that one block stands out.
TEST(QuerySelectionRules, FlashKeepsTheBlockThatStandsOut) {
  const int64_t n = 8 * kKeyBlock;
  Tensor q(n * 16, DType::kF32), k(n * 16, DType::kF32);
  for (int64_t i = 0; i < n; ++i) {
    q.Set(i * 16, 4.0f);
    if (i / kKeyBlock == 2) k.Set(i * 16, 4.0f);
  }
  QuerySelectionInput in;
  in.shape = {1, 1, 16, DType::kF32, 0.25f};
  in.sequence.q = q.data();
  in.sequence.k = k.data();
  in.sequence.q_token_stride = in.sequence.kv_token_stride = 16;
  in.sequence.q_tokens = in.sequence.kv_tokens = in.prompt_tokens = n;
  Tiles tiles(in, true);
  ASSERT_EQ(PoolBlocksCpu(in, tiles.k_means.data(), nullptr, tiles.view.means_stride, nullptr),
            kOk);
  ASSERT_EQ(SelectFlashCpu(in, {0.2, true, 1, 1, 1, 0}, &tiles.view, nullptr), kOk);
  for (int64_t t = 0; t < 8; ++t) {
    for (int64_t b = 0; b <= t; ++b) {
      // Among blocks 0 and 1 alone all are equal, so tiles 1 and 2 keep both.
      const bool kept = t == 7 || b == 0 || b == t || b == 2 || (t <= 2 && b < 2);
      EXPECT_EQ(TestBit(tiles.view.BlocksOf(0, t), b), kept) << "tile " << t << ", block " << b;
    }
  }
}

TEST(QuerySelectionRules, TiesGoToTheSmallerNumber) {
  // All scores are equal.
  const int64_t n = 400;
  Tensor q(n * 16, DType::kF32), k(n * 16, DType::kF32);
  QuerySelectionInput in;
  in.shape = {1, 1, 16, DType::kF32, 0.25f};
  in.sequence.q = q.data();
  in.sequence.k = k.data();
  in.sequence.q_token_stride = in.sequence.kv_token_stride = 16;
  in.sequence.q_tokens = in.sequence.kv_tokens = in.prompt_tokens = n;
  Lists lists(in, 1);
  MInferenceParams params;
  params.vertical_size = 100;
  params.last_queries = 1;
  ASSERT_EQ(SelectMInferenceCpu(in, params, &lists.view, nullptr), kOk);
  ASSERT_EQ(lists.num_verticals[0], 100);
  for (int i = 0; i < 100; ++i) EXPECT_EQ(lists.verticals[i], i);

  // Half of a row's mass: the first block and the own one come first, then the smallest number.
  Tiles tiles(in, true);
  ASSERT_EQ(SelectXAttentionCpu(in, {8, 0.6}, &tiles.view, nullptr), kOk);
  EXPECT_EQ(*tiles.view.BlocksOf(0, 3), 0b1011u);
  // A threshold keeps all that are equal.
  Tiles flash(in, true);
  ASSERT_EQ(PoolBlocksCpu(in, flash.k_means.data(), nullptr, flash.view.means_stride, nullptr),
            kOk);
  ASSERT_EQ(SelectFlashCpu(in, {1, true, 0, 1, 0, 0}, &flash.view, nullptr), kOk);
  EXPECT_EQ(*flash.view.BlocksOf(0, 3), 0b1111u);
}

TEST(QuerySelectionRules, FlexTiesGoToTheSmallerNumber) {
  // All scores are equal: what the last rows all see has equal sums, blocks 0 to 3.
  const int64_t n = 700;
  Tensor q(n * 16, DType::kF32), k(n * 16, DType::kF32);
  QuerySelectionInput in;
  in.shape = {1, 1, 16, DType::kF32, 0.25f};
  in.sequence.q = q.data();
  in.sequence.k = k.data();
  in.sequence.q_token_stride = in.sequence.kv_token_stride = 16;
  in.sequence.q_tokens = in.sequence.kv_tokens = in.prompt_tokens = n;
  Tiles slashed(in, true), aware(in, true);
  ASSERT_EQ(SelectFlexCpu(in, {0.01, 0, 256}, &slashed.view, nullptr), kOk);
  EXPECT_EQ(*slashed.view.BlocksOf(0, 5), 0b110011u);  // columns 0 and 1, offsets 0 and 1
  // Pairs of block rows: 1, twice 1/2, three times 1/3, four times 1/4 ...; 3.6 of 6 rows end
  // inside of row 3, after two of its four. Its own block is read anyway.
  ASSERT_EQ(SelectFlexCpu(in, {0.6, 1, 1}, &aware.view, nullptr), kOk);
  EXPECT_EQ(*aware.view.BlocksOf(0, 2), 0b111u);
  EXPECT_EQ(*aware.view.BlocksOf(0, 3), 0b1011u);
  EXPECT_EQ(*aware.view.BlocksOf(0, 4), 0b10001u);
}

// The gate sees what was there before RoPE: a key that looks like the mean query before both were
// rotated finds it, wherever the two stand.
TEST(QuerySelectionRules, SeerFindsWhatStandsOutBeforeRope) {
  constexpr int64_t kTokens = 8 * kKeyBlock, kDim = 16;
  constexpr int64_t kSpecial = 2 * kKeyBlock + kSeerBlock;  // block 5 of 64
  const Problem p({1, 1, kTokens, kTokens, kTokens, false, DType::kF32});
  const SeerTestGate gate(p.input(), kDim, false);
  SeerInput in = gate.Input(p.input());
  Tensor q(kTokens * kDim, DType::kF32), k(kTokens * kDim, DType::kF32);
  const auto set_rotated = [&](Tensor& x, int64_t i, float value) {
    // (value, 0, ...) rotated by position i.
    x.Set(i * kDim, value * in.rope_cos[i * kDim / 2]);
    x.Set(i * kDim + kDim / 2, value * in.rope_sin[i * kDim / 2]);
  };
  for (int64_t i = 0; i < kTokens; ++i) {
    set_rotated(q, i, 4.0f);
    if (i >= kSpecial && i < kSpecial + kSeerBlock) set_rotated(k, i, 4.0f);
  }
  in.base.sequence.q = q.data();
  in.base.sequence.k = k.data();
  // The gate passes the mean on as it is and rotates nothing.
  std::vector<float> wq(kDim * kDim, 0.0f), wk(kDim * 3 * kDim, 0.0f);
  for (int64_t e = 0; e < kDim; ++e) wq[e * kDim + e] = wk[e * 3 * kDim + 2 * kDim + e] = 1;
  const std::vector<float> one(kTokens / kSeerBlock * kDim / 2, 1.0f), zero(one.size(), 0.0f);
  in.gate = {kDim, wq.data(), wk.data(), one.data(), zero.data(), 1.0f};
  Tiles tiles(in.base, true);
  ASSERT_EQ(SelectSeerCpu(in, {0.2, 0, 0}, &tiles.view, nullptr), kOk);
  for (int64_t t = 3; t < 8; ++t) {
    EXPECT_EQ(*tiles.view.BlocksOf(0, t), (1u << t) | 0b100u) << "tile " << t;
  }
  // A density of one block in 16 keeps the same; the last two row blocks read everything.
  ASSERT_EQ(SelectSeerCpu(in, {0.2, 0.01, 2}, &tiles.view, nullptr), kOk);
  EXPECT_EQ(*tiles.view.BlocksOf(0, 6), 0b1000100u);
  EXPECT_EQ(*tiles.view.BlocksOf(0, 7), 0b11111111u);
}

TEST(QuerySelectionRules, SeerTiesGoToTheSmallerNumber) {
  const Problem p({1, 1, 400, 400, 400, false, DType::kF32});
  const SeerTestGate gate(p.input(), 16, false);
  SeerInput in = gate.Input(p.input());
  const std::vector<float> nothing(16 * 48, 0.0f);  // all shares are equal
  in.gate.wq = in.gate.wk = nothing.data();
  Tiles tiles(in.base, true);
  // Row blocks 4 and 5 keep ceil(0.5 * 5) = 3 of 64 each, the first; their own tile is read anyway.
  ASSERT_EQ(SelectSeerCpu(in, {0, 0.5, 0}, &tiles.view, nullptr), kOk);
  EXPECT_EQ(*tiles.view.BlocksOf(0, 2), 0b111u);
  EXPECT_EQ(*tiles.view.BlocksOf(0, 3), 0b1011u);
  // A threshold keeps all that are equal: 1/6 each in row block 5, 1/7 in row block 6.
  ASSERT_EQ(SelectSeerCpu(in, {0.15, 0, 0}, &tiles.view, nullptr), kOk);
  EXPECT_EQ(*tiles.view.BlocksOf(0, 2), 0b111u);
  EXPECT_EQ(*tiles.view.BlocksOf(0, 3), 0b1000u);
}

TEST(QuerySelectionRules, ParametersThatKeepEverything) {
  const Problem p({2, 1, 300, 500, 500});
  const int64_t all = 2 * (2 + 3 + 4);  // row tiles 1, 2, 3 of two heads
  Tiles flash(p.input(), true), flex(p.input(), true), x(p.input(), true);
  ASSERT_EQ(
      PoolBlocksCpu(p.input(), flash.k_means.data(), nullptr, flash.view.means_stride, nullptr),
      kOk);
  ASSERT_EQ(SelectFlashCpu(p.input(), {0, true, 0, 1, 0, 0}, &flash.view, nullptr), kOk);
  EXPECT_EQ(flash.Kept(), all);
  ASSERT_EQ(SelectFlexCpu(p.input(), {1, 0, 1}, &flex.view, nullptr), kOk);
  EXPECT_EQ(flex.Kept(), all);
  ASSERT_EQ(SelectXAttentionCpu(p.input(), {8, 1}, &x.view, nullptr), kOk);
  EXPECT_EQ(x.Kept(), all);
  Tiles anchor(p.input(), true, 1);
  ASSERT_EQ(SelectAnchorCpu(p.input(), {1e6, 0, 0}, &anchor.view, nullptr), kOk);
  EXPECT_EQ(CountBits(anchor.view.ColumnsOf(0, 3), 500), 3 * kKeyBlock);
  const SeerTestGate gate(p.input(), 8, false);
  for (const SeerParams& params : {SeerParams{0, 0, 0}, SeerParams{1, 1, 0}}) {
    Tiles seer(p.input(), true);
    ASSERT_EQ(SelectSeerCpu(gate.Input(p.input()), params, &seer.view, nullptr), kOk);
    EXPECT_EQ(seer.Kept(), all);
  }
}

TEST(QuerySelectionRules, BadSizesAreRefused) {
  const Problem p({2, 1, 20, 50, 50});
  QuerySelectionInput in = p.input();
  in.prompt_tokens = 49;
  Lists lists(p.input(), 2);
  Tiles tiles(p.input(), true, 1);
  constexpr KernelStatus kRefused = KernelStatus::kUnsupportedShape;
  EXPECT_EQ(SelectWindowCpu(in, {}, &lists.view, nullptr), kRefused);
  EXPECT_EQ(SelectMInferenceCpu(in, {}, &lists.view, nullptr), kRefused);
  EXPECT_EQ(SelectFlashCpu(in, {}, &tiles.view, nullptr), kRefused);
  EXPECT_EQ(SelectFlexCpu(in, {}, &tiles.view, nullptr), kRefused);
  EXPECT_EQ(SelectXAttentionCpu(in, {}, &tiles.view, nullptr), kRefused);
  EXPECT_EQ(SelectAnchorCpu(in, {}, &tiles.view, nullptr), kRefused);
  EXPECT_EQ(PoolBlocksCpu(in, nullptr, nullptr, 1, nullptr), kRefused);
  const SeerTestGate gate(p.input(), 8, false);
  SeerInput seer = gate.Input(in);
  EXPECT_EQ(SelectSeerCpu(seer, {}, &tiles.view, nullptr), kRefused);
  for (const int gate_dim : {0, 7, kMaxSeerGateDim + 2}) {
    seer = gate.Input(p.input());
    seer.gate.gate_dim = gate_dim;
    EXPECT_EQ(SelectSeerCpu(seer, {}, &tiles.view, nullptr), kRefused);
  }
  seer = gate.Input(p.input());
  seer.rope_sin = nullptr;
  EXPECT_EQ(SelectSeerCpu(seer, {}, &tiles.view, nullptr), kRefused);
  in = p.input();
  in.sequence.q_tokens = 0;
  EXPECT_EQ(SelectFlashCpu(in, {}, &tiles.view, nullptr), kRefused);
  in.sequence.q_tokens = 51;
  EXPECT_EQ(SelectFlashCpu(in, {}, &tiles.view, nullptr), kRefused);
}

// Keys of different heads more than 2^31 elements apart, in reserved, mostly untouched memory.
TEST(QuerySelectionRules, OffsetsBeyond32Bits) {
  const Problem p({2, 2, 200, 300, 300, false, DType::kF32});
  const int64_t head = p.input().sequence.kv_head_stride * 4, far = (int64_t{1} << 33) + 4096;
  void* const region = mmap(nullptr, far + head, PROT_READ | PROT_WRITE,
                            MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (region == MAP_FAILED) GTEST_SKIP() << "no address space for " << far << " bytes";
  QuerySelectionInput in = p.input();
  for (int64_t i = 0; i < 2; ++i) {
    std::memcpy(static_cast<char*>(region) + i * far,
                static_cast<const char*>(in.sequence.k) + i * head, head);
  }
  in.sequence.k = in.sequence.v = region;
  in.sequence.kv_head_stride = far / 4;
  const auto expect_same = [&](const auto& select) {
    Tiles near_tiles(p.input(), true, 1), far_tiles(in, true, 1);
    ASSERT_EQ(select(p.input(), &near_tiles), kOk);
    ASSERT_EQ(select(in, &far_tiles), kOk);
    EXPECT_EQ(far_tiles.blocks, near_tiles.blocks);
  };
  expect_same([](const QuerySelectionInput& input, Tiles* tiles) {
    const KernelStatus status =
        PoolBlocksCpu(input, tiles->k_means.data(), nullptr, tiles->view.means_stride, nullptr);
    return status != kOk ? status
                         : SelectFlashCpu(input, {0.9, true, 0, 1, 0, 0}, &tiles->view, nullptr);
  });
  expect_same([](const QuerySelectionInput& input, Tiles* tiles) {
    return SelectFlexCpu(input, {0.3, 0.5, 1}, &tiles->view, nullptr);
  });
  expect_same([](const QuerySelectionInput& input, Tiles* tiles) {
    return SelectXAttentionCpu(input, {8, 0.5}, &tiles->view, nullptr);
  });
  expect_same([](const QuerySelectionInput& input, Tiles* tiles) {
    return SelectAnchorCpu(input, {1, 0, 0}, &tiles->view, nullptr);
  });
  const SeerTestGate gate(p.input(), 8, false);
  expect_same([&gate](const QuerySelectionInput& input, Tiles* tiles) {
    return SelectSeerCpu(gate.Input(input), {0.3, 0, 0}, &tiles->view, nullptr);
  });
  munmap(region, far + head);
}

INSTANTIATE_TEST_SUITE_P(AllIsas, QuerySelectionTest, ::testing::ValuesIn(kAllIsas),
                         [](const auto& info) { return std::string(CpuIsaName(info.param)); });

}  // namespace
}  // namespace vsprefill::kernels
