// A KV cache of the decoder's own transformer as the client library fills it. On the CPU the chunks
// are assembled straight into the cache; for a GPU they are assembled in host memory of the same
// shape and copied over once they are verified.
#pragma once

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/cc/kv_assembler.h"
#include "client/cc/types.h"
#include "server/kv/kv_cache.h"
#include "server/kv/kv_pool.h"
#include "server/model/transformer.h"

namespace vsprefill::decode {

class CacheMemory {
 public:
  /// Memory for the tokens of `shape` and `extra_tokens` more. Thread-safe.
  /// FAILED_PRECONDITION: shape is not one of the transformer's caches, or lacks its first tokens;
  /// RESOURCE_EXHAUSTED: the pool or the memory is used up.
  static absl::StatusOr<std::shared_ptr<CacheMemory>> Create(model::Transformer& transformer,
                                                             kv::KvPool& pool,
                                                             const client::KvShape& shape,
                                                             int64_t extra_tokens);

  /// Where the chunks go.
  client::KvDestination destination() const;

  /// The cache, ready to decode from. Call it once, from the thread that runs the transformer, and
  /// only after the chunks were verified.
  absl::StatusOr<kv::KvCache*> Commit(model::Transformer& transformer);

 private:
  CacheMemory() = default;

  int64_t prompt_tokens_ = 0;
  std::shared_ptr<kv::KvCache> cache_;
  kv::KvCache* host_ = nullptr;             // what the chunks are assembled in
  std::shared_ptr<kv::KvCache> host_copy_;  // GPU only, until Commit
};

}  // namespace vsprefill::decode
