// VSIndexer inference over threads: a task is 64 tokens of one KV group.
#include <algorithm>

#include "kernels/cpu/isa_kernels.h"
#include "kernels/cpu/parallel.h"
#include "kernels/indexer.h"

namespace vsprefill::kernels {

KernelStatus IndexerCpu(const IndexerLayer& layer, const IndexerInput& input, Stream /*stream*/) {
  if (layer.head_dim <= 0 || layer.head_dim % 16 != 0 || layer.head_dim > cpu::kMaxHeadDim) {
    return KernelStatus::kUnsupportedShape;
  }
  const auto run = cpu::ActiveKernels().indexer;
  const int64_t tokens = input.token_end - input.token_begin;
  const int64_t blocks = (tokens + cpu::kIndexerTokens - 1) / cpu::kIndexerTokens;
  ParallelFor(blocks * layer.num_groups, [&](int64_t i, int /*worker*/) {
    cpu::IndexerTask task;
    task.layer = &layer;
    task.input = &input;
    task.group = static_cast<int>(i / blocks);
    task.token = input.token_begin + i % blocks * cpu::kIndexerTokens;
    task.count =
        static_cast<int>(std::min<int64_t>(cpu::kIndexerTokens, input.token_end - task.token));
    const int64_t at = task.group * input.logit_stride + task.token;
    task.vertical_logits = input.vertical_logits + at;
    task.slash_logits = input.slash_logits + at;
    run(task);
    const float* prior = layer.slash_prior + task.group * kSlashBuckets;
    for (int t = 0; t < task.count; ++t) {
      task.slash_logits[t] += prior[SlashBucket(task.token + t)];
    }
  });
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels
