// indexer.safetensors: what is written is read back, and everything else is refused with a clear
// message.
#include "server/model/vs_indexer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "server/model/safetensors.h"

namespace vsprefill::model {
namespace {

using ::testing::HasSubstr;

constexpr int kLayers = 2, kGroups = 3, kHeadDim = 16, kHidden = 8;

IndexerWeights MakeWeights() {
  IndexerWeights weights;
  weights.num_groups = kGroups;
  weights.head_dim = kHeadDim;
  weights.hidden = kHidden;
  weights.weights_id = "aaaa";
  weights.facts["steps"] = "7";
  float next = 0.5f;
  auto fill = [&](size_t n) {
    std::vector<float> values(n);
    for (float& value : values) value = next = std::fmod(next * 1.7f + 0.3f, 2.0f);
    return values;
  };
  for (int i = 0; i < kLayers; ++i) {
    IndexerWeights::Layer& layer = weights.layers.emplace_back();
    for (int j = 0; j < kGroups * kHidden * 2 * kHeadDim; ++j) layer.w1.push_back(0x3f80 + j % 100);
    layer.b1 = fill(kGroups * kHidden);
    layer.w2 = fill(kGroups * 2 * kHidden);
    layer.b2 = fill(kGroups * 2);
    layer.slash_prior = fill(kGroups * kernels::kSlashBuckets);
    weights.threshold_scale.push_back({1.0f, 0.5f, 2.0f});
  }
  return weights;
}

class VsIndexerTest : public ::testing::Test {
 protected:
  VsIndexerTest()
      : path_(::testing::TempDir() + "vs_indexer_test_" +
              ::testing::UnitTest::GetInstance()->current_test_info()->name() + ".safetensors") {}
  ~VsIndexerTest() override { std::filesystem::remove(path_); }

  static IndexerExpectation Expectation() { return {"aaaa", kLayers, kGroups, kHeadDim}; }

  /// Writes MakeWeights(), changed at the level of tensors.
  void WriteChanged(
      const std::function<void(TensorMap*, std::map<std::string, std::string>*)>& fn) {
    ASSERT_TRUE(WriteIndexer(path_, MakeWeights()).ok());
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
    const auto read = ReadIndexer(path_, Expectation());
    EXPECT_EQ(read.status().code(), code) << read.status();
    EXPECT_THAT(std::string(read.status().message()), HasSubstr(message));
  }

