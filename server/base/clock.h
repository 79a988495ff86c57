// Time as an interface, so that tests move it by hand. Thread-safe.
#pragma once

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace vsprefill {

class Clock {
 public:
  virtual ~Clock() = default;
  /// Wall-clock time, as gRPC deadlines use it.
  virtual absl::Time Now() = 0;
};

/// The system's clock; lives as long as the process.
inline Clock& SystemClock() {
  class System final : public Clock {
   public:
    absl::Time Now() override { return absl::Now(); }
  };
  static System* const clock = new System;
  return *clock;
}

/// A clock that stands still until it is moved.
class FakeClock final : public Clock {
 public:
  explicit FakeClock(absl::Time now = absl::UnixEpoch()) : now_(now) {}
  absl::Time Now() override {
    absl::MutexLock lock(&mu_);
    return now_;
  }
  void Advance(absl::Duration step) {
    absl::MutexLock lock(&mu_);
    now_ += step;
  }

 private:
  absl::Mutex mu_;
  absl::Time now_ ABSL_GUARDED_BY(mu_);
};

}  // namespace vsprefill
