// SelectCuda gives the index of SelectRef, bit for bit, and SelectCpu's where n is large.
#include <limits>

#include "kernels/cuda/select_kernels.h"
#include "kernels/selection.h"
#include "tests/kernels/cuda/gpu_test_support.h"

namespace vsprefill::kernels {
namespace {

using cuda::KernelChoice;
using testing::DeviceBuffer;

struct Case {
  int groups, group_size;
  int64_t kv_tokens, q_start;
  SelectionParams params;
  int kind = 0;  // of logits
  std::vector<float> scale;
};

std::vector<float> Logits(int kind, int64_t n, int64_t count, std::mt19937& rng) {
  std::normal_distribution<float> normal;
  std::vector<float> logits(count);
  for (int64_t i = 0; i < count; ++i) {
    const float x = normal(rng);
    switch (kind) {
      case 0:
        logits[i] = 2 * x;
        break;
      case 1:
        logits[i] = x - 1.2f * std::log1p(static_cast<float>(i % n));
        break;
      case 2:
        logits[i] = 1.5f;  // all equal
        break;
      case 3:
        logits[i] = i % 5 == 0   ? std::numeric_limits<float>::quiet_NaN()
                    : i % 5 == 1 ? std::numeric_limits<float>::infinity()
                    : i % 5 == 2 ? -std::numeric_limits<float>::infinity()
                                 : x;
        break;
      default:
        logits[i] = i % n == n / 2 ? 30.0f : 0.01f * x;  // one spike
    }
  }
  return logits;
}

struct Index {
  std::vector<int32_t> verticals, num_verticals, bands, num_bands;
  std::vector<uint32_t> bits;
};

void Check(const Case& c, SelectFn oracle) {
  const std::string what = "n " + std::to_string(c.kv_tokens) + " q_start " +
                           std::to_string(c.q_start) + " g " + std::to_string(c.group_size) +
                           " rule " + std::to_string(static_cast<int>(c.params.rule)) + " kind " +
                           std::to_string(c.kind) + " cap " + std::to_string(c.params.max_density) +
                           " threshold " + std::to_string(c.params.threshold);
  std::mt19937 rng(static_cast<unsigned>(c.kv_tokens));
  const int row_tile = RowTilePositions(c.group_size);
  const int64_t stride = c.kv_tokens + 5;
  const auto vertical = Logits(c.kind, stride, c.groups * stride, rng);
  const auto slash = Logits(c.kind, stride, c.groups * stride, rng);
  Index host;
  SparseIndexView view;
  view.vertical_stride = c.kv_tokens + 3;
  view.band_stride = BandWords(c.kv_tokens, row_tile) + 1;
  view.band_list_stride = BandBlocks(c.kv_tokens, row_tile) + 2;
  // What is not written keeps this filling on both sides.
  host.verticals.assign(c.groups * view.vertical_stride, -7);
  host.bands.assign(c.groups * view.band_list_stride, -7);
  host.bits.assign(c.groups * view.band_stride, 0xdeadbeef);
  host.num_verticals.assign(c.groups, -7);
  host.num_bands.assign(c.groups, -7);
  const Index unwritten = host;
  DeviceBuffer vertical_device(vertical), slash_device(slash);
  const int64_t workspace_bytes = SelectionWorkspaceBytes(c.groups, c.kv_tokens);
  std::vector<uint64_t> workspace(workspace_bytes / 8 + 32);
  DeviceBuffer workspace_device(workspace_bytes);

  SelectionInput input;
  input.vertical_logits = vertical.data();
  input.slash_logits = slash.data();
  input.logit_stride = stride;
  input.num_groups = c.groups;
  input.group_size = c.group_size;
  input.q_start = c.q_start;
  input.kv_tokens = c.kv_tokens;
  input.prompt_tokens = c.kv_tokens + (c.q_start % 2 == 0 ? 0 : 40);
  input.threshold_scale = c.scale.empty() ? nullptr : c.scale.data();
  SparseIndexView expected = view;
  expected.verticals = host.verticals.data();
  expected.num_verticals = host.num_verticals.data();
  expected.band_bits = host.bits.data();
  expected.bands = host.bands.data();
  expected.num_bands = host.num_bands.data();
  ASSERT_EQ(oracle(input, c.params, workspace.data(), &expected, nullptr), KernelStatus::kOk)
      << what;
  input.vertical_logits = vertical_device.as<float>();
  input.slash_logits = slash_device.as<float>();
  for (const KernelChoice choice : {KernelChoice::kFastest, KernelChoice::kGeneric}) {
    if (choice == KernelChoice::kGeneric && !cuda::DeviceIsSm90()) continue;  // it was the fastest
    const std::string run = what + (choice == KernelChoice::kGeneric ? ", generic kernel" : "");
    DeviceBuffer verticals(unwritten.verticals), bands(unwritten.bands), bits(unwritten.bits),
        num_verticals(unwritten.num_verticals), num_bands(unwritten.num_bands);
    SparseIndexView actual = view;
    actual.verticals = verticals.as<int32_t>();
    actual.num_verticals = num_verticals.as<int32_t>();
    actual.band_bits = bits.as<uint32_t>();
    actual.bands = bands.as<int32_t>();
    actual.num_bands = num_bands.as<int32_t>();
    ASSERT_EQ(cuda::SelectWith(choice, input, c.params, workspace_device.data(), &actual, nullptr),
              KernelStatus::kOk)
        << run;
    ASSERT_TRUE(testing::Synchronize());
    EXPECT_EQ(actual.num_groups, expected.num_groups);
    EXPECT_EQ(actual.dense_from, expected.dense_from) << run;
    EXPECT_EQ(num_verticals.Download<int32_t>(), host.num_verticals) << run;
    EXPECT_EQ(num_bands.Download<int32_t>(), host.num_bands) << run;
    EXPECT_TRUE(verticals.Download<int32_t>() == host.verticals) << run << ": verticals differ";
    EXPECT_TRUE(bands.Download<int32_t>() == host.bands) << run << ": bands differ";
    EXPECT_TRUE(bits.Download<uint32_t>() == host.bits) << run << ": band bits differ";
  }
}

std::vector<SelectionParams> AllParams() {
  std::vector<SelectionParams> all;
  for (float threshold : {0.0f, 0.7f, 3.0f, 1e9f}) {
    SelectionParams p;
    p.threshold = threshold;
    all.push_back(p);
  }
  for (float tau : {0.0f, 0.5f, 0.95f, 1.0f}) {
    SelectionParams p;
    p.rule = SelectionRule::kCumulative;
    p.tau_vertical = tau;
    p.tau_slash = 1.0f - tau * 0.5f;
    all.push_back(p);
  }
  for (float cap : {0.01f, 0.2f, 0.5f}) {
    for (SelectionRule rule : {SelectionRule::kMassPerCost, SelectionRule::kCumulative}) {
      SelectionParams p;
      p.rule = rule;
      p.threshold = 0.5f;
      p.max_density = cap;
      p.min_vertical_ratio = 0.1f;
      p.min_slash_ratio = 0.15f;
      all.push_back(p);
    }
  }
  SelectionParams wide;
  wide.local_tokens = 1500;
  wide.sink_tokens = 4;
  wide.last_dense_tokens = 0;
  all.push_back(wide);
  return all;
}

// The longer ones: clusters on Hopper.
TEST(SelectCuda, SmallEqualsReference) {
  for (const SelectionParams& params : AllParams()) Check({3, 3, 700, 0, params}, SelectRef);
  for (const SelectionParams& params : AllParams()) Check({2, 3, 4100, 0, params}, SelectRef);
  for (int kind = 1; kind <= 4; ++kind) Check({2, 4, 500, 131, {}, kind}, SelectRef);
}

TEST(SelectCuda, EqualsReference) {
  for (const SelectionParams& params : AllParams()) {
    for (int kind = 0; kind <= 4; ++kind) {
      Check({2, 3, 4097, 0, params, kind}, SelectRef);
      Check({1, 4, 2500, 1001, params, kind}, SelectRef);
    }
  }
  for (int64_t n : {1, 2, 63, 64, 65, 127, 128, 129, 200, 1023, 1024, 1025, 4096, 4097, 8193}) {
    Check({2, 3, n, 0, {}}, SelectRef);
    Check({1, 1, n, n / 2, {}}, SelectRef);
    Check({1, 16, n, 0, {}, 1}, SelectRef);
  }
  Check({3, 3, 3000, 0, {}, 0, {0.3f, 1.0f, 4.0f}}, SelectRef);
  Check({70, 2, 300, 0, {}}, SelectRef);  // more groups than one launch takes
}

// One block, and clusters of four and eight, with all rules.
TEST(SelectCuda, EveryLengthEqualsTheCpu) {
  for (const SelectionParams& params : AllParams()) {
    for (int64_t n : {2047, 4096, 4097, 8192, 8193, 12345, 20003}) {
      Check({2, 4, n, n / 3, params, static_cast<int>(n % 5)}, SelectCpu);
    }
  }
}

TEST(SelectCuda, LongSequencesEqualTheCpu) {
  SelectionParams capped;
  capped.threshold = 0.1f;
  capped.max_density = 0.05f;
  SelectionParams cumulative;
  cumulative.rule = SelectionRule::kCumulative;
  for (const SelectionParams& params : {SelectionParams{}, capped, cumulative}) {
    Check({2, 4, 131072, 122880, params, 1}, SelectCpu);
    Check({1, 4, kMaxSelectionTokens, kMaxSelectionTokens - 8192, params, 1}, SelectCpu);
  }
}

TEST(SelectCuda, RefusesBadSizes) {
  SelectionInput input;
  SparseIndexView index;
  EXPECT_EQ(SelectCuda(input, {}, nullptr, &index, nullptr), KernelStatus::kUnsupportedShape);
}

}  // namespace
}  // namespace vsprefill::kernels
