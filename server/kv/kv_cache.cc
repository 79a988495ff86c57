#include "server/kv/kv_cache.h"

#include "absl/strings/str_cat.h"
#include "server/base/status_macros.h"

namespace vsprefill::kv {
namespace {

// Each tensor starts on a boundary that vector and tensor-core loads like.
constexpr int64_t kAlignment = 256;

int64_t AlignUp(int64_t bytes) { return (bytes + kAlignment - 1) / kAlignment * kAlignment; }

int64_t TensorBytes(const KvLayout& layout, int64_t capacity_tokens) {
  return AlignUp(layout.num_kv_heads * capacity_tokens * layout.head_dim *
                 kernels::SizeOf(layout.dtype));
}

int64_t LogitBytes(const KvLayout& layout, int64_t capacity_tokens) {
  return AlignUp(layout.num_kv_heads * capacity_tokens * int64_t{sizeof(float)});
}

}  // namespace

// Memory: K of every layer, V of every layer, then vertical and slash logits of every layer.
int64_t KvCache::BytesFor(const KvLayout& layout, int64_t capacity_tokens, bool with_logits) {
  int64_t per_layer = 2 * TensorBytes(layout, capacity_tokens);
  if (with_logits) per_layer += 2 * LogitBytes(layout, capacity_tokens);
  return per_layer * layout.num_layers;
}

absl::StatusOr<std::shared_ptr<KvCache>> KvCache::Create(Allocator& allocator,
                                                         KvPool::Reservation reservation,
                                                         const KvLayout& layout,
                                                         int64_t capacity_tokens,
                                                         bool with_logits) {
  const int64_t bytes = BytesFor(layout, capacity_tokens, with_logits);
  if (reservation.bytes() < bytes) {
    return absl::InternalError(
        absl::StrCat("KV cache of ", bytes, " bytes with a reservation of ", reservation.bytes()));
  }
  auto cache = std::shared_ptr<KvCache>(new KvCache());
  cache->layout_ = layout;
  cache->capacity_tokens_ = capacity_tokens;
  cache->with_logits_ = with_logits;
  cache->reservation_ = std::move(reservation);
  VSP_ASSIGN_OR_RETURN(cache->buffer_, Buffer::Create(allocator, bytes));
  return cache;
}

void* KvCache::k(int layer) const {
  return static_cast<char*>(buffer_.data()) + layer * TensorBytes(layout_, capacity_tokens_);
}

void* KvCache::v(int layer) const {
  return static_cast<char*>(buffer_.data()) +
         (layout_.num_layers + layer) * TensorBytes(layout_, capacity_tokens_);
}

float* KvCache::vertical_logits(int layer) const {
  if (!with_logits_) return nullptr;
  return reinterpret_cast<float*>(static_cast<char*>(buffer_.data()) +
                                  2 * layout_.num_layers * TensorBytes(layout_, capacity_tokens_) +
                                  layer * LogitBytes(layout_, capacity_tokens_));
}

float* KvCache::slash_logits(int layer) const {
  if (!with_logits_) return nullptr;
  return reinterpret_cast<float*>(static_cast<char*>(buffer_.data()) +
                                  2 * layout_.num_layers * TensorBytes(layout_, capacity_tokens_) +
                                  (layout_.num_layers + layer) *
                                      LogitBytes(layout_, capacity_tokens_));
}

}  // namespace vsprefill::kv
