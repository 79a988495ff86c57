// CPU layer ops against the float64 reference, for every instruction set and dtype.
#include "kernels/layer_ops.h"

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

class LayerOpsTest : public ::testing::TestWithParam<std::tuple<CpuIsa, DType>> {
 protected:
  LayerOpsTest() : isa_(std::get<0>(GetParam())) {}
  void SetUp() override {
    if (!isa_.supported()) GTEST_SKIP() << "this processor lacks it";
  }
  DType dtype() const { return std::get<1>(GetParam()); }
  // docs/numerics.md: one rounding to bf16 (half a unit in the last place is 2^-9, a different
  // rounding of a value near a tie one unit), or float32 arithmetic.
  Tolerance tolerance() const {
    return dtype() == DType::kBF16 ? Tolerance{1e-4, 1.0 / 128} : Tolerance{2e-6, 2e-6};
  }

 private:
  ScopedIsa isa_;
};

TEST_P(LayerOpsTest, RmsNormMatchesReference) {
  for (const int64_t width : {16, 64, 576, 2048, 100, 7}) {
    for (const int64_t tokens : {1, 3, 300}) {
      for (const bool with_delta : {false, true}) {
        const Tensor input(tokens * width, dtype(), 1, 3.0f), delta(tokens * width, dtype(), 2);
        const Tensor weight(width, dtype(), 3);
        Tensor expected_residual = input, residual = input;
        Tensor expected(tokens * width, dtype()), out(tokens * width, dtype());
        RmsNormArgs args;
        args.residual = expected_residual.data();
        args.delta = with_delta ? delta.data() : nullptr;
        args.weight = weight.data();
        args.out = expected.data();
        args.tokens = tokens;
        args.width = width;
        args.dtype = dtype();
        ASSERT_EQ(RmsNormRef(args, nullptr), KernelStatus::kOk);
        args.residual = residual.data();
        args.out = out.data();
        ASSERT_EQ(RmsNormCpu(args, nullptr), KernelStatus::kOk);
        const std::string what = "tokens " + std::to_string(tokens) + ", width " +
                                 std::to_string(width) + ", delta " + std::to_string(with_delta);
        EXPECT_TRUE(Near(residual, expected_residual, {0, 0}, "residual, " + what));
        EXPECT_TRUE(Near(out, expected, tolerance(), "out, " + what));
      }
    }
  }
}

TEST_P(LayerOpsTest, RmsNormWithoutOutputOnlyAdds) {
  Tensor residual(64, dtype(), 1);
  const Tensor before = residual, delta(64, dtype(), 2);
  RmsNormArgs args;
  args.residual = residual.data();
  args.delta = delta.data();
  args.tokens = 1;
  args.width = 64;
  args.dtype = dtype();
  ASSERT_EQ(RmsNormCpu(args, nullptr), KernelStatus::kOk);
  Tensor expected(64, dtype());
  for (int64_t i = 0; i < 64; ++i) expected.Set(i, before[i] + delta[i]);
  EXPECT_TRUE(Near(residual, expected, {0, 0}, "sum"));
}

struct RopeShape {
  int q_heads, kv_heads, head_dim;
  int64_t tokens, position_begin;
  bool norm;
};

