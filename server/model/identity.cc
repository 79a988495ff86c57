#include "server/model/identity.h"

#include <openssl/evp.h>

#include <cstdio>
#include <cstdlib>
#include <memory>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "nlohmann/json.hpp"

namespace vsprefill::model {
namespace {

// Tensors up to this size are hashed whole.
constexpr int64_t kWholeBytes = 4096;
constexpr int64_t kBlocks = 64;
constexpr int64_t kBlockBytes = 64;

class Sha256 {
 public:
  Sha256() : context_(EVP_MD_CTX_new()) {
    Check(context_ != nullptr && EVP_DigestInit_ex(context_.get(), EVP_sha256(), nullptr) == 1);
  }
  void Update(const void* data, size_t bytes) {
    Check(EVP_DigestUpdate(context_.get(), data, bytes) == 1);
  }
  void Update(absl::string_view text) { Update(text.data(), text.size()); }
  std::string Hex() {
    unsigned char digest[EVP_MAX_MD_SIZE];
    unsigned int bytes = 0;
    Check(EVP_DigestFinal_ex(context_.get(), digest, &bytes) == 1);
    return absl::BytesToHexString(absl::string_view(reinterpret_cast<const char*>(digest), bytes));
  }

 private:
  // SHA-256 over memory fails only where OpenSSL itself is broken.
  static void Check(bool ok) {
    if (ok) return;
    std::fputs("OpenSSL cannot compute SHA-256\n", stderr);
    std::abort();
  }
  struct Free {
    void operator()(EVP_MD_CTX* context) const { EVP_MD_CTX_free(context); }
  };
  std::unique_ptr<EVP_MD_CTX, Free> context_;
};

std::string Number(double value) { return absl::StrFormat("%.17g", value); }

}  // namespace

std::string WeightsId(const TensorMap& tensors) {
  const absl::string_view zero("\0", 1);
  Sha256 hash;
  for (const auto& [name, tensor] : tensors) {
    hash.Update(name);
    hash.Update(zero);
    hash.Update(tensor.dtype);
    hash.Update(zero);
    hash.Update(absl::StrJoin(tensor.shape, ","));
    hash.Update(zero);
    const int64_t bytes = tensor.data.size();
    if (bytes <= kWholeBytes) {
      hash.Update(tensor.data.data(), bytes);
      continue;
    }
    for (int64_t i = 0; i < kBlocks; ++i) {
      const int64_t offset = i * (bytes - kBlockBytes) / (kBlocks - 1);
      hash.Update(tensor.data.data() + offset, kBlockBytes);
    }
  }
  return hash.Hex();
}

std::string KvIdJson(const ModelConfig& config, absl::string_view weights_id,
                     kernels::DType kv_dtype) {
  const RopeConfig& rope = config.rope;
  nlohmann::json values = {{"type", rope.type}, {"theta", Number(rope.theta)}};
  if (rope.type != "default") values["factor"] = Number(rope.factor);
  if (rope.type == "llama3") {
    values["low_freq_factor"] = Number(rope.low_freq_factor);
    values["high_freq_factor"] = Number(rope.high_freq_factor);
  }
  if (rope.type == "yarn") {
    values["beta_fast"] = Number(rope.beta_fast);
    values["beta_slow"] = Number(rope.beta_slow);
    values["attention_factor"] = Number(ResolvedAttentionFactor(rope));
    values["truncate"] = rope.truncate ? "true" : "false";
  }
  if (rope.type == "llama3" || rope.type == "yarn") {
    values["original_max_position_embeddings"] =
        Number(static_cast<double>(rope.original_max_position_embeddings));
  }
  // nlohmann::json keeps keys sorted and dumps without spaces: the canonical form.
  const nlohmann::json identity = {
      {"weights_id", std::string(weights_id)}, {"layers", config.num_layers},
      {"kv_heads", config.num_kv_heads},       {"head_dim", config.head_dim},
      {"kv_dtype", kernels::Name(kv_dtype)},   {"rope", values}};
  return identity.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace);
}

std::string KvId(const ModelConfig& config, absl::string_view weights_id, kernels::DType kv_dtype) {
  Sha256 hash;
  hash.Update(KvIdJson(config, weights_id, kv_dtype));
  return hash.Hex();
}

}  // namespace vsprefill::model
