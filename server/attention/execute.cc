#include "server/attention/execute.h"

#include <algorithm>
#include <vector>

#include "absl/strings/str_format.h"
#include "server/attention/recall_probe.h"
#include "server/base/kernel_status.h"
#include "server/base/status_macros.h"

namespace vsprefill::attention {
namespace {

std::string Describe(const char* operation, const kernels::AttentionShape& shape) {
  return absl::StrFormat("%s (%d query heads, %d KV heads, head_dim %d, %s)", operation,
                         shape.num_q_heads, shape.num_kv_heads, shape.head_dim,
                         kernels::Name(shape.dtype));
}

/// The library takes one sequence at a time; many of one row each are one launch of our kernel.
bool IsDecodingBatch(const std::vector<kernels::AttentionSequence>& sequences) {
  return sequences.size() > 1 &&
         std::all_of(sequences.begin(), sequences.end(),
                     [](const auto& sequence) { return sequence.q_tokens == 1; });
}

}  // namespace

absl::Status Execute(const MethodContext& context, const AttentionCall& call) {
  std::vector<kernels::AttentionSequence> sequences;
  sequences.reserve(call.sequences.size());
  for (const SequenceCall& sequence : call.sequences) sequences.push_back(sequence.attention);
  const bool dense = std::all_of(sequences.begin(), sequences.end(),
                                 [](const auto& sequence) { return sequence.dense(); });
  const bool library = dense && context.library_attention;
  kernels::KernelStatus status = kernels::KernelStatus::kUnsupportedShape;
  if (!library || IsDecodingBatch(sequences)) {
    status = context.kernels->attention(call.shape, sequences.data(),
                                        static_cast<int>(sequences.size()), call.stream);
  }
  if (library && status == kernels::KernelStatus::kUnsupportedShape) {
    VSP_RETURN_IF_ERROR(context.library_attention(call.shape, sequences, call.stream));
  } else {
    VSP_RETURN_IF_ERROR(FromKernelStatus(status, Describe("attention", call.shape)));
  }
  if (call.probe != nullptr) call.probe->Observe(call.shape, sequences[0]);
  for (const SequenceCall& sequence : call.sequences) {
    if (sequence.counts == nullptr) continue;
    VSP_RETURN_IF_ERROR(FromKernelStatus(
        context.kernels->count_pairs(call.shape, sequence.attention, sequence.counts, call.stream),
        Describe("count_pairs", call.shape)));
  }
  return absl::OkStatus();
}

}  // namespace vsprefill::attention
