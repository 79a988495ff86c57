// Greedy decoding, one token at a time, with dense attention over a cache that holds a prompt.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "server/kv/kv_cache.h"
#include "server/model/transformer.h"

namespace vsprefill::decode {

struct GreedyResult {
  std::vector<int32_t> tokens;            // the first token and what followed, EOS included
  std::string stop;                       // "eos", "length", or "context": no position is left
  std::vector<absl::Duration> intervals;  // time that each token but the first took
};

/// Index of the largest logit, the lowest index among equals. INTERNAL where one is NaN or there
/// are none.
absl::StatusOr<int32_t> ArgMax(absl::Span<const float> logits);

/// `cache` holds the prompt (num_tokens of it) and has room for max_new_tokens - 1 more.
/// `first_token` is the prompt's next token. Stops after EOS or max_new_tokens (>= 1).
absl::StatusOr<GreedyResult> DecodeGreedily(model::Transformer& transformer, kv::KvCache& cache,
                                            int32_t first_token, int64_t max_new_tokens);

}  // namespace vsprefill::decode
