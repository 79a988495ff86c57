// What every method does once its index is set: run the kernel and count pairs.
#pragma once

#include "absl/status/status.h"
#include "server/attention/attention_method.h"

namespace vsprefill::attention {

/// Runs attention of `call` with the index that each sequence holds (none: dense) and adds the pair
/// counts. The device library's attention is used where there is one and all sequences are dense.
absl::Status Execute(const MethodContext& context, const AttentionCall& call);

}  // namespace vsprefill::attention
