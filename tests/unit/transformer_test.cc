// The transformer against transformers: KV of every layer and logits, for a tiny model of each
// family and RoPE kind and for SmolLM2 (tests/golden/make_fixtures.py).
#include "server/model/transformer.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/scalar.h"
#include "server/base/mapped_file.h"
#include "server/kv/kv_pool.h"
#include "server/model/safetensors.h"
#include "server/model/seer_gate.h"

namespace vsprefill::model {
namespace {

using kernels::DType;

std::string FixturesDir() {
  const char* dir = std::getenv("VSP_FIXTURES");
  return dir != nullptr ? dir : "models/fixtures";
}

std::string ModelDir(const std::string& fixture) {
  if (fixture != "smollm2") return absl::StrCat(FixturesDir(), "/", fixture);
  const char* dir = std::getenv("VSP_MODEL");
  return dir != nullptr ? dir : "models/SmolLM2-135M-Instruct";
}

// What transformers computed.
struct Expected {
  std::vector<int32_t> ids;
  std::vector<std::vector<float>> k, v;  // per layer, [kv_heads, n, head_dim]
  std::vector<float> logits;             // of the last token
};

std::vector<float> Floats(const SafetensorsReader& file, const std::string& name) {
  const TensorView* tensor = file.Find(name);
  if (tensor == nullptr) return {};
  std::vector<float> values(tensor->num_elements);
  EXPECT_TRUE(ConvertToFloat(*tensor, absl::MakeSpan(values)).ok()) << name;
  return values;
}

Expected ReadExpected(const std::string& fixture) {
  const std::string path = absl::StrCat(FixturesDir(), "/", fixture, "/expected.safetensors");
  absl::StatusOr<SafetensorsReader> file = SafetensorsReader::OpenFile(path);
  EXPECT_TRUE(file.ok()) << file.status()
                         << "\nmake it with: .venv/bin/python tests/golden/make_fixtures.py";
  Expected expected;
  if (!file.ok()) return expected;
  const TensorView* ids = file->Find("ids");
  EXPECT_NE(ids, nullptr);
  expected.ids.resize(ids->num_elements);
  std::memcpy(expected.ids.data(), ids->data.data(), ids->data.size());
  for (int layer = 0; file->Find(absl::StrCat("layers.", layer, ".k")) != nullptr; ++layer) {
    expected.k.push_back(Floats(*file, absl::StrCat("layers.", layer, ".k")));
    expected.v.push_back(Floats(*file, absl::StrCat("layers.", layer, ".v")));
  }
  const std::vector<float> logits = Floats(*file, "logits");
  const int64_t vocab = file->Find("logits")->shape.back();
  expected.logits.assign(logits.end() - vocab, logits.end());
  return expected;
}

struct Outcome {
  std::vector<std::vector<float>> k, v;
  std::vector<float> logits;
};

// K or V of a layer without the cache's spare capacity, as float32.
std::vector<float> FromCache(const kv::KvCache& cache, const void* data, int64_t tokens) {
  const kv::KvLayout& layout = cache.layout();
  std::vector<float> values;
  for (int head = 0; head < layout.num_kv_heads; ++head) {
    const int64_t begin = head * cache.head_stride();
    for (int64_t i = begin; i < begin + tokens * layout.head_dim; ++i) {
      if (layout.dtype == DType::kF32) {
        values.push_back(static_cast<const float*>(data)[i]);
      } else {
        const uint32_t bits = uint32_t{static_cast<const uint16_t*>(data)[i]} << 16;
        float value;
        std::memcpy(&value, &bits, sizeof(value));
        values.push_back(value);
      }
    }
  }
  return values;
}

class TransformerTest : public testing::TestWithParam<std::string> {
 protected:
  static std::unique_ptr<Transformer> Load(const std::string& fixture, DType dtype) {
    LoadOptions options;
    options.model_dir = ModelDir(fixture);
    options.dtype = dtype;
    options.indexer_path = options.seer_gate_path = "none";
    absl::StatusOr<std::unique_ptr<Transformer>> model = Transformer::Load(options);
    EXPECT_TRUE(model.ok()) << model.status();
    return model.ok() ? *std::move(model) : nullptr;
  }

