// A peer of a server under test, in a process of its own so that it can be stopped and killed.
//   fault_peer receive          a decode worker: prints its address, "chunk" per KV chunk
//   fault_peer read ADDR N      a caller: prefills N tokens, prints "chunk" per KV chunk
#include <cstdio>
#include <cstdlib>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "tests/support/push_receiver.h"
#include "tests/support/test_service.h"

namespace vsprefill::testing {
namespace {

void Say(const std::string& line) {
  std::printf("%s\n", line.c_str());
  std::fflush(stdout);
}

int Receive() {
  PushReceiver receiver([](int count) {
    if (count > 1) Say("chunk");
    return grpc::Status::OK;
  });
  Say("address " + receiver.address());
  for (;;) absl::SleepFor(absl::Hours(1));
}

int Read(const std::string& address, int64_t tokens) {
  const auto stub =
      v1::PrefillService::NewStub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  const auto reader = stub->Prefill(&context, MakeRequest("peer", TestIds(tokens)));
  const StreamResult result = ReadAll(context, *reader, [](const v1::PrefillEvent& event) {
    if (event.has_kv()) Say("chunk");
  });
  Say(absl::StrCat("status ", result.status.error_code(), " ", result.status.error_message()));
  return result.status.ok() ? 0 : 1;
}

}  // namespace
}  // namespace vsprefill::testing

int main(int argc, char** argv) {
  const std::string mode = argc > 1 ? argv[1] : "";
  if (mode == "receive") return vsprefill::testing::Receive();
  if (mode == "read" && argc == 4) return vsprefill::testing::Read(argv[2], std::atoll(argv[3]));
  return 2;
}
