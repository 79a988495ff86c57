// A child process of a test: its output by lines, signals by pid, and an end that cannot be missed.
#pragma once

#include <sys/types.h>

#include <string>
#include <vector>

#include "absl/time/time.h"

namespace vsprefill::testing {

class Subprocess {
 public:
  /// Runs argv[0] with stdout and stderr in one pipe.
  explicit Subprocess(const std::vector<std::string>& argv);
  /// Kills and reaps it where it still runs.
  ~Subprocess();
  Subprocess(const Subprocess&) = delete;
  Subprocess& operator=(const Subprocess&) = delete;

  /// Reads lines until one begins with `prefix`; the rest of that line, or "" after the time-out or
  /// at the end of the output.
  std::string AwaitLine(const std::string& prefix, absl::Duration timeout = absl::Seconds(60));
  /// Everything it wrote until now, AwaitLine's lines included.
  const std::string& output() const { return output_; }
  void Signal(int signal);
  /// Exit status; 128 + signal where a signal ended it; -1 after the time-out. Reads the output on.
  int Wait(absl::Duration timeout = absl::Seconds(60));

 private:
  bool ReadSome(absl::Time until);

  pid_t pid_ = -1;
  int fd_ = -1;
  size_t line_begin_ = 0;
  std::string output_;
};

/// The folder of the running test program's build: programs are in bin/, tests in tests/.
std::string BuildFolder();

}  // namespace vsprefill::testing
