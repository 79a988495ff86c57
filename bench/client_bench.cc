// The C++ client's side of client_compare.py: for each line on standard input one prefill on
// connections that stay, into fresh memory; prints the seconds from the call to the verified cache
// and the payload bytes, or ends with status 1.
//
//   client_bench ADDRESS TOKENS STRIPES
#include <cstdint>
#include <cstdio>
#include <iostream>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "client/cc/host_kv.h"
#include "client/cc/prefill_client.h"

int main(int argc, char** argv) {
  namespace client = vsprefill::client;
  int tokens = 0, stripes = 0;
  if (argc != 4 || !absl::SimpleAtoi(argv[2], &tokens) || tokens < 1 ||
      !absl::SimpleAtoi(argv[3], &stripes)) {
    std::fprintf(stderr, "usage: client_bench ADDRESS TOKENS STRIPES\n");
    return 2;
  }
  std::vector<int32_t> ids(tokens);
  for (int i = 0; i < tokens; ++i) ids[i] = i % 1000;

  client::PrefillClient prefill_client(argv[1]);
  for (std::string line; std::getline(std::cin, line);) {
    client::PrefillRequest request;
    request.request_id = client::RandomRequestId();
    request.token_ids = ids;
    request.stripes = stripes;
    std::shared_ptr<client::HostKv> kv;
    client::PrefillHandlers handlers;
    handlers.destination =
        [&kv](const client::Accepted& accepted) -> absl::StatusOr<client::KvDestination> {
      absl::StatusOr<std::shared_ptr<client::HostKv>> memory =
          client::HostKv::Create(accepted.shape);
      if (!memory.ok()) return memory.status();
      kv = *std::move(memory);
      return kv->destination();
    };
    const absl::StatusOr<client::PrefillResult> result = prefill_client.Prefill(request, handlers);
    if (!result.ok()) {
      std::fprintf(stderr, "client_bench: %s\n", result.status().ToString().c_str());
      return 1;
    }
    std::printf("%.9f %lld\n", absl::ToDoubleSeconds(result->client_total),
                static_cast<long long>(result->received_bytes));
    std::fflush(stdout);
  }
  return 0;
}
