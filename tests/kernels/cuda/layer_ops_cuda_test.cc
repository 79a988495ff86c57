// RmsNormCuda, QkvRopeAppendCuda and SiluMulCuda against the references.
#include "kernels/layer_ops.h"
#include "tests/kernels/cuda/gpu_test_support.h"

namespace vsprefill::kernels {
namespace {

using testing::DeviceBuffer;
using testing::HostTensor;

const DType kTypes[] = {DType::kBF16, DType::kF32};

/// One rounding to the dtype apart, relative to values of a few units.
double Relative(DType dtype) { return dtype == DType::kBF16 ? 3e-3 : 1e-6; }
double Absolute(DType dtype) { return dtype == DType::kBF16 ? 4e-2 : 2e-5; }

TEST(RmsNormCuda, SmallEqualsReference) {
  std::mt19937 rng(1);
  for (DType dtype : kTypes) {
    for (const auto& [tokens, width] : {std::pair<int64_t, int64_t>{1, 8},
                                        {3, 576},
                                        {17, 64},
                                        {5, 4096},
                                        {2, 8200},
                                        {2, 20000}}) {
      for (bool with_delta : {false, true}) {
        for (bool with_out : {true, false}) {
          HostTensor residual = testing::RandomTensor(dtype, tokens * width, rng);
          HostTensor delta = testing::RandomTensor(dtype, tokens * width, rng);
          HostTensor weight = testing::RandomTensor(dtype, width, rng);
          HostTensor out(dtype, tokens * width);
          DeviceBuffer residual_device(residual.bytes), delta_device(delta.bytes),
              weight_device(weight.bytes), out_device(static_cast<int64_t>(out.bytes.size()));
          RmsNormArgs args;
          args.residual = residual.data();
          args.delta = with_delta ? delta.data() : nullptr;
          args.weight = weight.data();
          args.out = with_out ? out.data() : nullptr;
          args.tokens = tokens;
          args.width = width;
          args.dtype = dtype;
          ASSERT_EQ(RmsNormRef(args, nullptr), KernelStatus::kOk);
          args.residual = residual_device.data();
          args.delta = with_delta ? delta_device.data() : nullptr;
          args.weight = weight_device.data();
          args.out = with_out ? out_device.data() : nullptr;
          ASSERT_EQ(RmsNormCuda(args, nullptr), KernelStatus::kOk);
          ASSERT_TRUE(testing::Synchronize());
          const std::string what = std::string("width ") + std::to_string(width) + " " +
                                   Name(dtype) + (with_delta ? " delta" : "");
          EXPECT_EQ(residual_device.Download<char>(), residual.bytes) << what << ": residual";
          if (with_out) {
            testing::ExpectClose(DownloadTensor(out_device, dtype), out, Relative(dtype),
                                 2 * Absolute(dtype), what);
          }
        }
      }
    }
  }
}

TEST(QkvRopeAppendCuda, SmallEqualsReference) {
  std::mt19937 rng(2);
  struct Shape {
    int q_heads, kv_heads, head_dim;
    int64_t tokens, begin;
    bool norm;
  };
  const Shape shapes[] = {{9, 3, 64, 7, 0, false},  {9, 3, 64, 33, 100, true},
                          {8, 2, 128, 5, 3, true},  {2, 1, 96, 9, 1, true},
                          {3, 1, 80, 4, 0, true},   {4, 4, 16, 21, 2, false},
                          {2, 2, 32, 1, 50, false}, {2, 1, 256, 3, 0, true}};
  for (DType dtype : kTypes) {
    for (const Shape& s : shapes) {
      const int64_t capacity = s.begin + s.tokens + 3;
      const int64_t width = (s.q_heads + 2 * s.kv_heads) * s.head_dim;
      HostTensor qkv = testing::RandomTensor(dtype, s.tokens * width, rng);
      HostTensor q_norm = testing::RandomTensor(dtype, s.head_dim, rng);
      HostTensor k_norm = testing::RandomTensor(dtype, s.head_dim, rng);
      std::vector<float> cosines(capacity * s.head_dim / 2), sines(cosines.size());
      for (size_t i = 0; i < cosines.size(); ++i) {
        cosines[i] = std::cos(0.37f * static_cast<float>(i));
        sines[i] = std::sin(0.37f * static_cast<float>(i));
      }
      HostTensor k_cache = testing::RandomTensor(dtype, s.kv_heads * capacity * s.head_dim, rng);
      HostTensor v_cache = testing::RandomTensor(dtype, s.kv_heads * capacity * s.head_dim, rng);
      DeviceBuffer qkv_device(qkv.bytes), q_norm_device(q_norm.bytes), k_norm_device(k_norm.bytes),
          cos_device(cosines), sin_device(sines), k_device(k_cache.bytes), v_device(v_cache.bytes);
      QkvRopeAppendArgs args;
      args.qkv = qkv.data();
      args.tokens = s.tokens;
      args.num_q_heads = s.q_heads;
      args.num_kv_heads = s.kv_heads;
      args.head_dim = s.head_dim;
      args.q_norm = s.norm ? q_norm.data() : nullptr;
      args.k_norm = s.norm ? k_norm.data() : nullptr;
      args.cos = cosines.data();
      args.sin = sines.data();
      args.position_begin = s.begin;
      args.k_cache = k_cache.data();
      args.v_cache = v_cache.data();
      args.cache_head_stride = capacity * s.head_dim;
      args.dtype = dtype;
      ASSERT_EQ(QkvRopeAppendRef(args, nullptr), KernelStatus::kOk);
      args.qkv = qkv_device.data();
      args.q_norm = s.norm ? q_norm_device.data() : nullptr;
      args.k_norm = s.norm ? k_norm_device.data() : nullptr;
      args.cos = cos_device.as<float>();
      args.sin = sin_device.as<float>();
      args.k_cache = k_device.data();
      args.v_cache = v_device.data();
      ASSERT_EQ(QkvRopeAppendCuda(args, nullptr), KernelStatus::kOk);
      ASSERT_TRUE(testing::Synchronize());
      const std::string what =
          "head_dim " + std::to_string(s.head_dim) + " " + Name(dtype) + (s.norm ? " norm" : "");
      // Only q of the projected rows is specified after the call.
      HostTensor actual = DownloadTensor(qkv_device, dtype);
      for (int64_t t = 0; t < s.tokens; ++t) {
        for (int64_t i = s.q_heads * s.head_dim; i < width; ++i) {
          actual.Set(t * width + i, 0);
          qkv.Set(t * width + i, 0);
        }
      }
      testing::ExpectClose(actual, qkv, Relative(dtype), Absolute(dtype), what + " q");
      testing::ExpectClose(DownloadTensor(k_device, dtype), k_cache, Relative(dtype),
                           Absolute(dtype), what + " k");
      EXPECT_EQ(v_device.Download<char>(), v_cache.bytes) << what << " v";
    }
  }
}

TEST(SiluMulCuda, SmallEqualsReference) {
  std::mt19937 rng(3);
  for (DType dtype : kTypes) {
    for (const auto& [tokens, width] :
         {std::pair<int64_t, int64_t>{1, 8}, {7, 1536}, {33, 1000}, {3, 14336}}) {
      HostTensor gate_up = testing::RandomTensor(dtype, tokens * 2 * width, rng, 4.0f);
      gate_up.Set(0, -1e30f);
      gate_up.Set(1, 100.0f);
      HostTensor out(dtype, tokens * width);
      DeviceBuffer gate_up_device(gate_up.bytes),
          out_device(static_cast<int64_t>(out.bytes.size()));
      SiluMulArgs args;
      args.gate_up = gate_up.data();
      args.out = out.data();
      args.tokens = tokens;
      args.width = width;
      args.dtype = dtype;
      ASSERT_EQ(SiluMulRef(args, nullptr), KernelStatus::kOk);
      args.gate_up = gate_up_device.data();
      args.out = out_device.data();
      ASSERT_EQ(SiluMulCuda(args, nullptr), KernelStatus::kOk);
      ASSERT_TRUE(testing::Synchronize());
      testing::ExpectClose(DownloadTensor(out_device, dtype), out, Relative(dtype),
                           dtype == DType::kBF16 ? 2.0 : 1e-3,
                           "width " + std::to_string(width) + " " + Name(dtype));
    }
  }
}

TEST(LayerOpsCuda, RefuseUnalignedShapes) {
  DeviceBuffer buffer(4096);
  RmsNormArgs norm;
  norm.residual = norm.out = buffer.data();
  norm.weight = buffer.data();
  norm.tokens = 1;
  norm.width = 12;
  EXPECT_EQ(RmsNormCuda(norm, nullptr), KernelStatus::kUnsupportedShape);
  SiluMulArgs silu;
  silu.gate_up = silu.out = buffer.data();
  silu.tokens = 1;
  silu.width = 12;
  EXPECT_EQ(SiluMulCuda(silu, nullptr), KernelStatus::kUnsupportedShape);
  QkvRopeAppendArgs rope;
  rope.qkv = buffer.data();
  rope.tokens = 1;
  rope.num_q_heads = rope.num_kv_heads = 1;
  rope.head_dim = 24;
  EXPECT_EQ(QkvRopeAppendCuda(rope, nullptr), KernelStatus::kUnsupportedShape);
}

}  // namespace
}  // namespace vsprefill::kernels
