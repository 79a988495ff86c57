#include "server/metrics/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <array>
#include <map>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"

namespace vsprefill::metrics {
namespace {

using prometheus::BuildCounter;
using prometheus::BuildGauge;
using prometheus::BuildHistogram;
using prometheus::Counter;
using prometheus::Family;
using prometheus::Gauge;
using prometheus::Histogram;
using prometheus::Labels;
using Buckets = Histogram::BucketBoundaries;

// vLLM's buckets of time to first token.
const Buckets kFirstTokenBuckets = {.001, .005, .01, .02, .04, .06, .08, .1, .25, .5,  .75,
                                    1,    2.5,  5,   7.5, 10,  20,  40,  80, 160, 640, 2560};
// vLLM's request buckets, with a low end that queue times need.
const Buckets kRequestBuckets = {.001, .002, .005, .01, .02, .05, .1,  .2,   .3,  .5,
                                 .8,   1,    1.5,  2,   2.5, 5,   10,  15,   20,  30,
                                 40,   50,   60,   120, 240, 480, 960, 1920, 7680};
const Buckets kLayerBuckets = {.0001, .0002, .0005, .001, .002, .005, .01, .02, .05,
                               .1,    .2,    .5,    1,    2,    5,    10,  20,  60};
const Buckets kBytesBuckets = {2048,    8192,     32768,     131072,    524288,     2097152,
                               8388608, 33554432, 134217728, 536870912, 2147483648, 8589934592};
const Buckets kTokenBuckets = {1,    2,    5,    10,    20,    50,    100,    200,   500,
                               1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000};
const Buckets kDensityBuckets = {.05, .1, .15, .2, .25, .3, .35, .4, .45, .5,
                                 .55, .6, .65, .7, .75, .8, .85, .9, .95, 1};
const Buckets kRecallBuckets = {.5,  .6,  .7,  .75, .8,  .85,  .9, .925,
                                .95, .96, .97, .98, .99, .995, 1};
const Buckets kKeptBuckets = {0, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768, 65536};

constexpr std::array<absl::string_view, 13> kRejectReasons = {
    "invalid",  "kv_id",       "dtype",    "queue_requests", "queue_tokens", "kv_pool", "duplicate",
    "draining", "push_target", "deadline", "attach",         "device",       "other"};
constexpr std::array<absl::string_view, 17> kCodes = {
    "OK",        "CANCELLED",      "UNKNOWN",           "INVALID_ARGUMENT",   "DEADLINE_EXCEEDED",
    "NOT_FOUND", "ALREADY_EXISTS", "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION",
    "ABORTED",   "OUT_OF_RANGE",   "UNIMPLEMENTED",     "INTERNAL",           "UNAVAILABLE",
    "DATA_LOSS", "UNAUTHENTICATED"};
constexpr std::array<absl::string_view, 3> kPhases = {"queue", "compute", "transfer"};

const char* Name(Mode mode) { return mode == Mode::kStream ? "stream" : "push"; }
const char* Name(PeerKind peer) {
  switch (peer) {
    case PeerKind::kCaller:
      return "caller";
    case PeerKind::kAttached:
      return "attached";
    case PeerKind::kTarget:
      return "target";
  }
  return "other";
}

Labels With(Labels labels, const std::string& key, absl::string_view value) {
  labels[key] = std::string(value);
  return labels;
}

}  // namespace

struct Metrics::Impl {
  explicit Impl(const Info& info) : base({{"model_name", info.model_name}, {"engine", "0"}}) {
    first_token =
        ByMode("time_to_first_token_seconds",
               "Request received until its first token was handed to gRPC", kFirstTokenBuckets);
    first_layer =
        ByMode("time_to_first_layer_seconds",
               "Request received until its first KV chunk was handed to gRPC", kFirstTokenBuckets);
    last_byte = ByMode("time_to_last_byte_seconds",
                       "Request received until gRPC released its last KV byte", kFirstTokenBuckets);
    transfer = ByMode("kv_transfer_time_seconds",
                      "First KV chunk handed to gRPC until the last KV byte was released",
                      kRequestBuckets);
    transfer_bytes =
        ByMode("kv_transfer_bytes", "KV payload bytes sent per request", kBytesBuckets);
    send_stall =
        ByMode("layer_send_stall_seconds",
               "Time from handing a KV chunk to gRPC until gRPC takes the next one", kLayerBuckets);
    queue = One("request_queue_time_seconds", "Request received until its compute began",
                kRequestBuckets);
    prefill = One("request_prefill_time_seconds",
                  "Compute of a request: began until the end of the last layer", kRequestBuckets);
    layer_compute =
        One("layer_compute_seconds", "Compute of one layer of one chunk", kLayerBuckets);
    prompt_tokens = One("request_prompt_tokens", "Prompt tokens per request", kTokenBuckets);
    index_build = One("index_build_seconds",
                      "VSIndexer and selection per request, all layers together", kRequestBuckets);
    vertical_columns =
        One("vertical_columns", "Vertical columns kept per KV group, mean of a layer of a request",
            kKeptBuckets);
    slash_diagonals =
        One("slash_diagonals", "Slash diagonals kept per KV group, mean of a layer of a request",
            kKeptBuckets);
    auto& density_family = BuildHistogram()
                               .Name("vsprefill_attention_density_ratio")
                               .Help(
                                   "Unmasked (query, key) pairs / causal pairs, per request and "
                                   "quarter of the layers (0 is the first)")
                               .Register(registry);
    for (size_t group = 0; group < density.size(); ++group) {
      density[group] =
          &density_family.Add(With(base, "layer_group", absl::StrCat(group)), kDensityBuckets);
    }
    auto& recall_family = BuildHistogram()
                              .Name("vsprefill_attention_mass_recall_ratio")
                              .Help(
                                  "Share of the true attention mass that a probed layer's index "
                                  "read, per query head, by quarter of the layers (0 is the first)")
                              .Register(registry);
    for (const std::string& method : info.probed_methods) {
      for (size_t group = 0; group < density.size(); ++group) {
        recall[method][group] = &recall_family.Add(
            With(With(base, "method", method), "layer_group", absl::StrCat(group)), kRecallBuckets);
      }
    }

    prompt_tokens_total = Count("prompt_tokens_total", "Prompt tokens of finished requests");
    pairs_total = Count("attention_pairs_total", "Causal (query, key) pairs, all layers and heads");
    pairs_computed = Count("attention_pairs_computed_total",
                           "Unmasked (query, key) pairs computed, all layers and heads");
    pairs_multiplied = Count("attention_pairs_multiplied_total",
                             "(query, key) pairs multiplied by kernels, padding included");
    dense_fallback_layers = Count("dense_fallback_layers_total",
                                  "Layers computed densely, whole or in part, because their index "
                                  "would have been slower");
    push_retries = Count("push_retries_total", "Pushes started again after UNAVAILABLE");
    checksum_failures = Count("checksum_failures_total", "Push targets that answered DATA_LOSS");
    success = &BuildCounter()
                   .Name("vsprefill_request_success_total")
                   .Help("Requests that delivered their whole cache")
                   .Register(registry)
                   .Add(With(base, "finished_reason", "delivered"));
    Fill("requests_failed_total", "Requests that failed after admission", "code", kCodes, &failed);
    Fill("requests_rejected_total", "Requests refused before admission", "reason", kRejectReasons,
         &rejected);
    Fill("requests_cancelled_total", "Requests cancelled by their caller", "phase", kPhases,
         &cancelled);
    auto& sent = BuildCounter()
                     .Name("vsprefill_kv_bytes_sent_total")
                     .Help("KV payload bytes accepted by gRPC")
                     .Register(registry);
    for (PeerKind peer : {PeerKind::kCaller, PeerKind::kAttached, PeerKind::kTarget}) {
      const Mode mode = peer == PeerKind::kTarget ? Mode::kPush : Mode::kStream;
      bytes_sent[peer] = &sent.Add(With(With(base, "mode", Name(mode)), "peer_kind", Name(peer)));
    }

    running = Level("num_requests_running", "Requests that compute or deliver");
    waiting = Level("num_requests_waiting", "Requests in the queue");
    waiting_tokens = Level("waiting_tokens", "Prompt tokens in the queue");
    kv_usage = Level("kv_cache_usage_perc", "Share of the KV pool that is reserved, 0 to 1");
    send_buffer = Level("send_buffer_bytes", "KV bytes staged or lent to gRPC, not yet released");
    draining = Level("draining", "1 after SIGTERM");
    last_progress = Level("last_progress_timestamp_seconds",
                          "Unix time of the last layer computed; 0 before the first");
    BuildGauge()
        .Name("vsprefill_cache_config_info")
        .Help("Constant 1: KV chunk tokens, chunks that fit the pool, KV dtype")
        .Register(registry)
        .Add(With(With(With(base, "block_size", absl::StrCat(info.chunk_tokens)), "num_gpu_blocks",
                       absl::StrCat(info.pool_chunks)),
                  "kv_dtype", info.kv_dtype))
        .Set(1);
  }

