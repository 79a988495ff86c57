#include "client/cc/convert.h"

#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_format.h"

namespace vsprefill::client {
namespace {

// Larger than any model; keeps products of sizes far from overflow.
constexpr int64_t kMaxLayers = 1024, kMaxHeads = 1024, kMaxHeadDim = 4096;
constexpr int64_t kMaxTokens = int64_t{1} << 26;

absl::Status CheckSize(absl::string_view name, uint64_t value, int64_t max) {
  if (value < 1 || value > static_cast<uint64_t>(max)) {
    return absl::DataLossError(
        absl::StrFormat("KV layout with %s %d; allowed is [1, %d]", name, value, max));
  }
  return absl::OkStatus();
}

absl::StatusOr<kv::KvLayout> LayoutFromProto(const v1::KvLayout& p) {
  for (const absl::Status& s : {CheckSize("num_layers", p.num_layers(), kMaxLayers),
                                CheckSize("num_kv_heads", p.num_kv_heads(), kMaxHeads),
                                CheckSize("head_dim", p.head_dim(), kMaxHeadDim)}) {
    if (!s.ok()) return s;
  }
  kv::KvLayout layout;
  layout.num_layers = static_cast<int>(p.num_layers());
  layout.num_kv_heads = static_cast<int>(p.num_kv_heads());
  layout.head_dim = static_cast<int>(p.head_dim());
  layout.kv_id = p.kv_id();
  switch (p.dtype()) {
    case v1::KV_DTYPE_FLOAT32:
      layout.dtype = kernels::DType::kF32;
      break;
    case v1::KV_DTYPE_BFLOAT16:
      layout.dtype = kernels::DType::kBF16;
      break;
    default:
      return absl::DataLossError(
          absl::StrFormat("KV layout with unknown dtype %d", static_cast<int>(p.dtype())));
  }
  return layout;
}

int64_t Clamp(uint64_t v) {
  constexpr auto most = static_cast<uint64_t>(std::numeric_limits<int64_t>::max());
  return static_cast<int64_t>(v < most ? v : most);
}

}  // namespace

v1::PrefillRequest ToProto(const PrefillRequest& r) {
  v1::PrefillRequest p;
  p.set_request_id(r.request_id);
  p.set_attempt(r.attempt);
  p.mutable_token_ids()->Add(r.token_ids.begin(), r.token_ids.end());
  p.set_expected_kv_id(r.expected_kv_id);
  if (r.kv_dtype.has_value()) {
    p.set_kv_dtype(*r.kv_dtype == kernels::DType::kF32 ? v1::KV_DTYPE_FLOAT32
                                                       : v1::KV_DTYPE_BFLOAT16);
  }
  p.mutable_method()->set_name(r.method);
  p.mutable_method()->set_preset(r.preset);
  for (const auto& [name, value] : r.parameters) {
    (*p.mutable_method()->mutable_parameters())[name] = value;
  }
  p.set_stripes(static_cast<uint32_t>(r.stripes));
  p.set_start_token(static_cast<uint64_t>(r.start_token));
  p.set_want_logits(r.want_logits);
  for (const std::string& target : r.push_targets) p.add_push_targets(target);
  return p;
}

absl::StatusOr<KvShape> ShapeFromProto(const v1::KvLayout& p) {
  absl::StatusOr<kv::KvLayout> layout = LayoutFromProto(p);
  if (!layout.ok()) return layout.status();
  if (absl::Status s = CheckSize("prompt_tokens", p.prompt_tokens(), kMaxTokens); !s.ok()) return s;
  if (p.start_token() >= p.prompt_tokens()) {
    return absl::DataLossError(absl::StrFormat("KV layout with start_token %d of %d tokens",
                                               p.start_token(), p.prompt_tokens()));
  }
  KvShape shape;
  shape.layout = *std::move(layout);
  shape.prompt_tokens = static_cast<int64_t>(p.prompt_tokens());
  shape.start_token = static_cast<int64_t>(p.start_token());
  shape.chunk_tokens = p.chunk_tokens();
  return shape;
}

absl::StatusOr<Accepted> FromProto(const v1::Accepted& p) {
  absl::StatusOr<KvShape> shape = ShapeFromProto(p.layout());
  if (!shape.ok()) return shape.status();
  Accepted a;
  a.shape = *std::move(shape);
  a.stripe = static_cast<int>(p.stripe());
  a.stripes = static_cast<int>(p.stripes());
  a.stripe_bytes = Clamp(p.stripe_bytes());
  a.method = p.method();
  a.parameters.insert(p.method_parameters().begin(), p.method_parameters().end());
  return a;
}

KvManifest FromProto(const v1::KvManifest& p) {
  KvManifest m;
  m.bytes = Clamp(p.bytes());
  for (const v1::LayerManifest& l : p.layers()) {
    m.layers.push_back({l.layer(), Clamp(l.tokens()), l.chunks(), Clamp(l.bytes()), l.checksum()});
  }
  return m;
}

PrefillStats FromProto(const v1::PrefillStats& p) {
  PrefillStats s;
  s.queue_seconds = p.queue_seconds();
  s.compute_seconds = p.compute_seconds();
  s.index_seconds = p.index_seconds();
  s.ttft_seconds = p.ttft_seconds();
  s.exposed_transfer_seconds = p.exposed_transfer_seconds();
  s.density = p.density();
  s.cost_ratio = p.cost_ratio();
  s.layer_group_density.assign(p.layer_group_density().begin(), p.layer_group_density().end());
  s.kv_bytes = Clamp(p.kv_bytes());
  s.dense_fallback_layers = static_cast<int>(p.dense_fallback_layers());
  return s;
}

TargetStatus FromProto(const v1::TargetStatus& p) {
  return {p.target(), p.code(), p.message(), Clamp(p.bytes())};
}

absl::StatusOr<ModelInfo> FromProto(const v1::ModelInfo& p) {
  absl::StatusOr<kv::KvLayout> layout = LayoutFromProto(p.layout());
  if (!layout.ok()) return layout.status();
  ModelInfo info;
  info.model_name = p.model_name();
  info.architecture = p.architecture();
  info.weights_id = p.weights_id();
  info.device = p.device();
  info.compute_dtype = p.compute_dtype();
  info.default_method = p.default_method();
  info.server_version = p.server_version();
  info.layout = *std::move(layout);
  info.vocab_size = p.vocab_size();
  info.max_prompt_tokens = Clamp(p.max_prompt_tokens());
  info.num_q_heads = static_cast<int>(p.num_q_heads());
  for (const v1::MethodInfo& m : p.methods()) {
    MethodInfo& method = info.methods.emplace_back();
    method.name = m.name();
    method.help = m.help();
    for (const v1::MethodParameter& x : m.parameters()) {
      method.parameters.push_back({x.name(), x.default_value(), x.min(), x.max(), x.help()});
    }
  }
  for (const v1::PresetInfo& x : p.presets()) {
    PresetInfo& preset = info.presets.emplace_back();
    preset.name = x.name();
    preset.method = x.method();
    preset.parameters.insert(x.parameters().begin(), x.parameters().end());
    preset.density = x.density();
    preset.perplexity_change_mean = x.perplexity_change_mean();
    preset.perplexity_change_median = x.perplexity_change_median();
    preset.perplexity_change_worst = x.perplexity_change_worst();
    preset.measured_on = x.measured_on();
  }
  return info;
}

ServerLoad FromProto(const v1::Load& p) {
  ServerLoad l;
  l.requests_running = p.requests_running();
  l.requests_waiting = p.requests_waiting();
  l.waiting_tokens = Clamp(p.waiting_tokens());
  l.max_waiting_requests = p.max_waiting_requests();
  l.max_waiting_tokens = Clamp(p.max_waiting_tokens());
  l.kv_pool_bytes = Clamp(p.kv_pool_bytes());
  l.kv_pool_used_bytes = Clamp(p.kv_pool_used_bytes());
  l.staging_bytes = Clamp(p.staging_bytes());
  l.staging_used_bytes = Clamp(p.staging_used_bytes());
  l.draining = p.draining();
  l.tokens_per_second = p.tokens_per_second();
  return l;
}

absl::Status FromGrpc(const grpc::Status& s) {
  return absl::Status(static_cast<absl::StatusCode>(s.error_code()), s.error_message());
}

grpc::Status ToGrpc(const absl::Status& s) {
  return grpc::Status(static_cast<grpc::StatusCode>(s.code()), std::string(s.message()));
}

}  // namespace vsprefill::client
