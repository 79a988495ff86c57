// IndexerCuda against the reference (float64, features not rounded).
#include "kernels/indexer.h"
#include "tests/kernels/cuda/gpu_test_support.h"

namespace vsprefill::kernels {
namespace {

using testing::DeviceBuffer;
using testing::HostTensor;

struct Case {
  int groups, head_dim, hidden;
  int64_t begin, end;
  DType dtype, weights;
};

void Check(const Case& c) {
  const std::string what = "groups " + std::to_string(c.groups) + " head_dim " +
                           std::to_string(c.head_dim) + " hidden " + std::to_string(c.hidden) +
                           " tokens " + std::to_string(c.begin) + ".." + std::to_string(c.end) +
                           " " + Name(c.dtype) + "/" + Name(c.weights);
  std::mt19937 rng(4);
  const int64_t capacity = c.end + 3, stride = c.end + 7;
  HostTensor k = testing::RandomTensor(c.dtype, c.groups * capacity * c.head_dim, rng, 3.0f);
  HostTensor v = testing::RandomTensor(c.dtype, c.groups * capacity * c.head_dim, rng, 0.2f);
  const float w1_scale = 1.0f / std::sqrt(2.0f * static_cast<float>(c.head_dim));
  HostTensor w1 = testing::RandomTensor(c.weights, int64_t{c.groups} * c.hidden * 2 * c.head_dim,
                                        rng, w1_scale);
  const auto floats = [&rng](int64_t count, float scale) {
    std::normal_distribution<float> normal;
    std::vector<float> values(count);
    for (float& x : values) x = normal(rng) * scale;
    return values;
  };
  const auto b1 = floats(int64_t{c.groups} * c.hidden, 0.3f);
  const auto w2 =
      floats(int64_t{c.groups} * 2 * c.hidden, 1.0f / std::sqrt(static_cast<float>(c.hidden)));
  const auto b2 = floats(c.groups * 2, 1.0f);
  const auto prior = floats(c.groups * kSlashBuckets, 1.0f);
  std::vector<float> vertical(c.groups * stride, -77.0f), slash(vertical);
  DeviceBuffer k_device(k.bytes), v_device(v.bytes), w1_device(w1.bytes), b1_device(b1),
      w2_device(w2), b2_device(b2), prior_device(prior), vertical_device(vertical),
      slash_device(slash);
  IndexerLayer layer;
  layer.num_groups = c.groups;
  layer.head_dim = c.head_dim;
  layer.hidden = c.hidden;
  layer.weight_dtype = c.weights;
  layer.w1 = w1.data();
  layer.b1 = b1.data();
  layer.w2 = w2.data();
  layer.b2 = b2.data();
  layer.slash_prior = prior.data();
  IndexerInput input;
  input.k = k.data();
  input.v = v.data();
  input.head_stride = capacity * c.head_dim;
  input.token_stride = c.head_dim;
  input.dtype = c.dtype;
  input.token_begin = c.begin;
  input.token_end = c.end;
  input.vertical_logits = vertical.data();
  input.slash_logits = slash.data();
  input.logit_stride = stride;
  ASSERT_EQ(IndexerRef(layer, input, nullptr), KernelStatus::kOk);
  layer.w1 = w1_device.data();
  layer.b1 = b1_device.as<float>();
  layer.w2 = w2_device.as<float>();
  layer.b2 = b2_device.as<float>();
  layer.slash_prior = prior_device.as<float>();
  input.k = k_device.data();
  input.v = v_device.data();
  input.vertical_logits = vertical_device.as<float>();
  input.slash_logits = slash_device.as<float>();
  ASSERT_EQ(IndexerCuda(layer, input, nullptr), KernelStatus::kOk);
  ASSERT_TRUE(testing::Synchronize());
  const auto vertical_first = vertical_device.Download<float>();
  const auto slash_first = slash_device.Download<float>();
  // Unwritten logits keep their -77 in both, so the comparison covers them, too.
  const bool exact = c.dtype == DType::kF32 || c.weights == DType::kF32;
  const double bound = exact ? 1e-4 : 2e-2;
  testing::ExpectClose(testing::FloatTensor(vertical_first), testing::FloatTensor(vertical),
                       exact ? 1e-5 : 5e-3, bound, what + " vertical");
  testing::ExpectClose(testing::FloatTensor(slash_first), testing::FloatTensor(slash),
                       exact ? 1e-5 : 5e-3, bound, what + " slash");
  ASSERT_EQ(IndexerCuda(layer, input, nullptr), KernelStatus::kOk);
  ASSERT_TRUE(testing::Synchronize());
  EXPECT_EQ(vertical_device.Download<float>(), vertical_first) << what << ": two runs differ";
  EXPECT_EQ(slash_device.Download<float>(), slash_first) << what << ": two runs differ";
}

TEST(IndexerCuda, SmallEqualsReference) {
  Check({3, 64, 256, 0, 300, DType::kBF16, DType::kBF16});
  Check({1, 64, 100, 37, 130, DType::kBF16, DType::kBF16});
  Check({2, 128, 64, 5, 6, DType::kBF16, DType::kBF16});
}

TEST(IndexerCuda, EqualsReference) {
  Check({2, 128, 512, 0, 257, DType::kBF16, DType::kBF16});
  Check({2, 16, 32, 0, 200, DType::kBF16, DType::kBF16});
  Check({2, 32, 40, 11, 200, DType::kBF16, DType::kBF16});
  Check({1, 80, 128, 0, 200, DType::kBF16, DType::kBF16});
  Check({1, 96, 128, 0, 200, DType::kBF16, DType::kBF16});
  Check({1, 72, 64, 0, 50, DType::kBF16, DType::kBF16});
  Check({3, 64, 256, 13, 113, DType::kF32, DType::kF32});
  Check({1, 64, 300, 0, 60, DType::kF32, DType::kBF16});
  Check({1, 64, 300, 0, 60, DType::kBF16, DType::kF32});
}

}  // namespace
}  // namespace vsprefill::kernels
