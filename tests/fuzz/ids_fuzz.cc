// An ids file.
#include <cstddef>
#include <cstdint>
#include <cstdlib>

#include "absl/strings/string_view.h"
#include "client/cli/ids_file.h"
#include "tests/fuzz/fuzz_check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const absl::string_view text(reinterpret_cast<const char*>(data), size);
  const auto ids = vsprefill::cli::ParseIds(text, "ids.json");
  vsprefill::CheckOneClearLine(ids.status());
  if (ids.ok()) {
    if (ids->empty()) std::abort();
    for (const int32_t id : *ids) {
      if (id < 0) std::abort();
    }
  }
  return 0;
}
