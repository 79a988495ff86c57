// A progress line on stderr: redrawn in place on a terminal, printed now and then elsewhere.
#pragma once

#include <cstdint>
#include <string>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace vsprefill::training {

/// "[#####.....]  120/400 30 %  TEXT  elapsed 1m2s  left 2m24s": what Progress draws. `done_before`
/// units were there when the clock started (a resumed run); they count for the bar, not for the
/// speed.
std::string ProgressLine(int64_t done, int64_t total, int64_t done_before, absl::Duration elapsed,
                         absl::string_view text);

class Progress {
 public:
  Progress(int64_t total, int64_t done_before);
  ~Progress();
  void Update(int64_t done, absl::string_view text);

 private:
  const int64_t total_, done_before_;
  const bool terminal_;
  const absl::Time start_;
  absl::Time last_printed_ = absl::InfinitePast();
  bool open_line_ = false;
};

}  // namespace vsprefill::training
