// The program vsprefill; see commands.cc.
#include <unistd.h>

#include <iostream>

#include "client/cli/commands.h"

int main(int argc, char** argv) {
  const vsprefill::cli::Console console{std::cout, std::cerr, isatty(STDERR_FILENO) == 1};
  return vsprefill::cli::RunCli({argv + 1, argv + argc}, console);
}