  const std::string path_;
};

TEST_F(VsIndexerTest, RoundTripKeepsEveryBit) {
  const IndexerWeights weights = MakeWeights();
  ASSERT_TRUE(WriteIndexer(path_, weights).ok());
  const auto read = ReadIndexer(path_, Expectation());
  ASSERT_TRUE(read.ok()) << read.status();
  EXPECT_EQ(read->hidden, kHidden);
  EXPECT_EQ(read->num_groups, kGroups);
  EXPECT_EQ(read->head_dim, kHeadDim);
  EXPECT_EQ(read->weights_id, "aaaa");
  EXPECT_EQ(read->facts, weights.facts);
  EXPECT_EQ(read->threshold_scale, weights.threshold_scale);
  ASSERT_EQ(read->num_layers(), kLayers);
  for (int i = 0; i < kLayers; ++i) {
    EXPECT_EQ(read->layers[i].w1, weights.layers[i].w1);
    EXPECT_EQ(read->layers[i].b1, weights.layers[i].b1);
    EXPECT_EQ(read->layers[i].w2, weights.layers[i].w2);
    EXPECT_EQ(read->layers[i].b2, weights.layers[i].b2);
    EXPECT_EQ(read->layers[i].slash_prior, weights.layers[i].slash_prior);
  }
}

TEST_F(VsIndexerTest, OnTheDeviceTheKernelSeesTheStoredValues) {
  const IndexerWeights weights = MakeWeights();
  const auto indexer = VsIndexer::Create(weights, kernels::DeviceKind::kCpu);
  ASSERT_TRUE(indexer.ok()) << indexer.status();
  EXPECT_EQ((*indexer)->num_layers(), kLayers);
  EXPECT_EQ((*indexer)->hidden(), kHidden);
  EXPECT_EQ((*indexer)->threshold_scale(), weights.threshold_scale);
  const kernels::IndexerLayer& layer = (*indexer)->layer(1);
  EXPECT_EQ(layer.num_groups, kGroups);
  EXPECT_EQ(layer.head_dim, kHeadDim);
  EXPECT_EQ(layer.hidden, kHidden);
  EXPECT_EQ(std::memcmp(layer.w1, weights.layers[1].w1.data(), weights.layers[1].w1.size() * 2), 0);
  EXPECT_EQ(layer.b1[3], weights.layers[1].b1[3]);
  EXPECT_EQ(layer.w2[5], weights.layers[1].w2[5]);
  EXPECT_EQ(layer.b2[2], weights.layers[1].b2[2]);
  EXPECT_EQ(layer.slash_prior[130], weights.layers[1].slash_prior[130]);
}

TEST_F(VsIndexerTest, OtherWeightsAreRefusedAndBothIdsNamed) {
  ASSERT_TRUE(WriteIndexer(path_, MakeWeights()).ok());
  IndexerExpectation expectation = Expectation();
  expectation.weights_id = "bbbb";
  const auto read = ReadIndexer(path_, expectation);
  EXPECT_EQ(read.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(read.status().message()), HasSubstr("aaaa"));
  EXPECT_THAT(std::string(read.status().message()), HasSubstr("bbbb"));
}

TEST_F(VsIndexerTest, NoFileIsNotFound) { ExpectRefused(absl::StatusCode::kNotFound, path_); }

TEST_F(VsIndexerTest, ForeignFormatIsRefused) {
  WriteChanged([](TensorMap*, auto* metadata) { (*metadata)["format"] = "pt"; });
  ExpectRefused(absl::StatusCode::kInvalidArgument, "not an indexer file");
}

TEST_F(VsIndexerTest, HiddenThatIsNoNumberIsRefused) {
  WriteChanged([](TensorMap*, auto* metadata) { (*metadata)["hidden"] = "-3"; });
  ExpectRefused(absl::StatusCode::kInvalidArgument, "hidden is '-3'");
}

TEST_F(VsIndexerTest, HiddenThatDiffersFromTheTensorsIsRefused) {
  WriteChanged([](TensorMap*, auto* metadata) { (*metadata)["hidden"] = "9"; });
  ExpectRefused(absl::StatusCode::kInvalidArgument, "layers.0.w1");
}

TEST_F(VsIndexerTest, MissingTensorIsRefused) {
  WriteChanged([](TensorMap* tensors, auto*) { tensors->erase("layers.1.b2"); });
  ExpectRefused(absl::StatusCode::kInvalidArgument, "layers.1.b2");
}

TEST_F(VsIndexerTest, WrongDTypeIsRefused) {
  WriteChanged([](TensorMap* tensors, auto*) { tensors->at("layers.0.w1").dtype = "F16"; });
  ExpectRefused(absl::StatusCode::kInvalidArgument, "has dtype F16, expected BF16");
}

TEST_F(VsIndexerTest, WrongShapeIsRefused) {
  WriteChanged([](TensorMap* tensors, auto*) {
    tensors->at("layers.0.b1").shape = {kHidden, kGroups};
  });
  ExpectRefused(absl::StatusCode::kInvalidArgument, "layers.0.b1");
}

TEST_F(VsIndexerTest, MoreLayersThanTheModelAreRefused) {
  IndexerWeights weights = MakeWeights();
  weights.layers.push_back(weights.layers[0]);
  weights.threshold_scale.push_back(weights.threshold_scale[0]);
  ASSERT_TRUE(WriteIndexer(path_, weights).ok());
  ExpectRefused(absl::StatusCode::kInvalidArgument, "more layers than the model's 2");
}

TEST_F(VsIndexerTest, ValuesThatAreNotFiniteAreRefused) {
  IndexerWeights weights = MakeWeights();
  weights.layers[1].w2[4] = std::numeric_limits<float>::quiet_NaN();
  ASSERT_TRUE(WriteIndexer(path_, weights).ok());
  ExpectRefused(absl::StatusCode::kInvalidArgument, "layers.1.w2");

  weights = MakeWeights();
  weights.layers[0].w1[9] = 0xff80;  // -infinity
  ASSERT_TRUE(WriteIndexer(path_, weights).ok());
  ExpectRefused(absl::StatusCode::kInvalidArgument, "layers.0.w1");

  weights = MakeWeights();
  weights.threshold_scale[0][0] = 0;
  ASSERT_TRUE(WriteIndexer(path_, weights).ok());
  ExpectRefused(absl::StatusCode::kInvalidArgument, "threshold_scale");
}

TEST_F(VsIndexerTest, EveryTruncationIsRefused) {
  ASSERT_TRUE(WriteIndexer(path_, MakeWeights()).ok());
  const auto size = std::filesystem::file_size(path_);
  for (uintmax_t keep = 0; keep < size; keep += 97) {
    ASSERT_TRUE(WriteIndexer(path_, MakeWeights()).ok());
    std::filesystem::resize_file(path_, keep);
    EXPECT_EQ(ReadIndexer(path_, Expectation()).status().code(), absl::StatusCode::kInvalidArgument)
        << keep << " bytes";
  }
}

TEST_F(VsIndexerTest, WritingSizesThatDoNotFitIsRefused) {
  IndexerWeights weights = MakeWeights();
  weights.layers[0].b1.pop_back();
  EXPECT_EQ(WriteIndexer(path_, weights).code(), absl::StatusCode::kInvalidArgument);
  weights = MakeWeights();
  weights.threshold_scale.pop_back();
  EXPECT_EQ(WriteIndexer(path_, weights).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(std::filesystem::exists(path_));
}

}  // namespace
}  // namespace vsprefill::model
