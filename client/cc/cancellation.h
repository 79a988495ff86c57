// Ends calls from outside: any thread (not a signal handler) may call Cancel. One object may serve
// several calls, and one that was cancelled stays so.
#pragma once

#include <cstdint>
#include <functional>
#include <map>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"

namespace vsprefill::client {

class Cancellation {
 public:
  /// Running calls end with CANCELLED, and so does every later one.
  void Cancel();
  bool cancelled() const;

  /// For the library: `action` runs once, on Cancel or at once where that was before. It must not
  /// call this object. After Remove(id) returned it no longer runs.
  int64_t Add(std::function<void()> action);
  void Remove(int64_t id);

 private:
  mutable absl::Mutex mu_;
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  int64_t next_id_ ABSL_GUARDED_BY(mu_) = 0;
  std::map<int64_t, std::function<void()>> actions_ ABSL_GUARDED_BY(mu_);
};

}  // namespace vsprefill::client
