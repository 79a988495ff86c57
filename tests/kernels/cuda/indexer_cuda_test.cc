// IndexerCuda against the reference (float64, features not rounded).
#include "kernels/cuda/indexer_kernels.h"
#include "kernels/indexer.h"
#include "tests/kernels/cuda/gpu_test_support.h"

namespace vsprefill::kernels {
namespace {

using cuda::KernelChoice;
using testing::DeviceBuffer;
using testing::HostTensor;

struct Case {
  int groups, head_dim, hidden;
  int64_t begin, end;
  DType dtype = DType::kBF16, weights = DType::kBF16;
};

/// Random inputs and weights, on the host and on the device; keys and values far from unit scale.
struct Problem {
  HostTensor k, v, w1;
  std::vector<float> b1, w2, b2, prior, vertical, slash;
  DeviceBuffer k_device, v_device, w1_device, b1_device, w2_device, b2_device, prior_device;
  DeviceBuffer vertical_device, slash_device;
  IndexerLayer host_layer, layer;
  IndexerInput host, input;

  explicit Problem(const Case& c) {
    std::mt19937 rng(4);
    const int64_t capacity = c.end + 3, stride = c.end + 7;
    k = testing::RandomTensor(c.dtype, c.groups * capacity * c.head_dim, rng, 3.0f);
    v = testing::RandomTensor(c.dtype, c.groups * capacity * c.head_dim, rng, 0.2f);
    const float w1_scale = 1.0f / std::sqrt(2.0f * static_cast<float>(c.head_dim));
    w1 = testing::RandomTensor(c.weights, int64_t{c.groups} * c.hidden * 2 * c.head_dim, rng,
                               w1_scale);
    const auto floats = [&rng](int64_t count, float scale) {
      std::normal_distribution<float> normal;
      std::vector<float> values(count);
      for (float& x : values) x = normal(rng) * scale;
      return values;
    };
    b1 = floats(int64_t{c.groups} * c.hidden, 0.3f);
    w2 = floats(int64_t{c.groups} * 2 * c.hidden, 1.0f / std::sqrt(static_cast<float>(c.hidden)));
    b2 = floats(c.groups * 2, 1.0f);
    prior = floats(c.groups * kSlashBuckets, 1.0f);
    vertical.assign(c.groups * stride, -77.0f);
    slash = vertical;
    k_device = DeviceBuffer(k.bytes);
    v_device = DeviceBuffer(v.bytes);
    w1_device = DeviceBuffer(w1.bytes);
    b1_device = DeviceBuffer(b1);
    w2_device = DeviceBuffer(w2);
    b2_device = DeviceBuffer(b2);
    prior_device = DeviceBuffer(prior);
    host_layer.num_groups = c.groups;
    host_layer.head_dim = c.head_dim;
    host_layer.hidden = c.hidden;
    host_layer.weight_dtype = c.weights;
    layer = host_layer;
    host_layer.w1 = w1.data();
    host_layer.b1 = b1.data();
    host_layer.w2 = w2.data();
    host_layer.b2 = b2.data();
    host_layer.slash_prior = prior.data();
    layer.w1 = w1_device.data();
    layer.b1 = b1_device.as<float>();
    layer.w2 = w2_device.as<float>();
    layer.b2 = b2_device.as<float>();
    layer.slash_prior = prior_device.as<float>();
    host.head_stride = capacity * c.head_dim;
    host.token_stride = c.head_dim;
    host.dtype = c.dtype;
    host.token_begin = c.begin;
    host.token_end = c.end;
    host.logit_stride = stride;
    input = host;
    host.k = k.data();
    host.v = v.data();
    host.vertical_logits = vertical.data();
    host.slash_logits = slash.data();
    input.k = k_device.data();
    input.v = v_device.data();
    ClearLogits();
  }

