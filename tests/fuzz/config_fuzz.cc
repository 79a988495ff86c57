// config.json and generation_config.json, separated by a NUL byte.
#include <cstddef>
#include <cstdint>

#include "absl/strings/string_view.h"
#include "server/model/identity.h"
#include "server/model/model_config.h"
#include "tests/fuzz/fuzz_check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  const size_t separator = text.find('\0');
  const absl::string_view config = text.substr(0, separator);
  const absl::string_view generation =
      separator == absl::string_view::npos ? absl::string_view() : text.substr(separator + 1);
  const auto parsed = vsprefill::model::ParseModelConfig(config, generation);
  vsprefill::CheckOneClearLine(parsed.status());
  if (parsed.ok()) {
    (void)vsprefill::model::KvId(*parsed, "0", vsprefill::kernels::DType::kBF16);
  }
  return 0;
}
