#include "server/model/model_config.h"

#include <cmath>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "server/base/json.h"
#include "server/base/status_macros.h"

namespace vsprefill::model {
namespace {

using nlohmann::json;

constexpr int64_t kMaxPositions = int64_t{1} << 24;

absl::Status Unsupported(absl::string_view key, const json& value, absl::string_view supported) {
  return absl::InvalidArgumentError(absl::StrCat("config.json: ", key, " ", ShortJson(value),
                                                 " is not supported (supported: ", supported, ")"));
}

// The value of `key`; null where it is absent or null.
const json* Find(const json& object, const char* key) {
  const auto found = object.find(key);
  return found == object.end() || found->is_null() ? nullptr : &*found;
}

// A whole number in [min, max]; `fallback` where the key is absent, and an error without one (< 0).
absl::StatusOr<int64_t> GetInt(const json& object, const char* key, int64_t min, int64_t max,
                               int64_t fallback = -1) {
  const json* value = Find(object, key);
  if (value == nullptr) {
    if (fallback >= 0) return fallback;
    return absl::InvalidArgumentError(absl::StrCat("config.json: \"", key, "\" is missing"));
  }
  if (!value->is_number_integer() ||
      (value->is_number_unsigned() && value->get<uint64_t>() > static_cast<uint64_t>(INT64_MAX)) ||
      value->get<int64_t>() < min || value->get<int64_t>() > max) {
    return Unsupported(key, *value, absl::StrCat("whole numbers from ", min, " to ", max));
  }
  return value->get<int64_t>();
}

// A finite number > 0; `fallback` where the key is absent, and an error without one (NaN).
absl::StatusOr<double> GetPositive(const json& object, const char* key, double fallback) {
  const json* value = Find(object, key);
  if (value == nullptr) {
    if (!std::isnan(fallback)) return fallback;
    return absl::InvalidArgumentError(absl::StrCat("config.json: \"", key, "\" is missing"));
  }
  if (!value->is_number() || !std::isfinite(value->get<double>()) || value->get<double>() <= 0) {
    return Unsupported(key, *value, "finite numbers above 0");
  }
  return value->get<double>();
}

absl::StatusOr<bool> GetBool(const json& object, const char* key, bool fallback) {
  const json* value = Find(object, key);
  if (value == nullptr) return fallback;
  if (!value->is_boolean()) return Unsupported(key, *value, "true, false");
  return value->get<bool>();
}

absl::StatusOr<Family> ParseFamily(const json& root, std::string* architecture) {
  constexpr absl::string_view kSupported =
      "LlamaForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM with model_type llama, qwen2, qwen3";
  struct Known {
    absl::string_view architecture, model_type;
    Family family;
  };
  constexpr Known kKnown[] = {{"LlamaForCausalLM", "llama", Family::kLlama},
                              {"Qwen2ForCausalLM", "qwen2", Family::kQwen2},
                              {"Qwen3ForCausalLM", "qwen3", Family::kQwen3}};
  const json* architectures = Find(root, "architectures");
  const json* model_type = Find(root, "model_type");
  if (architectures == nullptr && model_type == nullptr) {
    return absl::InvalidArgumentError(
        "config.json: \"architectures\" and \"model_type\" are missing");
  }
  for (const Known& known : kKnown) {
    if (architectures != nullptr) {
      if (!architectures->is_array() || architectures->size() != 1 ||
          !(*architectures)[0].is_string() ||
          (*architectures)[0].get_ref<const std::string&>() != known.architecture) {
        continue;
      }
    }
    if (model_type != nullptr) {
      if (!model_type->is_string() ||
          model_type->get_ref<const std::string&>() != known.model_type) {
        continue;
      }
    }
    *architecture = std::string(known.architecture);
    return known.family;
  }
  if (architectures != nullptr) {
    return Unsupported(
        absl::StrCat("model_type ", model_type != nullptr ? ShortJson(*model_type) : "(none)",
                     ", architectures"),
        *architectures, kSupported);
  }
  return Unsupported("model_type", *model_type, kSupported);
}

// Which of the two styles is used, as transformers 5 resolves it: rope_scaling (4) goes first where
// both are there, theta inside the object goes before the one outside.
absl::StatusOr<RopeConfig> ParseRope(const json& root, int64_t max_positions) {
  RopeConfig rope;
  const json empty = json::object();
  const json* scaling = Find(root, "rope_scaling");
  const char* key = "rope_scaling";
  if (scaling == nullptr || scaling->empty()) {
    scaling = Find(root, "rope_parameters");
    key = "rope_parameters";
  }
  if (scaling == nullptr) scaling = &empty;
  if (!scaling->is_object()) return Unsupported(key, *scaling, "an object");

  VSP_ASSIGN_OR_RETURN(const double outer_theta, GetPositive(root, "rope_theta", 10000.0));
  VSP_ASSIGN_OR_RETURN(rope.theta, GetPositive(*scaling, "rope_theta", outer_theta));
  const json* type = Find(*scaling, "rope_type");
  if (type == nullptr) type = Find(*scaling, "type");
  if (type != nullptr) {
    constexpr absl::string_view kTypes = "default, linear, llama3, yarn";
    if (!type->is_string()) return Unsupported("rope_type", *type, kTypes);
    rope.type = type->get<std::string>();
    if (rope.type != "default" && rope.type != "linear" && rope.type != "llama3" &&
        rope.type != "yarn") {
      return Unsupported("rope_type", *type, kTypes);
    }
  }
  for (const char* unsupported :
       {"full_attention", "sliding_attention", "mrope_section", "short_factor", "long_factor"}) {
    if (const json* value = Find(*scaling, unsupported); value != nullptr) {
      return Unsupported(absl::StrCat(key, ".", unsupported), *value, "one RoPE for all layers");
    }
  }
  for (const json* object : {&root, scaling}) {
    const json* partial = Find(*object, "partial_rotary_factor");
    if (partial != nullptr && !(partial->is_number() && partial->get<double>() == 1.0)) {
      return Unsupported("partial_rotary_factor", *partial, "1.0");
    }
  }
  if (rope.type == "default") return rope;

  VSP_ASSIGN_OR_RETURN(int64_t original, GetInt(*scaling, "original_max_position_embeddings", 1,
                                                kMaxPositions, max_positions));
  VSP_ASSIGN_OR_RETURN(
      original, GetInt(root, "original_max_position_embeddings", 1, kMaxPositions, original));
  if (rope.type == "yarn" && scaling->contains("factor") && (*scaling)["factor"].is_null()) {
    rope.factor = static_cast<double>(max_positions) / static_cast<double>(original);
  } else {
    VSP_ASSIGN_OR_RETURN(rope.factor, GetPositive(*scaling, "factor", NAN));
  }
  if (rope.type == "linear") return rope;

  rope.original_max_position_embeddings = original;
  if (rope.type == "llama3") {
    VSP_ASSIGN_OR_RETURN(rope.low_freq_factor, GetPositive(*scaling, "low_freq_factor", NAN));
    VSP_ASSIGN_OR_RETURN(rope.high_freq_factor, GetPositive(*scaling, "high_freq_factor", NAN));
    if (rope.high_freq_factor <= rope.low_freq_factor) {
      return Unsupported("high_freq_factor", (*scaling)["high_freq_factor"],
                         absl::StrCat("above low_freq_factor ", rope.low_freq_factor));
    }
    return rope;
  }
  VSP_ASSIGN_OR_RETURN(rope.beta_fast, GetPositive(*scaling, "beta_fast", 32.0));
  VSP_ASSIGN_OR_RETURN(rope.beta_slow, GetPositive(*scaling, "beta_slow", 1.0));
  VSP_ASSIGN_OR_RETURN(rope.attention_factor, GetPositive(*scaling, "attention_factor", 0.0));
  VSP_ASSIGN_OR_RETURN(rope.mscale, GetPositive(*scaling, "mscale", 0.0));
  VSP_ASSIGN_OR_RETURN(rope.mscale_all_dim, GetPositive(*scaling, "mscale_all_dim", 0.0));
  VSP_ASSIGN_OR_RETURN(rope.truncate, GetBool(*scaling, "truncate", true));
  if (rope.theta == 1.0) {
    return Unsupported("rope_theta", json(rope.theta), "anything but 1 with yarn");
  }
  return rope;
}

absl::Status RefuseUnsupportedFeatures(const json& root, Family family, int64_t num_layers) {
  if (const json* quantization = Find(root, "quantization_config"); quantization != nullptr) {
    const json* method = quantization->is_object() ? Find(*quantization, "quant_method") : nullptr;
    return Unsupported(
        method != nullptr ? "quantization_config with quant_method" : "quantization_config",
        method != nullptr ? *method : *quantization, "unquantised F32, BF16 and F16 weights");
  }
  if (const json* act = Find(root, "hidden_act");
      act != nullptr && !(act->is_string() && act->get_ref<const std::string&>() == "silu")) {
    return Unsupported("hidden_act", *act, "\"silu\"");
  }
  if (const json* types = Find(root, "layer_types"); types != nullptr) {
    if (!types->is_array()) return Unsupported("layer_types", *types, "a list");
    for (const json& type : *types) {
      if (!type.is_string() || type.get_ref<const std::string&>() != "full_attention") {
        return Unsupported("layer_types with", type, "\"full_attention\" in every layer");
      }
    }
  }
  if (family == Family::kLlama) return absl::OkStatus();
  // Qwen files carry a window even where it is off; with layer_types those decide.
  VSP_ASSIGN_OR_RETURN(const bool use_window, GetBool(root, "use_sliding_window", false));
  const json* window = Find(root, "sliding_window");
  VSP_ASSIGN_OR_RETURN(const int64_t full_layers,
                       GetInt(root, "max_window_layers", 0, INT32_MAX, 28));
  if (use_window && window != nullptr && full_layers < num_layers &&
      Find(root, "layer_types") == nullptr) {
    return Unsupported("use_sliding_window with sliding_window", *window, "no sliding window");
  }
  return absl::OkStatus();
}

// eos_token_id: a number, a list of numbers, or null.
absl::StatusOr<std::vector<int32_t>> ParseEos(const json& root, absl::string_view source) {
  std::vector<int32_t> ids;
  const json* eos = Find(root, "eos_token_id");
  if (eos == nullptr) return ids;
  const json list = eos->is_array() ? *eos : json::array({*eos});
  for (const json& id : list) {
    if (!id.is_number_unsigned() || id.get<uint64_t>() > static_cast<uint64_t>(INT32_MAX)) {
      return absl::InvalidArgumentError(absl::StrCat(source, ": eos_token_id ", ShortJson(*eos),
                                                     " is no token id or list of them"));
    }
    ids.push_back(id.get<int32_t>());
  }
  return ids;
}

}  // namespace

double ResolvedAttentionFactor(const RopeConfig& rope) {
  if (rope.type != "yarn") return 1.0;
  if (rope.attention_factor > 0) return rope.attention_factor;
  const auto scale = [&](double mscale) {
    return rope.factor <= 1 ? 1.0 : 0.1 * mscale * std::log(rope.factor) + 1.0;
  };
  return rope.mscale > 0 && rope.mscale_all_dim > 0
             ? scale(rope.mscale) / scale(rope.mscale_all_dim)
             : scale(1.0);
}

absl::StatusOr<ModelConfig> ParseModelConfig(absl::string_view config_json,
                                             absl::string_view generation_config_json) {
  VSP_ASSIGN_OR_RETURN(const json root, ParseJson(config_json, "config.json"));
  if (!root.is_object()) return absl::InvalidArgumentError("config.json: no JSON object");
  ModelConfig config;
  VSP_ASSIGN_OR_RETURN(config.family, ParseFamily(root, &config.architecture));
  VSP_ASSIGN_OR_RETURN(config.num_layers, GetInt(root, "num_hidden_layers", 1, 1024));
  VSP_RETURN_IF_ERROR(RefuseUnsupportedFeatures(root, config.family, config.num_layers));
  VSP_ASSIGN_OR_RETURN(config.hidden_size, GetInt(root, "hidden_size", 1, 65536));
  VSP_ASSIGN_OR_RETURN(config.intermediate_size, GetInt(root, "intermediate_size", 1, 1 << 20));
  VSP_ASSIGN_OR_RETURN(config.num_q_heads, GetInt(root, "num_attention_heads", 1, 1024));
  // Absent means "as many as query heads" for Llama, but a class default for Qwen: there the key is
  // demanded, null excepted.
  const bool kv_heads_optional =
      config.family == Family::kLlama || root.contains("num_key_value_heads");
  VSP_ASSIGN_OR_RETURN(config.num_kv_heads,
                       GetInt(root, "num_key_value_heads", 1, config.num_q_heads,
                              kv_heads_optional ? config.num_q_heads : -1));
  if (config.num_q_heads % config.num_kv_heads != 0 ||
      config.num_q_heads / config.num_kv_heads > 128) {
    return Unsupported("num_key_value_heads", json(config.num_kv_heads),
                       absl::StrCat("divisors of num_attention_heads ", config.num_q_heads,
                                    " with at most 128 query heads each"));
  }
  const int64_t derived_head_dim = config.family == Family::kQwen3 && !root.contains("head_dim")
                                       ? 128
                                       : config.hidden_size / config.num_q_heads;
  VSP_ASSIGN_OR_RETURN(config.head_dim, GetInt(root, "head_dim", 1, 65536, derived_head_dim));
  if (config.head_dim % 16 != 0 || config.head_dim < 16 || config.head_dim > 256) {
    return Unsupported("head_dim", json(config.head_dim), "multiples of 16 from 16 to 256");
  }
  VSP_ASSIGN_OR_RETURN(config.vocab_size, GetInt(root, "vocab_size", 1, 1 << 24));
  VSP_ASSIGN_OR_RETURN(config.max_position_embeddings,
                       GetInt(root, "max_position_embeddings", 1, kMaxPositions));
  VSP_ASSIGN_OR_RETURN(config.rms_norm_eps, GetPositive(root, "rms_norm_eps", 1e-6));
  VSP_ASSIGN_OR_RETURN(config.tied_embeddings, GetBool(root, "tie_word_embeddings", false));
  if (config.family == Family::kQwen2) {
    config.qkv_bias = true;
  } else {
    VSP_ASSIGN_OR_RETURN(config.qkv_bias, GetBool(root, "attention_bias", false));
    config.o_bias = config.qkv_bias;
  }
  if (config.family == Family::kLlama) {
    VSP_ASSIGN_OR_RETURN(config.mlp_bias, GetBool(root, "mlp_bias", false));
  }
  config.qk_norm = config.family == Family::kQwen3;
  VSP_ASSIGN_OR_RETURN(config.rope, ParseRope(root, config.max_position_embeddings));

  VSP_ASSIGN_OR_RETURN(config.eos_token_ids, ParseEos(root, "config.json"));
  if (!generation_config_json.empty()) {
    VSP_ASSIGN_OR_RETURN(const json generation,
                         ParseJson(generation_config_json, "generation_config.json"));
    if (!generation.is_object()) {
      return absl::InvalidArgumentError("generation_config.json: no JSON object");
    }
    VSP_ASSIGN_OR_RETURN(std::vector<int32_t> ids, ParseEos(generation, "generation_config.json"));
    if (!ids.empty()) config.eos_token_ids = std::move(ids);
  }
  return config;
}

}  // namespace vsprefill::model
