// Model directories that are broken in one way each: one clear line and the right code, never a
// crash. And forward calls that must be refused or that answer with scores.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/base/json.h"
#include "server/base/mapped_file.h"
#include "server/kv/kv_pool.h"
#include "server/model/safetensors.h"
#include "server/model/transformer.h"

namespace vsprefill::model {
namespace {

using kernels::DType;
using nlohmann::json;
using testing::AllOf;
using testing::HasSubstr;

std::string Fixture() {
  const char* dir = std::getenv("VSP_FIXTURES");
  return absl::StrCat(dir != nullptr ? dir : "models/fixtures", "/llama");
}

class ModelLoadTest : public testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(FileExists(Fixture() + "/config.json"))
        << "make it with: .venv/bin/python tests/golden/make_fixtures.py";
    dir_ =
        std::filesystem::path(testing::TempDir()) /
        absl::StrCat("model_load_", testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::remove_all(dir_);
    std::filesystem::create_directories(dir_);
    for (const char* file : {"config.json", "model.safetensors"}) {
      std::filesystem::copy_file(std::filesystem::path(Fixture()) / file, dir_ / file);
    }
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  absl::StatusOr<std::unique_ptr<Transformer>> Load(DType dtype = DType::kBF16) const {
    LoadOptions options;
    options.model_dir = dir_.string();
    options.dtype = dtype;
    return Transformer::Load(options);
  }

  // The message of a refusal with this code: one line.
  std::string Refusal(absl::StatusCode code = absl::StatusCode::kInvalidArgument) const {
    const absl::Status status = Load().status();
    EXPECT_EQ(status.code(), code) << status;
    EXPECT_EQ(status.message().find('\n'), absl::string_view::npos) << status;
    return std::string(status.message());
  }

  // Rewrites the weights: `change` sees all tensors and may point them at memory that it keeps.
  void ChangeTensors(const std::function<void(TensorMap&)>& change) const {
    auto file = SafetensorsReader::OpenFile(Fixture() + "/model.safetensors");
    ASSERT_TRUE(file.ok()) << file.status();
    TensorMap tensors = file->tensors();
    change(tensors);
    ASSERT_TRUE(WriteSafetensors((dir_ / "model.safetensors").string(), tensors).ok());
  }

  void ChangeConfig(const std::string& key, const json& value) const {
    json config = json::parse(*ReadTextFile(Fixture() + "/config.json"));
    config[key] = value;
    std::ofstream(dir_ / "config.json") << config.dump();
  }

  std::filesystem::path dir_;
};

TEST_F(ModelLoadTest, TheUntouchedModelLoads) {
  const auto model = Load();
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_FALSE((*model)->has_indexer());
  EXPECT_EQ((*model)->weights_id().size(), 64u);
  EXPECT_EQ((*model)->kv_layout().kv_id.size(), 64u);
}

TEST_F(ModelLoadTest, MissingFilesAreNotFound) {
  std::filesystem::remove(dir_ / "model.safetensors");
  EXPECT_THAT(Refusal(absl::StatusCode::kNotFound), HasSubstr("model.safetensors"));
  std::filesystem::remove(dir_ / "config.json");
  EXPECT_THAT(Refusal(absl::StatusCode::kNotFound), HasSubstr("config.json"));
}

TEST_F(ModelLoadTest, UnsupportedConfigurationNamesTheFileAndTheKey) {
  ChangeConfig("hidden_act", "gelu");
  EXPECT_THAT(Refusal(),
              AllOf(HasSubstr(dir_.string()), HasSubstr("hidden_act"), HasSubstr("gelu")));
}

TEST_F(ModelLoadTest, TruncatedFile) {
  std::filesystem::resize_file(dir_ / "model.safetensors",
                               std::filesystem::file_size(dir_ / "model.safetensors") - 1);
  EXPECT_THAT(Refusal(), HasSubstr("truncated"));
  std::filesystem::resize_file(dir_ / "model.safetensors", 0);
  EXPECT_THAT(Refusal(), HasSubstr("0 bytes"));
}

TEST_F(ModelLoadTest, MissingTensor) {
  ChangeTensors([](TensorMap& tensors) { tensors.erase("model.layers.1.mlp.up_proj.weight"); });
  EXPECT_THAT(Refusal(), HasSubstr("\"model.layers.1.mlp.up_proj.weight\" is missing"));
}

TEST_F(ModelLoadTest, WrongShape) {
  ChangeConfig("intermediate_size", 528);
  EXPECT_THAT(Refusal(), AllOf(HasSubstr("gate_proj"), HasSubstr("528")));
  // A configuration that asks for more memory than there is must not get so far as to ask.
  ChangeConfig("vocab_size", 1 << 24);
  EXPECT_THAT(Refusal(), AllOf(HasSubstr("embed_tokens"), HasSubstr("16777216")));
}

TEST_F(ModelLoadTest, WrongDType) {
  std::vector<uint8_t> integers;
  ChangeTensors([&](TensorMap& tensors) {
    TensorView& tensor = tensors["model.layers.0.mlp.down_proj.weight"];
    integers.resize(tensor.num_elements);
    tensor.dtype = "I8";
    tensor.data = integers;
  });
  EXPECT_THAT(Refusal(), AllOf(HasSubstr("down_proj"), HasSubstr("I8"), HasSubstr("BF16")));
}

TEST_F(ModelLoadTest, UnexpectedTensor) {
  const float bias = 1;
  ChangeTensors([&](TensorMap& tensors) {
    tensors["model.layers.0.self_attn.sinks"] = {
        "F32", {1}, 1, absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(&bias), 4)};
  });
  EXPECT_THAT(Refusal(), AllOf(HasSubstr("unexpected"), HasSubstr("self_attn.sinks")));
}

TEST_F(ModelLoadTest, ScalesThatAreNotFinite) {
  for (const float bad :
       {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    std::vector<float> norm;
    ChangeTensors([&](TensorMap& tensors) {
      TensorView& tensor = tensors["model.layers.2.input_layernorm.weight"];
      norm.assign(tensor.num_elements, 1.0f);
      norm[3] = bad;
      tensor.dtype = "F32";
      tensor.data = absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(norm.data()),
                                        norm.size() * sizeof(float));
    });
    EXPECT_THAT(Refusal(), AllOf(HasSubstr("model.layers.2.input_layernorm.weight"),
                                 HasSubstr("element 3"), HasSubstr("finite")));
  }
}

TEST_F(ModelLoadTest, BrokenIndexerIsRefused) {
  std::ofstream(dir_ / "indexer.safetensors") << "not an indexer at all";
  EXPECT_THAT(Refusal(), HasSubstr("indexer.safetensors"));
}

TEST_F(ModelLoadTest, BrokenGateIsRefused) {
  std::ofstream(dir_ / "seer_gate.safetensors") << "not a gate at all";
  EXPECT_THAT(Refusal(), HasSubstr("seer_gate.safetensors"));
}

class ForwardTest : public ModelLoadTest {
 protected:
  void SetUp() override {
    ModelLoadTest::SetUp();
    auto model = Load(DType::kF32);
    ASSERT_TRUE(model.ok()) << model.status();
    model_ = *std::move(model);
    method_ = *attention::CreateMethod(model_->method_context(), "dense", {});
    cache_ = MakeCache();
  }

