// seer_gate.safetensors, read through a file in memory.
#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <string>

#include "absl/strings/str_cat.h"
#include "server/model/seer_gate.h"
#include "tests/fuzz/fuzz_check.h"

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const int file = memfd_create("seer_gate", MFD_CLOEXEC);
  if (file < 0 || write(file, data, size) != static_cast<ssize_t>(size)) std::abort();
  vsprefill::model::SeerGateExpectation expectation;
  expectation.weights_id = std::string(64, 'a');
  expectation.num_layers = 2;
  expectation.num_q_heads = 4;
  expectation.num_kv_heads = 2;
  expectation.head_dim = 8;
  const auto weights =
      vsprefill::model::ReadSeerGate(absl::StrCat("/proc/self/fd/", file), expectation);
  vsprefill::CheckOneClearLine(weights.status());
  close(file);
  return 0;
}
