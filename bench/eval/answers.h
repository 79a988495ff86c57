// Prompts answered after a sparse prefill: the caches that several selections make are decoded
// densely, side by side.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/statusor.h"
#include "bench/eval/lab.h"

namespace vsprefill::eval {

struct Answer {
  std::vector<int32_t> tokens;  // greedy, the stop id left out
  double seconds = 0;           // of the prefill, up to the first token's logits
  Shares shares;
};

/// One answer per selection; a null plan means dense.
absl::StatusOr<std::vector<Answer>> AnswerPrompt(Lab& lab, const Item& item,
                                                 const std::vector<Selection>& selections,
                                                 int decode_batch);

}  // namespace vsprefill::eval
