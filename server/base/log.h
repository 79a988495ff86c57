// Structured log lines on stderr: one event with key=value fields per line. No prompt text, token
// ids or credentials go in here. Thread-safe.
#pragma once

#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"

namespace vsprefill {

/// kInfo: life cycle; kWarning: degraded; kError: needs a person.
enum class LogLevel { kInfo = 0, kWarning = 1, kError = 2 };

using LogFields = std::vector<std::pair<absl::string_view, std::string>>;

/// Writes "I 2026-11-23T09:00:00.123456Z event key=value key=\"a b\"".
void Log(LogLevel level, absl::string_view event, const LogFields& fields = {});

/// Lines below this level are dropped (default kInfo). Set once at start.
void SetMinLogLevel(LogLevel level);

/// The text of one line without its time, as Log writes it (for tests).
std::string FormatLogLine(LogLevel level, absl::string_view event, const LogFields& fields);

/// Lets an event through at most once per interval.
class LogThrottle {
 public:
  explicit LogThrottle(absl::Duration interval) : interval_(interval) {}
  /// True where the line is to be written; *suppressed = lines dropped since the last one.
  bool Allow(absl::Time now, int64_t* suppressed);

 private:
  const absl::Duration interval_;
  absl::Mutex mu_;
  absl::Time next_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  int64_t suppressed_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace vsprefill
