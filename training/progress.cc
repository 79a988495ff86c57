#include "training/progress.h"

#include <unistd.h>

#include <algorithm>
#include <cstdio>

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"

namespace vsprefill::training {
namespace {

constexpr int kBarWidth = 20;
constexpr absl::Duration kLinePause = absl::Seconds(10);

absl::Duration Whole(absl::Duration d) { return absl::Trunc(d, absl::Seconds(1)); }

}  // namespace

std::string ProgressLine(int64_t done, int64_t total, int64_t done_before, absl::Duration elapsed,
                         absl::string_view text) {
  const int filled = total > 0 ? static_cast<int>(kBarWidth * done / total) : kBarWidth;
  std::string bar(filled, '#');
  bar.append(kBarWidth - filled, '.');
  std::string left = "?";
  if (done > done_before) {
    left = absl::FormatDuration(Whole(elapsed * (total - done) / (done - done_before)));
  }
  return absl::StrFormat("[%s] %d/%d %d %%  %s  elapsed %s  left %s", bar, done, total,
                         total > 0 ? 100 * done / total : 100, text,
                         absl::FormatDuration(Whole(elapsed)), left);
}

Progress::Progress(int64_t total, int64_t done_before)
    : total_(total),
      done_before_(done_before),
      terminal_(isatty(STDERR_FILENO) != 0),
      start_(absl::Now()) {}

Progress::~Progress() {
  if (open_line_) std::fputc('\n', stderr);
}

void Progress::Update(int64_t done, absl::string_view text) {
  const absl::Time now = absl::Now();
  if (!terminal_ && done != total_ && now - last_printed_ < kLinePause) return;
  last_printed_ = now;
  const std::string line = ProgressLine(done, total_, done_before_, now - start_, text);
  absl::FPrintF(stderr, terminal_ ? "\r\033[K%s" : "%s\n", line);
  std::fflush(stderr);
  open_line_ = terminal_;
}

}  // namespace vsprefill::training
