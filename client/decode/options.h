// The command line of vsprefill-decode.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "client/cc/types.h"
#include "kernels/tensor_view.h"

namespace vsprefill::decode {

struct Options {
  std::string model_dir;
  std::string prefill;  // the server of stream mode; empty in listen mode
  std::string listen;   // the address of listen mode
  std::string device = "auto";
  kernels::DType dtype = kernels::DType::kBF16;
  int threads = 0;
  int64_t max_new_tokens = 0;
  int64_t kv_pool_bytes = 0;
  int max_caches = 0;
  bool json = false;
  std::vector<int32_t> ids;
  client::PrefillRequest request;  // stream mode; token_ids is left empty
};

/// INVALID_ARGUMENT or NOT_FOUND: what is wrong with the command line or the ids file.
absl::StatusOr<Options> ParseOptions(const std::vector<std::string>& argv);
std::string HelpText();

}  // namespace vsprefill::decode
