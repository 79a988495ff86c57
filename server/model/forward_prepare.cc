// What a forward pass checks and makes ready before its first layer.
#include <algorithm>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"
#include "server/model/forward_pass.h"
#include "server/model/torch_guard.h"

namespace vsprefill::model {
namespace {

// Rows that pass through the second half of a layer at a time: on the CPU the widest activations
// stay in the processor's cache.
constexpr int64_t kCpuBlockRows = 1024;
constexpr int64_t kCudaBlockRows = 8192;

}  // namespace

absl::Status ForwardPass::Validate(absl::Span<const SequenceChunk> batch,
                                   const ForwardOptions& options) const {
  if (batch.empty()) return absl::InvalidArgumentError("forward call without a sequence");
  if (options.method == nullptr) {
    return absl::InvalidArgumentError("forward call without an attention method");
  }
  const bool needs_logits = options.method->needs_indexer_logits();
  if (needs_logits && model_.indexer == nullptr) {
    return absl::FailedPreconditionError(
        absl::StrCat("method ", options.method->name(), " needs an indexer, none is loaded"));
  }
  for (const SequenceChunk& chunk : batch) {
    const int64_t tokens = chunk.ids.size();
    const int64_t end = chunk.position_begin + tokens;
    if (tokens == 0 || chunk.cache == nullptr) {
      return absl::InvalidArgumentError("a chunk needs at least one token and a cache");
    }
    if (chunk.position_begin != chunk.cache->num_tokens()) {
      return absl::InvalidArgumentError(absl::StrCat("chunk begins at position ",
                                                     chunk.position_begin, ", the cache holds ",
                                                     chunk.cache->num_tokens(), " tokens"));
    }
    const int64_t limit =
        std::min(chunk.cache->capacity_tokens(), model_.config->max_position_embeddings);
    if (end > limit || chunk.prompt_tokens < end) {
      return absl::InvalidArgumentError(
          absl::StrCat("chunk ends at position ", end, ", allowed: at most ",
                       std::min(limit, chunk.prompt_tokens), " (cache and model hold ", limit,
                       ", the prompt ", chunk.prompt_tokens, ")"));
    }
    const kv::KvLayout& layout = chunk.cache->layout();
    const kv::KvLayout& own = *model_.kv_layout;
    if (layout.num_layers != own.num_layers || layout.num_kv_heads != own.num_kv_heads ||
        layout.head_dim != own.head_dim || layout.dtype != own.dtype) {
      return absl::FailedPreconditionError("the cache was made for another model");
    }
    if (needs_logits && chunk.cache->vertical_logits(0) == nullptr) {
      return absl::FailedPreconditionError(absl::StrCat(
          "method ", options.method->name(), " needs a cache with room for indexer logits"));
    }
    for (const int32_t id : chunk.ids) {
      if (id < 0 || id >= model_.config->vocab_size) {
        return absl::InvalidArgumentError(
            absl::StrCat("token id ", id, " is not in 0 to ", model_.config->vocab_size - 1));
      }
    }
  }
  return absl::OkStatus();
}

absl::Status ForwardPass::PrepareBuffers(absl::Span<const SequenceChunk> batch) {
  total_rows_ = 0;
  for (const SequenceChunk& chunk : batch) total_rows_ += chunk.ids.size();
  if (total_rows_ <= capacity_rows_) return absl::OkStatus();
  // The old buffers may be in use by enqueued work.
  VSP_RETURN_IF_ERROR(model_.backend->Synchronize());
  const ModelConfig& config = *model_.config;
  const int64_t block_rows =
      std::min(total_rows_, model_.backend->device() == kernels::DeviceKind::kCpu ? kCpuBlockRows
                                                                                  : kCudaBlockRows);
  capacity_rows_ = 0;
  const auto make = [&](Buffer& buffer, int64_t rows, int64_t width) -> absl::Status {
    buffer.Reset();  // before the new one is made: both need not fit
    VSP_ASSIGN_OR_RETURN(buffer, Buffer::Create(model_.backend->allocator(),
                                                rows * width * kernels::SizeOf(dtype_)));
    return absl::OkStatus();
  };
  VSP_RETURN_IF_ERROR(make(residual_, total_rows_, config.hidden_size));
  VSP_RETURN_IF_ERROR(make(normed_, total_rows_, config.hidden_size));
  VSP_RETURN_IF_ERROR(make(attended_, total_rows_, q_width()));
  VSP_RETURN_IF_ERROR(make(gated_, block_rows, config.intermediate_size));
  capacity_rows_ = total_rows_;
  return absl::OkStatus();
}

absl::Status ForwardPass::PrepareRope(int64_t positions) {
  if (positions <= rope_.size()) return absl::OkStatus();
  VSP_RETURN_IF_ERROR(TorchGuard("RoPE tables", [&] {
    rope_.Grow(
        std::min(std::max(positions, 2 * rope_.size()), model_.config->max_position_embeddings));
    return absl::OkStatus();
  }));
  cos_ = rope_.cos();
  sin_ = rope_.sin();
  if (model_.backend->device() == kernels::DeviceKind::kCpu) return absl::OkStatus();
  VSP_RETURN_IF_ERROR(model_.backend->Synchronize());
  const int64_t bytes = rope_.size() * model_.config->head_dim / 2 * sizeof(float);
  for (auto [buffer, table] : {std::make_pair(&device_cos_, &cos_), {&device_sin_, &sin_}}) {
    VSP_ASSIGN_OR_RETURN(*buffer, Buffer::Create(model_.backend->allocator(), bytes));
    VSP_RETURN_IF_ERROR(model_.backend->Upload(*table, bytes, buffer->data()));
    *table = static_cast<const float*>(buffer->data());
  }
  return absl::OkStatus();
}

}  // namespace vsprefill::model
