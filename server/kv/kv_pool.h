// The budget of KV memory (--kv_pool_bytes). A request reserves its whole cache at admission, so
// that one that was admitted cannot run out of memory half way. Thread-safe.
#pragma once

#include <cstdint>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"

namespace vsprefill::kv {

class KvPool {
 public:
  /// Bytes held in a pool; gives them back when destroyed. Move-only. An empty one holds nothing.
  class Reservation {
   public:
    Reservation() = default;
    Reservation(Reservation&& other) noexcept { *this = std::move(other); }
    Reservation& operator=(Reservation&& other) noexcept {
      if (this != &other) {
        Reset();
        pool_ = std::exchange(other.pool_, nullptr);
        bytes_ = std::exchange(other.bytes_, 0);
      }
      return *this;
    }
    ~Reservation() { Reset(); }
    int64_t bytes() const { return bytes_; }
    void Reset() noexcept;

   private:
    friend class KvPool;
    KvPool* pool_ = nullptr;
    int64_t bytes_ = 0;
  };

  explicit KvPool(int64_t capacity_bytes) : capacity_bytes_(capacity_bytes) {}

  /// RESOURCE_EXHAUSTED where fewer than `bytes` are free (the message names both).
  absl::StatusOr<Reservation> Reserve(int64_t bytes);
  int64_t capacity_bytes() const { return capacity_bytes_; }
  int64_t used_bytes() const;

 private:
  const int64_t capacity_bytes_;
  mutable absl::Mutex mu_;
  int64_t used_bytes_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace vsprefill::kv
