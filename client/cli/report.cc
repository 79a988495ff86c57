#include "client/cli/report.h"

#include <nlohmann/json.hpp>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "client/cli/exit_code.h"

namespace vsprefill::cli {
namespace {

using Json = nlohmann::ordered_json;

/// One line; text of a peer that is not UTF-8 does not throw.
std::string Dump(const Json& json) {
  return json.dump(-1, ' ', false, Json::error_handler_t::replace) + "\n";
}

std::string Line(absl::string_view name, absl::string_view value) {
  return absl::StrFormat("%-22s%s\n", name, value);
}

std::string Seconds(double s) { return absl::StrFormat("%.3f s", s); }

std::string ParametersText(const std::map<std::string, double>& parameters) {
  return absl::StrJoin(parameters, " ",
                       [](std::string* out, const std::pair<const std::string, double>& p) {
                         absl::StrAppend(out, p.first, "=", p.second);
                       });
}

Json LayoutJson(const kv::KvLayout& layout) {
  return {{"num_layers", layout.num_layers}, {"num_kv_heads", layout.num_kv_heads},
          {"head_dim", layout.head_dim},     {"dtype", kernels::Name(layout.dtype)},
          {"kv_id", layout.kv_id},           {"bytes_per_token", layout.token_bytes()}};
}

}  // namespace

std::string BytesText(int64_t bytes) {
  if (bytes < 1024) return absl::StrCat(bytes, " B");
  const char* const units[] = {"KiB", "MiB", "GiB", "TiB"};
  double value = static_cast<double>(bytes) / 1024;
  int unit = 0;
  while (value >= 1024 && unit < 3) {
    value /= 1024;
    ++unit;
  }
  return absl::StrFormat("%.1f %s", value, units[unit]);
}

std::string TargetText(const client::TargetStatus& t) {
  const absl::Status status(static_cast<absl::StatusCode>(t.code), t.message);
  return absl::StrCat(t.target, "  ",
                      status.ok() ? absl::StrCat("OK, ", BytesText(t.bytes)) : StatusLine(status));
}

std::string PrefillJson(const client::PrefillRequest& request, const client::PrefillResult& r) {
  const client::PrefillStats& s = r.stats;
  Json json = {{"request_id", request.request_id},
               {"attempt", request.attempt},
               {"first_token", r.first_token.token_id},
               {"prompt_tokens", r.accepted.shape.prompt_tokens},
               {"start_token", r.accepted.shape.start_token},
               {"method", r.accepted.method},
               {"parameters", r.accepted.parameters},
               {"density", s.density},
               {"cost_ratio", s.cost_ratio},
               {"layer_group_density", s.layer_group_density},
               {"dense_fallback_layers", s.dense_fallback_layers},
               {"queue_seconds", s.queue_seconds},
               {"compute_seconds", s.compute_seconds},
               {"index_seconds", s.index_seconds},
               {"ttft_seconds", s.ttft_seconds},
               {"exposed_transfer_seconds", s.exposed_transfer_seconds},
               {"bytes", s.kv_bytes},
               {"received_bytes", r.received_bytes},
               {"client_ttft_seconds", absl::ToDoubleSeconds(r.client_ttft)},
               {"client_total_seconds", absl::ToDoubleSeconds(r.client_total)},
               {"stripes", request.stripes},
               {"layout", LayoutJson(r.accepted.shape.layout)}};
  if (!r.targets.empty()) {
    Json& targets = json["targets"] = Json::array();
    for (const client::TargetStatus& t : r.targets) {
      targets.push_back(
          {{"target", t.target}, {"code", t.code}, {"message", t.message}, {"bytes", t.bytes}});
    }
  }
  return Dump(json);
}

std::string PrefillText(const client::PrefillRequest& request, const client::PrefillResult& r) {
  const client::PrefillStats& s = r.stats;
  const client::KvShape& shape = r.accepted.shape;
  std::string method = r.accepted.method;
  if (!r.accepted.parameters.empty()) {
    absl::StrAppend(&method, " (", ParametersText(r.accepted.parameters), ")");
  }
  std::string out;
  absl::StrAppend(
      &out, Line("request", absl::StrCat(request.request_id, ", attempt ", request.attempt)),
      Line("prompt", absl::StrCat(shape.prompt_tokens, " tokens")), Line("method", method),
      Line("first token", absl::StrCat(r.first_token.token_id)),
      Line("time to first token",
           absl::StrCat(Seconds(s.ttft_seconds), " at the server, ",
                        Seconds(absl::ToDoubleSeconds(r.client_ttft)), " here")),
      Line("queue", Seconds(s.queue_seconds)),
      Line("compute", absl::StrCat(Seconds(s.compute_seconds), ", of it ", Seconds(s.index_seconds),
                                   " index")),
      Line("exposed transfer", Seconds(s.exposed_transfer_seconds)),
      Line("density", absl::StrFormat("%.4f (cost ratio %.4f)", s.density, s.cost_ratio)));
  if (!s.layer_group_density.empty()) {
    absl::StrAppend(&out,
                    Line("by layer quarter",
                         absl::StrJoin(s.layer_group_density, "  ", [](std::string* o, double d) {
                           absl::StrAppendFormat(o, "%.4f", d);
                         })));
  }
  if (s.dense_fallback_layers > 0) {
    absl::StrAppend(
        &out, Line("dense fallback", absl::StrCat(s.dense_fallback_layers,
                                                  " layers, where sparse would have been slower")));
  }
  std::string kv = absl::StrCat(BytesText(s.kv_bytes), " sent");
  if (r.targets.empty()) {
    absl::StrAppendFormat(&kv, ", %s received and verified in %s", BytesText(r.received_bytes),
                          Seconds(absl::ToDoubleSeconds(r.client_total)));
    if (request.stripes > 1) absl::StrAppend(&kv, " over ", request.stripes, " connections");
  }
  absl::StrAppend(&out, Line("KV cache", kv));
  for (const client::TargetStatus& t : r.targets) {
    absl::StrAppend(&out, Line("target", TargetText(t)));
  }
  return out;
}

std::string InfoJson(const client::ModelInfo& info) {
  Json methods = Json::array();
  for (const client::MethodInfo& m : info.methods) {
    Json parameters = Json::array();
    for (const client::MethodParameter& p : m.parameters) {
      parameters.push_back({{"name", p.name},
                            {"default", p.default_value},
                            {"min", p.min},
                            {"max", p.max},
                            {"help", p.help}});
    }
    methods.push_back({{"name", m.name}, {"help", m.help}, {"parameters", parameters}});
  }
  Json presets = Json::array();
  for (const client::PresetInfo& p : info.presets) {
    presets.push_back({{"name", p.name},
                       {"method", p.method},
                       {"parameters", p.parameters},
                       {"density", p.density},
                       {"perplexity_change_mean", p.perplexity_change_mean},
                       {"perplexity_change_median", p.perplexity_change_median},
                       {"perplexity_change_worst", p.perplexity_change_worst},
                       {"measured_on", p.measured_on}});
  }
  return Dump({{"model_name", info.model_name},
               {"architecture", info.architecture},
               {"weights_id", info.weights_id},
               {"layout", LayoutJson(info.layout)},
               {"num_q_heads", info.num_q_heads},
               {"vocab_size", info.vocab_size},
               {"max_prompt_tokens", info.max_prompt_tokens},
               {"device", info.device},
               {"compute_dtype", info.compute_dtype},
               {"default_method", info.default_method},
               {"methods", methods},
               {"presets", presets},
               {"server_version", info.server_version}});
}

std::string InfoText(const client::ModelInfo& info) {
  const kv::KvLayout& l = info.layout;
  std::string out;
  absl::StrAppend(
      &out, Line("model", absl::StrCat(info.model_name, " (", info.architecture, ")")),
      Line("weights_id", info.weights_id), Line("kv_id", l.kv_id),
      Line("KV layout", absl::StrFormat("%d layers, %d heads of %d, %s, %s per token", l.num_layers,
                                        l.num_kv_heads, l.head_dim, kernels::Name(l.dtype),
                                        BytesText(l.token_bytes()))),
      Line("query heads", absl::StrCat(info.num_q_heads)),
      Line("vocabulary", absl::StrCat(info.vocab_size)),
      Line("longest prompt", absl::StrCat(info.max_prompt_tokens, " tokens")),
      Line("device", absl::StrCat(info.device, ", ", info.compute_dtype)),
      Line("server", info.server_version));
  for (const client::MethodInfo& m : info.methods) {
    const bool is_default = m.name == info.default_method;
    absl::StrAppend(
        &out, Line("method", absl::StrCat(m.name, is_default ? " (default): " : ": ", m.help)));
    for (const client::MethodParameter& p : m.parameters) {
      absl::StrAppend(&out, Line("", absl::StrCat(p.name, " = ", p.default_value, ", in [", p.min,
                                                  ", ", p.max, "]: ", p.help)));
    }
  }
  for (const client::PresetInfo& p : info.presets) {
    absl::StrAppend(
        &out, Line("preset",
                   absl::StrFormat("%s: %s (%s), density %.3f, perplexity %+.1f %% (median text "
                                   "%+.1f %%, worst text %+.0f %%)",
                                   p.name, p.method, ParametersText(p.parameters), p.density,
                                   100 * p.perplexity_change_mean, 100 * p.perplexity_change_median,
                                   100 * p.perplexity_change_worst)));
  }
  if (!info.presets.empty()) {
    absl::StrAppend(&out, Line("", absl::StrCat("measured on ", info.presets[0].measured_on)));
  }
  return out;
}

std::string LoadJson(const client::ServerLoad& l) {
  return Dump({{"requests_running", l.requests_running},
               {"requests_waiting", l.requests_waiting},
               {"waiting_tokens", l.waiting_tokens},
               {"max_waiting_requests", l.max_waiting_requests},
               {"max_waiting_tokens", l.max_waiting_tokens},
               {"kv_pool_bytes", l.kv_pool_bytes},
               {"kv_pool_used_bytes", l.kv_pool_used_bytes},
               {"staging_bytes", l.staging_bytes},
               {"staging_used_bytes", l.staging_used_bytes},
               {"draining", l.draining},
               {"tokens_per_second", l.tokens_per_second}});
}

std::string LoadText(const client::ServerLoad& l) {
  const auto of = [](int64_t used, int64_t all) {
    return absl::StrCat(BytesText(used), " of ", BytesText(all));
  };
  return absl::StrCat(Line("running", absl::StrCat(l.requests_running)),
                      Line("waiting", absl::StrFormat("%d of %d requests, %d of %d tokens",
                                                      l.requests_waiting, l.max_waiting_requests,
                                                      l.waiting_tokens, l.max_waiting_tokens)),
                      Line("KV pool", of(l.kv_pool_used_bytes, l.kv_pool_bytes)),
                      Line("staging", of(l.staging_used_bytes, l.staging_bytes)),
                      Line("speed", absl::StrFormat("%.0f tokens/s", l.tokens_per_second)),
                      Line("draining", l.draining ? "yes" : "no"));
}

}  // namespace vsprefill::cli
