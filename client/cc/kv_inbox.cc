#include "client/cc/kv_inbox.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace vsprefill::client {

absl::Status KvInbox::Open(const std::shared_ptr<PushHandle>& push) {
  absl::MutexLock lock(&mu_);
  if (closed_) return absl::UnavailableError("the receiver is shutting down");
  pushes_.insert(push);
  return absl::OkStatus();
}

void KvInbox::Erase(std::map<std::string, Slot>::iterator it) {
  bytes_ -= it->second.bytes;
  complete_.erase(std::remove(complete_.begin(), complete_.end(), it->first), complete_.end());
  slots_.erase(it);
}

absl::Status KvInbox::Begin(const std::shared_ptr<PushHandle>& push, const std::string& request_id,
                            uint32_t attempt, int64_t bytes) {
  std::shared_ptr<PushHandle> replaced;
  {
    absl::MutexLock lock(&mu_);
    if (closed_) return absl::UnavailableError("the receiver is shutting down");
    const auto it = slots_.find(request_id);
    const bool replaces = it != slots_.end();
    if (replaces && it->second.attempt >= attempt) {
      return absl::AlreadyExistsError(
          absl::StrFormat("request %s: attempt %d is here, got attempt %d", request_id,
                          it->second.attempt, attempt));
    }
    const int64_t other_bytes = bytes_ - (replaces ? it->second.bytes : 0);
    if (bytes > max_bytes_ - other_bytes) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("a cache of %d bytes; %d of %d bytes are free", bytes,
                          max_bytes_ - other_bytes, max_bytes_));
    }
    if (!replaces && static_cast<int>(slots_.size()) >= max_caches_) {
      return absl::ResourceExhaustedError(
          absl::StrFormat("%d caches wait already, the most allowed", max_caches_));
    }
    if (replaces) {
      replaced = it->second.push;
      Erase(it);
    }
    Slot& slot = slots_[request_id];
    slot.attempt = attempt;
    slot.bytes = bytes;
    slot.push = push;
    bytes_ += bytes;
  }
  // Outside the lock: ending a push calls gRPC.
  if (replaced != nullptr) {
    replaced->End(absl::AbortedError(
        absl::StrCat("request ", request_id, ": replaced by attempt ", attempt)));
  }
  return absl::OkStatus();
}

absl::Status KvInbox::Complete(const std::shared_ptr<PushHandle>& push, ReceivedKv kv) {
  absl::MutexLock lock(&mu_);
  const auto it = slots_.find(kv.request_id);
  if (it == slots_.end() || it->second.push != push) {
    return absl::AbortedError(
        absl::StrCat("request ", kv.request_id, ": replaced by a higher attempt"));
  }
  complete_.push_back(kv.request_id);
  it->second.push = nullptr;
  it->second.kv = std::move(kv);
  return absl::OkStatus();
}

void KvInbox::Leave(const std::shared_ptr<PushHandle>& push) {
  absl::MutexLock lock(&mu_);
  pushes_.erase(push);
  for (auto it = slots_.begin(); it != slots_.end(); ++it) {
    if (it->second.push == push) {
      Erase(it);
      return;
    }
  }
}

absl::StatusOr<ReceivedKv> KvInbox::Next(absl::Duration timeout) {
  absl::MutexLock lock(&mu_);
  if (!mu_.AwaitWithTimeout(absl::Condition(this, &KvInbox::NextIsReady), timeout)) {
    return absl::DeadlineExceededError(
        absl::StrCat("no cache came within ", absl::FormatDuration(timeout)));
  }
  if (complete_.empty()) return absl::CancelledError("the receiver was shut down");
  const auto it = slots_.find(complete_.front());
  ReceivedKv kv = std::move(it->second.kv);
  Erase(it);
  return kv;
}

void KvInbox::EndStalled(absl::Time deadline) {
  std::vector<std::shared_ptr<PushHandle>> stalled;
  {
    absl::MutexLock lock(&mu_);
    for (const auto& push : pushes_) {
      if (push->last_progress() < deadline) stalled.push_back(push);
    }
  }
  for (const auto& push : stalled) push->End(absl::AbortedError("the push made no progress"));
}

void KvInbox::Close() {
  std::vector<std::shared_ptr<PushHandle>> running;
  {
    absl::MutexLock lock(&mu_);
    closed_ = true;
    running.assign(pushes_.begin(), pushes_.end());
  }
  for (const auto& push : running) {
    push->End(absl::UnavailableError("the receiver is shutting down"));
  }
}

int KvInbox::num_caches() const {
  absl::MutexLock lock(&mu_);
  return static_cast<int>(slots_.size());
}

int64_t KvInbox::reserved_bytes() const {
  absl::MutexLock lock(&mu_);
  return bytes_;
}

}  // namespace vsprefill::client
