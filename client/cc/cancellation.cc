#include "client/cc/cancellation.h"

#include <utility>

namespace vsprefill::client {

void Cancellation::Cancel() {
  absl::MutexLock lock(&mu_);
  if (cancelled_) return;
  cancelled_ = true;
  // Under the lock, so that Remove can promise that no action still runs.
  for (const auto& [id, action] : actions_) action();
}

bool Cancellation::cancelled() const {
  absl::MutexLock lock(&mu_);
  return cancelled_;
}

int64_t Cancellation::Add(std::function<void()> action) {
  absl::MutexLock lock(&mu_);
  if (cancelled_) action();
  actions_.emplace(next_id_, std::move(action));
  return next_id_++;
}

void Cancellation::Remove(int64_t id) {
  absl::MutexLock lock(&mu_);
  actions_.erase(id);
}

}  // namespace vsprefill::client
