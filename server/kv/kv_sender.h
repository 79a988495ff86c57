// The delivery thread: stages chunks for every stream as they become ready and the stream has room,
// watches for streams that stall, and runs short tasks for the rest of the server, so that neither
// the engine thread nor a gRPC thread ever waits for the other side. It never blocks on a client: a
// stream holds at most `window_chunks` chunks that gRPC has not accepted.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/kv/kv_source.h"
#include "server/kv/kv_stager.h"
#include "server/kv/mailbox.h"

namespace vsprefill::kv {

/// Takes one stream's chunks. All calls come on the sender thread and must not block. No call
/// follows KvStream::Close, OnAllReleased, OnStalled or OnStageError.
class KvSink {
 public:
  virtual ~KvSink() = default;
  virtual void OnChunk(std::shared_ptr<StagedChunk> chunk) = 0;
  /// The last chunk has been given to OnChunk.
  virtual void OnEndOfChunks() = 0;
  /// Every chunk has been released; `last_release` is infinitely past for a stream without chunks.
  virtual void OnAllReleased(absl::Time last_release) = 0;
  /// Nothing went out for the stall timeout although chunks are waiting.
  virtual void OnStalled(absl::Duration idle) = 0;
  virtual void OnStageError(const absl::Status& status) = 0;
};

/// One stripe of a source on its way to one sink.
class KvStream : public std::enable_shared_from_this<KvStream> {
 public:
  KvStream(std::shared_ptr<Mailbox> mailbox, std::shared_ptr<KvSource> source, int stripe,
           int stripes, std::shared_ptr<KvSink> sink);

  /// Any thread: gRPC accepted one chunk, there is room for another.
  void ChunkWritten();
  /// Sender thread: stops the stream; the sink is let go soon.
  void Close() { closed_ = true; }

 private:
  friend class KvSender;

  const std::shared_ptr<Mailbox> mailbox_;
  // All below: sender thread only, but for the clock of progress.
  std::shared_ptr<KvSource> source_;
  std::shared_ptr<KvSink> sink_;
  ChunkCursor cursor_;
  int window_used_ = 0;
  int64_t unreleased_chunks_ = 0;
  bool ended_ = false, closed_ = false;
  absl::Time last_release_ = absl::InfinitePast();
  const std::shared_ptr<std::atomic<int64_t>> last_progress_nanos_;
};

struct KvSenderOptions {
  int window_chunks = 2;
  absl::Duration stall_timeout = absl::Seconds(30);
};

class KvSender {
 public:
  /// `stager` must outlive the sender.
  KvSender(KvStager& stager, const KvSenderOptions& options);
  /// Ends the thread. Tasks that were not run are dropped.
  ~KvSender();

  /// Any thread: runs `task` on the sender thread, in the order of the calls.
  void Post(std::function<void()> task) { mailbox_->Post(std::move(task)); }
  void PostAfter(absl::Duration delay, std::function<void()> task) {
    mailbox_->PostAt(absl::Now() + delay, std::move(task));
  }
  /// Any thread: something became ready.
  void Wake() {
    mailbox_->Post([] {});
  }

  std::shared_ptr<KvStream> AddStream(std::shared_ptr<KvSource> source, int stripe, int stripes,
                                      std::shared_ptr<KvSink> sink);

 private:
  void Loop();
  /// Stages at most one chunk; false where there was nothing to do.
  bool PumpOne(KvStream& stream);
  void CheckStall(KvStream& stream);

  KvStager& stager_;
  const KvSenderOptions options_;
  const std::shared_ptr<Mailbox> mailbox_;
  std::vector<std::shared_ptr<KvStream>> streams_;  // sender thread only
  std::thread thread_;
};

}  // namespace vsprefill::kv
