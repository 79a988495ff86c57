// The model flags that the benchmark programs share, checked.
#pragma once

#include <string>

#include "absl/status/statusor.h"
#include "server/model/transformer.h"

namespace vsprefill {

/// `device`: cpu or cuda; `dtype`: bfloat16 or float32; `threads`: CPU threads, 0 for all cores.
/// INVALID_ARGUMENT, naming the flag and what it allows, for anything else.
absl::StatusOr<model::LoadOptions> MakeLoadOptions(const std::string& model_dir,
                                                   const std::string& indexer,
                                                   const std::string& device,
                                                   const std::string& dtype, int threads);

}  // namespace vsprefill
