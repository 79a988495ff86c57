// indexer.safetensors, read through a file in memory.
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "absl/strings/str_cat.h"
#include "server/model/vs_indexer.h"
#include "tests/fuzz/fuzz_check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const int file = memfd_create("indexer", MFD_CLOEXEC);
  if (file < 0 || write(file, data, size) != static_cast<ssize_t>(size)) std::abort();
  vsprefill::model::IndexerExpectation expectation;
  expectation.weights_id = std::string(64, 'a');
  expectation.num_layers = 2;
  expectation.num_groups = 2;
  expectation.head_dim = 16;
  const auto weights =
      vsprefill::model::ReadIndexer(absl::StrCat("/proc/self/fd/", file), expectation);
  vsprefill::CheckOneClearLine(weights.status());
  close(file);
  return 0;
}