  Histogram* One(const char* name, const char* help, const Buckets& buckets) {
    return &BuildHistogram()
                .Name(absl::StrCat("vsprefill_", name))
                .Help(help)
                .Register(registry)
                .Add(base, buckets);
  }
  std::array<Histogram*, 2> ByMode(const char* name, const char* help, const Buckets& buckets) {
    auto& family =
        BuildHistogram().Name(absl::StrCat("vsprefill_", name)).Help(help).Register(registry);
    return {&family.Add(With(base, "mode", "stream"), buckets),
            &family.Add(With(base, "mode", "push"), buckets)};
  }
  Counter* Count(const char* name, const char* help) {
    return &BuildCounter()
                .Name(absl::StrCat("vsprefill_", name))
                .Help(help)
                .Register(registry)
                .Add(base);
  }
  Gauge* Level(const char* name, const char* help) {
    return &BuildGauge()
                .Name(absl::StrCat("vsprefill_", name))
                .Help(help)
                .Register(registry)
                .Add(base);
  }
  template <size_t N>
  void Fill(const char* name, const char* help, const char* key,
            const std::array<absl::string_view, N>& values,
            std::map<std::string, Counter*, std::less<>>* counters) {
    auto& family =
        BuildCounter().Name(absl::StrCat("vsprefill_", name)).Help(help).Register(registry);
    for (absl::string_view value : values) {
      (*counters)[std::string(value)] = &family.Add(With(base, key, value));
    }
  }

