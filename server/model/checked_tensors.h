// Tensors of a small trained network's file (indexer, gate): read into host vectors with the shape,
// the dtype and every value checked, and written again.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "server/model/safetensors.h"

namespace vsprefill::model {

/// INVALID_ARGUMENT for a tensor that is missing, has another shape or dtype, or holds a value that
/// is not finite.
absl::Status ReadFloats(const SafetensorsReader& reader, const std::string& name,
                        const std::vector<int64_t>& shape, std::vector<float>* out);
/// The bits of a BF16 tensor.
absl::Status ReadBFloat16(const SafetensorsReader& reader, const std::string& name,
                          const std::vector<int64_t>& shape, std::vector<uint16_t>* out);

/// Adds a view of `values`, which must outlive the map. INVALID_ARGUMENT where the shape holds
/// another number of values; `what` names the file's kind.
absl::Status AddTensor(absl::string_view what, const std::string& name, std::vector<int64_t> shape,
                       const std::vector<float>& values, TensorMap* tensors);
absl::Status AddTensor(absl::string_view what, const std::string& name, std::vector<int64_t> shape,
                       const std::vector<uint16_t>& bf16_bits, TensorMap* tensors);

}  // namespace vsprefill::model
