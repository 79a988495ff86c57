#include "client/cc/kv_receiver.h"

#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>
#include <grpcpp/support/proto_buffer_reader.h>

#include <atomic>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/synchronization/notification.h"
#include "client/cc/convert.h"
#include "client/cc/kv_inbox.h"
#include "client/cc/raw_stream.h"
#include "client/cc/wire.h"
#include "vsprefill/v1/kv.grpc.pb.h"

namespace vsprefill::client {
namespace {

constexpr int kMaxReceiveBytes = static_cast<int>(kv::kMaxMessageBytes) + (64 << 10);
constexpr size_t kMaxRequestIdBytes = 256;
// How long a shutdown waits for pushes to take note before it cuts them off.
constexpr absl::Duration kShutdownGrace = absl::Seconds(2);

}  // namespace

/// One push. gRPC calls its methods one at a time; the inbox may end it from another thread.
class KvReceiver::PushReactor : public grpc::ServerReadReactor<grpc::ByteBuffer> {
 public:
  PushReactor(KvInbox& inbox, const KvReceiverOptions& options, grpc::ByteBuffer* response)
      : inbox_(inbox), options_(options), response_(response), handle_(std::make_shared<Handle>()) {
    handle_->reactor = this;
    handle_->Touch();
    if (absl::Status s = inbox_.Open(handle_); !s.ok()) {
      handle_->End(s);
    } else {
      StartRead(&message_);
    }
  }

  void OnReadDone(bool ok) override {
    if (!ok) {
      handle_->End(absl::DataLossError("the push ended before its finish message"));
      return;
    }
    handle_->Touch();
    absl::Status s = OnMessage();
    message_.Clear();
    if (!s.ok() || finished_) {
      handle_->End(s);
    } else if (!handle_->ended) {
      StartRead(&message_);
    }
  }

  void OnDone() override {
    inbox_.Leave(handle_);
    delete this;
  }

 private:
  /// Outlives the reactor where the inbox still holds it. A reactor lives until the one call of
  /// Finish, so that whoever flips `ended` may use the pointer.
  struct Handle : PushHandle {
    void End(const absl::Status& status) override {
      if (!ended.exchange(true)) reactor->Finish(ToGrpc(status));
    }
    absl::Time last_progress() const override { return absl::FromUnixNanos(progress_ns); }
    void Touch() { progress_ns = absl::ToUnixNanos(absl::Now()); }

    PushReactor* reactor = nullptr;
    std::atomic<bool> ended{false};
    std::atomic<int64_t> progress_ns{0};
  };

  absl::Status OnMessage() {
    absl::StatusOr<MessageSlices> slices = MessageSlices::Create(message_);
    if (!slices.ok()) return slices.status();
    absl::StatusOr<std::optional<WireChunk>> chunk = ParseChunk(slices->pieces());
    if (!chunk.ok()) return chunk.status();
    if (chunk->has_value()) {
      if (assembler_ == nullptr) return absl::InvalidArgumentError("a KV chunk before begin");
      return assembler_->Add((*chunk)->header, (*chunk)->payload);
    }
    v1::PushRequest request;
    grpc::ProtoBufferReader reader(&message_);
    if (!reader.status().ok() || !request.ParseFromZeroCopyStream(&reader)) {
      return absl::DataLossError("a message that is no PushRequest");
    }
    switch (request.message_case()) {
      case v1::PushRequest::kBegin:
        return OnBegin(request.begin());
      case v1::PushRequest::kFinish:
        return OnFinish(request.finish());
      default:
        return absl::OkStatus();  // of a later version
    }
  }

