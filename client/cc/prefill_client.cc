#include "client/cc/prefill_client.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/security/credentials.h>

#include <random>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/synchronization/mutex.h"
#include "client/cc/convert.h"
#include "client/cc/prefill_run.h"
#include "vsprefill/v1/prefill.grpc.pb.h"

namespace vsprefill::client {
namespace {

constexpr int kMaxStripes = 64;
// A chunk message is at most kv::kMaxMessageBytes; logits of a large vocabulary fit too.
constexpr int kMaxReceiveBytes = static_cast<int>(kv::kMaxMessageBytes) + (64 << 10);
// What may be on its way on one stream before the first window update; gRPC's own start is slow.
constexpr int kLookaheadBytes = 16 << 20;

std::shared_ptr<grpc::Channel> MakeChannel(const std::string& address) {
  grpc::ChannelArguments args;
  args.SetMaxReceiveMessageSize(kMaxReceiveBytes);
  args.SetInt(GRPC_ARG_HTTP2_STREAM_LOOKAHEAD_BYTES, kLookaheadBytes);
  // A server or a network that is gone without a word ends the call after half a minute; a long
  // compute with nothing to send does not.
  args.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 20000);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10000);
  args.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  // A prefill is too costly to be repeated behind the caller's back.
  args.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  // Without it channels to one address share a TCP connection, and stripes gain nothing.
  args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel(address, grpc::InsecureChannelCredentials(), args);
}

template <typename Context>
void SetTimeout(Context& context, absl::Duration timeout) {
  if (timeout != absl::InfiniteDuration()) {
    context.set_deadline(absl::ToChronoTime(absl::Now() + timeout));
  }
}

}  // namespace

/// One channel, and so one TCP connection, per stripe; made when first asked for, then kept.
class PrefillClient::Connections {
 public:
  explicit Connections(absl::string_view address) : address_(address) {}

  std::shared_ptr<grpc::Channel> channel(int i) {
    absl::MutexLock lock(&mu_);
    return Get(i).channel;
  }
  grpc::GenericStub* stub(int i) {
    absl::MutexLock lock(&mu_);
    return Get(i).stub.get();
  }

 private:
  struct Connection {
    std::shared_ptr<grpc::Channel> channel;
    std::unique_ptr<grpc::GenericStub> stub;
  };
  Connection& Get(int i) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    while (static_cast<int>(connections_.size()) <= i) {
      Connection& c = connections_.emplace_back();
      c.channel = MakeChannel(address_);
      c.stub = std::make_unique<grpc::GenericStub>(c.channel);
    }
    return connections_[i];
  }

  const std::string address_;
  absl::Mutex mu_;
  std::vector<Connection> connections_ ABSL_GUARDED_BY(mu_);
};

PrefillClient::PrefillClient(absl::string_view address)
    : connections_(std::make_unique<Connections>(address)) {}
PrefillClient::~PrefillClient() = default;

absl::StatusOr<PrefillResult> PrefillClient::Prefill(const PrefillRequest& request,
                                                     const PrefillHandlers& handlers,
                                                     Cancellation* cancellation) {
  if (request.stripes < 1 || request.stripes > kMaxStripes) {
    return absl::InvalidArgumentError(
        absl::StrFormat("stripes %d not in [1, %d]", request.stripes, kMaxStripes));
  }
  if (request.start_token < 0) {
    return absl::InvalidArgumentError(
        absl::StrFormat("start_token %d is negative", request.start_token));
  }
  const bool push = !request.push_targets.empty();
  if (push && request.stripes != 1) {
    return absl::InvalidArgumentError("stripes and push targets exclude each other");
  }
  if (!push && !handlers.destination) {
    return absl::InvalidArgumentError("no destination for the KV cache");
  }
  std::vector<grpc::GenericStub*> stubs;
  stubs.reserve(static_cast<size_t>(request.stripes));
  for (int i = 0; i < request.stripes; ++i) stubs.push_back(connections_->stub(i));
  PrefillRun run(stubs, request, handlers);
  if (cancellation == nullptr) return run.Run();
  const int64_t id = cancellation->Add([&run] { run.Cancel(); });
  absl::StatusOr<PrefillResult> result = run.Run();
  cancellation->Remove(id);
  return result;
}

absl::StatusOr<ModelInfo> PrefillClient::GetModelInfo(absl::Duration timeout) {
  grpc::ClientContext context;
  SetTimeout(context, timeout);
  v1::ModelInfo info;
  const grpc::Status s = v1::PrefillService::NewStub(connections_->channel(0))
                             ->GetModelInfo(&context, v1::GetModelInfoRequest(), &info);
  if (!s.ok()) return FromGrpc(s);
  return FromProto(info);
}

absl::StatusOr<ServerLoad> PrefillClient::GetLoad(absl::Duration timeout) {
  grpc::ClientContext context;
  SetTimeout(context, timeout);
  v1::Load load;
  const grpc::Status s = v1::PrefillService::NewStub(connections_->channel(0))
                             ->GetLoad(&context, v1::GetLoadRequest(), &load);
  if (!s.ok()) return FromGrpc(s);
  return FromProto(load);
}

std::string RandomRequestId() {
  std::random_device random;
  std::string id;
  for (int i = 0; i < 4; ++i) absl::StrAppendFormat(&id, "%08x", random());
  return id;
}

}  // namespace vsprefill::client
