#include "tests/support/subprocess.h"

#include <fcntl.h>
#include <poll.h>
#include <signal.h>
#include <spawn.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <filesystem>

#include "absl/time/clock.h"

extern char** environ;

namespace vsprefill::testing {

Subprocess::Subprocess(const std::vector<std::string>& argv) {
  int fds[2];
  if (pipe2(fds, O_CLOEXEC) != 0) std::abort();
  posix_spawn_file_actions_t actions;
  posix_spawn_file_actions_init(&actions);
  posix_spawn_file_actions_adddup2(&actions, fds[1], 1);
  posix_spawn_file_actions_adddup2(&actions, fds[1], 2);
  std::vector<char*> pointers;
  for (const std::string& argument : argv) pointers.push_back(const_cast<char*>(argument.c_str()));
  pointers.push_back(nullptr);
  if (posix_spawn(&pid_, argv[0].c_str(), &actions, nullptr, pointers.data(), environ) != 0) {
    pid_ = -1;
    output_ = "cannot start " + argv[0];
  }
  posix_spawn_file_actions_destroy(&actions);
  close(fds[1]);
  fd_ = fds[0];
}

Subprocess::~Subprocess() {
  if (pid_ > 0) {
    kill(pid_, SIGKILL);
    waitpid(pid_, nullptr, 0);
  }
  close(fd_);
}

bool Subprocess::ReadSome(absl::Time until) {
  pollfd poller = {fd_, POLLIN, 0};
  const int64_t wait = std::max<int64_t>(absl::ToInt64Milliseconds(until - absl::Now()), 0);
  if (poll(&poller, 1, static_cast<int>(wait)) <= 0) return false;
  char buffer[4096];
  const ssize_t n = read(fd_, buffer, sizeof(buffer));
  if (n <= 0) return false;
  output_.append(buffer, n);
  return true;
}

std::string Subprocess::AwaitLine(const std::string& prefix, absl::Duration timeout) {
  const absl::Time until = absl::Now() + timeout;
  for (;;) {
    for (size_t end; (end = output_.find('\n', line_begin_)) != std::string::npos;) {
      const std::string line = output_.substr(line_begin_, end - line_begin_);
      line_begin_ = end + 1;
      if (line.compare(0, prefix.size(), prefix) == 0) return line.substr(prefix.size());
    }
    if (!ReadSome(until)) return "";
  }
}

void Subprocess::Signal(int signal) {
  if (pid_ > 0) kill(pid_, signal);
}

int Subprocess::Wait(absl::Duration timeout) {
  if (pid_ <= 0) return -1;
  const absl::Time until = absl::Now() + timeout;
  for (;;) {
    int status = 0;
    if (waitpid(pid_, &status, WNOHANG) == pid_) {
      pid_ = -1;
      while (ReadSome(absl::Now())) {
      }
      return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
    }
    if (absl::Now() > until) return -1;
    if (!ReadSome(absl::Now() + absl::Milliseconds(10))) absl::SleepFor(absl::Milliseconds(1));
  }
}

std::string BuildFolder() {
  return std::filesystem::read_symlink("/proc/self/exe").parent_path().parent_path().string();
}

}  // namespace vsprefill::testing
