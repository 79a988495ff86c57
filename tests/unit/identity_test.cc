// The identities against the vectors that the Python implementation wrote
// (tests/golden/make_identities.py).
#include "server/model/identity.h"

#include <gtest/gtest.h>

#include <string>

#include "server/base/json.h"
#include "server/base/mapped_file.h"

namespace vsprefill::model {
namespace {

using nlohmann::json;

json Golden() {
  const auto text = ReadTextFile("tests/golden/identities.json");
  EXPECT_TRUE(text.ok()) << text.status();
  return text.ok() ? json::parse(*text) : json::object();
}

TEST(IdentityTest, WeightsIdMatchesPythonForAnySharding) {
  const json golden = Golden();
  ASSERT_GE(golden["weights"].size(), 3u);
  for (const json& vector : golden["weights"]) {
    TensorMap tensors;
    std::vector<SafetensorsReader> files;
    for (const json& name : vector["files"]) {
      auto file = SafetensorsReader::OpenFile("tests/golden/" + name.get<std::string>());
      ASSERT_TRUE(file.ok()) << file.status();
      files.push_back(*std::move(file));
      tensors.insert(files.back().tensors().begin(), files.back().tensors().end());
    }
    EXPECT_EQ(WeightsId(tensors), vector["weights_id"].get<std::string>());
  }
}

TEST(IdentityTest, KvIdMatchesPython) {
  const json golden = Golden();
  ASSERT_GE(golden["kv"].size(), 8u);
  for (const json& vector : golden["kv"]) {
    json values = vector["config"];
    // What a whole config.json has and an identity does not depend on.
    values["model_type"] = "llama";
    values["intermediate_size"] = 512;
    values["vocab_size"] = 512;
    const auto config = ParseModelConfig(values.dump());
    ASSERT_TRUE(config.ok()) << config.status();
    const std::string weights_id = vector["weights_id"];
    const kernels::DType dtype =
        vector["kv_dtype"] == "bfloat16" ? kernels::DType::kBF16 : kernels::DType::kF32;
    EXPECT_EQ(KvIdJson(*config, weights_id, dtype), vector["json"].get<std::string>());
    EXPECT_EQ(KvId(*config, weights_id, dtype), vector["kv_id"].get<std::string>());
  }
}

TEST(IdentityTest, EverySampledByteCounts) {
  std::vector<uint8_t> data(10000);
  TensorMap tensors;
  tensors["w"] = {"F32", {2500}, 2500, absl::MakeConstSpan(data)};
  const std::string before = WeightsId(tensors);
  data.back() ^= 1;
  EXPECT_NE(WeightsId(tensors), before);
  data.back() ^= 1;
  data.front() ^= 1;
  EXPECT_NE(WeightsId(tensors), before);
  data.front() ^= 1;
  tensors["w"].shape = {2, 1250};
  EXPECT_NE(WeightsId(tensors), before);
}

}  // namespace
}  // namespace vsprefill::model
