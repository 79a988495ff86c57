// Tasks for one thread, now or at a time. Thread-safe. Outlives its thread where somebody (a gRPC
// slice) may post late: a closed mailbox drops what it gets.
#pragma once

#include <functional>
#include <map>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace vsprefill::kv {

class Mailbox {
 public:
  void Post(std::function<void()> task);
  void PostAt(absl::Time when, std::function<void()> task);
  /// Waits until a task is due or `wait` is over, then takes all that are due. False once closed.
  bool Take(absl::Duration wait, std::vector<std::function<void()>>* tasks);
  void Close();

 private:
  bool Due() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  absl::Mutex mu_;
  std::vector<std::function<void()>> tasks_ ABSL_GUARDED_BY(mu_);
  std::multimap<absl::Time, std::function<void()>> timed_ ABSL_GUARDED_BY(mu_);
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
};

}  // namespace vsprefill::kv
