#include "server/rpc/push_stream.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/security/credentials.h>
#include <grpcpp/support/channel_arguments.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "server/rpc/convert.h"
#include "vsprefill/v1/kv.pb.h"

namespace vsprefill::rpc {
namespace {

constexpr char kPushMethod[] = "/vsprefill.v1.KvReceiver/Push";

std::shared_ptr<grpc::Channel> ChannelTo(const std::string& target) {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, 20000);
  arguments.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, 10000);
  arguments.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);  // a retry would buffer what was sent
  // A connection of its own: no state of an earlier push, e.g. a back-off, has a say.
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel(target, grpc::InsecureChannelCredentials(), arguments);
}

}  // namespace

void PushTracker::Add() {
  absl::MutexLock lock(&mu_);
  ++count_;
}

void PushTracker::Remove() {
  absl::MutexLock lock(&mu_);
  --count_;
}

bool PushTracker::AwaitNone(absl::Duration timeout) {
  absl::MutexLock lock(&mu_);
  return mu_.AwaitWithTimeout(absl::Condition(this, &PushTracker::None), timeout);
}

void PushStream::OnAccepted(std::shared_ptr<engine::Job> job, int stream) {
  job_ = std::move(job);
  stream_ = stream;
}

void PushStream::OnStarted() {
  v1::PushRequest begin;
  begin.mutable_begin()->set_request_id(job_->request().request_id);
  begin.mutable_begin()->set_attempt(job_->request().attempt);
  *begin.mutable_begin()->mutable_layout() = ToProto(job_->source().plan());

  if (job_->request().deadline != absl::InfiniteFuture()) {
    context_.set_deadline(absl::ToChronoTime(job_->request().deadline));
  }
  stub_ = std::make_unique<grpc::GenericStub>(ChannelTo(target_));
  {
    absl::MutexLock lock(&mu_);
    self_ = shared_from_this();
    queue_.push_front({Serialize(begin), 0, false});
    holding_ = true;
  }
  tracker_->Add();
  stub_->PrepareBidiStreamingCall(&context_, kPushMethod, {}, this);
  AddHold();  // writes start outside of reactions
  StartRead(&response_);
  StartCall();
  Pump();
}

void PushStream::OnChunk(std::shared_ptr<kv::StagedChunk> chunk) {
  job_->FirstChunkHanded();
  lent_->Add(chunk);
  Enqueue({ChunkMessage(chunk), chunk->bytes, false});
}

void PushStream::OnEndOfChunks() {
  end_of_chunks_ = true;
  MaybeEnqueueFinish();
}

void PushStream::OnFirstToken(const engine::FirstToken& first_token) {
  first_token_ = first_token.token_id;
  MaybeEnqueueFinish();
}

void PushStream::MaybeEnqueueFinish() {
  if (!end_of_chunks_ || !first_token_.has_value() || finish_queued_) return;
  finish_queued_ = true;
  v1::PushRequest finish;
  // This stream has staged every chunk, so the manifest is complete.
  *finish.mutable_finish()->mutable_manifest() = ToProto(*job_->source().Manifest());
  finish.mutable_finish()->set_first_token(*first_token_);
  finish.mutable_finish()->set_prompt_tokens(job_->request().token_ids.size());
  Enqueue({Serialize(finish), 0, true});
}

void PushStream::Enqueue(Message message) {
  {
    absl::MutexLock lock(&mu_);
    if (ended_) return;
    queue_.push_back(std::move(message));
  }
  Pump();
}

void PushStream::Pump() {
  bool write = false, remove_hold = false;
  {
    absl::MutexLock lock(&mu_);
    if (!holding_ || writing_) return;
    if (ended_) {
      holding_ = false;
      remove_hold = true;
    } else if (!queue_.empty()) {
      writing_message_ = std::move(queue_.front());
      queue_.pop_front();
      writing_ = write = true;
    }
  }
  if (write) {
    writing_since_ = absl::Now();
    if (writing_message_.last) {
      StartWriteLast(&writing_message_.bytes, grpc::WriteOptions());
    } else {
      StartWrite(&writing_message_.bytes);
    }
  }
  if (remove_hold) RemoveHold();
}

void PushStream::OnWriteDone(bool ok) {
  const int64_t kv_bytes = std::exchange(writing_message_.kv_bytes, 0);
  const absl::Duration stall = absl::Now() - writing_since_;
  writing_message_.bytes.Clear();
  std::deque<Message> dropped;
  {
    absl::MutexLock lock(&mu_);
    writing_ = false;
    if (!ok) {
      ended_ = true;
      dropped.swap(queue_);
    }
  }
  if (ok && kv_bytes > 0) job_->ChunkWritten(stream_, kv_bytes, stall);
  Pump();
}

void PushStream::OnReadDone(bool ok) {
  if (ok) {
    v1::PushResponse response;
    const bool valid = Parse(response_, &response).ok();
    {
      absl::MutexLock lock(&mu_);
      confirmed_bytes_ = valid ? static_cast<int64_t>(response.bytes()) : -1;
    }
    StartRead(&response_);
    return;
  }
  // The worker has ended the call, or it is broken: nothing more is written.
  std::deque<Message> dropped;
  {
    absl::MutexLock lock(&mu_);
    ended_ = true;
    dropped.swap(queue_);
  }
  Pump();
}

void PushStream::OnDone(const grpc::Status& grpc_status) {
  absl::Status status = FromGrpc(grpc_status);
  const int64_t expected = job_->source().plan().StripeBytes(0, 1);
  std::shared_ptr<PushStream> self;
  {
    absl::MutexLock lock(&mu_);
    self.swap(self_);
    if (status.ok() && (!finish_queued_ || confirmed_bytes_ != expected)) {
      status = absl::DataLossError(absl::StrCat(
          "the target confirmed ", confirmed_bytes_.value_or(0), " of ", expected, " bytes"));
    }
  }
  job_->TargetFinished(stream_, status, status.ok() ? expected : 0);
  tracker_->Remove();
}

void PushStream::OnFailed(const absl::Status& status) {
  std::deque<Message> dropped;
  bool started;
  {
    absl::MutexLock lock(&mu_);
    ended_ = true;
    dropped.swap(queue_);
    started = holding_ || self_ != nullptr;
  }
  job_->TargetFinished(stream_, status, 0);
  if (started) {
    context_.TryCancel();
    lent_->Reclaim(sender_, target_);
  }
  Pump();
}

std::shared_ptr<engine::Receiver> PushStream::Renew() {
  return std::make_shared<PushStream>(target_, tracker_, sender_);
}

}  // namespace vsprefill::rpc
