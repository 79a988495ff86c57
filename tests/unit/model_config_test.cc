#include "server/model/model_config.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <string>

#include "server/base/json.h"

namespace vsprefill::model {
namespace {

using nlohmann::json;
using testing::AllOf;
using testing::ElementsAre;
using testing::HasSubstr;

// A config.json in the style of transformers 4, as the hub holds it.
json LlamaV4() {
  return json::parse(R"({
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": false,
    "eos_token_id": [128001, 128008, 128009], "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": false,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "pretraining_tp": 1, "rms_norm_eps": 1e-05, "rope_scaling": {"factor": 8.0,
    "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3"}, "rope_theta": 500000.0, "tie_word_embeddings": false,
    "torch_dtype": "bfloat16", "transformers_version": "4.43.0", "vocab_size": 128256})");
}

// The style of transformers 5.
json Qwen3V5() {
  return json::parse(R"({
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": false,
    "dtype": "bfloat16", "eos_token_id": 151645, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2560, "intermediate_size": 9728, "layer_types": ["full_attention"],
    "max_position_embeddings": 40960, "max_window_layers": 36, "num_attention_heads": 32,
    "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"}, "sliding_window": null,
    "tie_word_embeddings": true, "use_sliding_window": false, "vocab_size": 151936})");
}

json Qwen2V4() {
  return json::parse(R"({
    "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "eos_token_id": 151643,
    "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": true,
    "torch_dtype": "bfloat16", "use_sliding_window": false, "vocab_size": 151936})");
}

ModelConfig Parsed(const json& config, absl::string_view generation = "") {
  absl::StatusOr<ModelConfig> parsed = ParseModelConfig(config.dump(), generation);
  EXPECT_TRUE(parsed.ok()) << parsed.status();
  return parsed.ok() ? *parsed : ModelConfig();
}

// The message of a refusal; empty where the configuration is accepted.
std::string Refusal(const json& config) {
  const absl::Status status = ParseModelConfig(config.dump()).status();
  EXPECT_TRUE(status.ok() || absl::IsInvalidArgument(status)) << status;
  EXPECT_EQ(status.message().find('\n'), absl::string_view::npos) << "one line: " << status;
  return std::string(status.message());
}

TEST(ModelConfigTest, ReadsLlamaInTheStyleOfTransformers4) {
  const ModelConfig config = Parsed(LlamaV4());
  EXPECT_EQ(config.family, Family::kLlama);
  EXPECT_EQ(config.num_layers, 32);
  EXPECT_EQ(config.num_q_heads, 32);
  EXPECT_EQ(config.num_kv_heads, 8);
  EXPECT_EQ(config.head_dim, 128);
  EXPECT_EQ(config.vocab_size, 128256);
  EXPECT_FALSE(config.tied_embeddings);
  EXPECT_FALSE(config.qkv_bias || config.o_bias || config.mlp_bias || config.qk_norm);
  EXPECT_FLOAT_EQ(config.rms_norm_eps, 1e-5f);
  EXPECT_EQ(config.rope.type, "llama3");
  EXPECT_EQ(config.rope.theta, 500000.0);
  EXPECT_EQ(config.rope.factor, 8.0);
  EXPECT_EQ(config.rope.original_max_position_embeddings, 8192);
  EXPECT_THAT(config.eos_token_ids, ElementsAre(128001, 128008, 128009));
}

TEST(ModelConfigTest, ReadsQwen3InTheStyleOfTransformers5) {
  const ModelConfig config = Parsed(Qwen3V5());
  EXPECT_EQ(config.family, Family::kQwen3);
  EXPECT_EQ(config.head_dim, 128);  // not hidden / heads = 80
  EXPECT_TRUE(config.qk_norm);
  EXPECT_FALSE(config.qkv_bias);
  EXPECT_TRUE(config.tied_embeddings);
  EXPECT_EQ(config.rope.type, "default");
  EXPECT_EQ(config.rope.theta, 1000000.0);
}

TEST(ModelConfigTest, ReadsQwen2WithBiases) {
  const ModelConfig config = Parsed(Qwen2V4());
  EXPECT_TRUE(config.qkv_bias);
  EXPECT_FALSE(config.o_bias || config.mlp_bias || config.qk_norm);
  EXPECT_EQ(config.head_dim, 64);
}

TEST(ModelConfigTest, LlamaBiasesFollowTheirKeys) {
  json config = LlamaV4();
  config["attention_bias"] = true;
  config["mlp_bias"] = true;
  const ModelConfig parsed = Parsed(config);
  EXPECT_TRUE(parsed.qkv_bias && parsed.o_bias && parsed.mlp_bias);
}

TEST(ModelConfigTest, OldLlamaHasAsManyKvHeadsAsQueryHeads) {
  json config = LlamaV4();
  config.erase("num_key_value_heads");
  config["rope_scaling"] = nullptr;
  config.erase("rope_theta");
  const ModelConfig parsed = Parsed(config);
  EXPECT_EQ(parsed.num_kv_heads, 32);
  EXPECT_EQ(parsed.rope.theta, 10000.0);
}

TEST(ModelConfigTest, GenerationConfigDecidesAboutTheEnd) {
  EXPECT_THAT(Parsed(Qwen2V4(), R"({"eos_token_id": [7, 9]})").eos_token_ids, ElementsAre(7, 9));
  EXPECT_THAT(Parsed(Qwen2V4(), R"({})").eos_token_ids, ElementsAre(151643));
}

