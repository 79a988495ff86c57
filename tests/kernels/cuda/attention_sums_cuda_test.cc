// AttentionSumsCuda against the reference; sums are distributions; two runs give the same bits.
#include "kernels/cuda/attention_sums_kernels.h"
#include "kernels/distill.h"
#include "tests/kernels/cuda/gpu_test_support.h"

namespace vsprefill::kernels {
namespace {

using testing::DeviceBuffer;
using testing::HostTensor;

struct Case {
  int q_heads, kv_heads, head_dim;
  int64_t tokens;
  DType dtype;
};

void Check(const Case& c, cuda::KernelChoice kernel) {
  const std::string what = "heads " + std::to_string(c.q_heads) + "/" + std::to_string(c.kv_heads) +
                           " head_dim " + std::to_string(c.head_dim) + " tokens " +
                           std::to_string(c.tokens) + " " + Name(c.dtype);
  std::mt19937 rng(static_cast<unsigned>(c.tokens));
  const int64_t q_stride = (c.q_heads + 2 * c.kv_heads) * c.head_dim;
  const int64_t capacity = c.tokens + 5;
  HostTensor q = testing::RandomTensor(c.dtype, c.tokens * q_stride, rng);
  HostTensor k = testing::RandomTensor(c.dtype, c.kv_heads * capacity * c.head_dim, rng);
  const AttentionShape shape = {c.q_heads, c.kv_heads, c.head_dim, c.dtype,
                                1.0f / std::sqrt(float(c.head_dim))};
  std::vector<float> lse(AttentionSumsScratch(shape, c.tokens)), columns(c.kv_heads * c.tokens),
      diagonals(columns.size());
  DeviceBuffer q_device(q.bytes), k_device(k.bytes);
  DeviceBuffer lse_device(lse.size() * 4), columns_device(columns.size() * 4),
      diagonals_device(columns.size() * 4);
  AttentionSumsArgs args;
  args.shape = shape;
  args.sequence.q = q.data();
  args.sequence.q_token_stride = q_stride;
  args.sequence.q_head_stride = c.head_dim;
  args.sequence.k = k.data();
  args.sequence.kv_head_stride = capacity * c.head_dim;
  args.sequence.kv_token_stride = c.head_dim;
  args.sequence.q_tokens = args.sequence.kv_tokens = c.tokens;
  args.lse = lse.data();
  args.columns = columns.data();
  args.diagonals = diagonals.data();
  ASSERT_EQ(AttentionSumsRef(args, nullptr), KernelStatus::kOk);
  args.sequence.q = q_device.data();
  args.sequence.k = k_device.data();
  args.lse = lse_device.as<float>();
  args.columns = columns_device.as<float>();
  args.diagonals = diagonals_device.as<float>();
  std::vector<float> first[2];
  for (int run = 0; run < 2; ++run) {
    ASSERT_EQ(cuda::AttentionSumsWith(kernel, args, nullptr), KernelStatus::kOk);
    ASSERT_TRUE(testing::Synchronize());
    const auto columns_now = columns_device.Download<float>();
    const auto diagonals_now = diagonals_device.Download<float>();
    if (run == 0) {
      first[0] = columns_now;
      first[1] = diagonals_now;
    } else {
      EXPECT_EQ(columns_now, first[0]) << what << ": two runs differ";
      EXPECT_EQ(diagonals_now, first[1]) << what << ": two runs differ";
    }
  }
  auto lse_now = lse_device.Download<float>();
  lse_now.resize(c.q_heads * c.tokens);  // the rest is scratch
  lse.resize(c.q_heads * c.tokens);
  testing::ExpectClose(testing::FloatTensor(lse_now), testing::FloatTensor(lse), 1e-5, 1e-3,
                       what + " lse");
  testing::ExpectClose(testing::FloatTensor(first[0]), testing::FloatTensor(columns), 1e-4, 1e-4,
                       what + " columns");
  testing::ExpectClose(testing::FloatTensor(first[1]), testing::FloatTensor(diagonals), 1e-4, 1e-4,
                       what + " diagonals");
  for (int g = 0; g < c.kv_heads; ++g) {
    double sums[2] = {0, 0};
    for (int64_t i = 0; i < c.tokens; ++i) {
      for (int s = 0; s < 2; ++s) sums[s] += first[s][g * c.tokens + i];
    }
    EXPECT_NEAR(sums[0], 1.0, 1e-3) << what << ": columns of group " << g;
    EXPECT_NEAR(sums[1], 1.0, 1e-3) << what << ": diagonals of group " << g;
  }
}

class AttentionSumsCudaTest : public ::testing::TestWithParam<cuda::KernelChoice> {};

TEST_P(AttentionSumsCudaTest, SmallEqualsReference) {
  for (int64_t tokens : {1, 2, 63, 64, 65, 127, 128, 129, 255, 256, 257, 300}) {
    Check({9, 3, 64, tokens, DType::kBF16}, GetParam());
  }
  Check({2, 1, 128, 385, DType::kBF16}, GetParam());
  Check({9, 3, 64, 200, DType::kF32}, GetParam());
}

TEST_P(AttentionSumsCudaTest, EqualsReference) {
  Check({4, 4, 128, 515, DType::kBF16}, GetParam());
  Check({8, 1, 128, 400, DType::kBF16}, GetParam());
  Check({4, 1, 128, 1537, DType::kBF16}, GetParam());  // several walks per band
  Check({8, 2, 16, 1000, DType::kBF16}, GetParam());
  Check({4, 2, 32, 640, DType::kBF16}, GetParam());
  Check({2, 1, 80, 333, DType::kBF16}, GetParam());
  Check({2, 1, 96, 333, DType::kBF16}, GetParam());
  Check({6, 3, 64, 700, DType::kBF16}, GetParam());
  Check({3, 1, 64, 2600, DType::kBF16}, GetParam());
  Check({6, 3, 72, 333, DType::kF32}, GetParam());
}

INSTANTIATE_TEST_SUITE_P(Kernels, AttentionSumsCudaTest,
                         ::testing::Values(cuda::KernelChoice::kFastest,
                                           cuda::KernelChoice::kGeneric),
                         [](const auto& info) {
                           return info.param == cuda::KernelChoice::kFastest ? "Fastest"
                                                                             : "Generic";
                         });

}  // namespace
}  // namespace vsprefill::kernels
