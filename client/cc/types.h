// Plain structs of the client library: what a caller says to a prefill server and what it hears.
// No protobuf and no gRPC here, so that programs with other headers (LibTorch) can include them.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "absl/types/span.h"
#include "kernels/tensor_view.h"
#include "server/kv/kv_layout.h"

namespace vsprefill::client {

/// What one KV cache on the wire holds: tokens [start_token, prompt_tokens) of every layer.
struct KvShape {
  kv::KvLayout layout;
  int64_t prompt_tokens = 0;
  int64_t start_token = 0;
  int64_t chunk_tokens = 0;  // no chunk holds more tokens

  int64_t sent_tokens() const { return prompt_tokens - start_token; }
  int64_t bytes() const { return sent_tokens() * layout.token_bytes(); }
};

/// The fields of a chunk that stand before its payload.
struct ChunkHeader {
  int64_t layer = 0;
  int64_t token_begin = 0;
  int64_t token_end = 0;  // exclusive
  uint64_t checksum = 0;  // XXH3-64 of the payload
};

struct LayerManifest {
  int64_t layer = 0;
  int64_t tokens = 0;
  int64_t chunks = 0;
  int64_t bytes = 0;
  uint64_t checksum = 0;  // over the chunks' (token_begin, token_end, checksum) in token order
};

struct KvManifest {
  std::vector<LayerManifest> layers;
  int64_t bytes = 0;
};

struct PrefillRequest {
  std::string request_id;  // not empty; RandomRequestId() makes one
  uint32_t attempt = 0;
  absl::Span<const int32_t> token_ids;  // must outlive the call
  std::string expected_kv_id;           // empty: whatever the server has
  std::optional<kernels::DType> kv_dtype;
  std::string method;  // empty: the preset's, else the server's default
  std::string preset;  // "safe", "balanced", "fast" (ModelInfo::presets); empty: none
  std::map<std::string, double> parameters;  // go before the preset's
  int stripes = 1;  // connections that carry the cache, layers dealt out in turn
  int64_t start_token = 0;
  bool want_logits = false;
  std::vector<std::string> push_targets;  // not empty: no KV comes to the caller
  absl::Duration timeout = absl::InfiniteDuration();
};

/// What the server made of the request.
struct Accepted {
  KvShape shape;
  int stripe = 0;
  int stripes = 1;
  int64_t stripe_bytes = 0;
  std::string method;
  std::map<std::string, double> parameters;
};

struct FirstToken {
  int32_t token_id = 0;
  std::vector<float> logits;  // empty unless asked for
};

/// Measured by the server; see PrefillStats in prefill.proto.
struct PrefillStats {
  double queue_seconds = 0;
  double compute_seconds = 0;
  double index_seconds = 0;
  double ttft_seconds = 0;
  double exposed_transfer_seconds = 0;
  double density = 0;
  double cost_ratio = 0;
  std::vector<double> layer_group_density;
  int64_t kv_bytes = 0;
  int dense_fallback_layers = 0;  // dense, at least in part, because their index was slower
};

struct TargetStatus {
  std::string target;
  int code = 0;  // a gRPC status code
  std::string message;
  int64_t bytes = 0;
};

struct PrefillResult {
  Accepted accepted;
  FirstToken first_token;
  PrefillStats stats;
  std::vector<TargetStatus> targets;
  int64_t received_bytes = 0;   // payload bytes that came to this caller, verified
  absl::Duration client_ttft;   // call started -> first token read
  absl::Duration client_total;  // call started -> cache verified
};

struct MethodParameter {
  std::string name;
  double default_value = 0, min = 0, max = 0;
  std::string help;
};

struct MethodInfo {
  std::string name;
  std::string help;
  std::vector<MethodParameter> parameters;
};

struct PresetInfo {
  std::string name, method;
  std::map<std::string, double> parameters;
  /// As measured on `measured_on`: share of pairs read, and the change of perplexity against dense
  /// as a ratio.
  double density = 0;
  double perplexity_change_mean = 0, perplexity_change_median = 0, perplexity_change_worst = 0;
  std::string measured_on;
};

struct ModelInfo {
  std::string model_name, architecture, weights_id, device, compute_dtype, default_method;
  std::string server_version;
  kv::KvLayout layout;
  int64_t vocab_size = 0;
  int64_t max_prompt_tokens = 0;
  int num_q_heads = 0;
  std::vector<MethodInfo> methods;
  std::vector<PresetInfo> presets;
};

struct ServerLoad {
  int64_t requests_running = 0, requests_waiting = 0, waiting_tokens = 0;
  int64_t max_waiting_requests = 0, max_waiting_tokens = 0;
  int64_t kv_pool_bytes = 0, kv_pool_used_bytes = 0;
  int64_t staging_bytes = 0, staging_used_bytes = 0;
  bool draining = false;
  double tokens_per_second = 0;
};

}  // namespace vsprefill::client
