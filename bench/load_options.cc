#include "bench/load_options.h"

#include "absl/strings/str_format.h"

namespace vsprefill {

absl::StatusOr<model::LoadOptions> MakeLoadOptions(const std::string& model_dir,
                                                   const std::string& indexer,
                                                   const std::string& device,
                                                   const std::string& dtype, int threads) {
  if (device != "cpu" && device != "cuda") {
    return absl::InvalidArgumentError(
        absl::StrFormat("--device is '%s', expected cpu or cuda", device));
  }
  if (dtype != "bfloat16" && dtype != "float32") {
    return absl::InvalidArgumentError(
        absl::StrFormat("--dtype is '%s', expected bfloat16 or float32", dtype));
  }
  if (threads < 0) {
    return absl::InvalidArgumentError(
        absl::StrFormat("--threads is %d, expected 0 (all cores) or more", threads));
  }
  model::LoadOptions options;
  options.model_dir = model_dir;
  options.indexer_path = indexer;
  options.device = device == "cuda" ? kernels::DeviceKind::kCuda : kernels::DeviceKind::kCpu;
  options.dtype = dtype == "float32" ? kernels::DType::kF32 : kernels::DType::kBF16;
  options.cpu_threads = threads;
  return options;
}

}  // namespace vsprefill
