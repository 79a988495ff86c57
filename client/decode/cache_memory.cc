#include "client/decode/cache_memory.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/decode/upload.h"
#include "server/base/status_macros.h"

namespace vsprefill::decode {

absl::StatusOr<std::shared_ptr<CacheMemory>> CacheMemory::Create(model::Transformer& transformer,
                                                                 kv::KvPool& pool,
                                                                 const client::KvShape& shape,
                                                                 int64_t extra_tokens) {
  const kv::KvLayout& own = transformer.kv_layout();
  const kv::KvLayout& theirs = shape.layout;
  if (theirs.kv_id != own.kv_id) {
    return absl::FailedPreconditionError(
        absl::StrCat("the cache has kv_id ", theirs.kv_id, ", this decoder's model ", own.kv_id));
  }
  // kv_id covers these; a sender that is wrong about itself must not reach past the memory.
  if (theirs.num_layers != own.num_layers || theirs.num_kv_heads != own.num_kv_heads ||
      theirs.head_dim != own.head_dim || theirs.dtype != own.dtype) {
    return absl::FailedPreconditionError(absl::StrFormat(
        "the cache has %d layers, %d heads of %d, %s; this decoder's model %d, %d of %d, %s",
        theirs.num_layers, theirs.num_kv_heads, theirs.head_dim, kernels::Name(theirs.dtype),
        own.num_layers, own.num_kv_heads, own.head_dim, kernels::Name(own.dtype)));
  }
  if (shape.start_token != 0) {
    return absl::FailedPreconditionError(absl::StrCat(
        "the cache begins at token ", shape.start_token, "; this decoder holds none before it"));
  }
  const int64_t capacity = shape.prompt_tokens + extra_tokens;
  const int64_t bytes = kv::KvCache::BytesFor(own, capacity, /*with_logits=*/false);
  std::shared_ptr<CacheMemory> memory(new CacheMemory);
  memory->prompt_tokens_ = shape.prompt_tokens;
  VSP_ASSIGN_OR_RETURN(kv::KvPool::Reservation reservation, pool.Reserve(bytes));
  VSP_ASSIGN_OR_RETURN(memory->cache_,
                       kv::KvCache::Create(transformer.allocator(), std::move(reservation), own,
                                           capacity, /*with_logits=*/false));
  memory->host_ = memory->cache_.get();
  if (transformer.device() != kernels::DeviceKind::kCpu) {
    VSP_ASSIGN_OR_RETURN(kv::KvPool::Reservation host_reservation, pool.Reserve(bytes));
    VSP_ASSIGN_OR_RETURN(memory->host_copy_,
                         kv::KvCache::Create(HostAllocator(), std::move(host_reservation), own,
                                             capacity, /*with_logits=*/false));
    memory->host_ = memory->host_copy_.get();
  }
  return memory;
}

client::KvDestination CacheMemory::destination() const {
  client::KvDestination d;
  d.rows = host_->capacity_tokens();
  for (int l = 0; l < host_->layout().num_layers; ++l) {
    d.layers.push_back({static_cast<uint8_t*>(host_->k(l)), static_cast<uint8_t*>(host_->v(l))});
  }
  return d;
}

absl::StatusOr<kv::KvCache*> CacheMemory::Commit(model::Transformer& transformer) {
  if (host_copy_ != nullptr) {
    VSP_RETURN_IF_ERROR(Upload(*host_copy_, prompt_tokens_, *cache_, transformer.stream()));
    VSP_RETURN_IF_ERROR(transformer.Synchronize());
    host_copy_.reset();
    host_ = nullptr;
  }
  cache_->set_num_tokens(prompt_tokens_);
  return cache_.get();
}

}  // namespace vsprefill::decode