  void ClearLogits() {
    const std::vector<float> unwritten(vertical.size(), -77.0f);
    vertical_device = DeviceBuffer(unwritten);
    slash_device = DeviceBuffer(unwritten);
    input.vertical_logits = vertical_device.as<float>();
    input.slash_logits = slash_device.as<float>();
  }
  /// Runs into fresh logits and returns them, vertical ones first.
  std::vector<float> Run(KernelChoice choice) {
    ClearLogits();
    EXPECT_EQ(cuda::IndexerWith(choice, layer, input, nullptr), KernelStatus::kOk);
    return Logits();
  }
  std::vector<float> Logits() const {
    EXPECT_TRUE(testing::Synchronize());
    auto logits = vertical_device.Download<float>();
    const auto more = slash_device.Download<float>();
    logits.insert(logits.end(), more.begin(), more.end());
    return logits;
  }
};

void Check(const Case& c) {
  Problem p(c);
  ASSERT_EQ(IndexerRef(p.host_layer, p.host, nullptr), KernelStatus::kOk);
  std::vector<float> expected = p.vertical;
  expected.insert(expected.end(), p.slash.begin(), p.slash.end());
  const bool both = c.dtype == DType::kBF16 && cuda::DeviceIsSm90();
  for (const KernelChoice choice : {KernelChoice::kFastest, KernelChoice::kGeneric}) {
    if (choice == KernelChoice::kGeneric && !both) continue;
    const std::string what = "groups " + std::to_string(c.groups) + " head_dim " +
                             std::to_string(c.head_dim) + " hidden " + std::to_string(c.hidden) +
                             " tokens " + std::to_string(c.begin) + ".." + std::to_string(c.end) +
                             " " + Name(c.dtype) + "/" + Name(c.weights) +
                             (choice == KernelChoice::kGeneric ? " generic kernel" : "");
    const auto logits = p.Run(choice);
    // Unwritten logits keep their -77 in both, so the comparison covers them, too.
    const bool exact = c.dtype == DType::kF32 || c.weights == DType::kF32;
    testing::ExpectClose(testing::FloatTensor(logits), testing::FloatTensor(expected),
                         exact ? 1e-5 : 5e-3, exact ? 1e-4 : 2e-2, what);
    EXPECT_EQ(p.Run(choice), logits) << what << ": two runs differ";
  }
}

TEST(IndexerCuda, SmallEqualsReference) {
  Check({3, 64, 256, 0, 300});
  Check({1, 64, 100, 37, 130});
  Check({2, 128, 64, 5, 6});
  Check({2, 128, 257, 3, 400});
}

TEST(IndexerCuda, EqualsReference) {
  Check({2, 128, 512, 0, 257});
  Check({2, 16, 32, 0, 200});
  Check({2, 32, 40, 11, 200});
  Check({1, 80, 128, 0, 200});
  Check({1, 96, 128, 0, 200});
  Check({1, 72, 64, 0, 50});
  Check({3, 64, 256, 13, 113, DType::kF32, DType::kF32});
  Check({1, 64, 300, 0, 60, DType::kF32, DType::kBF16});
  Check({1, 64, 300, 0, 60, DType::kBF16, DType::kF32});
}

// Both head sizes of the Hopper kernel, every number of groups up to 8, the usual widths and odd
// ones; a few tokens more or fewer than its items and tiles hold.
TEST(IndexerCuda, EveryWidthEqualsReference) {
  for (int head_dim : {64, 128}) {
    for (int hidden : {1, 127, 129, 256, 512, 1024}) Check({1, head_dim, hidden, 10, 131});
    for (int groups = 1; groups <= 8; ++groups) Check({groups, head_dim, 256, 7, 200});
    for (int64_t tokens : {1, 63, 64, 65, 191, 192, 193, 385}) Check({1, head_dim, 128, 0, tokens});
  }
}

// Many work items for each multiprocessor; chunks give the bits of the whole.
TEST(IndexerCuda, LongSequencesAgreeWithTheGenericKernelAndInChunks) {
  if (!cuda::DeviceIsSm90()) GTEST_SKIP() << "one bf16 kernel on this device";
  for (const Case& c : {Case{8, 128, 512, 0, 20011}, Case{3, 64, 256, 0, 50003}}) {
    const std::string what = "head_dim " + std::to_string(c.head_dim);
    Problem p(c);
    const auto generic = p.Run(KernelChoice::kGeneric);
    const auto whole = p.Run(KernelChoice::kFastest);
    // Each is within half of the bound of the reference.
    testing::ExpectClose(testing::FloatTensor(whole), testing::FloatTensor(generic), 5e-3, 2e-2,
                         what);
    for (int run = 0; run < 3; ++run) {
      EXPECT_TRUE(p.Run(KernelChoice::kFastest) == whole) << what << ": two runs differ";
    }
    p.ClearLogits();
    int64_t begin = 0;
    for (int64_t end : {int64_t{1}, int64_t{100}, int64_t{8292}, c.end}) {
      p.input.token_begin = begin;
      p.input.token_end = end;
      ASSERT_EQ(IndexerCuda(p.layer, p.input, nullptr), KernelStatus::kOk);
      begin = end;
    }
    EXPECT_TRUE(p.Logits() == whole) << what << ": chunks differ from the whole";
  }
}

// A head stride that puts elements past 2^31.
TEST(IndexerCuda, LargeOffsets) {
  Problem p({2, 128, 128, 0, 300});
  const auto compact = p.Run(KernelChoice::kFastest);
  const int64_t head_stride = (int64_t{1} << 31) + 640, rows = 300 * 128;
  DeviceBuffer k(2 * (head_stride + rows), false), v(2 * (head_stride + rows), false);
  if (k.data() == nullptr || v.data() == nullptr) GTEST_SKIP() << "not enough GPU memory";
  for (int group = 0; group < 2; ++group) {
    const int64_t from = 2 * group * p.input.head_stride, to = 2 * group * head_stride;
    VSP_ASSERT_CUDA(cudaMemcpy(k.as<char>() + to, p.k_device.as<char>() + from, 2 * rows,
                               cudaMemcpyDeviceToDevice));
    VSP_ASSERT_CUDA(cudaMemcpy(v.as<char>() + to, p.v_device.as<char>() + from, 2 * rows,
                               cudaMemcpyDeviceToDevice));
  }
  p.input.k = k.data();
  p.input.v = v.data();
  p.input.head_stride = head_stride;
  EXPECT_TRUE(p.Run(KernelChoice::kFastest) == compact);
}

}  // namespace
}  // namespace vsprefill::kernels
