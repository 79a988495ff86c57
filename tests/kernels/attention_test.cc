// AttentionCpu against the float64 reference: one table of shapes, every instruction set and dtype.
#include "kernels/attention.h"

#include <gtest/gtest.h>
#include <sys/mman.h>

#include <tuple>
#include <vector>

#include "tests/kernels/attention_test_util.h"

namespace vsprefill::kernels {
namespace {

using ::vsprefill::kernels::testing::AttentionCase;
using ::vsprefill::kernels::testing::AttentionProblem;
using ::vsprefill::kernels::testing::AttentionTolerance;
using ::vsprefill::kernels::testing::IsaDTypeName;
using ::vsprefill::kernels::testing::kAllDTypes;
using ::vsprefill::kernels::testing::kAllIsas;
using ::vsprefill::kernels::testing::Near;
using ::vsprefill::kernels::testing::OwnedIndex;
using ::vsprefill::kernels::testing::ScopedIsa;
using ::vsprefill::kernels::testing::Selection;
using ::vsprefill::kernels::testing::Tensor;

class AttentionTest : public ::testing::TestWithParam<std::tuple<CpuIsa, DType>> {
 protected:
  AttentionTest() : isa_(std::get<0>(GetParam())) {}
  void SetUp() override {
    if (!isa_.supported()) GTEST_SKIP() << "this processor lacks it";
  }
  DType dtype() const { return std::get<1>(GetParam()); }

  void ExpectMatchesReference(const AttentionCase& c) const {
    const AttentionProblem problem(c, dtype());
    Tensor expected(0, dtype()), out(0, dtype());
    const AttentionSequence reference = problem.Writing(&expected);
    ASSERT_EQ(AttentionRef(problem.shape(), &reference, 1, nullptr), KernelStatus::kOk);
    const AttentionSequence sequence = problem.Writing(&out);
    ASSERT_EQ(AttentionCpu(problem.shape(), &sequence, 1, nullptr), KernelStatus::kOk);
    EXPECT_TRUE(Near(out, expected, AttentionTolerance(dtype()), c.ToString()));
  }

