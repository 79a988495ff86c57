// One prefill request as the engine sees it, free of protobuf, and the rules it must satisfy.
#pragma once

#include <cstdint>
#include <map>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "kernels/tensor_view.h"

namespace vsprefill::engine {

inline constexpr size_t kMaxRequestIdBytes = 256;
inline constexpr size_t kMaxPushTargets = 16;

struct Request {
  std::string request_id;
  uint32_t attempt = 0;
  std::vector<int32_t> token_ids;
  std::string expected_kv_id;              // empty: any
  std::optional<kernels::DType> kv_dtype;  // nullopt: the server's
  std::string method;                      // empty: the preset's, else the server's default
  std::string preset;                      // attention/presets.h; empty: none
  std::map<std::string, double> method_parameters;
  int stripes = 1;
  int64_t start_token = 0;
  bool want_logits = false;
  std::vector<std::string> push_targets;
  absl::Time received = absl::InfinitePast();
  absl::Time deadline = absl::InfiniteFuture();
};

/// What a request is checked against.
struct RequestLimits {
  std::string kv_id;
  kernels::DType kv_dtype = kernels::DType::kBF16;
  int vocab_size = 0;
  int num_layers = 0;
  int64_t max_prompt_tokens = 0;
};

/// Status payload that names the `reason` label of requests_rejected_total.
inline constexpr absl::string_view kReasonPayload = "vsprefill/reason";
/// Status payload: milliseconds after which a retry may succeed, "-1" where it never will.
inline constexpr absl::string_view kPushbackPayload = "vsprefill/retry-pushback-ms";

absl::Status Rejection(absl::StatusCode code, absl::string_view reason, absl::string_view message);

/// INVALID_ARGUMENT or FAILED_PRECONDITION; the message holds the value and what is allowed.
absl::Status ValidateRequest(const Request& request, const RequestLimits& limits);

}  // namespace vsprefill::engine
