// One request's KV cache and its VSIndexer logits, in the memory of the compute device, contiguous
// per layer and head. The engine thread writes it while it computes; ranges that are complete are
// read by senders at the same time. The memory goes when the last reference does.
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "kernels/tensor_view.h"
#include "server/base/allocator.h"
#include "server/kv/kv_layout.h"
#include "server/kv/kv_pool.h"

namespace vsprefill::kv {

class KvCache {
 public:
  /// Bytes that a cache of this shape takes from the pool (KV and, where wanted, logits).
  static int64_t BytesFor(const KvLayout& layout, int64_t capacity_tokens, bool with_logits);

  /// Takes ownership of `reservation` (>= BytesFor) and gives it back with the memory.
  static absl::StatusOr<std::shared_ptr<KvCache>> Create(Allocator& allocator,
                                                         KvPool::Reservation reservation,
                                                         const KvLayout& layout,
                                                         int64_t capacity_tokens, bool with_logits);

  const KvLayout& layout() const { return layout_; }
  int64_t capacity_tokens() const { return capacity_tokens_; }
  /// Elements between heads of one layer's K (and V): capacity_tokens * head_dim.
  int64_t head_stride() const { return capacity_tokens_ * layout_.head_dim; }

  /// K and V of a layer: [num_kv_heads, capacity_tokens, head_dim].
  void* k(int layer) const;
  void* v(int layer) const;
  /// VSIndexer logits of a layer: float32 [num_kv_heads, capacity_tokens]; null without logits.
  float* vertical_logits(int layer) const;
  float* slash_logits(int layer) const;

  /// Tokens whose KV is complete in every layer. Engine thread only.
  int64_t num_tokens() const { return num_tokens_; }
  void set_num_tokens(int64_t n) { num_tokens_ = n; }

 private:
  KvCache() = default;

  KvLayout layout_;
  int64_t capacity_tokens_ = 0;
  bool with_logits_ = false;
  int64_t num_tokens_ = 0;
  KvPool::Reservation reservation_;  // released after buffer_ (declared before it)
  Buffer buffer_;
};

}  // namespace vsprefill::kv
