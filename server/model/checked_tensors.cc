#include "server/model/checked_tensors.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "absl/strings/str_format.h"
#include "server/base/status_macros.h"

namespace vsprefill::model {
namespace {

absl::StatusOr<const TensorView*> GetTyped(const SafetensorsReader& reader, const std::string& name,
                                           const std::vector<int64_t>& shape,
                                           absl::string_view dtype) {
  VSP_ASSIGN_OR_RETURN(const TensorView* tensor, reader.Get(name, shape));
  if (tensor->dtype != dtype) {
    return absl::InvalidArgumentError(absl::StrFormat("%s: tensor %s has dtype %s, expected %s",
                                                      reader.source(), name, tensor->dtype, dtype));
  }
  return tensor;
}

bool IsFinite(float value) { return std::isfinite(value); }
// All exponent bits set: infinity or NaN.
bool IsFinite(uint16_t bf16_bits) { return (bf16_bits & 0x7f80) != 0x7f80; }

template <typename T>
absl::Status Read(const SafetensorsReader& reader, const std::string& name,
                  const std::vector<int64_t>& shape, absl::string_view dtype, std::vector<T>* out) {
  VSP_ASSIGN_OR_RETURN(const TensorView* tensor, GetTyped(reader, name, shape, dtype));
  out->resize(tensor->num_elements);
  std::memcpy(out->data(), tensor->data.data(), tensor->data.size());
  for (const T value : *out) {
    if (!IsFinite(value)) {
      return absl::InvalidArgumentError(
          absl::StrFormat("%s: tensor %s holds a value that is not finite", reader.source(), name));
    }
  }
  return absl::OkStatus();
}

template <typename T>
absl::Status Add(absl::string_view what, const std::string& name, absl::string_view dtype,
                 std::vector<int64_t> shape, const std::vector<T>& values, TensorMap* tensors) {
  TensorView view;
  view.dtype = std::string(dtype);
  view.shape = std::move(shape);
  view.num_elements = 1;
  for (int64_t size : view.shape) view.num_elements *= size;
  if (view.num_elements != static_cast<int64_t>(values.size())) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "%s weights: %s has %d values, expected %d", what, name, values.size(), view.num_elements));
  }
  view.data = {reinterpret_cast<const uint8_t*>(values.data()), values.size() * sizeof(T)};
  tensors->emplace(name, std::move(view));
  return absl::OkStatus();
}

}  // namespace

absl::Status ReadFloats(const SafetensorsReader& reader, const std::string& name,
                        const std::vector<int64_t>& shape, std::vector<float>* out) {
  return Read(reader, name, shape, "F32", out);
}

absl::Status ReadBFloat16(const SafetensorsReader& reader, const std::string& name,
                          const std::vector<int64_t>& shape, std::vector<uint16_t>* out) {
  return Read(reader, name, shape, "BF16", out);
}

absl::Status AddTensor(absl::string_view what, const std::string& name, std::vector<int64_t> shape,
                       const std::vector<float>& values, TensorMap* tensors) {
  return Add(what, name, "F32", std::move(shape), values, tensors);
}

absl::Status AddTensor(absl::string_view what, const std::string& name, std::vector<int64_t> shape,
                       const std::vector<uint16_t>& bf16_bits, TensorMap* tensors) {
  return Add(what, name, "BF16", std::move(shape), bf16_bits, tensors);
}

}  // namespace vsprefill::model
