// One response stream, of Prefill or of Attach: writes the events of its job one at a time. gRPC
// holds at most one message; what waits here is at most the sender's window of chunks.
#pragma once

#include <grpcpp/server_context.h>
#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/server_callback.h>

#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/engine/job.h"
#include "server/engine/receiver.h"
#include "server/kv/kv_sender.h"
#include "server/rpc/lent_chunks.h"

namespace vsprefill::rpc {

/// Lives until gRPC has reported the end of the call and nobody else holds it.
class EventStream final : public grpc::ServerWriteReactor<grpc::ByteBuffer>,
                          public engine::Receiver,
                          public std::enable_shared_from_this<EventStream> {
 public:
  /// `context` and `sender` must outlive the call. A stream whose client takes neither events nor
  /// status for `linger` after its job has ended is cut off.
  static std::shared_ptr<EventStream> Create(grpc::CallbackServerContext* context,
                                             kv::KvSender& sender, absl::Duration linger);

  /// Ends the call before a job took it over.
  void Reject(const absl::Status& status);

  // engine::Receiver (sender thread).
  void OnAccepted(std::shared_ptr<engine::Job> job, int stream) override;
  void OnChunk(std::shared_ptr<kv::StagedChunk> chunk) override;
  void OnFirstToken(const engine::FirstToken& first_token) override;
  void OnDelivered(const engine::Summary& summary) override;
  void OnFailed(const absl::Status& status) override;

  // gRPC reactions.
  void OnWriteDone(bool ok) override;
  void OnCancel() override;
  void OnDone() override;

 private:
  struct Message {
    grpc::ByteBuffer bytes;
    int64_t kv_bytes = 0;
    std::function<void()> on_handed;  // right before it goes to gRPC
  };

  EventStream(grpc::CallbackServerContext* context, kv::KvSender& sender, absl::Duration linger)
      : context_(context), sender_(sender), linger_(linger), peer_(context->peer()) {}
  void Enqueue(Message message, bool at_front);
  void Pump();
  /// No event follows; the call ends with `status` after those that wait.
  void Close(const absl::Status& status, bool drop_events, absl::Duration grace);
  void CutOff(const absl::Status& status);

  grpc::CallbackServerContext* const context_;
  kv::KvSender& sender_;
  const absl::Duration linger_;
  const std::string peer_;
  const std::shared_ptr<LentChunks> lent_ = std::make_shared<LentChunks>();
  grpc::ByteBuffer writing_bytes_;  // owned by the write that is under way
  int64_t writing_kv_bytes_ = 0;
  absl::Time writing_since_;

  absl::Mutex mu_;
  std::shared_ptr<EventStream> self_ ABSL_GUARDED_BY(mu_);  // until OnDone
  std::shared_ptr<engine::Job> job_ ABSL_GUARDED_BY(mu_);
  int stream_ ABSL_GUARDED_BY(mu_) = 0;
  std::deque<Message> queue_ ABSL_GUARDED_BY(mu_);
  bool writing_ ABSL_GUARDED_BY(mu_) = false;
  std::optional<absl::Status> close_status_ ABSL_GUARDED_BY(mu_);
  bool finish_called_ ABSL_GUARDED_BY(mu_) = false;
  bool cancelled_ ABSL_GUARDED_BY(mu_) = false;
  bool done_ ABSL_GUARDED_BY(mu_) = false;  // context_ is gone
};

}  // namespace vsprefill::rpc
