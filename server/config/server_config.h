// The configuration of vsprefill-server: one immutable struct, made from the command line and
// checked before anything starts.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/tensor_view.h"

namespace vsprefill::config {

struct ServerConfig {
  std::string model_dir;
  std::string model_name;  // default: the directory's name
  std::string indexer;     // path, "none", or empty: the model's own where there is one
  std::string seer_gate;   // likewise
  std::string listen = "127.0.0.1:8470";
  std::string metrics_listen = "127.0.0.1:8471";
  std::string device = "auto";
  kernels::DType dtype = kernels::DType::kBF16;
  std::string preset;                               // resolved into the two below; empty: none
  std::string method;                               // empty: vsprefill with an indexer, else dense
  std::map<std::string, double> method_parameters;  // defaults of that method
  int64_t kv_pool_bytes = int64_t{4} << 30;
  int64_t staging_bytes = int64_t{256} << 20;
  int64_t chunk_tokens = 2048;
  int64_t max_prompt_tokens = 0;   // 0: the model's
  int64_t recall_probe_every = 0;  // 0: never
  int max_waiting_requests = 64;
  int64_t max_waiting_tokens = 1 << 20;
  absl::Duration send_stall_timeout = absl::Seconds(30);
  absl::Duration drain_timeout = absl::Seconds(60);
  std::vector<std::string> push_allow;
  int cpu_threads = 0;  // 0: all cores
  std::string cpu_isa = "auto";
  bool help = false;
};

/// Parses the arguments after the program's name: --name value or --name=value. INVALID_ARGUMENT,
/// one line, for an unknown flag, a missing value, or a value that is not allowed (it names them).
/// With --help nothing else is checked.
absl::StatusOr<ServerConfig> ParseServerConfig(const std::vector<std::string>& arguments);

/// What --help prints.
std::string ServerUsage();

/// "4GiB", "512MiB", "64KiB" or plain bytes.
absl::StatusOr<int64_t> ParseBytes(absl::string_view text);

}  // namespace vsprefill::config
