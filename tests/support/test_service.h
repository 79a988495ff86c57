// A whole server in the test's process, on loopback, with a fake transformer; and a client that
// takes a stream apart. For integration and fault tests.
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "server/engine/engine.h"
#include "server/kv/kv_stager.h"
#include "server/metrics/metrics.h"
#include "server/metrics/metrics_server.h"
#include "server/rpc/grpc_server.h"
#include "tests/support/fake_transformer.h"
#include "vsprefill/v1/prefill.grpc.pb.h"

namespace vsprefill::testing {

struct TestServiceOptions {
  FakeTransformerOptions model;
  int64_t kv_pool_bytes = 64 << 20;
  int64_t staging_bytes = 16 << 20;
  int64_t chunk_tokens = 64;
  int max_waiting_requests = 8;
  int64_t max_waiting_tokens = 1 << 20;
  absl::Duration send_stall_timeout = absl::Seconds(30);
  std::vector<std::string> push_allow;
};

class TestService {
 public:
  explicit TestService(const TestServiceOptions& options = {});
  ~TestService();

  engine::Engine& engine() { return *engine_; }
  rpc::GrpcServer& server() { return *server_; }
  const std::string& address() const { return server_->address(); }
  const std::string& metrics_address() const { return metrics_server_->address(); }
  /// A channel with a connection of its own.
  std::shared_ptr<grpc::Channel> NewChannel();
  v1::PrefillService::Stub& stub() { return *stub_; }

  /// The text of /metrics by HTTP, and the value of one series (its whole left side); NaN if
  /// absent.
  std::string Scrape();
  double Metric(const std::string& series);
  /// True once no memory, no staged byte and no request is left; false if that takes over a second.
  bool AwaitQuiet(absl::Duration timeout = absl::Seconds(1));

 private:
  std::unique_ptr<model::Transformer> transformer_;
  std::unique_ptr<kv::KvStager> stager_;
  std::unique_ptr<metrics::Metrics> metrics_;
  std::unique_ptr<engine::Engine> engine_;
  std::unique_ptr<rpc::GrpcServer> server_;
  std::unique_ptr<metrics::MetricsServer> metrics_server_;
  std::unique_ptr<v1::PrefillService::Stub> stub_;
};

/// HTTP GET on "host:port"; status code and body.
std::pair<int, std::string> HttpGet(const std::string& address, const std::string& path);

/// `n` token ids that depend on `seed`.
std::vector<int32_t> TestIds(int64_t n, int seed = 1);
v1::PrefillRequest MakeRequest(const std::string& id, const std::vector<int32_t>& token_ids);

/// What a stream brought.
struct StreamResult {
  grpc::Status status;
  std::vector<v1::PrefillEvent> events;  // in order, KV payloads included
  v1::Accepted accepted;
  v1::FirstToken first_token;
  v1::Done done;
  bool has_accepted = false, has_first_token = false, has_done = false;
  std::vector<v1::KvChunk> chunks;
  std::string pushback;  // trailing grpc-retry-pushback-ms
};
StreamResult ReadAll(grpc::ClientContext& context, grpc::ClientReader<v1::PrefillEvent>& reader,
                     const std::function<void(const v1::PrefillEvent&)>& on_event = nullptr);
StreamResult Prefill(v1::PrefillService::Stub& stub, const v1::PrefillRequest& request,
                     absl::Duration deadline = absl::Seconds(20));

/// Empty where the chunks of all streams together are exactly the KV of `request` (checksums and
/// manifest included); otherwise what is wrong.
std::string CheckKv(const v1::PrefillRequest& request, const std::vector<v1::KvChunk>& chunks,
                    const v1::KvLayout& layout, const v1::KvManifest& manifest);

}  // namespace vsprefill::testing
