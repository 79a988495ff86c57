// IndexerCpu against the float64 reference.
#include "kernels/indexer.h"

#include <gtest/gtest.h>

#include <tuple>

#include "tests/kernels/kernel_test_util.h"

namespace vsprefill::kernels {
namespace {

using ::vsprefill::kernels::testing::IsaDTypeName;
using ::vsprefill::kernels::testing::kAllDTypes;
using ::vsprefill::kernels::testing::kAllIsas;
using ::vsprefill::kernels::testing::Near;
using ::vsprefill::kernels::testing::ScopedIsa;
using ::vsprefill::kernels::testing::Tensor;
using ::vsprefill::kernels::testing::Tolerance;

struct IndexerShape {
  int groups, head_dim, hidden;
  int64_t kv_tokens, token_begin, token_end;
};

class IndexerTest : public ::testing::TestWithParam<std::tuple<CpuIsa, DType, DType>> {};

TEST_P(IndexerTest, MatchesReference) {
  const auto [isa, weight_dtype, input_dtype] = GetParam();
  ScopedIsa scope(isa);
  if (!scope.supported()) GTEST_SKIP() << "this processor lacks it";
  for (const IndexerShape& s :
       {IndexerShape{3, 64, 256, 300, 0, 300}, IndexerShape{3, 64, 512, 130, 65, 130},
        IndexerShape{1, 128, 256, 64, 0, 64}, IndexerShape{2, 96, 100, 63, 0, 63},
        IndexerShape{2, 16, 7, 33, 32, 33}, IndexerShape{1, 256, 64, 17, 0, 17}}) {
    const int64_t inputs = 2 * s.head_dim, units = int64_t{s.groups} * s.hidden;
    const float spread = 1.0f / std::sqrt(static_cast<float>(inputs));
    const Tensor w1(units * inputs, weight_dtype, 1, spread);
    const Tensor b1(units, DType::kF32, 2), b2(2 * s.groups, DType::kF32, 3);
    const Tensor w2(2 * units, DType::kF32, 4, 1.0f / std::sqrt(static_cast<float>(s.hidden)));
    const Tensor prior(s.groups * kSlashBuckets, DType::kF32, 5);
    // Strides larger than tight; key and value scales far from 1, which the normalisation removes.
    const int64_t token_stride = s.head_dim + 16, head_stride = s.kv_tokens * token_stride + 32;
    const Tensor k(s.groups * head_stride, input_dtype, 6, 20.0f);
    const Tensor v(s.groups * head_stride, input_dtype, 7, 0.05f);
    IndexerLayer layer;
    layer.num_groups = s.groups;
    layer.head_dim = s.head_dim;
    layer.hidden = s.hidden;
    layer.weight_dtype = weight_dtype;
    layer.w1 = w1.data();
    layer.b1 = static_cast<const float*>(b1.data());
    layer.w2 = static_cast<const float*>(w2.data());
    layer.b2 = static_cast<const float*>(b2.data());
    layer.slash_prior = static_cast<const float*>(prior.data());
    const int64_t logit_stride = s.kv_tokens + 3;
    Tensor expected_vertical(s.groups * logit_stride, DType::kF32, 8);
    Tensor expected_slash(s.groups * logit_stride, DType::kF32, 9);
    Tensor vertical = expected_vertical, slash = expected_slash;
    IndexerInput input;
    input.k = k.data();
    input.v = v.data();
    input.head_stride = head_stride;
    input.token_stride = token_stride;
    input.dtype = input_dtype;
    input.token_begin = s.token_begin;
    input.token_end = s.token_end;
    input.vertical_logits = static_cast<float*>(expected_vertical.data());
    input.slash_logits = static_cast<float*>(expected_slash.data());
    input.logit_stride = logit_stride;
    ASSERT_EQ(IndexerRef(layer, input, nullptr), KernelStatus::kOk);
    input.vertical_logits = static_cast<float*>(vertical.data());
    input.slash_logits = static_cast<float*>(slash.data());
    ASSERT_EQ(IndexerCpu(layer, input, nullptr), KernelStatus::kOk);
    // With bf16 weights the features are rounded to bf16 too (docs/numerics.md).
    const Tolerance tolerance =
        weight_dtype == DType::kBF16 ? Tolerance{2e-2, 1e-2} : Tolerance{2e-5, 2e-5};
    const std::string what = "groups " + std::to_string(s.groups) + ", head_dim " +
                             std::to_string(s.head_dim) + ", hidden " + std::to_string(s.hidden) +
                             ", tokens " + std::to_string(s.kv_tokens);
    EXPECT_TRUE(Near(vertical, expected_vertical, tolerance, "vertical, " + what));
    EXPECT_TRUE(Near(slash, expected_slash, tolerance, "slash, " + what));
  }
}

TEST(SlashBucketTest, GrowsWithTheOffsetAndStaysInRange) {
  int last = 0;
  for (int64_t offset = 0; offset < int64_t{1} << 20; ++offset) {
    const int bucket = SlashBucket(offset);
    ASSERT_GE(bucket, last) << offset;
    ASSERT_LE(bucket, last + 1) << offset;
    last = bucket;
  }
  EXPECT_EQ(last, kSlashBuckets - 1);
}

INSTANTIATE_TEST_SUITE_P(AllIsas, IndexerTest,
                         ::testing::Combine(::testing::ValuesIn(kAllIsas),
                                            ::testing::ValuesIn(kAllDTypes),
                                            ::testing::ValuesIn(kAllDTypes)),
                         [](const auto& info) {
                           return IsaDTypeName(std::get<0>(info.param), std::get<1>(info.param)) +
                                  "_inputs_" + Name(std::get<2>(info.param));
                         });

}  // namespace
}  // namespace vsprefill::kernels
