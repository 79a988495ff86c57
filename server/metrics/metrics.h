// Every metric of the server, declared in one place; docs/metrics.md lists them. Thread-safe. No
// label takes a value that a client chooses, so the number of series is bounded.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace vsprefill::metrics {

enum class Mode { kStream, kPush };
enum class PeerKind { kCaller, kAttached, kTarget };

/// Facts that do not change while the process runs.
struct Info {
  std::string model_name;
  std::string kv_dtype;
  int64_t chunk_tokens = 0;  // most tokens in one KV chunk message
  int64_t pool_chunks = 0;   // chunks of all layers that fit the KV pool
  /// Methods whose recall is probed; empty: the probe is off and has no series.
  std::vector<std::string> probed_methods;
};

/// What is read at the moment of a scrape.
struct Gauges {
  int64_t requests_running = 0;
  int64_t requests_waiting = 0;
  int64_t waiting_tokens = 0;
  double kv_cache_usage = 0;  // 0..1
  int64_t send_buffer_bytes = 0;
  bool draining = false;
  absl::Time last_progress;
};

/// One finished request.
struct Completed {
  Mode mode = Mode::kStream;
  absl::Duration time_to_first_token, time_to_first_layer, time_to_last_byte;
  absl::Duration queue, compute, transfer, index_build;
  int64_t kv_bytes = 0;
  int64_t prompt_tokens = 0;
  /// (query, key) pairs over all layers and heads: causal, unmasked, multiplied by the kernel.
  int64_t pairs_total = 0, pairs_computed = 0, pairs_multiplied = 0;
  std::vector<double> layer_group_density;  // per quarter of the layers
  int dense_fallback_layers = 0;
  /// Per layer, mean over chunks and KV groups; empty for a method without an index.
  std::vector<double> vertical_columns, slash_diagonals;
};

class Metrics {
 public:
  explicit Metrics(const Info& info);
  ~Metrics();

  void SetSampler(std::function<Gauges()> sampler);
  /// Prometheus text format.
  std::string Render();

  /// `reason`: one of kRejectReasons in metrics.cc (others count as "other").
  void Rejected(absl::string_view reason);
  /// `code`: name of a status code, e.g. "ABORTED".
  void Failed(absl::string_view code);
  /// `phase`: "queue", "compute" or "transfer".
  void Cancelled(absl::string_view phase);
  void Succeeded(const Completed& completed);

  /// Shares of attention mass read, one per query head of the probed layer. A method that is not
  /// among `probed_methods` is dropped.
  void RecallProbed(absl::string_view method, int layer_group, const std::vector<double>& recall);
  void LayerComputed(absl::Duration duration);
  /// Time from handing a chunk to gRPC until gRPC had room for another.
  void ChunkSent(Mode mode, PeerKind peer, int64_t bytes, absl::Duration stall);
  void PushRetried();
  void ChecksumFailed();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace vsprefill::metrics
