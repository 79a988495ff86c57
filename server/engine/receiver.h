// What the engine asks of whoever receives a request's results: a response stream, an attached
// stream, or a push target. Implemented in server/rpc. Every call comes on the sender thread, in
// the order below, and must not block.
#pragma once

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/time/time.h"
#include "server/kv/kv_source.h"
#include "server/kv/kv_stager.h"

namespace vsprefill::engine {

class Job;

struct FirstToken {
  int32_t token_id = 0;
  std::vector<float> logits;  // empty unless the request wants them
};

struct TargetResult {
  std::string target;
  absl::Status status;
  int64_t bytes = 0;
};

/// Everything there is to say about a request that delivered its cache.
struct Summary {
  absl::Duration queue, compute, ttft, exposed_transfer, index_build;
  int dense_fallback_layers = 0;  // dense, at least in part, because their index was slower
  double density = 0, cost_ratio = 0;
  std::vector<double> layer_group_density;
  int64_t kv_bytes = 0;
  std::vector<kv::LayerManifest> manifest;
  std::vector<TargetResult> targets;
};

class Receiver {
 public:
  virtual ~Receiver() = default;
  /// First call. `stream` is the stripe or the index of the push target, for calls to the job.
  virtual void OnAccepted(std::shared_ptr<Job> job, int stream) = 0;
  /// The request's compute has begun.
  virtual void OnStarted() {}
  /// Only for receivers that carry KV. Answer each with Job::ChunkWritten.
  virtual void OnChunk(std::shared_ptr<kv::StagedChunk> chunk) = 0;
  virtual void OnEndOfChunks() {}
  /// As soon as the token is sampled; chunks may still follow.
  virtual void OnFirstToken(const FirstToken& first_token) {}
  /// One of these two is the last call. OnDelivered may hold push targets that failed: then the
  /// call fails although others have their caches.
  virtual void OnDelivered(const Summary& summary) = 0;
  virtual void OnFailed(const absl::Status& status) = 0;
  /// A fresh receiver for the same push target, to try once more; null where there is no such
  /// thing.
  virtual std::shared_ptr<Receiver> Renew() { return nullptr; }
};

}  // namespace vsprefill::engine