TEST_P(LayerOpsTest, QkvRopeAppendMatchesReference) {
  for (const RopeShape& s :
       {RopeShape{9, 3, 64, 65, 0, false}, RopeShape{9, 3, 64, 33, 17, true},
        RopeShape{4, 4, 16, 5, 0, false}, RopeShape{2, 1, 80, 3, 2, true},
        RopeShape{8, 1, 128, 300, 1000, true}, RopeShape{6, 2, 96, 1, 9, false}}) {
    const int64_t width = int64_t{s.q_heads + 2 * s.kv_heads} * s.head_dim;
    const int64_t positions = s.position_begin + s.tokens, capacity = positions + 5;
    const int64_t half = s.head_dim / 2, cache_size = s.kv_heads * capacity * s.head_dim;
    const Tensor input(s.tokens * width, dtype(), 5);
    const Tensor q_norm(s.head_dim, dtype(), 6), k_norm(s.head_dim, dtype(), 7);
    std::vector<float> cosines(positions * half), sines(positions * half);
    for (int64_t i = 0; i < positions * half; ++i) {
      cosines[i] = std::cos(0.1f * static_cast<float>(i));
      sines[i] = std::sin(0.1f * static_cast<float>(i));
    }
    Tensor expected_qkv = input, qkv = input;
    // The caches start equal, so that a write outside of the appended rows shows.
    Tensor expected_k(cache_size, dtype(), 8), expected_v(cache_size, dtype(), 9);
    Tensor k = expected_k, v = expected_v;
    QkvRopeAppendArgs args;
    args.qkv = expected_qkv.data();
    args.tokens = s.tokens;
    args.num_q_heads = s.q_heads;
    args.num_kv_heads = s.kv_heads;
    args.head_dim = s.head_dim;
    args.q_norm = s.norm ? q_norm.data() : nullptr;
    args.k_norm = s.norm ? k_norm.data() : nullptr;
    args.cos = cosines.data();
    args.sin = sines.data();
    args.position_begin = s.position_begin;
    args.k_cache = expected_k.data();
    args.v_cache = expected_v.data();
    args.cache_head_stride = capacity * s.head_dim;
    args.dtype = dtype();
    ASSERT_EQ(QkvRopeAppendRef(args, nullptr), KernelStatus::kOk);
    args.qkv = qkv.data();
    args.k_cache = k.data();
    args.v_cache = v.data();
    ASSERT_EQ(QkvRopeAppendCpu(args, nullptr), KernelStatus::kOk);
    const std::string what = "q_heads " + std::to_string(s.q_heads) + ", head_dim " +
                             std::to_string(s.head_dim) + ", tokens " + std::to_string(s.tokens);
    EXPECT_TRUE(Near(qkv, expected_qkv, tolerance(), "q, " + what));
    EXPECT_TRUE(Near(k, expected_k, tolerance(), "k, " + what));
    EXPECT_TRUE(Near(v, expected_v, {0, 0}, "v, " + what));
  }
}

TEST_P(LayerOpsTest, SiluMulMatchesReference) {
  for (const int64_t width : {16, 1536, 100, 3}) {
    for (const int64_t tokens : {1, 7, 130}) {
      Tensor gate_up(tokens * 2 * width, dtype(), 11, 6.0f);
      // Beyond where exp overflows and where the result is the identity or zero.
      gate_up.Set(0, -200.0f);
      gate_up.Set(1, 200.0f);
      gate_up.Set(2, 0.0f);
      Tensor expected(tokens * width, dtype()), out(tokens * width, dtype());
      SiluMulArgs args;
      args.gate_up = gate_up.data();
      args.out = expected.data();
      args.tokens = tokens;
      args.width = width;
      args.dtype = dtype();
      ASSERT_EQ(SiluMulRef(args, nullptr), KernelStatus::kOk);
      args.out = out.data();
      ASSERT_EQ(SiluMulCpu(args, nullptr), KernelStatus::kOk);
      EXPECT_TRUE(Near(out, expected, tolerance(),
                       "tokens " + std::to_string(tokens) + ", width " + std::to_string(width)));
    }
  }
}

TEST_P(LayerOpsTest, OddHeadDimIsRefused) {
  QkvRopeAppendArgs args;
  args.head_dim = 63;
  EXPECT_EQ(QkvRopeAppendCpu(args, nullptr), KernelStatus::kUnsupportedShape);
}

INSTANTIATE_TEST_SUITE_P(AllIsas, LayerOpsTest,
                         ::testing::Combine(::testing::ValuesIn(kAllIsas),
                                            ::testing::ValuesIn(kAllDTypes)),
                         [](const auto& info) {
                           return IsaDTypeName(std::get<0>(info.param), std::get<1>(info.param));
                         });

}  // namespace
}  // namespace vsprefill::kernels
