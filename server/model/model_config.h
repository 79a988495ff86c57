// A model's hyper-parameters, read from a Hugging Face config.json of transformers 4 or 5.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"

namespace vsprefill::model {

enum class Family { kLlama, kQwen2, kQwen3 };

struct RopeConfig {
  std::string type = "default";  // default, linear, llama3, yarn
  double theta = 10000.0;
  double factor = 1.0;
  double low_freq_factor = 1.0, high_freq_factor = 4.0;  // llama3
  double beta_fast = 32.0, beta_slow = 1.0;              // yarn
  double attention_factor = 0.0;                         // yarn; 0: derived from factor
  double mscale = 0.0, mscale_all_dim = 0.0;             // yarn
  bool truncate = true;                                  // yarn
  int64_t original_max_position_embeddings = 0;          // llama3, yarn
};

struct ModelConfig {
  Family family = Family::kLlama;
  std::string architecture;  // e.g. LlamaForCausalLM
  int num_layers = 0;
  int hidden_size = 0;
  int intermediate_size = 0;
  int num_q_heads = 0, num_kv_heads = 0, head_dim = 0;
  int vocab_size = 0;
  int64_t max_position_embeddings = 0;
  float rms_norm_eps = 1e-6f;
  bool tied_embeddings = false;
  bool qkv_bias = false, o_bias = false,
       mlp_bias = false;  // Qwen2: qkv; Llama: attention_bias, mlp_bias
  bool qk_norm = false;   // Qwen3
  RopeConfig rope;
  std::vector<int32_t> eos_token_ids;  // from generation_config.json or config.json
};

/// The factor on cos and sin: yarn's attention_factor, given or derived; 1 for the other kinds.
double ResolvedAttentionFactor(const RopeConfig& rope);

/// INVALID_ARGUMENT names the key, its value and what is supported.
absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view config_json,
                                             absl::string_view generation_config_json = "");

}  // namespace vsprefill::model
