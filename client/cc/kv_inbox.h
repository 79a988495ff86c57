// The books of a KvReceiver: which caches are being received, which are complete and wait to be
// taken, and what they weigh. Knows no gRPC. Thread-safe. Internal.
#pragma once

#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/cc/kv_receiver.h"

namespace vsprefill::client {

/// One running push as the books see it.
class PushHandle {
 public:
  virtual ~PushHandle() = default;
  /// Ends the push with `status` unless it has ended. From any thread.
  virtual void End(const absl::Status& status) = 0;
  virtual absl::Time last_progress() const = 0;
};

class KvInbox {
 public:
  KvInbox(int max_caches, int64_t max_bytes) : max_caches_(max_caches), max_bytes_(max_bytes) {}

  /// A push began to exist (it has not said yet what it brings). UNAVAILABLE after Close.
  absl::Status Open(const std::shared_ptr<PushHandle>& push);
  /// The push brings this cache. Takes the place of a lower attempt, which is ended or, if
  /// complete, dropped. ALREADY_EXISTS: this attempt or a higher one is here; RESOURCE_EXHAUSTED:
  /// bounds.
  absl::Status Begin(const std::shared_ptr<PushHandle>& push, const std::string& request_id,
                     uint32_t attempt, int64_t bytes);
  /// The push's cache is verified. ABORTED where a higher attempt has taken its place.
  absl::Status Complete(const std::shared_ptr<PushHandle>& push, ReceivedKv kv);
  /// The push is over; what it had begun and not completed is given back.
  void Leave(const std::shared_ptr<PushHandle>& push);

  absl::StatusOr<ReceivedKv> Next(absl::Duration timeout);
  /// Ends pushes that made no progress since `deadline` with ABORTED.
  void EndStalled(absl::Time deadline);
  /// Ends all pushes with UNAVAILABLE, and Next with CANCELLED.
  void Close();

  int num_caches() const;
  int64_t reserved_bytes() const;

 private:
  struct Slot {
    uint32_t attempt = 0;
    int64_t bytes = 0;
    std::shared_ptr<PushHandle> push;  // null once complete
    ReceivedKv kv;                     // once complete
  };

  void Erase(std::map<std::string, Slot>::iterator it) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool NextIsReady() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    return closed_ || !complete_.empty();
  }

  const int max_caches_;
  const int64_t max_bytes_;
  mutable absl::Mutex mu_;
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
  int64_t bytes_ ABSL_GUARDED_BY(mu_) = 0;
  std::set<std::shared_ptr<PushHandle>> pushes_ ABSL_GUARDED_BY(mu_);
  std::map<std::string, Slot> slots_ ABSL_GUARDED_BY(mu_);  // by request id
  std::deque<std::string> complete_ ABSL_GUARDED_BY(mu_);   // request ids, oldest first
};

}  // namespace vsprefill::client
