// One push: the server as a client of KvReceiver.Push on a decode worker. Sends begin, every chunk,
// and finish (manifest and first token), then waits for the worker's verdict.
#pragma once

#include <grpcpp/client_context.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/client_callback.h>

#include <deque>
#include <memory>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/engine/job.h"
#include "server/engine/receiver.h"
#include "server/rpc/lent_chunks.h"

namespace vsprefill::rpc {

/// Counts pushes whose calls gRPC has not ended, so that a server does not go before them.
class PushTracker {
 public:
  void Add();
  void Remove();
  bool AwaitNone(absl::Duration timeout);

 private:
  bool None() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return count_ == 0; }
  absl::Mutex mu_;
  int count_ ABSL_GUARDED_BY(mu_) = 0;
};

class PushStream final : public grpc::ClientBidiReactor<grpc::ByteBuffer, grpc::ByteBuffer>,
                         public engine::Receiver,
                         public std::enable_shared_from_this<PushStream> {
 public:
  /// `sender` must outlive the call.
  PushStream(std::string target, std::shared_ptr<PushTracker> tracker, kv::KvSender& sender)
      : target_(std::move(target)), tracker_(std::move(tracker)), sender_(sender) {}

  // engine::Receiver (sender thread).
  void OnAccepted(std::shared_ptr<engine::Job> job, int stream) override;
  void OnStarted() override;
  void OnChunk(std::shared_ptr<kv::StagedChunk> chunk) override;
  void OnEndOfChunks() override;
  void OnFirstToken(const engine::FirstToken& first_token) override;
  void OnDelivered(const engine::Summary& summary) override {}
  void OnFailed(const absl::Status& status) override;
  std::shared_ptr<engine::Receiver> Renew() override;

  // gRPC reactions.
  void OnWriteDone(bool ok) override;
  void OnReadDone(bool ok) override;
  void OnDone(const grpc::Status& status) override;

 private:
  struct Message {
    grpc::ByteBuffer bytes;
    int64_t kv_bytes = 0;
    bool last = false;
  };

  void Enqueue(Message message);
  void MaybeEnqueueFinish();
  void Pump();

  const std::string target_;
  const std::shared_ptr<PushTracker> tracker_;
  kv::KvSender& sender_;
  const std::shared_ptr<LentChunks> lent_ = std::make_shared<LentChunks>();
  // Set once on the sender thread before the call starts.
  std::shared_ptr<engine::Job> job_;
  int stream_ = 0;
  grpc::ClientContext context_;
  std::unique_ptr<grpc::GenericStub> stub_;
  // Sender thread only.
  bool end_of_chunks_ = false, finish_queued_ = false;
  std::optional<int32_t> first_token_;
  // The write or read that is under way.
  Message writing_message_;
  absl::Time writing_since_;
  grpc::ByteBuffer response_;

  absl::Mutex mu_;
  std::shared_ptr<PushStream> self_ ABSL_GUARDED_BY(mu_);  // while gRPC has the call
  std::deque<Message> queue_ ABSL_GUARDED_BY(mu_);
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  bool ended_ ABSL_GUARDED_BY(mu_) = false;  // the peer has ended the call, or we gave up
  bool holding_ ABSL_GUARDED_BY(mu_) = false;
  std::optional<int64_t> confirmed_bytes_ ABSL_GUARDED_BY(mu_);
};

}  // namespace vsprefill::rpc
