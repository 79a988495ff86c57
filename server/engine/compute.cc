// What the engine thread does with one request: Engine::Run.
#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/base/allocator.h"
#include "server/base/status_macros.h"
#include "server/engine/engine.h"

namespace vsprefill::engine {
namespace {

/// The largest logit, the lowest id among equals. INTERNAL where it is not finite.
absl::StatusOr<int32_t> Greedy(const std::vector<float>& logits) {
  const auto best = std::max_element(logits.begin(), logits.end());
  if (best == logits.end() || !std::isfinite(*best)) {
    return absl::InternalError("the model's logits are not finite");
  }
  return static_cast<int32_t>(best - logits.begin());
}

}  // namespace

absl::Status Engine::Run(Job& job) {
  VSP_RETURN_IF_ERROR(job.Start());
  const absl::Time start = absl::Now();
  // The cache keeps the pool alive: a slice of it may be released after the engine has gone.
  struct PooledCache {
    std::shared_ptr<kv::KvPool> pool;
    std::shared_ptr<kv::KvCache> cache;
  };
  auto pooled = std::make_shared<PooledCache>();
  pooled->pool = pool_;
  VSP_ASSIGN_OR_RETURN(
      pooled->cache,
      kv::KvCache::Create(transformer_.allocator(), job.TakeReservation(), kv_layout(),
                          job.request().token_ids.size(), job.method().needs_indexer_logits()));
  std::shared_ptr<kv::KvCache> cache(pooled, pooled->cache.get());
  pooled.reset();
  job.source().SetCache(cache);
  const std::unique_ptr<attention::RecallProbe> probe = NextProbe(job);
  const absl::Status status = Compute(job, *cache, probe.get());
  if (!status.ok() || job.failed()) {
    // The failure may have come before SetCache: make sure that nothing keeps the memory.
    job.source().DropCache();
    if (!status.ok() && !job.failed() && transformer_.device() == kernels::DeviceKind::kCuda &&
        !transformer_.Synchronize().ok()) {
      device_lost_.store(true);
    }
    return status;
  }
  const double seconds = absl::ToDoubleSeconds(absl::Now() - start);
  {
    absl::MutexLock lock(&mu_);
    const double rate = job.request().token_ids.size() / std::max(seconds, 1e-9);
    tokens_per_second_ = tokens_per_second_ == 0 ? rate : 0.7 * tokens_per_second_ + 0.3 * rate;
  }
  // The request has its result; only what waits in the queue waits for this.
  if (probe != nullptr) FinishProbe(job, *probe);
  return absl::OkStatus();
}

std::unique_ptr<attention::RecallProbe> Engine::NextProbe(const Job& job) {
  const int64_t tokens = job.request().token_ids.size();
  // The last layer computes the prompt's last row alone.
  const int layers = kv_layout().num_layers - 1;
  if (options_.recall_probe_every == 0 || layers == 0 || !job.method().IsSparse(tokens) ||
      ++sparse_requests_ % options_.recall_probe_every != 0) {
    return nullptr;
  }
  const int64_t number = probes_++;
  const double turns = 0.6180339887498949 * static_cast<double>(number);  // phases fill [0, 1)
  return std::make_unique<attention::RecallProbe>(
      static_cast<int>(number % layers), tokens, turns - std::floor(turns),
      [this](const void* device, int64_t bytes, void* host) {
        return transformer_.CopyToHost(device, bytes, host);
      });
}

void Engine::FinishProbe(const Job& job, attention::RecallProbe& probe) {
  const absl::StatusOr<std::vector<double>> recall = probe.Finish();
  if (recall.ok()) {
    metrics_.RecallProbed(job.method().name(), LayerGroup(probe.layer(), kv_layout().num_layers),
                          *recall);
    return;
  }
  int64_t suppressed = 0;
  if (probe_warnings_.Allow(absl::Now(), &suppressed)) {
    Log(LogLevel::kWarning, "recall_probe_failed",
        {{"request_id", job.request().request_id},
         {"status", recall.status().ToString()},
         {"suppressed", absl::StrCat(suppressed)}});
  }
}

absl::Status Engine::Compute(Job& job, kv::KvCache& cache, attention::RecallProbe* probe) {
  const Request& request = job.request();
  const kv::ChunkPlan& plan = job.source().plan();
  const int num_layers = kv_layout().num_layers;
  const int64_t num_tokens = request.token_ids.size();
  const bool is_cpu = transformer_.device() == kernels::DeviceKind::kCpu;

  const int64_t count_bytes = num_layers * sizeof(kernels::PairCounts);
  VSP_ASSIGN_OR_RETURN(Buffer counts, Buffer::Create(transformer_.allocator(), count_bytes));
  ComputeResult result;
  result.counts.resize(num_layers);
  VSP_RETURN_IF_ERROR(transformer_.CopyToDevice(result.counts.data(), count_bytes, counts.data()));

  FirstToken first_token;
  // CUDA: marks before the first layer and after each, per step; the last one after the logits.
  std::vector<std::vector<kv::LayerMark>> marks(plan.num_steps());
  const auto mark_now = [&](int64_t step) -> absl::Status {
    VSP_ASSIGN_OR_RETURN(marks[step].emplace_back(), stager_.MarkLayer(transformer_.stream()));
    return absl::OkStatus();
  };
  for (int64_t step = 0; step < plan.num_steps(); ++step) {
    const int64_t begin = plan.step_begin(step), end = plan.step_end(step);
    model::SequenceChunk chunk;
    chunk.ids = absl::MakeConstSpan(request.token_ids).subspan(begin, end - begin);
    chunk.position_begin = begin;
    chunk.prompt_tokens = num_tokens;
    chunk.cache = &cache;
    chunk.counts = static_cast<kernels::PairCounts*>(counts.data());

    const bool last = end == num_tokens;
    absl::Time layer_begin = absl::Now();
    VSP_RETURN_IF_ERROR(mark_now(step));
    model::ForwardOptions forward;
    forward.method = &job.method();
    forward.probe = probe;
    forward.logits = last ? model::LogitsMode::kLast : model::LogitsMode::kNone;
    forward.after_layer = [&](int layer) -> absl::Status {
      const absl::Time now = absl::Now();
      if (layer == num_layers - 1) result.end = now;
      // On CUDA this is when the layer was enqueued, which says nothing about its compute.
      if (is_cpu) metrics_.LayerComputed(now - layer_begin);
      VSP_RETURN_IF_ERROR(mark_now(step));
      job.source().MarkReady(step, layer, marks[step].back());
      sender_->Wake();
      last_progress_nanos_.store(absl::ToUnixNanos(now));
      layer_begin = absl::Now();
      return job.CheckAlive();
    };
    VSP_ASSIGN_OR_RETURN(model::ForwardResult output,
                         transformer_.Forward(absl::MakeConstSpan(&chunk, 1), forward));
    result.index_build += absl::Seconds(output.indexer_seconds);
    if (!last) continue;
    // Logits on the host: everything enqueued before them has been computed.
    if (!is_cpu) result.end = absl::Now();
    VSP_RETURN_IF_ERROR(mark_now(step));
    if (output.logits.empty()) return absl::InternalError("the model returned no logits");
    VSP_ASSIGN_OR_RETURN(first_token.token_id, Greedy(output.logits[0]));
    if (request.want_logits) first_token.logits = std::move(output.logits[0]);
  }
  job.PublishFirstToken(std::move(first_token));
  VSP_RETURN_IF_ERROR(transformer_.CopyToHost(counts.data(), count_bytes, result.counts.data()));
  if (!is_cpu) {
    for (const std::vector<kv::LayerMark>& step : marks) {
      for (int layer = 0; layer < num_layers; ++layer) {
        const auto duration = stager_.Elapsed(step[layer], step[layer + 1]);
        if (duration.has_value()) metrics_.LayerComputed(*duration);
      }
    }
    const std::vector<kv::LayerMark>& last = marks.back();
    result.end -=
        stager_.Elapsed(last[num_layers], last[num_layers + 1]).value_or(absl::ZeroDuration());
  }
  result.index_build += absl::Seconds(job.method().index_statistics().select_seconds);
  result.dense_fallback_layers = job.method().dense_fallback_layers();
  job.PublishResult(std::move(result));
  return absl::OkStatus();
}

}  // namespace vsprefill::engine