TEST(ModelConfigTest, YarnResolvesItsAttentionFactor) {
  json config = Qwen2V4();
  config["rope_scaling"] = {
      {"type", "yarn"}, {"factor", 4.0}, {"original_max_position_embeddings", 32768}};
  RopeConfig rope = Parsed(config).rope;
  EXPECT_EQ(rope.type, "yarn");
  EXPECT_TRUE(rope.truncate);
  EXPECT_DOUBLE_EQ(ResolvedAttentionFactor(rope), 0.1 * std::log(4.0) + 1.0);
  config["rope_scaling"]["mscale"] = 0.5;
  config["rope_scaling"]["mscale_all_dim"] = 2.0;
  rope = Parsed(config).rope;
  EXPECT_DOUBLE_EQ(ResolvedAttentionFactor(rope),
                   (0.05 * std::log(4.0) + 1.0) / (0.2 * std::log(4.0) + 1.0));
  config["rope_scaling"]["attention_factor"] = 1.5;
  EXPECT_DOUBLE_EQ(ResolvedAttentionFactor(Parsed(config).rope), 1.5);
}

TEST(ModelConfigTest, WhatIsNotSupportedIsRefusedByName) {
  const auto with = [](const char* key, const json& value) {
    json config = LlamaV4();
    config[key] = value;
    return Refusal(config);
  };
  EXPECT_THAT(with("architectures", {"MistralForCausalLM"}),
              AllOf(HasSubstr("MistralForCausalLM"), HasSubstr("LlamaForCausalLM")));
  EXPECT_THAT(with("model_type", "mixtral"), HasSubstr("mixtral"));
  EXPECT_THAT(with("hidden_act", "gelu"), AllOf(HasSubstr("hidden_act"), HasSubstr("gelu")));
  EXPECT_THAT(with("rope_scaling", {{"rope_type", "longrope"}, {"factor", 2.0}}),
              AllOf(HasSubstr("longrope"), HasSubstr("llama3")));
  EXPECT_THAT(with("rope_scaling", {{"type", "dynamic"}, {"factor", 2.0}}), HasSubstr("dynamic"));
  EXPECT_THAT(with("rope_scaling", {{"type", "linear"}}), HasSubstr("factor"));
  EXPECT_THAT(with("rope_scaling", {{"type", "linear"}, {"factor", -1.0}}), HasSubstr("-1.0"));
  EXPECT_THAT(with("quantization_config", {{"quant_method", "gptq"}, {"bits", 4}}),
              AllOf(HasSubstr("quantization_config"), HasSubstr("gptq")));
  EXPECT_THAT(with("partial_rotary_factor", 0.5), HasSubstr("partial_rotary_factor"));
  EXPECT_THAT(with("layer_types", {"full_attention", "sliding_attention"}),
              HasSubstr("sliding_attention"));
  EXPECT_THAT(with("num_key_value_heads", 5), AllOf(HasSubstr("5"), HasSubstr("32")));
  EXPECT_THAT(with("num_key_value_heads", 64), HasSubstr("64"));
  EXPECT_THAT(with("num_hidden_layers", 0), HasSubstr("num_hidden_layers"));
  EXPECT_THAT(with("num_hidden_layers", 1e300), HasSubstr("num_hidden_layers"));
  EXPECT_THAT(with("hidden_size", "4096"), HasSubstr("hidden_size"));
  EXPECT_THAT(with("hidden_size", -4096), HasSubstr("-4096"));
  EXPECT_THAT(with("vocab_size", 18446744073709551615u), HasSubstr("18446744073709551615"));
  EXPECT_THAT(with("head_dim", 100), HasSubstr("100"));
  EXPECT_THAT(with("rms_norm_eps", 0.0), HasSubstr("rms_norm_eps"));
  EXPECT_THAT(with("tie_word_embeddings", 1), HasSubstr("tie_word_embeddings"));
  EXPECT_THAT(with("eos_token_id", -3), HasSubstr("eos_token_id"));
}

TEST(ModelConfigTest, SlidingWindowIsRefusedOnlyWhereItIsInUse) {
  json config = Qwen2V4();
  config["use_sliding_window"] = true;
  EXPECT_EQ(Refusal(config), "");  // max_window_layers 24 of 24 layers: no layer has a window
  config["max_window_layers"] = 12;
  EXPECT_THAT(Refusal(config), HasSubstr("sliding_window"));
  config["sliding_window"] = nullptr;
  EXPECT_EQ(Refusal(config), "");
}

TEST(ModelConfigTest, MissingKeysAreNamed) {
  for (const char* key : {"num_hidden_layers", "hidden_size", "intermediate_size", "vocab_size",
                          "num_attention_heads", "max_position_embeddings"}) {
    json config = LlamaV4();
    config.erase(key);
    EXPECT_THAT(Refusal(config), HasSubstr(key));
  }
  json config = LlamaV4();
  config.erase("architectures");
  config.erase("model_type");
  EXPECT_THAT(Refusal(config), HasSubstr("architectures"));
}

TEST(ModelConfigTest, BrokenJsonIsRefused) {
  for (const std::string& text :
       {std::string("{"), std::string(""), std::string("[]"), std::string("{\"a\":1,\"a\":2}"),
        std::string("{\"a\":\"\xff\"}"), std::string("{\"rms_norm_eps\":1e999}"),
        std::string(100000, '[')}) {
    const absl::Status status = ParseModelConfig(text).status();
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << text.substr(0, 20);
    EXPECT_THAT(std::string(status.message()), HasSubstr("config.json"));
  }
}

}  // namespace
}  // namespace vsprefill::model
