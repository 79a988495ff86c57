#include "server/engine/request.h"

#include <set>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"

namespace vsprefill::engine {
namespace {

absl::Status Invalid(absl::string_view message) {
  return Rejection(absl::StatusCode::kInvalidArgument, "invalid", message);
}

}  // namespace

absl::Status Rejection(absl::StatusCode code, absl::string_view reason, absl::string_view message) {
  absl::Status status(code, message);
  status.SetPayload(kReasonPayload, absl::Cord(reason));
  return status;
}

absl::Status ValidateRequest(const Request& request, const RequestLimits& limits) {
  if (request.request_id.empty() || request.request_id.size() > kMaxRequestIdBytes) {
    return Invalid(absl::StrCat("request_id has ", request.request_id.size(),
                                " bytes; allowed are 1 to ", kMaxRequestIdBytes));
  }
  const int64_t num_tokens = request.token_ids.size();
  if (num_tokens == 0) {
    return Invalid(
        absl::StrCat("the prompt has 0 tokens; allowed are 1 to ", limits.max_prompt_tokens));
  }
  if (num_tokens > limits.max_prompt_tokens) {
    return Invalid(absl::StrCat("the prompt has ", num_tokens, " tokens; allowed are 1 to ",
                                limits.max_prompt_tokens));
  }
  for (int64_t i = 0; i < num_tokens; ++i) {
    const int32_t id = request.token_ids[i];
    if (id < 0 || id >= limits.vocab_size) {
      return Invalid(absl::StrCat("token_ids[", i, "] = ", id, " is out of range [0, ",
                                  limits.vocab_size, ")"));
    }
  }
  if (request.start_token < 0 || request.start_token >= num_tokens) {
    return Invalid(absl::StrCat("start_token ", request.start_token, " is out of range [0, ",
                                num_tokens, ") of this prompt"));
  }
  if (request.stripes < 1 || request.stripes > limits.num_layers) {
    return Invalid(absl::StrCat("stripes ", request.stripes, " is out of range [1, ",
                                limits.num_layers, "] (the model's layers)"));
  }
  if (request.push_targets.size() > kMaxPushTargets) {
    return Invalid(absl::StrCat(request.push_targets.size(), " push_targets; allowed are 0 to ",
                                kMaxPushTargets));
  }
  if (!request.push_targets.empty() && request.stripes > 1) {
    return Invalid(absl::StrCat("stripes ", request.stripes,
                                " with push_targets; with push targets allowed is 1"));
  }
  std::set<std::string> seen;
  for (const std::string& target : request.push_targets) {
    if (!seen.insert(target).second) {
      return Invalid(absl::StrCat("push target \"", target, "\" is named twice"));
    }
  }
  if (!request.expected_kv_id.empty() && request.expected_kv_id != limits.kv_id) {
    return Rejection(absl::StatusCode::kFailedPrecondition, "kv_id",
                     absl::StrCat("expected kv_id ", request.expected_kv_id,
                                  ", this server has kv_id ", limits.kv_id));
  }
  if (request.kv_dtype.has_value() && *request.kv_dtype != limits.kv_dtype) {
    return Rejection(
        absl::StatusCode::kFailedPrecondition, "dtype",
        absl::StrCat("KV dtype ", kernels::Name(*request.kv_dtype),
                     " cannot be served; this server computes ", kernels::Name(limits.kv_dtype)));
  }
  return absl::OkStatus();
}

}  // namespace vsprefill::engine
