// seer_gate.safetensors: what is written is read back and reaches the kernels, and everything else
// is refused with a clear message.
#include "server/model/seer_gate.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <functional>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/scalar.h"
#include "server/model/rope.h"
#include "server/model/safetensors.h"

namespace vsprefill::model {
namespace {

using ::testing::HasSubstr;

constexpr int kLayers = 2, kHeads = 6, kKvHeads = 3, kHeadDim = 16, kGateDim = 8;

SeerGateWeights MakeWeights() {
  SeerGateWeights weights;
  weights.num_q_heads = kHeads;
  weights.num_kv_heads = kKvHeads;
  weights.head_dim = kHeadDim;
  weights.gate_dim = kGateDim;
  weights.weights_id = "aaaa";
  weights.facts["steps"] = "7";
  for (int i = 0; i < kLayers; ++i) {
    SeerGateWeights::Layer& layer = weights.layers.emplace_back();
    for (int j = 0; j < kHeads * kGateDim * kHeadDim; ++j) {
      layer.wq.push_back(0x3f80 + (i + j) % 100);
    }
    for (int j = 0; j < kKvHeads * kGateDim * 3 * kHeadDim; ++j) {
      layer.wk.push_back(0xbf80 + (2 * i + j) % 100);
    }
  }
  return weights;
}

class SeerGateTest : public ::testing::Test {
 protected:
  SeerGateTest()
      : path_(::testing::TempDir() + "seer_gate_test_" +
              ::testing::UnitTest::GetInstance()->current_test_info()->name() + ".safetensors") {}
  ~SeerGateTest() override { std::filesystem::remove(path_); }

  static SeerGateExpectation Expectation() { return {"aaaa", kLayers, kHeads, kKvHeads, kHeadDim}; }

  /// Writes MakeWeights(), changed at the level of tensors.
  void WriteChanged(
      const std::function<void(TensorMap*, std::map<std::string, std::string>*)>& fn) {
    ASSERT_TRUE(WriteSeerGate(path_, MakeWeights()).ok());
    std::string bytes;
    {
      std::ifstream file(path_, std::ios::binary);
      bytes.assign(std::istreambuf_iterator<char>(file), {});
    }
    auto contents =
        ParseSafetensors({reinterpret_cast<const uint8_t*>(bytes.data()), bytes.size()}, path_);
    ASSERT_TRUE(contents.ok()) << contents.status();
    fn(&contents->tensors, &contents->metadata);
    ASSERT_TRUE(WriteSafetensors(path_, contents->tensors, contents->metadata).ok());
  }

  void ExpectRefused(absl::StatusCode code, const std::string& message) {
    const auto read = ReadSeerGate(path_, Expectation());
    EXPECT_EQ(read.status().code(), code) << read.status();
    EXPECT_THAT(std::string(read.status().message()), HasSubstr(message));
  }

