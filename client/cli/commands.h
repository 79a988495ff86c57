// The sub-commands of the program vsprefill, apart from main so that tests can run them.
#pragma once

#include <ostream>
#include <string>
#include <vector>

namespace vsprefill::cli {

/// Where a command prints. Results go to `out`, everything else to `err`.
struct Console {
  std::ostream& out;
  std::ostream& err;
  bool progress = false;  // `err` is a terminal
};

/// Runs "vsprefill ARGS..." and returns its exit code (exit_code.h).
int RunCli(const std::vector<std::string>& args, const Console& console);

/// The sub-commands; `args` are those behind their name.
int RunPrefill(const std::vector<std::string>& args, const Console& console);
int RunInfo(const std::vector<std::string>& args, const Console& console);
int RunLoad(const std::vector<std::string>& args, const Console& console);

}  // namespace vsprefill::cli
