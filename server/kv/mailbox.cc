#include "server/kv/mailbox.h"

#include <algorithm>
#include <utility>

namespace vsprefill::kv {

void Mailbox::Post(std::function<void()> task) {
  absl::MutexLock lock(&mu_);
  if (!closed_) tasks_.push_back(std::move(task));
}

void Mailbox::PostAt(absl::Time when, std::function<void()> task) {
  absl::MutexLock lock(&mu_);
  if (!closed_) timed_.emplace(when, std::move(task));
}

bool Mailbox::Due() const {
  return closed_ || !tasks_.empty() || (!timed_.empty() && timed_.begin()->first <= absl::Now());
}

bool Mailbox::Take(absl::Duration wait, std::vector<std::function<void()>>* tasks) {
  absl::MutexLock lock(&mu_);
  absl::Time until = absl::Now() + wait;
  if (!timed_.empty()) until = std::min(until, timed_.begin()->first);
  mu_.AwaitWithDeadline(absl::Condition(this, &Mailbox::Due), until);
  if (closed_) return false;
  tasks->swap(tasks_);
  const auto due = timed_.upper_bound(absl::Now());
  for (auto it = timed_.begin(); it != due; ++it) tasks->push_back(std::move(it->second));
  timed_.erase(timed_.begin(), due);
  return true;
}

void Mailbox::Close() {
  std::vector<std::function<void()>> tasks;  // destroyed outside of the lock: they may own things
  std::multimap<absl::Time, std::function<void()>> timed;
  absl::MutexLock lock(&mu_);
  closed_ = true;
  tasks.swap(tasks_);
  timed.swap(timed_);
}

}  // namespace vsprefill::kv
