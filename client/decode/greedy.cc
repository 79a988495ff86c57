#include "client/decode/greedy.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "server/attention/attention_method.h"
#include "server/base/status_macros.h"

namespace vsprefill::decode {

absl::StatusOr<int32_t> ArgMax(absl::Span<const float> logits) {
  if (logits.empty()) return absl::InternalError("the model gave no logits");
  size_t best = 0;
  for (size_t i = 0; i < logits.size(); ++i) {
    if (std::isnan(logits[i])) {
      return absl::InternalError(absl::StrCat("the logit of token ", i, " is NaN"));
    }
    if (logits[i] > logits[best]) best = i;
  }
  return static_cast<int32_t>(best);
}

absl::StatusOr<GreedyResult> DecodeGreedily(model::Transformer& transformer, kv::KvCache& cache,
                                            int32_t first_token, int64_t max_new_tokens) {
  const model::ModelConfig& config = transformer.config();
  if (first_token < 0 || first_token >= config.vocab_size) {
    return absl::InvalidArgumentError(
        absl::StrCat("first token ", first_token, " not in [0, ", config.vocab_size, ")"));
  }
  VSP_ASSIGN_OR_RETURN(std::unique_ptr<attention::AttentionMethod> dense,
                       attention::CreateMethod(transformer.method_context(), "dense", {}));
  model::ForwardOptions options;
  options.method = dense.get();
  options.logits = model::LogitsMode::kLast;

  GreedyResult result;
  int32_t token = first_token;
  while (true) {
    result.tokens.push_back(token);
    const auto& eos = config.eos_token_ids;
    if (std::find(eos.begin(), eos.end(), token) != eos.end()) {
      result.stop = "eos";
      return result;
    }
    if (static_cast<int64_t>(result.tokens.size()) >= max_new_tokens) {
      result.stop = "length";
      return result;
    }
    const int64_t position = cache.num_tokens();
    if (position >= config.max_position_embeddings) {
      result.stop = "context";
      return result;
    }
    const absl::Time start = absl::Now();
    model::SequenceChunk chunk;
    chunk.ids = absl::MakeConstSpan(&token, 1);
    chunk.position_begin = position;
    chunk.prompt_tokens = position + 1;
    chunk.cache = &cache;
    VSP_ASSIGN_OR_RETURN(model::ForwardResult forward,
                         transformer.Forward(absl::MakeConstSpan(&chunk, 1), options));
    if (forward.logits.size() != 1) return absl::InternalError("the model gave no logits");
    VSP_ASSIGN_OR_RETURN(token, ArgMax(forward.logits[0]));
    result.intervals.push_back(absl::Now() - start);
  }
}

}  // namespace vsprefill::decode