  std::shared_ptr<kv::KvCache> MakeCache() {
    constexpr int64_t kCapacity = 64;
    auto reservation = pool_.Reserve(kv::KvCache::BytesFor(model_->kv_layout(), kCapacity, false));
    return *kv::KvCache::Create(model_->allocator(), *std::move(reservation), model_->kv_layout(),
                                kCapacity, false);
  }

  absl::StatusOr<ForwardResult> Forward(const std::vector<int32_t>& ids, LogitsMode logits,
                                        int64_t position_begin = 0,
                                        std::function<absl::Status(int)> after_layer = nullptr) {
    SequenceChunk chunk;
    chunk.ids = ids;
    chunk.position_begin = position_begin;
    chunk.prompt_tokens = position_begin + static_cast<int64_t>(ids.size());
    chunk.cache = cache_.get();
    ForwardOptions options;
    options.method = method_.get();
    options.logits = logits;
    options.after_layer = std::move(after_layer);
    return model_->Forward(absl::MakeConstSpan(&chunk, 1), options);
  }

  kv::KvPool pool_{int64_t{1} << 30};
  std::unique_ptr<Transformer> model_;
  std::unique_ptr<attention::AttentionMethod> method_;
  std::shared_ptr<kv::KvCache> cache_;
};

TEST_F(ForwardTest, BadCallsAreRefusedAndChangeNothing) {
  EXPECT_TRUE(absl::IsInvalidArgument(Forward({}, LogitsMode::kNone).status()));
  const int vocab = model_->config().vocab_size;
  EXPECT_THAT(std::string(Forward({0, vocab}, LogitsMode::kNone).status().message()),
              AllOf(HasSubstr(absl::StrCat(vocab)), HasSubstr(absl::StrCat("0 to ", vocab - 1))));
  EXPECT_TRUE(absl::IsInvalidArgument(Forward({-1}, LogitsMode::kNone).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(Forward({1}, LogitsMode::kNone, 5).status()));
  EXPECT_THAT(std::string(Forward(std::vector<int32_t>(65), LogitsMode::kNone).status().message()),
              AllOf(HasSubstr("65"), HasSubstr("64")));
  EXPECT_EQ(cache_->num_tokens(), 0);
  EXPECT_TRUE(Forward({1, 2, 3}, LogitsMode::kNone).ok());
  EXPECT_EQ(cache_->num_tokens(), 3);
}

TEST_F(ForwardTest, AnErrorAfterALayerEndsTheCall) {
  int layers = 0;
  const absl::Status status = Forward({1, 2, 3}, LogitsMode::kLast, 0, [&](int layer) {
                                EXPECT_EQ(layer, layers++);
                                return layer == 1 ? absl::CancelledError("stop") : absl::OkStatus();
                              }).status();
  EXPECT_TRUE(absl::IsCancelled(status)) << status;
  EXPECT_EQ(layers, 2);
  EXPECT_EQ(cache_->num_tokens(), 0);
  EXPECT_TRUE(Forward({1, 2, 3}, LogitsMode::kLast).ok());
}

TEST_F(ForwardTest, ScoresAreTheLogSoftmaxOfTheLogits) {
  const std::vector<int32_t> ids = {5, 17, 300, 42, 42, 7};
  const auto scores = Forward(ids, LogitsMode::kScores);
  ASSERT_TRUE(scores.ok()) << scores.status();
  ASSERT_EQ(scores->log_probs[0].size(), ids.size() - 1);
  for (size_t i = 0; i + 1 < ids.size(); ++i) {
    cache_ = MakeCache();
    const auto last =
        Forward(std::vector<int32_t>(ids.begin(), ids.begin() + i + 1), LogitsMode::kLast);
    ASSERT_TRUE(last.ok()) << last.status();
    const std::vector<float>& logits = last->logits[0];
    double sum = 0;
    size_t best = 0;
    for (size_t id = 0; id < logits.size(); ++id) {
      sum += std::exp(double{logits[id]});
      if (logits[id] > logits[best]) best = id;
    }
    EXPECT_NEAR(scores->log_probs[0][i], logits[ids[i + 1]] - std::log(sum), 1e-4) << i;
    EXPECT_EQ(scores->top1[0][i], best == static_cast<size_t>(ids[i + 1])) << i;
  }
}

TEST_F(ForwardTest, WithoutLogitsTheKvIsTheSame) {
  const std::vector<int32_t> ids = {5, 17, 300, 42, 42, 7};
  ASSERT_TRUE(Forward(ids, LogitsMode::kNone).ok());
  const std::shared_ptr<kv::KvCache> without = cache_;
  cache_ = MakeCache();
  ASSERT_TRUE(Forward(ids, LogitsMode::kScores).ok());
  const kv::KvLayout& layout = model_->kv_layout();
  for (int layer = 0; layer < layout.num_layers; ++layer) {
    for (int head = 0; head < layout.num_kv_heads; ++head) {
      const int64_t begin = head * cache_->head_stride();
      const size_t bytes = ids.size() * layout.head_dim * sizeof(float);
      for (const auto& [a, b] : {std::make_pair(without->k(layer), cache_->k(layer)),
                                 std::make_pair(without->v(layer), cache_->v(layer))}) {
        EXPECT_EQ(
            std::memcmp(static_cast<float*>(a) + begin, static_cast<float*>(b) + begin, bytes), 0)
            << "layer " << layer;
      }
    }
  }
}

TEST_F(ForwardTest, IndexerMethodsNeedAnIndexer) {
  auto method = attention::CreateMethod(model_->method_context(), "vsprefill", {});
  if (!method.ok()) {
    EXPECT_TRUE(absl::IsFailedPrecondition(method.status())) << method.status();
    return;
  }
  method_ = *std::move(method);
  const absl::Status status = Forward({1, 2}, LogitsMode::kNone).status();
  EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("indexer"));
}

}  // namespace
}  // namespace vsprefill::model