  static std::shared_ptr<kv::KvCache> MakeCache(Transformer& model, int64_t capacity) {
    static kv::KvPool pool(int64_t{8} << 30);
    auto reservation = pool.Reserve(kv::KvCache::BytesFor(model.kv_layout(), capacity, false));
    EXPECT_TRUE(reservation.ok());
    auto cache = kv::KvCache::Create(model.allocator(), *std::move(reservation), model.kv_layout(),
                                     capacity, false);
    EXPECT_TRUE(cache.ok()) << cache.status();
    return *cache;
  }

  struct Method {
    std::string name;
    std::map<std::string, double> parameters;
  };

  // Prefills each prompt in chunks of `chunk_tokens`, all prompts in the same forward calls.
  static std::vector<Outcome> Prefill(Transformer& model,
                                      const std::vector<std::vector<int32_t>>& prompts,
                                      int64_t chunk_tokens,
                                      const Method& attention = {"dense", {}}) {
    auto method =
        attention::CreateMethod(model.method_context(), attention.name, attention.parameters);
    EXPECT_TRUE(method.ok()) << method.status();
    std::vector<std::shared_ptr<kv::KvCache>> caches;
    std::vector<Outcome> runs(prompts.size());
    for (const auto& ids : prompts) {
      caches.push_back(MakeCache(model, static_cast<int64_t>(ids.size()) + 7));
    }
    while (true) {
      std::vector<SequenceChunk> batch;
      std::vector<size_t> prompt_of;
      for (size_t i = 0; i < prompts.size(); ++i) {
        const int64_t begin = caches[i]->num_tokens();
        const int64_t left = static_cast<int64_t>(prompts[i].size()) - begin;
        if (left <= 0) continue;
        SequenceChunk chunk;
        chunk.ids = absl::MakeConstSpan(prompts[i]).subspan(begin, std::min(left, chunk_tokens));
        chunk.position_begin = begin;
        chunk.prompt_tokens = prompts[i].size();
        chunk.cache = caches[i].get();
        batch.push_back(chunk);
        prompt_of.push_back(i);
      }
      if (batch.empty()) break;
      ForwardOptions options;
      options.method = method->get();
      options.logits = LogitsMode::kLast;
      auto result = model.Forward(batch, options);
      EXPECT_TRUE(result.ok()) << result.status();
      if (!result.ok()) return runs;
      for (size_t i = 0; i < batch.size(); ++i) runs[prompt_of[i]].logits = result->logits[i];
    }
    for (size_t i = 0; i < prompts.size(); ++i) {
      for (int layer = 0; layer < model.config().num_layers; ++layer) {
        runs[i].k.push_back(FromCache(*caches[i], caches[i]->k(layer), prompts[i].size()));
        runs[i].v.push_back(FromCache(*caches[i], caches[i]->v(layer), prompts[i].size()));
      }
    }
    return runs;
  }
};

double MaxAbsError(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double error = a.empty() ? INFINITY : 0;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    const double difference = std::abs(double{a[i]} - double{b[i]});
    if (!(difference <= error)) error = std::isnan(difference) ? INFINITY : difference;
  }
  return error;
}

double Cosine(const std::vector<float>& a, const std::vector<float>& b) {
  EXPECT_EQ(a.size(), b.size());
  double ab = 0, aa = 0, bb = 0;
  for (size_t i = 0; i < std::min(a.size(), b.size()); ++i) {
    ab += double{a[i]} * b[i];
    aa += double{a[i]} * a[i];
    bb += double{b[i]} * b[i];
  }
  return ab / std::sqrt(aa * bb);
}

void ExpectClose(const Outcome& run, const std::vector<std::vector<float>>& k,
                 const std::vector<std::vector<float>>& v, const std::vector<float>& logits,
                 double tolerance) {
  ASSERT_EQ(run.k.size(), k.size());
  for (size_t layer = 0; layer < k.size(); ++layer) {
    EXPECT_LE(MaxAbsError(run.k[layer], k[layer]), tolerance) << "K of layer " << layer;
    EXPECT_LE(MaxAbsError(run.v[layer], v[layer]), tolerance) << "V of layer " << layer;
  }
  EXPECT_LE(MaxAbsError(run.logits, logits), tolerance) << "logits";
}

TEST_P(TransformerTest, Float32MatchesTransformers) {
  const Expected expected = ReadExpected(GetParam());
  ASSERT_FALSE(expected.ids.empty());
  const auto model = Load(GetParam(), DType::kF32);
  ASSERT_NE(model, nullptr);
  const Outcome run = Prefill(*model, {expected.ids}, expected.ids.size())[0];
  ExpectClose(run, expected.k, expected.v, expected.logits, 1e-3);
}

TEST_P(TransformerTest, BFloat16IsClose) {
  const Expected expected = ReadExpected(GetParam());
  ASSERT_FALSE(expected.ids.empty());
  const auto model = Load(GetParam(), DType::kBF16);
  ASSERT_NE(model, nullptr);
  const Outcome run = Prefill(*model, {expected.ids}, expected.ids.size())[0];
  ASSERT_EQ(run.k.size(), expected.k.size());
  for (size_t layer = 0; layer < expected.k.size(); ++layer) {
    EXPECT_GE(Cosine(run.k[layer], expected.k[layer]), 0.999) << "K of layer " << layer;
    EXPECT_GE(Cosine(run.v[layer], expected.v[layer]), 0.999) << "V of layer " << layer;
  }
  EXPECT_GE(Cosine(run.logits, expected.logits), 0.999);
}

TEST_P(TransformerTest, ChunksAndBatchesGiveTheSame) {
  const Expected expected = ReadExpected(GetParam());
  ASSERT_FALSE(expected.ids.empty());
  const auto model = Load(GetParam(), DType::kF32);
  ASSERT_NE(model, nullptr);
  const int64_t n = expected.ids.size();
  const Outcome whole = Prefill(*model, {expected.ids}, n)[0];
  for (const int64_t chunk_tokens : {int64_t{1} + n / 3, int64_t{37}}) {
    SCOPED_TRACE(absl::StrCat("chunks of ", chunk_tokens));
    const Outcome chunked = Prefill(*model, {expected.ids}, chunk_tokens)[0];
    ExpectClose(chunked, whole.k, whole.v, whole.logits, 1e-3);
  }
  // Three prompts of different lengths in one batch, one of them a single token.
  const std::vector<int32_t> half(expected.ids.begin(), expected.ids.begin() + n / 2);
  const std::vector<int32_t> one = {expected.ids.back()};
  const Outcome half_alone = Prefill(*model, {half}, n)[0];
  const Outcome one_alone = Prefill(*model, {one}, n)[0];
  const std::vector<Outcome> batch = Prefill(*model, {half, one, expected.ids}, 1 + n / 2);
  ExpectClose(batch[0], half_alone.k, half_alone.v, half_alone.logits, 1e-3);
  ExpectClose(batch[1], one_alone.k, one_alone.v, one_alone.logits, 1e-3);
  ExpectClose(batch[2], whole.k, whole.v, whole.logits, 1e-3);
}

// Every method that needs no indexer, whole and in chunks: what transformers computed where it
// keeps everything, and something else where it does not.
TEST_P(TransformerTest, MethodsGoThroughTheForwardPass) {
  const Expected expected = ReadExpected(GetParam());
  ASSERT_FALSE(expected.ids.empty());
  const auto model = Load(GetParam(), DType::kF32);
  ASSERT_NE(model, nullptr);
  const int64_t n = expected.ids.size();
  const std::map<std::string, std::map<std::string, double>> everything = {
      {"dense", {}},
      {"streaming_llm", {{"window_tokens", static_cast<double>(n)}}},
      {"flashprefill", {{"alpha", 0}, {"last_tiles", 0}}},
      {"flashprefill_v2", {{"alpha", 0}, {"last_tiles", 0}, {"dense_below", 0}}},
      {"minference", {{"slash_size", static_cast<double>(n)}}},
      {"flexprefill", {{"gamma", 1}, {"min_budget", 1}}},
      {"xattention", {{"threshold", 1}}},
      {"anchor_attention", {{"theta", 1e6}, {"step", 1}}},
  };
  for (const attention::MethodSpec& spec : attention::MethodSpecs()) {
    if (spec.needs_indexer || spec.needs_seer_gate) continue;
    SCOPED_TRACE(spec.name);
    ASSERT_TRUE(everything.contains(spec.name)) << "a new method: add it to the list above";
    for (const int64_t chunk_tokens : {n, 1 + n / 3}) {
      const Outcome run =
          Prefill(*model, {expected.ids}, chunk_tokens, {spec.name, everything.at(spec.name)})[0];
      ExpectClose(run, expected.k, expected.v, expected.logits, 1e-3);
    }
  }
  // The window's rows see less, which the next layers' keys show.
  const Outcome window = Prefill(*model, {expected.ids}, n,
                                 {"streaming_llm", {{"sink_tokens", 1}, {"window_tokens", 1}}})[0];
  if (n > 400) {
    EXPECT_GT(MaxAbsError(window.k.back(), expected.k.back()), 1e-3);
  }
}

// SeerAttention with a gate of random weights: everything is what transformers computed, also in
// chunks; a gate of other weights is refused at the start.
TEST_P(TransformerTest, AGateServesSeerAttentionAndBelongsToTheWeights) {
  const Expected expected = ReadExpected(GetParam());
  ASSERT_FALSE(expected.ids.empty());
  LoadOptions options;
  options.model_dir = ModelDir(GetParam());
  options.dtype = DType::kF32;
  options.indexer_path = options.seer_gate_path = "none";
  auto plain = Transformer::Load(options);
  ASSERT_TRUE(plain.ok()) << plain.status();
  EXPECT_FALSE((*plain)->has_seer_gate());
  const ModelConfig& config = (*plain)->config();
  SeerGateWeights gate;
  gate.num_q_heads = config.num_q_heads;
  gate.num_kv_heads = config.num_kv_heads;
  gate.head_dim = config.head_dim;
  gate.gate_dim = 16;
  gate.weights_id = (*plain)->weights_id();
  std::mt19937 rng(5);
  std::normal_distribution<float> normal;
  const auto random = [&](int heads, int features) {
    std::vector<uint16_t> bits(size_t{16} * heads * features);
    for (uint16_t& x : bits) x = kernels::FloatToBF16(normal(rng));
    return bits;
  };
  for (int layer = 0; layer < config.num_layers; ++layer) {
    gate.layers.push_back({random(config.num_q_heads, config.head_dim),
                           random(config.num_kv_heads, 3 * config.head_dim)});
  }
  options.seer_gate_path = testing::TempDir() + "transformer_test_gate.safetensors";
  ASSERT_TRUE(WriteSeerGate(options.seer_gate_path, gate).ok());
  const auto model = Transformer::Load(options);
  ASSERT_TRUE(model.ok()) << model.status();
  EXPECT_TRUE((*model)->has_seer_gate());
  const int64_t n = expected.ids.size();
  for (const int64_t chunk_tokens : {n, 1 + n / 3}) {
    const Outcome run =
        Prefill(**model, {expected.ids}, chunk_tokens, {"seer_attention", {{"threshold", 0}}})[0];
    ExpectClose(run, expected.k, expected.v, expected.logits, 1e-3);
  }
  const Outcome sparse =
      Prefill(**model, {expected.ids}, n,
              {"seer_attention", {{"density", 1e-3}, {"last_dense_blocks", 0}}})[0];
  if (n > 500) {
    EXPECT_GT(MaxAbsError(sparse.k.back(), expected.k.back()), 1e-3);
  }
  gate.weights_id = std::string(64, 'f');
  ASSERT_TRUE(WriteSeerGate(options.seer_gate_path, gate).ok());
  const auto refused = Transformer::Load(options);
  EXPECT_TRUE(absl::IsFailedPrecondition(refused.status())) << refused.status();
  EXPECT_NE(refused.status().message().find(gate.weights_id), std::string::npos);
  EXPECT_NE(refused.status().message().find((*plain)->weights_id()), std::string::npos);
  std::filesystem::remove(options.seer_gate_path);
}

// Every folder with an expected file is a case, so a new fixture is tested without a change here.
std::vector<std::string> Fixtures() {
  std::vector<std::string> names;
  std::error_code error;
  for (const auto& entry : std::filesystem::directory_iterator(FixturesDir(), error)) {
    if (std::filesystem::exists(entry.path() / "expected.safetensors")) {
      names.push_back(entry.path().filename());
    }
  }
  std::sort(names.begin(), names.end());
  if (names.empty()) names.push_back("none");  // fails and says how to make them
  return names;
}

INSTANTIATE_TEST_SUITE_P(Fixtures, TransformerTest, testing::ValuesIn(Fixtures()),
                         [](const testing::TestParamInfo<std::string>& info) {
                           std::string name = info.param;
                           std::replace_if(
                               name.begin(), name.end(), [](char c) { return !std::isalnum(c); },
                               '_');
                           return name;
                         });

}  // namespace
}  // namespace vsprefill::model
