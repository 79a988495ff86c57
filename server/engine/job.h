// One admitted request, from the queue to its end, shared by the engine thread (which computes it),
// the sender thread (which owns its delivery) and the gRPC threads of its streams. Whatever
// happens, it ends exactly once, with its receivers told and its KV memory let go.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "kernels/attention.h"
#include "server/attention/attention_method.h"
#include "server/engine/receiver.h"
#include "server/engine/request.h"
#include "server/kv/kv_pool.h"
#include "server/kv/kv_sender.h"
#include "server/kv/kv_source.h"
#include "server/metrics/metrics.h"

namespace vsprefill::engine {

enum class Phase { kQueue, kCompute, kTransfer, kEnded };

/// What the engine thread found out, beside the KV.
struct ComputeResult {
  absl::Time end;  // of the last layer
  absl::Duration index_build;
  std::vector<kernels::PairCounts> counts;  // per layer
  int dense_fallback_layers = 0;            // AttentionMethod::dense_fallback_layers
};

/// Quarter of the layers that `layer` lies in (fewer than four layers: its number).
inline int LayerGroup(int layer, int num_layers) {
  return layer * std::min(4, num_layers) / num_layers;
}

class Job : public std::enable_shared_from_this<Job> {
 public:
  struct Environment {
    kv::KvSender* sender = nullptr;
    metrics::Metrics* metrics = nullptr;
    absl::Duration stall_timeout;
    std::function<void(const std::shared_ptr<Job>&)> on_end;  // sender thread, once
  };

  Job(const Environment& environment, Request request,
      std::unique_ptr<attention::AttentionMethod> method, std::shared_ptr<kv::KvSource> source,
      kv::KvPool::Reservation reservation);

  const Request& request() const { return request_; }
  attention::AttentionMethod& method() const { return *method_; }
  kv::KvSource& source() const { return *source_; }
  bool is_push() const { return !request_.push_targets.empty(); }

  // --- Any thread.
  /// Ends the request with `status` unless it has ended or failed already.
  void Fail(absl::Status status);
  bool failed() const { return failed_.load(); }
  Phase phase() const;
  absl::Status failure() const;

  // --- Admission (any thread, once each).
  /// Announces the request to its receivers; `targets` get the KV where there are any, otherwise
  /// the caller does, as stripe 0.
  void Begin(std::shared_ptr<Receiver> caller, std::vector<std::shared_ptr<Receiver>> targets);
  /// INVALID_ARGUMENT: no such stripe; ALREADY_EXISTS: attached before.
  absl::Status Attach(int stripe, std::shared_ptr<Receiver> receiver);

  // --- Engine thread.
  /// Ends the wait in the queue. The failure where the request has failed.
  absl::Status Start();
  kv::KvPool::Reservation TakeReservation();
  /// Cancelled or late? Called at every layer of every chunk.
  absl::Status CheckAlive();
  void PublishFirstToken(FirstToken first_token);
  void PublishResult(ComputeResult result);

  // --- Receivers (gRPC threads).
  /// `stall`: time from handing the chunk to gRPC until gRPC took it.
  void ChunkWritten(int stream, int64_t bytes, absl::Duration stall);
  void FirstChunkHanded();
  void FirstTokenHanded();
  void TargetFinished(int stream, absl::Status status, int64_t bytes);

  // --- Sender thread, about every 100 ms: deadline, missing attaches, a caller that takes nothing.
  void Tick(absl::Time now);

 private:
  class StreamSink;
  struct Stream {
    std::shared_ptr<Receiver> receiver;
    std::shared_ptr<kv::KvStream> kv;
    bool released = false;  // all chunks
    bool retried = false;
    std::optional<TargetResult> target;  // push: set when the target has answered
    bool finished(bool push) const { return released && (!push || target.has_value()); }
  };

  void AddStream(int index, std::shared_ptr<Receiver> receiver);
  /// What has been missing for longer than the stall time-out; empty if nothing.
  std::string Overdue(absl::Time now) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  /// Starts a push over that found its target unavailable; false where there is no second try.
  bool RetryTarget(int index, const absl::Status& status);
  void EndFailed();
  void MaybeFinish();
  Summary MakeSummary() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Report(const Summary& summary) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  metrics::PeerKind PeerOf(int stream) const;
  void ReleaseAll();

  // Constant after construction.
  const Environment environment_;
  const Request request_;
  const std::unique_ptr<attention::AttentionMethod> method_;
  const std::shared_ptr<kv::KvSource> source_;

  std::atomic<bool> failed_ = false;

  // Sender thread only.
  std::shared_ptr<Receiver> caller_;
  std::optional<FirstToken> first_token_value_;
  std::vector<Stream> streams_;  // by stripe or target; sized at construction

  mutable absl::Mutex mu_;
  Phase phase_ ABSL_GUARDED_BY(mu_) = Phase::kQueue;
  absl::Status failure_ ABSL_GUARDED_BY(mu_);
  kv::KvPool::Reservation reservation_ ABSL_GUARDED_BY(mu_);
  std::vector<bool> attached_ ABSL_GUARDED_BY(mu_);
  std::optional<ComputeResult> result_ ABSL_GUARDED_BY(mu_);
  absl::Time started_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
  absl::Time first_chunk_ ABSL_GUARDED_BY(mu_) = absl::InfiniteFuture();
  absl::Time first_token_ ABSL_GUARDED_BY(mu_) = absl::InfiniteFuture();
  absl::Time last_release_ ABSL_GUARDED_BY(mu_) = absl::InfinitePast();
};

}  // namespace vsprefill::engine
