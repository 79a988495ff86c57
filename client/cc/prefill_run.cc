#include "client/cc/prefill_run.h"

#include <grpcpp/support/proto_buffer_reader.h>

#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/cc/convert.h"

namespace vsprefill::client {
namespace {

constexpr char kPrefillMethod[] = "/vsprefill.v1.PrefillService/Prefill";
constexpr char kAttachMethod[] = "/vsprefill.v1.PrefillService/Attach";

absl::StatusOr<v1::PrefillEvent> ParseEvent(const grpc::ByteBuffer& message) {
  v1::PrefillEvent event;
  grpc::ByteBuffer copy = message;  // a reference; the reader wants it mutable
  grpc::ProtoBufferReader reader(&copy);
  if (!reader.status().ok() || !event.ParseFromZeroCopyStream(&reader)) {
    return absl::DataLossError("the server sent an event that is no PrefillEvent");
  }
  return event;
}

/// The server's status, with the time to wait before a retry where it names one.
absl::Status EndOfCall(const grpc::Status& status, const grpc::ClientContext& context) {
  if (status.ok()) return absl::OkStatus();
  absl::Status result = FromGrpc(status);
  const auto& metadata = context.GetServerTrailingMetadata();
  const auto it = metadata.find("grpc-retry-pushback-ms");
  if (it == metadata.end()) return result;
  return absl::Status(result.code(),
                      absl::StrCat(result.message(), " (retry after ",
                                   std::string(it->second.data(), it->second.size()), " ms)"));
}

bool SameShape(const KvShape& a, const KvShape& b) {
  return a.layout.num_layers == b.layout.num_layers &&
         a.layout.num_kv_heads == b.layout.num_kv_heads && a.layout.head_dim == b.layout.head_dim &&
         a.layout.dtype == b.layout.dtype && a.layout.kv_id == b.layout.kv_id &&
         a.prompt_tokens == b.prompt_tokens && a.start_token == b.start_token;
}

}  // namespace

PrefillRun::PrefillRun(const std::vector<grpc::GenericStub*>& stubs, const PrefillRequest& request,
                       const PrefillHandlers& handlers)
    : stubs_(stubs), request_(request), handlers_(handlers), start_(absl::Now()) {
  for (size_t i = 0; i < stubs_.size(); ++i) {
    auto stripe = std::make_unique<Stripe>();
    stripe->index = static_cast<int>(i);
    if (request.timeout != absl::InfiniteDuration()) {
      stripe->context.set_deadline(absl::ToChronoTime(start_ + request.timeout));
    }
    stripes_.push_back(std::move(stripe));
  }
}

PrefillRun::~PrefillRun() = default;

absl::Status PrefillRun::failure() const {
  absl::MutexLock lock(&mu_);
  return failure_;
}

void PrefillRun::Fail(absl::Status status) {
  {
    absl::MutexLock lock(&mu_);
    if (!failure_.ok()) return;  // what comes after is a consequence
    failure_ = std::move(status);
  }
  Cancel();
}

void PrefillRun::Cancel() {
  for (const auto& stripe : stripes_) stripe->context.TryCancel();
}

absl::StatusOr<PrefillResult> PrefillRun::Run() {
  ReadStripe(*stripes_[0], kPrefillMethod, Serialize(ToProto(request_)));
  for (const auto& stripe : stripes_) {
    if (stripe->thread.joinable()) stripe->thread.join();
  }
  if (absl::Status s = failure(); !s.ok()) return s;
  for (const TargetStatus& t : result_.targets) {
    if (t.code != 0) {
      return absl::Status(static_cast<absl::StatusCode>(t.code),
                          absl::StrCat("push target ", t.target, ": ", t.message));
    }
  }
  if (!stripes_[0]->first_token) return absl::DataLossError("the server sent no first token");
  if (assembler_ != nullptr) {
    if (absl::Status s = assembler_->Finish(manifest_); !s.ok()) return s;
    result_.received_bytes = assembler_->bytes();
  }
  result_.client_total = absl::Now() - start_;
  return std::move(result_);
}

void PrefillRun::ReadStripe(Stripe& stripe, const std::string& method,
                            const grpc::ByteBuffer& request) {
  RawStream stream(*stubs_[stripe.index], method, request, &stripe.context);
  if (absl::Status s = ReadAll(stripe, stream); !s.ok()) Fail(std::move(s));
}

absl::Status PrefillRun::ReadAll(Stripe& stripe, RawStream& stream) {
  grpc::ByteBuffer message;
  while (stream.Read(&message)) {
    // After an error the rest is only drained: the call has been cancelled.
    if (absl::Status s = OnMessage(stripe, message); !s.ok()) Fail(std::move(s));
    message.Clear();
  }
  absl::Status end = EndOfCall(stream.Finish(), stripe.context);
  if (!end.ok()) {
    if (stripe.index == 0) return end;
    return absl::Status(end.code(), absl::StrCat("stripe ", stripe.index, ": ", end.message()));
  }
  if (!stripe.done) {
    return absl::DataLossError(absl::StrFormat(
        "stripe %d: the stream ended before the server said that it is done", stripe.index));
  }
  return absl::OkStatus();
}

absl::Status PrefillRun::OnMessage(Stripe& stripe, const grpc::ByteBuffer& message) {
  if (absl::Status s = failure(); !s.ok()) return s;
  absl::StatusOr<MessageSlices> slices = MessageSlices::Create(message);
  if (!slices.ok()) return slices.status();
  absl::StatusOr<std::optional<WireChunk>> chunk = ParseChunk(slices->pieces());
  if (!chunk.ok()) return chunk.status();
  if (stripe.done) return absl::DataLossError("the server sent an event after done");
  if (chunk->has_value()) return OnChunk(stripe, **chunk);

  absl::StatusOr<v1::PrefillEvent> event = ParseEvent(message);
  if (!event.ok()) return event.status();
  if (!stripe.accepted && event->event_case() != v1::PrefillEvent::kAccepted) {
    return absl::DataLossError("the server's first event is not accepted");
  }
  switch (event->event_case()) {
    case v1::PrefillEvent::kAccepted:
      return OnAccepted(stripe, event->accepted());
    case v1::PrefillEvent::kFirstToken:
      if (stripe.index != 0 || stripe.first_token) {
        return absl::DataLossError("the server sent a first token that nobody asked for");
      }
      stripe.first_token = true;
      result_.client_ttft = absl::Now() - start_;
      result_.first_token.token_id = event->first_token().token_id();
      result_.first_token.logits.assign(event->first_token().logits().begin(),
                                        event->first_token().logits().end());
      if (handlers_.on_first_token) handlers_.on_first_token(result_.first_token);
      return absl::OkStatus();
    case v1::PrefillEvent::kDone:
      return OnDone(stripe, event->done());
    default:
      return absl::OkStatus();  // an event of a later version
  }
}

absl::Status PrefillRun::OnChunk(const Stripe& stripe, const WireChunk& chunk) {
  if (!stripe.accepted) return absl::DataLossError("the server's first event is not accepted");
  if (assembler_ == nullptr) return absl::DataLossError("the server sent KV that it was to push");
  if (chunk.header.layer % static_cast<int64_t>(stripes_.size()) != stripe.index) {
    return absl::DataLossError(absl::StrFormat("layer %d came on stripe %d of %d",
                                               chunk.header.layer, stripe.index, stripes_.size()));
  }
  if (absl::Status s = assembler_->Add(chunk.header, chunk.payload); !s.ok()) return s;
  if (handlers_.on_progress) {
    absl::MutexLock lock(&progress_mu_);
    handlers_.on_progress(assembler_->complete_layers(), assembler_->bytes());
  }
  return absl::OkStatus();
}

absl::Status PrefillRun::CheckAccepted(const Accepted& a) const {
  const kv::KvLayout& layout = a.shape.layout;
  if (!request_.expected_kv_id.empty() && layout.kv_id != request_.expected_kv_id) {
    return absl::FailedPreconditionError(absl::StrCat("the server's KV cache has kv_id ",
                                                      layout.kv_id, ", expected is ",
                                                      request_.expected_kv_id));
  }
  if (request_.kv_dtype.has_value() && layout.dtype != *request_.kv_dtype) {
    return absl::FailedPreconditionError(absl::StrCat("the server's KV cache is ",
                                                      kernels::Name(layout.dtype), ", asked was ",
                                                      kernels::Name(*request_.kv_dtype)));
  }
  if (a.shape.prompt_tokens != static_cast<int64_t>(request_.token_ids.size()) ||
      a.shape.start_token != request_.start_token) {
    return absl::DataLossError(absl::StrFormat(
        "the server accepted tokens [%d, %d), asked was [%d, %d)", a.shape.start_token,
        a.shape.prompt_tokens, request_.start_token, request_.token_ids.size()));
  }
  if (!push() && a.stripes != static_cast<int>(stripes_.size()) &&
      !(stripes_.size() == 1 && a.stripes == 0)) {
    return absl::DataLossError(absl::StrFormat("the server accepted %d stripes, asked was %d",
                                               a.stripes, stripes_.size()));
  }
  return absl::OkStatus();
}

absl::Status PrefillRun::OnAccepted(Stripe& stripe, const v1::Accepted& proto) {
  if (stripe.accepted) return absl::DataLossError("the server accepted twice");
  absl::StatusOr<Accepted> accepted = FromProto(proto);
  if (!accepted.ok()) return accepted.status();
  if (absl::Status s = CheckAccepted(*accepted); !s.ok()) return s;
  stripe.accepted = true;
  if (stripe.index != 0) {
    if (!SameShape(accepted->shape, result_.accepted.shape)) {
      return absl::DataLossError(
          absl::StrFormat("stripe %d has another KV layout than stripe 0", stripe.index));
    }
    return absl::OkStatus();
  }
  result_.accepted = *std::move(accepted);
  if (push()) return absl::OkStatus();
  absl::StatusOr<KvDestination> destination = handlers_.destination(result_.accepted);
  if (!destination.ok()) return destination.status();
  absl::StatusOr<std::unique_ptr<KvAssembler>> assembler =
      KvAssembler::Create(result_.accepted.shape, *std::move(destination));
  if (!assembler.ok()) return assembler.status();
  assembler_ = *std::move(assembler);
  StartAttaching();
  return absl::OkStatus();
}

void PrefillRun::StartAttaching() {
  for (size_t i = 1; i < stripes_.size(); ++i) {
    Stripe* stripe = stripes_[i].get();
    stripe->thread = std::thread([this, stripe] {
      v1::AttachRequest attach;
      attach.set_request_id(request_.request_id);
      attach.set_attempt(request_.attempt);
      attach.set_stripe(static_cast<uint32_t>(stripe->index));
      ReadStripe(*stripe, kAttachMethod, Serialize(attach));
    });
  }
}

absl::Status PrefillRun::OnDone(Stripe& stripe, const v1::Done& done) {
  stripe.done = true;
  if (stripe.index != 0) return absl::OkStatus();
  for (const v1::TargetStatus& t : done.targets()) result_.targets.push_back(FromProto(t));
  if (push() && handlers_.on_targets) handlers_.on_targets(result_.targets);
  result_.stats = FromProto(done.stats());
  manifest_ = FromProto(done.manifest());
  return absl::OkStatus();
}

}  // namespace vsprefill::client
