// AttentionSumsCpu against the explicit softmax.
#include <gtest/gtest.h>

#include <numeric>
#include <tuple>

#include "kernels/distill.h"
#include "tests/kernels/attention_test_util.h"

namespace vsprefill::kernels {
namespace {

using ::vsprefill::kernels::testing::AttentionCase;
using ::vsprefill::kernels::testing::AttentionProblem;
using ::vsprefill::kernels::testing::IsaDTypeName;
using ::vsprefill::kernels::testing::kAllDTypes;
using ::vsprefill::kernels::testing::kAllIsas;
using ::vsprefill::kernels::testing::ScopedIsa;

class AttentionSumsTest : public ::testing::TestWithParam<std::tuple<CpuIsa, DType>> {};

struct Result {
  std::vector<float> lse, columns, diagonals;
};

Result RunSums(KernelStatus (*sums)(const AttentionSumsArgs&, Stream),
               const AttentionProblem& problem) {
  const AttentionShape& shape = problem.shape();
  const int64_t n = problem.sequence().kv_tokens;
  Result result{std::vector<float>(shape.num_q_heads * n),
                std::vector<float>(shape.num_kv_heads * n),
                std::vector<float>(shape.num_kv_heads * n)};
  AttentionSumsArgs args;
  args.shape = shape;
  args.sequence = problem.sequence();
  args.lse = result.lse.data();
  args.columns = result.columns.data();
  args.diagonals = result.diagonals.data();
  EXPECT_EQ(sums(args, nullptr), KernelStatus::kOk);
  return result;
}

void ExpectNear(const std::vector<float>& actual, const std::vector<float>& expected,
                double absolute, double relative, const std::string& what) {
  for (size_t i = 0; i < expected.size(); ++i) {
    ASSERT_NEAR(actual[i], expected[i], absolute + relative * std::abs(expected[i]))
        << what << ", element " << i;
  }
}

TEST_P(AttentionSumsTest, MatchesExplicitSoftmaxAndAddsUpToOne) {
  const auto [isa, dtype] = GetParam();
  ScopedIsa scope(isa);
  if (!scope.supported()) GTEST_SKIP() << "this processor lacks it";
  for (const AttentionCase& c :
       {AttentionCase{1, 1, 64, 1, 1}, AttentionCase{2, 1, 64, 2, 2},
        AttentionCase{9, 3, 64, 65, 65}, AttentionCase{3, 1, 64, 127, 127},
        AttentionCase{4, 2, 128, 300, 300}, AttentionCase{4, 4, 96, 97, 97},
        AttentionCase{8, 1, 16, 130, 130},
        AttentionCase{2, 1, 64, 517, 517, testing::Selection::kDense, 16}}) {
    const AttentionProblem problem(c, dtype);
    const Result expected = RunSums(AttentionSumsRef, problem),
                 actual = RunSums(AttentionSumsCpu, problem);
    const double relative = dtype == DType::kBF16 ? 2e-4 : 2e-5;
    ExpectNear(actual.lse, expected.lse, 2e-5, 2e-5, "lse, " + c.ToString());
    ExpectNear(actual.columns, expected.columns, 1e-7, relative, "columns, " + c.ToString());
    ExpectNear(actual.diagonals, expected.diagonals, 1e-7, relative, "diagonals, " + c.ToString());
    for (int group = 0; group < c.kv_heads; ++group) {
      const auto sum = [&](const std::vector<float>& v) {
        const auto first = v.begin() + group * c.kv_tokens;
        return std::accumulate(first, first + c.kv_tokens, 0.0);
      };
      EXPECT_NEAR(sum(actual.columns), 1.0, 1e-4) << c.ToString();
      EXPECT_NEAR(sum(actual.diagonals), 1.0, 1e-4) << c.ToString();
    }
    const Result again = RunSums(AttentionSumsCpu, problem);
    EXPECT_EQ(again.columns, actual.columns) << c.ToString();
    EXPECT_EQ(again.diagonals, actual.diagonals) << c.ToString();
  }
}

TEST(AttentionSumsShapeTest, QueriesMustCoverTheCache) {
  const AttentionProblem problem({3, 1, 64, 5, 10}, DType::kF32);
  AttentionSumsArgs args;
  args.shape = problem.shape();
  args.sequence = problem.sequence();
  EXPECT_EQ(AttentionSumsCpu(args, nullptr), KernelStatus::kUnsupportedShape);
}

INSTANTIATE_TEST_SUITE_P(AllIsas, AttentionSumsTest,
                         ::testing::Combine(::testing::ValuesIn(kAllIsas),
                                            ::testing::ValuesIn(kAllDTypes)),
                         [](const auto& info) {
                           return IsaDTypeName(std::get<0>(info.param), std::get<1>(info.param));
                         });

}  // namespace
}  // namespace vsprefill::kernels
