#include "server/base/log.h"

#include <unistd.h>

#include <atomic>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"

namespace vsprefill {
namespace {

std::atomic<LogLevel> min_level{LogLevel::kInfo};

bool NeedsQuotes(absl::string_view value) {
  if (value.empty()) return true;
  for (const char c : value) {
    if (c <= ' ' || c == '"' || c == '\\' || c == '=' || c == 0x7f) return true;
  }
  return false;
}

}  // namespace

std::string FormatLogLine(LogLevel level, absl::string_view event, const LogFields& fields) {
  std::string line(event);
  for (const auto& [key, value] : fields) {
    if (NeedsQuotes(value)) {
      absl::StrAppend(&line, " ", key, "=\"", absl::Utf8SafeCEscape(value), "\"");
    } else {
      absl::StrAppend(&line, " ", key, "=", value);
    }
  }
  return line;
}

void Log(LogLevel level, absl::string_view event, const LogFields& fields) {
  if (level < min_level.load(std::memory_order_relaxed)) return;
  constexpr absl::string_view kLetters = "IWE";
  const std::string line =
      absl::StrCat(kLetters.substr(static_cast<int>(level), 1), " ",
                   absl::FormatTime("%Y-%m-%dT%H:%M:%E6SZ", absl::Now(), absl::UTCTimeZone()), " ",
                   FormatLogLine(level, event, fields), "\n");
  // One write per line keeps lines of different threads apart. A failing stderr cannot be reported.
  [[maybe_unused]] const ssize_t written = write(STDERR_FILENO, line.data(), line.size());
}

void SetMinLogLevel(LogLevel level) { min_level.store(level, std::memory_order_relaxed); }

bool LogThrottle::Allow(absl::Time now, int64_t* suppressed) {
  absl::MutexLock lock(&mu_);
  if (now < next_) {
    ++suppressed_;
    return false;
  }
  *suppressed = suppressed_;
  suppressed_ = 0;
  next_ = now + interval_;
  return true;
}

}  // namespace vsprefill
