// A whole safetensors file in memory, parsed, hashed and converted.
#include <cstddef>
#include <cstdint>
#include <vector>

#include "server/model/identity.h"
#include "server/model/safetensors.h"
#include "tests/fuzz/fuzz_check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  using vsprefill::model::ConvertToBFloat16;
  using vsprefill::model::ConvertToFloat;
  const auto contents =
      vsprefill::model::ParseSafetensors(absl::MakeConstSpan(data, size), "fuzz.safetensors");
  vsprefill::CheckOneClearLine(contents.status());
  if (!contents.ok()) return 0;
  (void)vsprefill::model::WeightsId(contents->tensors);
  for (const auto& [name, tensor] : contents->tensors) {
    // The format's promise that a reader relies on: the data fits the shape, and lies in the file.
    if (tensor.data.size() > size) __builtin_trap();
    std::vector<float> floats(tensor.num_elements);
    std::vector<uint16_t> halves(tensor.num_elements);
    vsprefill::CheckOneClearLine(ConvertToFloat(tensor, absl::MakeSpan(floats)));
    vsprefill::CheckOneClearLine(ConvertToBFloat16(tensor, absl::MakeSpan(halves)));
  }
  return 0;
}