  absl::Status OnBegin(const v1::PushBegin& begin) {
    if (assembler_ != nullptr) return absl::InvalidArgumentError("begin came twice");
    if (begin.request_id().empty() || begin.request_id().size() > kMaxRequestIdBytes) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "request_id of %d bytes not in [1, %d]", begin.request_id().size(), kMaxRequestIdBytes));
    }
    absl::StatusOr<KvShape> shape = ShapeFromProto(begin.layout());
    if (!shape.ok()) return absl::InvalidArgumentError(shape.status().message());
    if (!options_.expected_kv_id.empty() && shape->layout.kv_id != options_.expected_kv_id) {
      return absl::FailedPreconditionError(absl::StrCat("the cache has kv_id ", shape->layout.kv_id,
                                                        ", this receiver takes ",
                                                        options_.expected_kv_id));
    }
    absl::Status s = inbox_.Begin(handle_, begin.request_id(), begin.attempt(), shape->bytes());
    if (!s.ok()) return s;
    absl::StatusOr<KvAllocation> memory = options_.allocate(begin.request_id(), *shape);
    if (!memory.ok()) return memory.status();
    absl::StatusOr<std::unique_ptr<KvAssembler>> assembler =
        KvAssembler::Create(*shape, std::move(memory->destination));
    if (!assembler.ok()) return assembler.status();
    assembler_ = *std::move(assembler);
    kv_.request_id = begin.request_id();
    kv_.attempt = begin.attempt();
    kv_.shape = *std::move(shape);
    kv_.owner = std::move(memory->owner);
    return absl::OkStatus();
  }

  absl::Status OnFinish(const v1::PushFinish& finish) {
    if (assembler_ == nullptr) return absl::InvalidArgumentError("finish before begin");
    if (static_cast<int64_t>(finish.prompt_tokens()) != kv_.shape.prompt_tokens) {
      return absl::DataLossError(absl::StrFormat("finish says %d prompt tokens, begin said %d",
                                                 finish.prompt_tokens(), kv_.shape.prompt_tokens));
    }
    if (absl::Status s = assembler_->Finish(FromProto(finish.manifest())); !s.ok()) return s;
    v1::PushResponse response;
    response.set_bytes(static_cast<uint64_t>(assembler_->bytes()));
    *response_ = Serialize(response);
    kv_.first_token = finish.first_token();
    finished_ = true;
    return inbox_.Complete(handle_, std::move(kv_));
  }

  KvInbox& inbox_;
  const KvReceiverOptions& options_;
  grpc::ByteBuffer* const response_;
  const std::shared_ptr<Handle> handle_;
  grpc::ByteBuffer message_;
  std::unique_ptr<KvAssembler> assembler_;
  ReceivedKv kv_;
  bool finished_ = false;  // the finish message was taken
};

class KvReceiver::Service
    : public v1::KvReceiver::WithRawCallbackMethod_Push<v1::KvReceiver::Service> {
 public:
  explicit Service(KvReceiverOptions options)
      : options_(std::move(options)), inbox_(options_.max_caches, options_.max_bytes) {}

  ~Service() override {
    inbox_.Close();
    stop_.Notify();
    if (server_ != nullptr) {
      server_->Shutdown(absl::ToChronoTime(absl::Now() + kShutdownGrace));
      server_->Wait();
    }
    if (watch_.joinable()) watch_.join();
  }

  grpc::ServerReadReactor<grpc::ByteBuffer>* Push(grpc::CallbackServerContext*,
                                                  grpc::ByteBuffer* response) override {
    return new PushReactor(inbox_, options_, response);  // deletes itself in OnDone
  }

  /// The port, 0 if it could not be bound.
  int Listen(const std::string& address) {
    int port = 0;
    grpc::EnableDefaultHealthCheckService(true);
    grpc::ServerBuilder builder;
    builder.SetMaxReceiveMessageSize(kMaxReceiveBytes);
    builder.AddChannelArgument(GRPC_ARG_ALLOW_REUSEPORT, 0);
    // Servers that push may ping a quiet connection this often without being turned away.
    builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS, 5000);
    builder.AddListeningPort(address, grpc::InsecureServerCredentials(), &port);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
    if (server_ == nullptr) return 0;
    watch_ = std::thread([this] {
      const absl::Duration period = std::min(options_.stall_timeout / 4, absl::Seconds(1));
      while (!stop_.WaitForNotificationWithTimeout(period)) {
        inbox_.EndStalled(absl::Now() - options_.stall_timeout);
      }
    });
    return port;
  }

  KvInbox& inbox() { return inbox_; }

 private:
  const KvReceiverOptions options_;
  KvInbox inbox_;
  absl::Notification stop_;
  std::thread watch_;
  std::unique_ptr<grpc::Server> server_;
};

KvReceiver::KvReceiver() = default;
KvReceiver::~KvReceiver() = default;

absl::StatusOr<std::unique_ptr<KvReceiver>> KvReceiver::Start(absl::string_view address,
                                                              KvReceiverOptions options) {
  if (!options.allocate) return absl::InvalidArgumentError("KvReceiverOptions.allocate is not set");
  std::unique_ptr<KvReceiver> receiver(new KvReceiver);
  receiver->service_ = std::make_unique<Service>(std::move(options));
  receiver->address_ = std::string(address);
  const int port = receiver->service_->Listen(receiver->address_);
  if (port == 0) return absl::UnavailableError(absl::StrCat("cannot listen on ", address));
  const size_t colon = receiver->address_.rfind(':');
  if (colon != std::string::npos && receiver->address_.substr(colon) == ":0") {
    receiver->address_.replace(colon + 1, 1, absl::StrCat(port));
  }
  return receiver;
}

const std::string& KvReceiver::address() const { return address_; }

absl::StatusOr<ReceivedKv> KvReceiver::Next(absl::Duration timeout) {
  return service_->inbox().Next(timeout);
}

void KvReceiver::Shutdown() { service_->inbox().Close(); }

int KvReceiver::num_caches() const { return service_->inbox().num_caches(); }
int64_t KvReceiver::reserved_bytes() const { return service_->inbox().reserved_bytes(); }

}  // namespace vsprefill::client