  const std::string path_;
};

TEST_F(SeerGateTest, RoundTripKeepsEveryBit) {
  const SeerGateWeights weights = MakeWeights();
  ASSERT_TRUE(WriteSeerGate(path_, weights).ok());
  const auto read = ReadSeerGate(path_, Expectation());
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->gate_dim, kGateDim);
  EXPECT_EQ(read->num_q_heads, kHeads);
  EXPECT_EQ(read->num_kv_heads, kKvHeads);
  EXPECT_EQ(read->head_dim, kHeadDim);
  EXPECT_EQ(read->weights_id, "aaaa");
  EXPECT_EQ(read->facts, weights.facts);
  ASSERT_EQ(read->num_layers(), kLayers);
  for (int i = 0; i < kLayers; ++i) {
    EXPECT_EQ(read->layers[i].wq, weights.layers[i].wq);
    EXPECT_EQ(read->layers[i].wk, weights.layers[i].wk);
  }
}

TEST_F(SeerGateTest, TheKernelSeesTheStoredValuesAndTheModelsRotations) {
  const SeerGateWeights weights = MakeWeights();
  RopeConfig rope;
  const auto gate = SeerGate::Create(weights, rope, 1000, kernels::DeviceKind::kCpu);
  ASSERT_TRUE(gate.ok()) << gate.status();
  ASSERT_EQ((*gate)->layers().size(), size_t{kLayers});
  const kernels::SeerGateLayer& layer = (*gate)->layers()[1];
  EXPECT_EQ(layer.gate_dim, kGateDim);
  EXPECT_EQ(layer.rope_inverse, 1.0f);
  for (size_t j = 0; j < weights.layers[1].wq.size(); ++j) {
    ASSERT_EQ(layer.wq[j], kernels::BF16ToFloat(weights.layers[1].wq[j]));
  }
  for (size_t j = 0; j < weights.layers[1].wk.size(); ++j) {
    ASSERT_EQ(layer.wk[j], kernels::BF16ToFloat(weights.layers[1].wk[j]));
  }
  // Row b: the model's RoPE over gate_dim at position 64 b, up to the last of 1000 positions.
  RopeTable table(rope, kGateDim);
  table.Grow(1000);
  for (int64_t b = 0; b * kernels::kSeerBlock < 1000; ++b) {
    for (int e = 0; e < kGateDim / 2; ++e) {
      const int64_t from = b * kernels::kSeerBlock * (kGateDim / 2) + e;
      ASSERT_EQ(layer.block_cos[b * (kGateDim / 2) + e], table.cos()[from]);
      ASSERT_EQ(layer.block_sin[b * (kGateDim / 2) + e], table.sin()[from]);
    }
  }
}

TEST_F(SeerGateTest, AnAttentionFactorIsUndone) {
  RopeConfig rope;
  rope.type = "yarn";
  rope.factor = 4;
  rope.original_max_position_embeddings = 4096;
  const auto gate = SeerGate::Create(MakeWeights(), rope, 100, kernels::DeviceKind::kCpu);
  ASSERT_TRUE(gate.ok()) << gate.status();
  RopeTable table(rope, kHeadDim);
  table.Grow(8);
  const float c = table.cos()[5], s = table.sin()[5];
  EXPECT_GT(c * c + s * s, 1.01f);
  EXPECT_NEAR((*gate)->layers()[0].rope_inverse * (c * c + s * s), 1.0f, 1e-6f);
}

TEST_F(SeerGateTest, OtherWeightsAreRefusedAndBothIdsNamed) {
  ASSERT_TRUE(WriteSeerGate(path_, MakeWeights()).ok());
  SeerGateExpectation expectation = Expectation();
  expectation.weights_id = "bbbb";
  const auto read = ReadSeerGate(path_, expectation);
  EXPECT_EQ(read.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(read.status().message()), HasSubstr("aaaa"));
  EXPECT_THAT(std::string(read.status().message()), HasSubstr("bbbb"));
}

TEST_F(SeerGateTest, WhatIsNoGateIsRefused) {
  ExpectRefused(absl::StatusCode::kNotFound, path_);
  WriteChanged([](TensorMap*, auto* m) { (*m)["format"] = "vsprefill-indexer-1"; });
  ExpectRefused(absl::StatusCode::kInvalidArgument, "not a SeerAttention gate");
  for (const char* bad : {"-3", "7", "258", "x", ""}) {
    WriteChanged([bad](TensorMap*, auto* m) { (*m)["gate_dim"] = bad; });
    ExpectRefused(absl::StatusCode::kInvalidArgument, absl::StrCat("gate_dim is '", bad, "'"));
  }
  WriteChanged([](TensorMap*, auto* m) { (*m)["gate_dim"] = "10"; });
  ExpectRefused(absl::StatusCode::kInvalidArgument, "layers.0.wq");
  WriteChanged([](TensorMap* tensors, auto*) { tensors->erase("layers.1.wk"); });
  ExpectRefused(absl::StatusCode::kInvalidArgument, "layers.1.wk");
  WriteChanged([](TensorMap* tensors, auto*) { tensors->at("layers.0.wq").dtype = "F16"; });
  ExpectRefused(absl::StatusCode::kInvalidArgument, "has dtype F16, expected BF16");
  SeerGateWeights weights = MakeWeights();
  weights.layers.push_back(weights.layers[0]);
  ASSERT_TRUE(WriteSeerGate(path_, weights).ok());
  ExpectRefused(absl::StatusCode::kInvalidArgument, "more layers than the model's 2");
  weights = MakeWeights();
  weights.layers[1].wk[9] = 0xff80;  // -infinity
  ASSERT_TRUE(WriteSeerGate(path_, weights).ok());
  ExpectRefused(absl::StatusCode::kInvalidArgument, "layers.1.wk holds a value that is not finite");
}

TEST_F(SeerGateTest, EveryTruncationIsRefused) {
  ASSERT_TRUE(WriteSeerGate(path_, MakeWeights()).ok());
  const auto size = std::filesystem::file_size(path_);
  for (uintmax_t keep = 0; keep < size; keep += 97) {
    ASSERT_TRUE(WriteSeerGate(path_, MakeWeights()).ok());
    std::filesystem::resize_file(path_, keep);
    EXPECT_EQ(ReadSeerGate(path_, Expectation()).status().code(),
              absl::StatusCode::kInvalidArgument)
        << keep << " bytes";
  }
}

TEST_F(SeerGateTest, WritingSizesThatDoNotFitIsRefused) {
  SeerGateWeights weights = MakeWeights();
  weights.layers[0].wk.pop_back();
  EXPECT_EQ(WriteSeerGate(path_, weights).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(std::filesystem::exists(path_));
}

}  // namespace
}  // namespace vsprefill::model
