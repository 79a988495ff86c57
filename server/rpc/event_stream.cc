#include "server/rpc/event_stream.h"

#include <grpc/grpc.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "server/rpc/convert.h"

namespace vsprefill::rpc {
namespace {

// A failed stream whose client does not read gets this long for its last message.
constexpr absl::Duration kFailGrace = absl::Milliseconds(250);

}  // namespace

std::shared_ptr<EventStream> EventStream::Create(grpc::CallbackServerContext* context,
                                                 kv::KvSender& sender, absl::Duration linger) {
  std::shared_ptr<EventStream> stream(new EventStream(context, sender, linger));
  absl::MutexLock lock(&stream->mu_);
  stream->self_ = stream;
  return stream;
}

void EventStream::Reject(const absl::Status& status) {
  if (const auto pushback = status.GetPayload(engine::kPushbackPayload); pushback.has_value()) {
    context_->AddTrailingMetadata("grpc-retry-pushback-ms", std::string(*pushback));
  }
  Close(status, /*drop_events=*/true, kFailGrace);
}

void EventStream::OnAccepted(std::shared_ptr<engine::Job> job, int stream) {
  bool cancelled;
  {
    absl::MutexLock lock(&mu_);
    job_ = job;
    stream_ = stream;
    cancelled = cancelled_ || done_;
  }
  if (cancelled) {
    job->Fail(absl::CancelledError("cancelled before it was accepted"));
    return;
  }
  Enqueue({Serialize(AcceptedEvent(*job, stream)), 0, nullptr}, /*at_front=*/false);
}

void EventStream::OnChunk(std::shared_ptr<kv::StagedChunk> chunk) {
  std::shared_ptr<engine::Job> job;
  {
    absl::MutexLock lock(&mu_);
    job = job_;
  }
  lent_->Add(chunk);
  Message message{ChunkMessage(chunk), chunk->bytes, nullptr};
  if (job != nullptr) message.on_handed = [job] { job->FirstChunkHanded(); };
  Enqueue(std::move(message), /*at_front=*/false);
}

void EventStream::OnFirstToken(const engine::FirstToken& first_token) {
  std::shared_ptr<engine::Job> job;
  {
    absl::MutexLock lock(&mu_);
    if (stream_ != 0) return;  // only the caller's own stream carries it
    job = job_;
  }
  // Before the chunks that wait: the token is what the caller's user is waiting for.
  Enqueue({Serialize(FirstTokenEvent(first_token)), 0, [job] { job->FirstTokenHanded(); }},
          /*at_front=*/true);
}

void EventStream::OnDelivered(const engine::Summary& summary) {
  bool is_caller;
  {
    absl::MutexLock lock(&mu_);
    is_caller = stream_ == 0;
  }
  Enqueue({Serialize(DoneEvent(summary, is_caller)), 0, nullptr}, /*at_front=*/false);
  absl::Status status;
  for (const engine::TargetResult& target : summary.targets) {
    if (!target.status.ok() && status.ok()) {
      status = absl::Status(target.status.code(), absl::StrCat("push target ", target.target, ": ",
                                                               target.status.message()));
    }
  }
  Close(status, /*drop_events=*/false, linger_);
}

void EventStream::OnFailed(const absl::Status& status) {
  Close(status, /*drop_events=*/true, kFailGrace);
}

void EventStream::Enqueue(Message message, bool at_front) {
  {
    absl::MutexLock lock(&mu_);
    if (done_ || cancelled_ || close_status_.has_value()) return;
    if (at_front) {
      queue_.push_front(std::move(message));
    } else {
      queue_.push_back(std::move(message));
    }
  }
  Pump();
}

void EventStream::Pump() {
  Message message;
  absl::Status finish_status;
  {
    absl::MutexLock lock(&mu_);
    if (writing_ || finish_called_ || done_) return;
    if (!queue_.empty()) {
      message = std::move(queue_.front());
      queue_.pop_front();
      writing_ = true;
    } else if (close_status_.has_value()) {
      finish_called_ = true;
      finish_status = *close_status_;
    } else {
      return;
    }
  }
  if (!message.bytes.Valid()) {
    Finish(ToGrpc(finish_status));
    return;
  }
  writing_bytes_.Swap(&message.bytes);
  writing_kv_bytes_ = message.kv_bytes;
  writing_since_ = absl::Now();
  if (message.on_handed) message.on_handed();
  StartWrite(&writing_bytes_);
}

void EventStream::OnWriteDone(bool ok) {
  const int64_t kv_bytes = std::exchange(writing_kv_bytes_, 0);
  const absl::Duration stall = absl::Now() - writing_since_;
  writing_bytes_.Clear();  // gRPC keeps its own references to the slices
  std::shared_ptr<engine::Job> job;
  std::deque<Message> dropped;
  int stream;
  {
    absl::MutexLock lock(&mu_);
    writing_ = false;
    job = job_;
    stream = stream_;
    if (!ok) {
      dropped.swap(queue_);
      if (!close_status_.has_value()) close_status_ = absl::CancelledError("the stream is broken");
    }
  }
  if (job != nullptr) {
    if (!ok) {
      job->Fail(absl::CancelledError(absl::StrCat("the stream of stripe ", stream, " broke off")));
    } else if (kv_bytes > 0) {
      job->ChunkWritten(stream, kv_bytes, stall);
    }
  }
  Pump();
}

void EventStream::Close(const absl::Status& status, bool drop_events, absl::Duration grace) {
  std::deque<Message> dropped;  // destroyed outside of the lock: chunks go with it
  {
    absl::MutexLock lock(&mu_);
    if (!close_status_.has_value()) close_status_ = status;
    if (drop_events) dropped.swap(queue_);
  }
  Pump();
  sender_.PostAfter(grace, [self = shared_from_this(), status] { self->CutOff(status); });
}

// Finish alone waits behind data that the client never reads. Cancelling the call with a status
// sends that status at once, past flow control, and frees what gRPC holds.
void EventStream::CutOff(const absl::Status& status) {
  // Also where the call is over: the connection may still hold what was written.
  lent_->Reclaim(sender_, peer_);
  grpc_call* call;
  {
    absl::MutexLock lock(&mu_);
    if (done_) return;
    call = context_->c_call();
    grpc_call_ref(call);
  }
  const grpc::Status grpc_status = ToGrpc(
      status.ok() ? absl::AbortedError("the client did not take the end of the stream") : status);
  grpc_call_cancel_with_status(call, static_cast<grpc_status_code>(grpc_status.error_code()),
                               grpc_status.error_message().c_str(), nullptr);
  grpc_call_unref(call);
}

void EventStream::OnCancel() {
  std::shared_ptr<engine::Job> job;
  std::deque<Message> dropped;
  int stream;
  {
    absl::MutexLock lock(&mu_);
    cancelled_ = true;
    job = job_;
    stream = stream_;
    dropped.swap(queue_);
    if (!close_status_.has_value()) close_status_ = absl::CancelledError("cancelled");
  }
  if (job != nullptr) {
    if (absl::Now() >= job->request().deadline) {
      job->Fail(absl::DeadlineExceededError("the deadline passed before the cache was delivered"));
    } else {
      job->Fail(absl::CancelledError(
          stream == 0 ? std::string("the caller cancelled")
                      : absl::StrCat("the receiver of stripe ", stream, " cancelled")));
    }
  }
  Pump();
}

void EventStream::OnDone() {
  std::shared_ptr<EventStream> self;
  std::shared_ptr<engine::Job> job;
  std::deque<Message> dropped;
  absl::MutexLock lock(&mu_);
  done_ = true;
  self.swap(self_);
  job.swap(job_);
  dropped.swap(queue_);
}

}  // namespace vsprefill::rpc
