// A PrefillService in this process that computes nothing: it streams the formula of fake_kv.h, on
// request with faults. Listens on a free port of 127.0.0.1.
#pragma once

#include <grpcpp/server.h>

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "client/cc/types.h"
#include "tests/support/fake_kv.h"
#include "vsprefill/v1/prefill.grpc.pb.h"

namespace vsprefill::testing {

/// Faults of the stream, beside those of the cache.
enum class StreamFault {
  kNone,
  kTruncated,    // ends with OK before done
  kHang,         // stops half way, until the call is cancelled
  kError,        // ends half way with `error`
  kNotAccepted,  // the first event is a chunk
  kAcceptedTwice,
  kOtherPrompt,  // accepts another number of tokens
  kOtherKvId,    // accepts with another kv_id, though one was expected
  kNoFirstToken,
  kEventAfterDone,
  kWrongStripe,  // sends all layers on stripe 0
  kAttachFails,  // Attach ends with NOT_FOUND
  kStripeHasOtherShape,
};

struct FakeServerOptions {
  client::KvShape shape = SmallShape();  // prompt_tokens and start_token come from the request
  KvFault kv_fault = KvFault::kNone;
  /// Where the chunks come from if not from the formula.
  std::function<FakeKv(const client::KvShape& shape)> make_kv;
  StreamFault stream_fault = StreamFault::kNone;
  grpc::Status error;  // of kError, and of every call if `refuse`
  bool refuse = false;
  bool refuse_prefill = false;     // only Prefill ends with `error`
  int64_t retry_pushback_ms = -1;  // with refuse
  int32_t first_token = 42;
  std::vector<v1::TargetStatus> targets;  // what done says of push targets
};

class FakePrefillServer final : public v1::PrefillService::Service {
 public:
  explicit FakePrefillServer(FakeServerOptions options);
  ~FakePrefillServer() override;

  const std::string& address() const { return address_; }
  /// The last Prefill request that came.
  v1::PrefillRequest last_request() const;
  /// Peers (host:port) of all streams so far.
  std::vector<std::string> peers() const;

  grpc::Status Prefill(grpc::ServerContext* context, const v1::PrefillRequest* request,
                       grpc::ServerWriter<v1::PrefillEvent>* out) override;
  grpc::Status Attach(grpc::ServerContext* context, const v1::AttachRequest* request,
                      grpc::ServerWriter<v1::PrefillEvent>* out) override;
  grpc::Status GetModelInfo(grpc::ServerContext* context, const v1::GetModelInfoRequest* request,
                            v1::ModelInfo* info) override;
  grpc::Status GetLoad(grpc::ServerContext* context, const v1::GetLoadRequest* request,
                       v1::Load* load) override;

 private:
  grpc::Status Refuse(grpc::ServerContext* context) const;
  v1::PrefillEvent AcceptedEvent(const v1::PrefillRequest& request, int stripe) const;
  client::KvShape ShapeOf(const v1::PrefillRequest& request) const;
  FakeKv MakeKv(const v1::PrefillRequest& request) const;

  const FakeServerOptions options_;
  mutable absl::Mutex mu_;
  std::map<std::string, v1::PrefillRequest> requests_ ABSL_GUARDED_BY(mu_);
  v1::PrefillRequest last_request_ ABSL_GUARDED_BY(mu_);
  std::vector<std::string> peers_ ABSL_GUARDED_BY(mu_);
  std::string address_;
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace vsprefill::testing
