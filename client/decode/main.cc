// vsprefill-decode: a decode worker; see options.cc for what it does.
#include <unistd.h>

#include <csignal>
#include <cstdlib>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "client/cli/args.h"
#include "client/cli/exit_code.h"
#include "client/decode/options.h"
#include "client/decode/worker.h"
#include "server/base/status_macros.h"
#include "server/model/device.h"
#include "server/model/transformer.h"

namespace vsprefill::decode {
namespace {

absl::Status Run(const Options& options) {
  VSP_ASSIGN_OR_RETURN(const model::ChosenDevice device, model::ChooseDevice(options.device));
  std::cerr << "vsprefill-decode: " << device.reason << std::endl;
  model::LoadOptions load;
  load.model_dir = options.model_dir;
  load.indexer_path = load.seer_gate_path = "none";  // decoding attends to everything
  load.device = device.kind;
  load.dtype = options.dtype;
  load.cpu_threads = options.threads;
  VSP_ASSIGN_OR_RETURN(const std::unique_ptr<model::Transformer> transformer,
                       model::Transformer::Load(load));
  if (!options.listen.empty()) return RunListen(options, *transformer, std::cout);
  return RunStream(options, *transformer, std::cout);
}

/// Starts this program anew with OpenMP threads that sleep when they have nothing to do. They spin
/// by default, and decoding has a thousand short parallel regions per second: where other processes
/// want the cores too, a token then takes ten times as long (measured: 0.8 against 0.05 s). libgomp
/// reads its environment when it is loaded, before main. Whoever has set a policy keeps it.
void SleepWhenIdle(char** argv) {
  if (std::getenv("OMP_WAIT_POLICY") != nullptr || std::getenv("GOMP_SPINCOUNT") != nullptr) return;
  setenv("OMP_WAIT_POLICY", "passive", /*overwrite=*/0);
  execv("/proc/self/exe", argv);  // returns only where it failed; then decoding is as right
}

}  // namespace
}  // namespace vsprefill::decode

int main(int argc, char** argv) {
  namespace cli = vsprefill::cli;
  const std::vector<std::string> args(argv + 1, argv + argc);
  if (cli::WantsHelp(args)) {
    std::cout << vsprefill::decode::HelpText();
    return cli::kExitOk;
  }
  vsprefill::decode::SleepWhenIdle(argv);
  const absl::StatusOr<vsprefill::decode::Options> options = vsprefill::decode::ParseOptions(args);
  if (!options.ok()) {
    std::cerr << "vsprefill-decode: " << options.status().message()
              << " (vsprefill-decode --help)\n";
    return cli::kExitUsage;
  }
  if (!options->listen.empty()) {
    // Before any thread starts, so that all inherit it; RunListen waits for the signals.
    sigset_t signals;
    sigemptyset(&signals);
    sigaddset(&signals, SIGTERM);
    sigaddset(&signals, SIGINT);
    pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  }
  const absl::Status status = vsprefill::decode::Run(*options);
  if (!status.ok()) std::cerr << "vsprefill-decode: " << cli::StatusLine(status) << "\n";
  return cli::ExitCodeFor(status);
}
