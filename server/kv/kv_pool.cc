#include "server/kv/kv_pool.h"

#include "absl/strings/str_cat.h"

namespace vsprefill::kv {

absl::StatusOr<KvPool::Reservation> KvPool::Reserve(int64_t bytes) {
  if (bytes < 0) {
    return absl::InvalidArgumentError(absl::StrCat("cannot reserve ", bytes, " bytes"));
  }
  absl::MutexLock lock(&mu_);
  if (bytes > capacity_bytes_ - used_bytes_) {
    return absl::ResourceExhaustedError(
        absl::StrCat("request needs ", bytes, " bytes of KV cache, ", capacity_bytes_ - used_bytes_,
                     " of ", capacity_bytes_, " are free"));
  }
  used_bytes_ += bytes;
  Reservation reservation;
  reservation.pool_ = this;
  reservation.bytes_ = bytes;
  return reservation;
}

int64_t KvPool::used_bytes() const {
  absl::MutexLock lock(&mu_);
  return used_bytes_;
}

void KvPool::Reservation::Reset() noexcept {
  if (pool_ == nullptr) return;
  {
    absl::MutexLock lock(&pool_->mu_);
    pool_->used_bytes_ -= bytes_;
  }
  pool_ = nullptr;
  bytes_ = 0;
}

}  // namespace vsprefill::kv
