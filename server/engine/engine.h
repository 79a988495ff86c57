// Admission, the queue, and the one thread that owns the compute device. Requests run one at a time
// in order of arrival, each in chunks of `chunk_tokens`. The engine thread never waits for a
// client: what it computes lies in the KV pool until the sender thread has delivered it.
#pragma once

#include <atomic>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <set>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "server/attention/recall_probe.h"
#include "server/base/log.h"
#include "server/engine/job.h"
#include "server/engine/request.h"
#include "server/kv/kv_pool.h"
#include "server/kv/kv_sender.h"
#include "server/kv/kv_stager.h"
#include "server/metrics/metrics.h"
#include "server/model/transformer.h"

namespace vsprefill::engine {

struct EngineOptions {
  int64_t kv_pool_bytes = 0;
  int64_t chunk_tokens = 2048;
  int64_t max_prompt_tokens = 0;  // 0: the model's max_position_embeddings
  int max_waiting_requests = 64;
  int64_t max_waiting_tokens = 1 << 20;
  absl::Duration send_stall_timeout = absl::Seconds(30);
  std::string default_method = "dense";
  /// Every so many sparse requests the attention mass that one layer read is measured (0: never).
  int64_t recall_probe_every = 0;
  /// Makes the method of a request (attention::CreateMethod with the model's context).
  std::function<absl::StatusOr<std::unique_ptr<attention::AttentionMethod>>(
      const std::string& name, const std::map<std::string, double>& parameters)>
      create_method;
};

struct Load {
  int running = 0, waiting = 0;
  int64_t waiting_tokens = 0;
  int64_t pool_bytes = 0, pool_used_bytes = 0;
  int64_t staging_bytes = 0, staging_used_bytes = 0;
  bool draining = false;
  double tokens_per_second = 0;  // recent compute rate, 0 before the first request
  absl::Time last_progress = absl::UnixEpoch();
};

/// What a scrape of /metrics shows of it.
metrics::Gauges ToGauges(const Load& load);

class Engine {
 public:
  /// All references must outlive the engine.
  Engine(model::Transformer& transformer, kv::KvStager& stager, metrics::Metrics& metrics,
         EngineOptions options);
  /// Fails what is in flight (UNAVAILABLE) and ends the threads.
  ~Engine();

  /// Admits a request, or says why not and leaves everything as it was: the codes of
  /// docs/errors.md. RESOURCE_EXHAUSTED carries kPushbackPayload. `targets` go with
  /// request.push_targets.
  absl::StatusOr<std::shared_ptr<Job>> Submit(Request request, std::shared_ptr<Receiver> caller,
                                              std::vector<std::shared_ptr<Receiver>> targets);
  /// Connects another stripe. NOT_FOUND: no such (request_id, attempt) in flight.
  absl::StatusOr<std::shared_ptr<Job>> Attach(const std::string& request_id, uint32_t attempt,
                                              int stripe, std::shared_ptr<Receiver> receiver);

  /// From now on Submit answers UNAVAILABLE.
  void StartDrain();
  /// True if all requests ended in time.
  bool AwaitIdle(absl::Duration timeout);
  void FailAll(const absl::Status& status);

  Load load() const;
  const EngineOptions& options() const { return options_; }
  const RequestLimits& limits() const { return limits_; }
  const kv::KvLayout& kv_layout() const { return transformer_.kv_layout(); }
  kv::KvSender& sender() { return *sender_; }
  metrics::Metrics& metrics() { return metrics_; }
  /// True once the device failed: nothing can be computed any more and the process should end.
  bool device_lost() const { return device_lost_.load(); }

 private:
  absl::StatusOr<std::shared_ptr<Job>> Admit(Request request, std::shared_ptr<Receiver> caller,
                                             std::vector<std::shared_ptr<Receiver>> targets);
  absl::Status QueueFull(absl::string_view reason, absl::string_view message) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void OnJobEnd(const std::shared_ptr<Job>& job);
  void Tick();
  void EngineLoop();
  /// Runs one request on the engine thread; its failure where it has one.
  absl::Status Run(Job& job);
  absl::Status Compute(Job& job, kv::KvCache& cache, attention::RecallProbe* probe);
  /// The probe for this request, if it is its turn.
  std::unique_ptr<attention::RecallProbe> NextProbe(const Job& job);
  void FinishProbe(const Job& job, attention::RecallProbe& probe);
  bool WorkOrStop() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return stop_ || !queue_.empty(); }
  bool Idle() const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return live_.empty(); }

  model::Transformer& transformer_;
  kv::KvStager& stager_;
  metrics::Metrics& metrics_;
  const EngineOptions options_;
  const RequestLimits limits_;
  // Shared with every cache: memory lent to gRPC may be released after the engine has gone.
  const std::shared_ptr<kv::KvPool> pool_;

  // Engine thread only.
  int64_t sparse_requests_ = 0, probes_ = 0;
  LogThrottle probe_warnings_{absl::Minutes(1)};

  std::atomic<bool> device_lost_ = false;
  std::atomic<int64_t> last_progress_nanos_ = 0;

  mutable absl::Mutex mu_;
  std::deque<std::shared_ptr<Job>> queue_ ABSL_GUARDED_BY(mu_);
  int64_t waiting_tokens_ ABSL_GUARDED_BY(mu_) = 0;
  std::map<std::string, std::shared_ptr<Job>> by_id_ ABSL_GUARDED_BY(mu_);  // highest attempt
  std::set<std::shared_ptr<Job>> live_ ABSL_GUARDED_BY(mu_);
  double tokens_per_second_ ABSL_GUARDED_BY(mu_) = 0;
  bool draining_ ABSL_GUARDED_BY(mu_) = false;
  bool stop_ ABSL_GUARDED_BY(mu_) = false;

  std::unique_ptr<kv::KvSender> sender_;
  std::thread thread_;
};

}  // namespace vsprefill::engine
