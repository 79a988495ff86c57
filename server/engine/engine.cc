#include "server/engine/engine.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/cord.h"
#include "absl/strings/str_cat.h"
#include "server/attention/presets.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"

namespace vsprefill::engine {
namespace {

constexpr absl::Duration kTick = absl::Milliseconds(100);

RequestLimits MakeLimits(const model::Transformer& transformer, const EngineOptions& options) {
  RequestLimits limits;
  limits.kv_id = transformer.kv_layout().kv_id;
  limits.kv_dtype = transformer.kv_layout().dtype;
  limits.vocab_size = transformer.config().vocab_size;
  limits.num_layers = transformer.config().num_layers;
  limits.max_prompt_tokens = transformer.config().max_position_embeddings;
  if (options.max_prompt_tokens > 0) {
    limits.max_prompt_tokens = std::min(limits.max_prompt_tokens, options.max_prompt_tokens);
  }
  return limits;
}

absl::StatusOr<std::unique_ptr<attention::AttentionMethod>> MakeMethod(
    const Request& request, const EngineOptions& options) {
  std::string name = request.method;
  std::map<std::string, double> parameters = request.method_parameters;
  if (!request.preset.empty()) {
    VSP_RETURN_IF_ERROR(attention::ResolvePreset(request.preset, &name, &parameters));
  }
  return options.create_method(name.empty() ? options.default_method : name, parameters);
}

std::string Seconds(absl::Duration duration) {
  return absl::StrCat(absl::ToDoubleSeconds(absl::Trunc(duration, absl::Microseconds(1))));
}

}  // namespace

metrics::Gauges ToGauges(const Load& load) {
  metrics::Gauges gauges;
  gauges.requests_running = load.running;
  gauges.requests_waiting = load.waiting;
  gauges.waiting_tokens = load.waiting_tokens;
  gauges.kv_cache_usage =
      load.pool_bytes > 0 ? static_cast<double>(load.pool_used_bytes) / load.pool_bytes : 0;
  gauges.send_buffer_bytes = load.staging_used_bytes;
  gauges.draining = load.draining;
  gauges.last_progress = load.last_progress;
  return gauges;
}

Engine::Engine(model::Transformer& transformer, kv::KvStager& stager, metrics::Metrics& metrics,
               EngineOptions options)
    : transformer_(transformer),
      stager_(stager),
      metrics_(metrics),
      options_(std::move(options)),
      limits_(MakeLimits(transformer, options_)),
      pool_(std::make_shared<kv::KvPool>(options_.kv_pool_bytes)) {
  kv::KvSenderOptions sender_options;
  sender_options.stall_timeout = options_.send_stall_timeout;
  sender_ = std::make_unique<kv::KvSender>(stager_, sender_options);
  sender_->PostAfter(kTick, [this] { Tick(); });
  thread_ = std::thread([this] { EngineLoop(); });
}

Engine::~Engine() {
  StartDrain();
  FailAll(absl::UnavailableError("the server stops"));
  AwaitIdle(absl::Seconds(5));
  {
    absl::MutexLock lock(&mu_);
    stop_ = true;
  }
  thread_.join();
  sender_.reset();
}

absl::StatusOr<std::shared_ptr<Job>> Engine::Submit(
    Request request, std::shared_ptr<Receiver> caller,
    std::vector<std::shared_ptr<Receiver>> targets) {
  auto job = Admit(std::move(request), std::move(caller), std::move(targets));
  if (!job.ok()) {
    const auto reason = job.status().GetPayload(kReasonPayload);
    metrics_.Rejected(reason.has_value() ? std::string(*reason) : "other");
  }
  return job;
}

absl::StatusOr<std::shared_ptr<Job>> Engine::Admit(Request request,
                                                   std::shared_ptr<Receiver> caller,
                                                   std::vector<std::shared_ptr<Receiver>> targets) {
  VSP_RETURN_IF_ERROR(ValidateRequest(request, limits_));
  if (absl::Now() >= request.deadline) {
    return Rejection(absl::StatusCode::kDeadlineExceeded, "deadline",
                     "the deadline had passed when the request arrived");
  }
  auto method = MakeMethod(request, options_);
  if (!method.ok()) {
    absl::Status status = std::move(method).status();
    status.SetPayload(kReasonPayload, absl::Cord("invalid"));
    return status;
  }
  const int64_t num_tokens = request.token_ids.size();
  const int64_t bytes =
      kv::KvCache::BytesFor(kv_layout(), num_tokens, (*method)->needs_indexer_logits());
  auto source = std::make_shared<kv::KvSource>(
      kv::ChunkPlan(kv_layout(), num_tokens, request.start_token, options_.chunk_tokens));

  absl::MutexLock lock(&mu_);
  if (draining_) {
    return Rejection(absl::StatusCode::kUnavailable, "draining",
                     "the server is draining and takes no new requests");
  }
  if (device_lost_.load()) {
    return Rejection(absl::StatusCode::kUnavailable, "device", "the compute device has failed");
  }
  std::shared_ptr<Job> superseded;
  if (const auto it = by_id_.find(request.request_id); it != by_id_.end()) {
    const uint32_t attempt = it->second->request().attempt;
    if (request.attempt <= attempt) {
      return Rejection(
          absl::StatusCode::kAlreadyExists, "duplicate",
          absl::StrCat("request ", request.request_id, " attempt ", request.attempt, ": attempt ",
                       attempt, " is in flight; allowed are higher attempts"));
    }
    superseded = it->second;
  }
  if (static_cast<int>(queue_.size()) >= options_.max_waiting_requests) {
    return QueueFull("queue_requests",
                     absl::StrCat(queue_.size(), " requests are waiting; allowed are ",
                                  options_.max_waiting_requests));
  }
  if (waiting_tokens_ + num_tokens > options_.max_waiting_tokens) {
    return QueueFull("queue_tokens",
                     absl::StrCat(waiting_tokens_, " tokens are waiting and the request has ",
                                  num_tokens, "; allowed are ", options_.max_waiting_tokens));
  }
  auto reservation = pool_->Reserve(bytes);
  if (!reservation.ok()) {
    absl::Status status = QueueFull("kv_pool", reservation.status().message());
    if (bytes > pool_->capacity_bytes()) status.SetPayload(kPushbackPayload, absl::Cord("-1"));
    return status;
  }

  Job::Environment environment;
  environment.sender = sender_.get();
  environment.metrics = &metrics_;
  environment.stall_timeout = options_.send_stall_timeout;
  environment.on_end = [this](const std::shared_ptr<Job>& job) { OnJobEnd(job); };
  auto job = std::make_shared<Job>(environment, std::move(request), *std::move(method),
                                   std::move(source), *std::move(reservation));
  if (superseded != nullptr) {
    superseded->Fail(
        absl::AbortedError(absl::StrCat("attempt ", superseded->request().attempt,
                                        " was superseded by attempt ", job->request().attempt)));
  }
  by_id_[job->request().request_id] = job;
  live_.insert(job);
  // Announced before the engine thread can see it.
  job->Begin(std::move(caller), std::move(targets));
  queue_.push_back(job);
  waiting_tokens_ += num_tokens;
  return job;
}

absl::Status Engine::QueueFull(absl::string_view reason, absl::string_view message) const {
  absl::Status status = Rejection(absl::StatusCode::kResourceExhausted, reason, message);
  // The work in the queue at the recent rate is when there may be room.
  const double seconds = tokens_per_second_ > 0 ? (waiting_tokens_ + 1) / tokens_per_second_ : 1.0;
  const int64_t pushback = std::clamp<int64_t>(std::llround(seconds * 1000), 100, 30000);
  status.SetPayload(kPushbackPayload, absl::Cord(absl::StrCat(pushback)));
  return status;
}

absl::StatusOr<std::shared_ptr<Job>> Engine::Attach(const std::string& request_id, uint32_t attempt,
                                                    int stripe,
                                                    std::shared_ptr<Receiver> receiver) {
  std::shared_ptr<Job> job;
  {
    absl::MutexLock lock(&mu_);
    const auto it = by_id_.find(request_id);
    if (it != by_id_.end() && it->second->request().attempt == attempt) job = it->second;
  }
  absl::Status status = job == nullptr
                            ? Rejection(absl::StatusCode::kNotFound, "attach",
                                        absl::StrCat("no request \"", request_id,
                                                     "\" with attempt ", attempt, " is in flight"))
                            : job->Attach(stripe, std::move(receiver));
  if (!status.ok()) {
    metrics_.Rejected("attach");
    return status;
  }
  return job;
}

void Engine::OnJobEnd(const std::shared_ptr<Job>& job) {
  const Request& request = job->request();
  const absl::Status failure = job->failure();
  Log(failure.ok() ? LogLevel::kInfo : LogLevel::kWarning, "request_end",
      {{"request_id", request.request_id},
       {"attempt", absl::StrCat(request.attempt)},
       {"code", absl::StatusCodeToString(failure.code())},
       {"message", std::string(failure.message())},
       {"seconds", Seconds(absl::Now() - request.received)}});
  absl::MutexLock lock(&mu_);
  if (const auto it = std::find(queue_.begin(), queue_.end(), job); it != queue_.end()) {
    waiting_tokens_ -= request.token_ids.size();
    queue_.erase(it);
  }
  live_.erase(job);
  if (const auto it = by_id_.find(request.request_id); it != by_id_.end() && it->second == job) {
    by_id_.erase(it);
  }
}

void Engine::StartDrain() {
  absl::MutexLock lock(&mu_);
  draining_ = true;
}

bool Engine::AwaitIdle(absl::Duration timeout) {
  absl::MutexLock lock(&mu_);
  return mu_.AwaitWithTimeout(absl::Condition(this, &Engine::Idle), timeout);
}

void Engine::FailAll(const absl::Status& status) {
  std::set<std::shared_ptr<Job>> jobs;
  {
    absl::MutexLock lock(&mu_);
    jobs = live_;
  }
  for (const auto& job : jobs) job->Fail(status);
}

Load Engine::load() const {
  Load load;
  load.pool_bytes = pool_->capacity_bytes();
  load.pool_used_bytes = pool_->used_bytes();
  load.staging_bytes = stager_.capacity_bytes();
  load.staging_used_bytes = stager_.used_bytes();
  load.last_progress = absl::FromUnixNanos(last_progress_nanos_.load());
  absl::MutexLock lock(&mu_);
  load.waiting = queue_.size();
  load.running = static_cast<int>(live_.size()) - load.waiting;
  load.waiting_tokens = waiting_tokens_;
  load.draining = draining_;
  load.tokens_per_second = tokens_per_second_;
  return load;
}

void Engine::Tick() {
  std::set<std::shared_ptr<Job>> jobs;
  {
    absl::MutexLock lock(&mu_);
    jobs = live_;
  }
  const absl::Time now = absl::Now();
  for (const auto& job : jobs) job->Tick(now);
  sender_->PostAfter(kTick, [this] { Tick(); });
}

void Engine::EngineLoop() {
  for (;;) {
    std::shared_ptr<Job> job;
    {
      absl::MutexLock lock(&mu_);
      mu_.Await(absl::Condition(this, &Engine::WorkOrStop));
      if (stop_) return;
      job = std::move(queue_.front());
      queue_.pop_front();
      waiting_tokens_ -= job->request().token_ids.size();
    }
    if (absl::Status status = Run(*job); !status.ok()) job->Fail(std::move(status));
  }
}

}  // namespace vsprefill::engine