  const Labels base;
  prometheus::Registry registry;
  std::array<Histogram*, 2> first_token, first_layer, last_byte, transfer, transfer_bytes,
      send_stall;
  Histogram *queue, *prefill, *layer_compute, *prompt_tokens, *index_build, *vertical_columns,
      *slash_diagonals;
  std::array<Histogram*, 4> density;
  std::map<std::string, std::array<Histogram*, 4>, std::less<>> recall;  // by method
  Counter *prompt_tokens_total, *pairs_total, *pairs_computed, *pairs_multiplied,
      *dense_fallback_layers, *push_retries, *checksum_failures, *success;
  std::map<std::string, Counter*, std::less<>> failed, rejected, cancelled;
  std::map<PeerKind, Counter*> bytes_sent;
  Gauge *running, *waiting, *waiting_tokens, *kv_usage, *send_buffer, *draining, *last_progress;

  absl::Mutex mu;
  std::function<Gauges()> sampler ABSL_GUARDED_BY(mu);
};

Metrics::Metrics(const Info& info) : impl_(std::make_unique<Impl>(info)) {}
Metrics::~Metrics() = default;

void Metrics::SetSampler(std::function<Gauges()> sampler) {
  absl::MutexLock lock(&impl_->mu);
  impl_->sampler = std::move(sampler);
}

std::string Metrics::Render() {
  {
    absl::MutexLock lock(&impl_->mu);
    if (impl_->sampler) {
      const Gauges gauges = impl_->sampler();
      impl_->running->Set(gauges.requests_running);
      impl_->waiting->Set(gauges.requests_waiting);
      impl_->waiting_tokens->Set(gauges.waiting_tokens);
      impl_->kv_usage->Set(gauges.kv_cache_usage);
      impl_->send_buffer->Set(gauges.send_buffer_bytes);
      impl_->draining->Set(gauges.draining ? 1 : 0);
      impl_->last_progress->Set(absl::ToDoubleSeconds(gauges.last_progress - absl::UnixEpoch()));
    }
  }
  return prometheus::TextSerializer().Serialize(impl_->registry.Collect());
}

void Metrics::Rejected(absl::string_view reason) {
  auto it = impl_->rejected.find(reason);
  if (it == impl_->rejected.end()) it = impl_->rejected.find("other");
  it->second->Increment();
}

void Metrics::Failed(absl::string_view code) {
  auto it = impl_->failed.find(code);
  if (it == impl_->failed.end()) it = impl_->failed.find("UNKNOWN");
  it->second->Increment();
}

void Metrics::Cancelled(absl::string_view phase) {
  const auto it = impl_->cancelled.find(phase);
  if (it != impl_->cancelled.end()) it->second->Increment();
}

void Metrics::Succeeded(const Completed& completed) {
  Impl& m = *impl_;
  const size_t mode = completed.mode == Mode::kStream ? 0 : 1;
  const auto seconds = [](absl::Duration duration) { return absl::ToDoubleSeconds(duration); };
  m.success->Increment();
  m.first_token[mode]->Observe(seconds(completed.time_to_first_token));
  m.first_layer[mode]->Observe(seconds(completed.time_to_first_layer));
  m.last_byte[mode]->Observe(seconds(completed.time_to_last_byte));
  m.transfer[mode]->Observe(seconds(completed.transfer));
  m.transfer_bytes[mode]->Observe(completed.kv_bytes);
  m.queue->Observe(seconds(completed.queue));
  m.prefill->Observe(seconds(completed.compute));
  m.index_build->Observe(seconds(completed.index_build));
  m.prompt_tokens->Observe(completed.prompt_tokens);
  m.prompt_tokens_total->Increment(completed.prompt_tokens);
  m.pairs_total->Increment(completed.pairs_total);
  m.pairs_computed->Increment(completed.pairs_computed);
  m.pairs_multiplied->Increment(completed.pairs_multiplied);
  m.dense_fallback_layers->Increment(completed.dense_fallback_layers);
  for (size_t i = 0; i < completed.layer_group_density.size() && i < m.density.size(); ++i) {
    m.density[i]->Observe(completed.layer_group_density[i]);
  }
  for (double kept : completed.vertical_columns) m.vertical_columns->Observe(kept);
  for (double kept : completed.slash_diagonals) m.slash_diagonals->Observe(kept);
}

void Metrics::RecallProbed(absl::string_view method, int layer_group,
                           const std::vector<double>& recall) {
  const auto it = impl_->recall.find(method);
  if (it == impl_->recall.end()) return;
  for (const double share : recall) it->second[layer_group]->Observe(share);
}

void Metrics::LayerComputed(absl::Duration duration) {
  impl_->layer_compute->Observe(absl::ToDoubleSeconds(duration));
}

void Metrics::ChunkSent(Mode mode, PeerKind peer, int64_t bytes, absl::Duration stall) {
  impl_->bytes_sent[peer]->Increment(bytes);
  impl_->send_stall[mode == Mode::kStream ? 0 : 1]->Observe(absl::ToDoubleSeconds(stall));
}

void Metrics::PushRetried() { impl_->push_retries->Increment(); }
void Metrics::ChecksumFailed() { impl_->checksum_failures->Increment(); }

}  // namespace vsprefill::metrics
