// Runs a fuzz target over a corpus without a fuzzer: each file as it is, cut short at several
// places and with single bytes changed (deterministic). Exit code 0 only where every input came
// back.
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size);

namespace {

constexpr int kCuts = 64;
constexpr int kChanges = 200;

void Run(const std::string& input, size_t size) {
  // An allocation of exactly this size, so that a sanitizer sees a read behind it.
  const std::vector<uint8_t> copy(input.begin(), input.begin() + static_cast<ptrdiff_t>(size));
  LLVMFuzzerTestOneInput(copy.data(), copy.size());
}

}  // namespace

int main(int argc, char** argv) {
  int files = 0;
  int64_t inputs = 0;
  uint64_t random = 1;
  for (int i = 1; i < argc; ++i) {
    for (const auto& entry : std::filesystem::directory_iterator(argv[i])) {
      std::ifstream stream(entry.path(), std::ios::binary);
      std::string input((std::istreambuf_iterator<char>(stream)), {});
      Run(input, input.size());
      for (int cut = 0; cut < kCuts; ++cut) Run(input, input.size() * cut / kCuts);
      for (int change = 0; change < kChanges && !input.empty(); ++change) {
        random = random * 6364136223846793005u + 1442695040888963407u;
        char& byte = input[(random >> 33) % input.size()];
        const char before = byte;
        byte = static_cast<char>(byte ^ static_cast<char>(1 + (random >> 25) % 255));
        Run(input, input.size());
        byte = before;
      }
      ++files;
      inputs += 1 + kCuts + kChanges;
    }
  }
  std::printf("%d files, %lld inputs\n", files, static_cast<long long>(inputs));
  return files > 0 ? 0 : 1;
}