 private:
  ScopedIsa isa_;
};

TEST_P(AttentionTest, OddLengthsDense) {
  for (const int64_t n : {1, 2, 15, 63, 64, 65, 96, 97, 127, 300}) {
    ExpectMatchesReference({9, 3, 64, n, n, Selection::kDense});
  }
}

TEST_P(AttentionTest, GroupSizes) {
  for (const int g : {1, 2, 3, 4, 7, 8, 16}) {
    ExpectMatchesReference({g, 1, 64, 150, 150, Selection::kMixed});
    ExpectMatchesReference({2 * g, 2, 64, 21, 100, Selection::kDense});
  }
}

TEST_P(AttentionTest, HeadDims) {
  for (const int d : {16, 32, 48, 64, 80, 96, 112, 128, 192, 256}) {
    ExpectMatchesReference({3, 1, d, 65, 65, Selection::kDense});
    ExpectMatchesReference({4, 2, d, 40, 200, Selection::kMixed});
  }
}

TEST_P(AttentionTest, Selections) {
  for (const Selection selection :
       {Selection::kLocal, Selection::kAllVerticals, Selection::kAllBands, Selection::kMixed,
        Selection::kMixedDenseTail}) {
    for (const int64_t n : {1, 65, 300, 517}) ExpectMatchesReference({3, 1, 64, n, n, selection});
    ExpectMatchesReference({8, 2, 128, 260, 260, selection});
  }
}

TEST_P(AttentionTest, BlockSparse) {
  for (const Selection selection : {Selection::kBlocks, Selection::kColumns, Selection::kMeans}) {
    for (const int64_t n : {1, 127, 129, 300, 901}) {
      ExpectMatchesReference({3, 1, 64, n, n, selection});
    }
    for (const int g : {1, 2, 4, 5, 8}) {
      ExpectMatchesReference({2 * g, 2, 64, 433, 433, selection});
      ExpectMatchesReference({2 * g, 2, 64, 70, 517, selection});
    }
    ExpectMatchesReference({4, 2, 128, 1, 2700, selection});
    ExpectMatchesReference({4, 2, 80, 391, 391, selection, 24});
  }
}

// One index per query head: row tiles of 128 positions of one head.
TEST_P(AttentionTest, IndexPerQueryHead) {
  for (const Selection selection :
       {Selection::kMixed, Selection::kBlocks, Selection::kColumns, Selection::kMeans}) {
    for (const int g : {1, 2, 3, 8}) {
      ExpectMatchesReference({2 * g, 2, 64, 300, 300, selection, 0, 1, true});
      ExpectMatchesReference({2 * g, 2, 64, 141, 517, selection, 8, 2, true});
    }
    ExpectMatchesReference({4, 2, 64, 1, 2700, selection, 0, 3, true});
  }
}

TEST_P(AttentionTest, ChunksThatStartInsideTheSequence) {
  for (const int64_t q_tokens : {1, 2, 41, 43, 100}) {
    for (const Selection selection : {Selection::kDense, Selection::kMixed}) {
      ExpectMatchesReference({9, 3, 64, q_tokens, 301, selection});
    }
  }
}

TEST_P(AttentionTest, StridesLargerThanTight) {
  ExpectMatchesReference({6, 2, 64, 70, 130, Selection::kDense, 24});
  ExpectMatchesReference({6, 2, 64, 70, 130, Selection::kMixed, 1});
}

// Few row tiles over a long cache are cut along the columns and merged.
TEST_P(AttentionTest, DecodeOverALongCache) {
  ExpectMatchesReference({9, 3, 64, 1, 3001, Selection::kDense});
  ExpectMatchesReference({16, 1, 128, 2, 2500, Selection::kMixed});
}

TEST_P(AttentionTest, SelectingEverythingEqualsDense) {
  for (const AttentionCase& c :
       {AttentionCase{9, 3, 64, 300, 300, Selection::kAllBands},
        AttentionCase{9, 3, 64, 300, 300, Selection::kAllVerticals},
        AttentionCase{9, 3, 64, 300, 300, Selection::kAllBlocks},
        AttentionCase{9, 3, 64, 300, 300, Selection::kAllBlocks, 0, 1, true},
        AttentionCase{9, 3, 64, 300, 300, Selection::kAllBands, 0, 1, true}}) {
    const AttentionProblem problem(c, dtype());
    Tensor sparse(0, dtype()), dense(0, dtype());
    AttentionSequence s = problem.Writing(&sparse);
    ASSERT_EQ(AttentionCpu(problem.shape(), &s, 1, nullptr), KernelStatus::kOk);
    s = problem.Writing(&dense);
    s.index = nullptr;
    s.tiles = nullptr;
    ASSERT_EQ(AttentionCpu(problem.shape(), &s, 1, nullptr), KernelStatus::kOk);
    EXPECT_TRUE(Near(sparse, dense, AttentionTolerance(dtype()), c.ToString()));
  }
}

TEST_P(AttentionTest, VarlenBatchEqualsOneByOne) {
  const std::vector<AttentionCase> cases = {{9, 3, 64, 1, 700, Selection::kDense, 0, 1},
                                            {9, 3, 64, 130, 130, Selection::kMixed, 0, 2},
                                            {9, 3, 64, 1, 1, Selection::kDense, 0, 3},
                                            {9, 3, 64, 64, 200, Selection::kDense, 8, 4},
                                            {9, 3, 64, 517, 517, Selection::kLocal, 0, 5},
                                            {9, 3, 64, 300, 600, Selection::kMixed, 0, 6},
                                            {9, 3, 64, 70, 300, Selection::kBlocks, 0, 7},
                                            {9, 3, 64, 70, 300, Selection::kMixed, 0, 8, true}};
  std::vector<AttentionProblem> problems;
  problems.reserve(cases.size());
  std::vector<Tensor> batched(cases.size(), Tensor(0, dtype()));
  std::vector<AttentionSequence> sequences;
  for (size_t i = 0; i < cases.size(); ++i) {
    problems.emplace_back(cases[i], dtype());
    sequences.push_back(problems.back().Writing(&batched[i]));
  }
  ASSERT_EQ(AttentionCpu(problems[0].shape(), sequences.data(), static_cast<int>(sequences.size()),
                         nullptr),
            KernelStatus::kOk);
  for (size_t i = 0; i < cases.size(); ++i) {
    Tensor expected(0, dtype());
    const AttentionSequence reference = problems[i].Writing(&expected);
    ASSERT_EQ(AttentionRef(problems[i].shape(), &reference, 1, nullptr), KernelStatus::kOk);
    EXPECT_TRUE(
        Near(batched[i], expected, AttentionTolerance(dtype()), "batched " + cases[i].ToString()));
  }
}

TEST_P(AttentionTest, BitwiseEqualFromRunToRun) {
  for (const AttentionCase& c : {AttentionCase{9, 3, 64, 400, 400, Selection::kMixed},
                                 AttentionCase{9, 3, 64, 1, 2000, Selection::kDense}}) {
    const AttentionProblem problem(c, dtype());
    Tensor first(0, dtype()), again(0, dtype());
    AttentionSequence s = problem.Writing(&first);
    ASSERT_EQ(AttentionCpu(problem.shape(), &s, 1, nullptr), KernelStatus::kOk);
    for (int run = 0; run < 5; ++run) {
      s = problem.Writing(&again);
      ASSERT_EQ(AttentionCpu(problem.shape(), &s, 1, nullptr), KernelStatus::kOk);
      EXPECT_TRUE(again == first) << c.ToString() << ", run " << run;
    }
  }
}

// Row tiles are aligned to position 0, so a chunk boundary changes no row, only how rows share
// tiles.
TEST_P(AttentionTest, ChunkingChangesNothing) {
  const AttentionCase c{9, 3, 64, 500, 500, Selection::kMixed};
  const AttentionProblem problem(c, dtype());
  Tensor whole(0, dtype()), chunked(0, dtype());
  AttentionSequence s = problem.Writing(&whole);
  ASSERT_EQ(AttentionCpu(problem.shape(), &s, 1, nullptr), KernelStatus::kOk);
  const AttentionSequence all = problem.Writing(&chunked);
  const int64_t row_bytes = all.q_token_stride * SizeOf(dtype());
  for (int64_t begin = 0; begin < c.q_tokens;) {
    const int64_t end = std::min<int64_t>(c.q_tokens, begin + 111);
    s = all;
    s.q = static_cast<const char*>(all.q) + begin * row_bytes;
    s.out = static_cast<char*>(all.out) + begin * row_bytes;
    s.q_tokens = end - begin;
    s.kv_tokens = end;
    ASSERT_EQ(AttentionCpu(problem.shape(), &s, 1, nullptr), KernelStatus::kOk);
    begin = end;
  }
  EXPECT_TRUE(Near(chunked, whole, AttentionTolerance(dtype()), c.ToString()));
}

// Scores far beyond what exp can hold; the running maximum has to follow them up.
TEST_P(AttentionTest, LargeScores) {
  const AttentionCase c{3, 1, 64, 200, 200, Selection::kDense};
  const AttentionProblem problem(c, dtype());
  Tensor expected(0, dtype()), out(0, dtype());
  AttentionShape shape = problem.shape();
  shape.scale = 20.0f;
  AttentionSequence s = problem.Writing(&expected);
  ASSERT_EQ(AttentionRef(shape, &s, 1, nullptr), KernelStatus::kOk);
  s = problem.Writing(&out);
  ASSERT_EQ(AttentionCpu(shape, &s, 1, nullptr), KernelStatus::kOk);
  // A score of 1e3 carries an error of 1e-4 in float32, which the softmax turns into a relative
  // one.
  EXPECT_TRUE(Near(out, expected,
                   dtype() == DType::kBF16 ? AttentionTolerance(dtype())
                                           : ::vsprefill::kernels::testing::Tolerance{1e-3, 1e-3},
                   c.ToString()));
}

// Element offsets past 2^31: heads that lie far apart in reserved, mostly untouched memory.
TEST_P(AttentionTest, OffsetsBeyond32Bits) {
  for (const Selection selection : {Selection::kMixed, Selection::kBlocks}) {
    const AttentionCase c{2, 2, 64, 70, 70, selection};
    const AttentionProblem problem(c, dtype());
    const int64_t head_stride = (int64_t{1} << 31) + 4096;
    const size_t bytes = static_cast<size_t>((head_stride + 70 * 64) * SizeOf(dtype()));
    void* const region = mmap(nullptr, 2 * bytes, PROT_READ | PROT_WRITE,
                              MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (region == MAP_FAILED) GTEST_SKIP() << "no address space for " << 2 * bytes << " bytes";
    const auto far = [&](const void* tight, char* base) {
      const int64_t head_bytes = problem.sequence().kv_head_stride * SizeOf(dtype());
      for (int64_t head = 0; head < 2; ++head) {
        std::memcpy(base + head * head_stride * SizeOf(dtype()),
                    static_cast<const char*>(tight) + head * head_bytes, head_bytes);
      }
      return base;
    };
    Tensor expected(0, dtype()), out(0, dtype());
    AttentionSequence s = problem.Writing(&expected);
    ASSERT_EQ(AttentionRef(problem.shape(), &s, 1, nullptr), KernelStatus::kOk);
    s = problem.Writing(&out);
    s.k = far(s.k, static_cast<char*>(region));
    s.v = far(s.v, static_cast<char*>(region) + bytes);
    s.kv_head_stride = head_stride;
    EXPECT_EQ(AttentionCpu(problem.shape(), &s, 1, nullptr), KernelStatus::kOk);
    EXPECT_TRUE(Near(out, expected, AttentionTolerance(dtype()), c.ToString()));
    munmap(region, 2 * bytes);
  }
}

TEST_P(AttentionTest, UnsupportedShapesAreRefused) {
  AttentionShape shape{9, 3, 64, dtype(), 0.125f};
  shape.head_dim = 40;
  EXPECT_EQ(AttentionCpu(shape, nullptr, 0, nullptr), KernelStatus::kUnsupportedShape);
  shape.head_dim = 272;
  EXPECT_EQ(AttentionCpu(shape, nullptr, 0, nullptr), KernelStatus::kUnsupportedShape);
  shape = {10, 3, 64, dtype(), 0.125f};
  EXPECT_EQ(AttentionCpu(shape, nullptr, 0, nullptr), KernelStatus::kUnsupportedShape);
  shape = {129, 1, 64, dtype(), 0.125f};
  EXPECT_EQ(AttentionCpu(shape, nullptr, 0, nullptr), KernelStatus::kUnsupportedShape);
  // An index for neither the KV groups nor the query heads.
  const AttentionProblem problem({9, 3, 64, 10, 10, Selection::kBlocks}, dtype());
  Tensor out(0, dtype());
  AttentionSequence s = problem.Writing(&out);
  TileIndexView tiles = *s.tiles;
  tiles.num_groups = 1;
  s.tiles = &tiles;
  EXPECT_EQ(AttentionCpu(problem.shape(), &s, 1, nullptr), KernelStatus::kUnsupportedShape);
}

INSTANTIATE_TEST_SUITE_P(AllIsas, AttentionTest,
                         ::testing::Combine(::testing::ValuesIn(kAllIsas),
                                            ::testing::ValuesIn(kAllDTypes)),
                         [](const auto& info) {
                           return IsaDTypeName(std::get<0>(info.param), std::get<1>(info.param));
                         });

}  // namespace
}  // namespace vsprefill::kernels
