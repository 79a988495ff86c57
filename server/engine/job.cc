#include "server/engine/job.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"

namespace vsprefill::engine {
namespace {

// Before a push target that was not reachable is tried once more.
constexpr absl::Duration kRetryDelay = absl::Milliseconds(200);

}  // namespace

/// Connects one KV stream with its receiver and the job's end.
class Job::StreamSink final : public kv::KvSink {
 public:
  StreamSink(std::shared_ptr<Job> job, int index, std::shared_ptr<Receiver> receiver)
      : job_(std::move(job)), index_(index), receiver_(std::move(receiver)) {}

  void OnChunk(std::shared_ptr<kv::StagedChunk> chunk) override {
    receiver_->OnChunk(std::move(chunk));
  }
  void OnEndOfChunks() override { receiver_->OnEndOfChunks(); }
  void OnAllReleased(absl::Time last_release) override {
    job_->streams_[index_].released = true;
    {
      absl::MutexLock lock(&job_->mu_);
      job_->last_release_ = std::max(job_->last_release_, last_release);
    }
    job_->MaybeFinish();
  }
  void OnStalled(absl::Duration idle) override {
    const std::string what = job_->is_push()
                                 ? absl::StrCat("push target ", job_->request_.push_targets[index_])
                                 : absl::StrCat("the receiver of stripe ", index_);
    const absl::Status status = absl::AbortedError(absl::StrCat(
        what, " took nothing for ", absl::FormatDuration(absl::Trunc(idle, absl::Milliseconds(1))),
        "; allowed is ", absl::FormatDuration(job_->environment_.stall_timeout)));
    // A push target that hangs fails alone; the others keep what they get.
    if (job_->is_push()) {
      receiver_->OnFailed(status);
    } else {
      job_->Fail(status);
    }
  }
  void OnStageError(const absl::Status& status) override { job_->Fail(status); }

 private:
  const std::shared_ptr<Job> job_;
  const int index_;
  const std::shared_ptr<Receiver> receiver_;
};

Job::Job(const Environment& environment, Request request,
         std::unique_ptr<attention::AttentionMethod> method, std::shared_ptr<kv::KvSource> source,
         kv::KvPool::Reservation reservation)
    : environment_(environment),
      request_(std::move(request)),
      method_(std::move(method)),
      source_(std::move(source)),
      streams_(is_push() ? request_.push_targets.size() : request_.stripes),
      reservation_(std::move(reservation)),
      attached_(streams_.size(), false) {
  attached_[0] = true;
}

void Job::Fail(absl::Status status) {
  {
    absl::MutexLock lock(&mu_);
    if (phase_ == Phase::kEnded || !failure_.ok()) return;
    failure_ = std::move(status);
  }
  failed_.store(true);
  environment_.sender->Post([self = shared_from_this()] { self->EndFailed(); });
}

Phase Job::phase() const {
  absl::MutexLock lock(&mu_);
  return phase_;
}

absl::Status Job::failure() const {
  absl::MutexLock lock(&mu_);
  return failure_;
}

void Job::Begin(std::shared_ptr<Receiver> caller, std::vector<std::shared_ptr<Receiver>> targets) {
  environment_.sender->Post(
      [self = shared_from_this(), caller = std::move(caller), targets = std::move(targets)] {
        self->caller_ = caller;
        caller->OnAccepted(self, 0);
        if (targets.empty()) {
          self->AddStream(0, caller);
        } else {
          for (size_t i = 0; i < targets.size(); ++i) {
            targets[i]->OnAccepted(self, i);
            self->AddStream(i, targets[i]);
          }
        }
      });
}

absl::Status Job::Attach(int stripe, std::shared_ptr<Receiver> receiver) {
  {
    absl::MutexLock lock(&mu_);
    const int stripes = is_push() ? 1 : request_.stripes;
    if (stripe < 1 || stripe >= stripes) {
      return Rejection(absl::StatusCode::kInvalidArgument, "invalid",
                       absl::StrCat("stripe ", stripe, " is out of range [1, ", stripes,
                                    ") of request ", request_.request_id));
    }
    if (attached_[stripe]) {
      return Rejection(absl::StatusCode::kAlreadyExists, "duplicate",
                       absl::StrCat("stripe ", stripe, " of request ", request_.request_id,
                                    " is attached already"));
    }
    attached_[stripe] = true;
  }
  environment_.sender->Post([self = shared_from_this(), stripe, receiver = std::move(receiver)] {
    receiver->OnAccepted(self, stripe);
    if (self->phase() == Phase::kEnded) {
      receiver->OnFailed(self->failure());
    } else {
      self->AddStream(stripe, receiver);
    }
  });
  return absl::OkStatus();
}

void Job::AddStream(int index, std::shared_ptr<Receiver> receiver) {
  Stream& stream = streams_[index];
  stream.receiver = receiver;
  stream.kv = environment_.sender->AddStream(
      source_, is_push() ? 0 : index, is_push() ? 1 : request_.stripes,
      std::make_shared<StreamSink>(shared_from_this(), index, std::move(receiver)));
}

absl::Status Job::Start() {
  {
    absl::MutexLock lock(&mu_);
    if (!failure_.ok()) return failure_;
    phase_ = Phase::kCompute;
    started_ = absl::Now();
  }
  environment_.sender->Post([self = shared_from_this()] {
    for (Stream& stream : self->streams_) {
      if (stream.receiver != nullptr) stream.receiver->OnStarted();
    }
  });
  return absl::OkStatus();
}

kv::KvPool::Reservation Job::TakeReservation() {
  absl::MutexLock lock(&mu_);
  return std::move(reservation_);
}

absl::Status Job::CheckAlive() {
  if (absl::Now() >= request_.deadline) {
    Fail(absl::DeadlineExceededError("the deadline passed while the prompt was computed"));
  }
  return failed() ? failure() : absl::OkStatus();
}

void Job::PublishFirstToken(FirstToken first_token) {
  environment_.sender->Post([self = shared_from_this(), first_token = std::move(first_token)] {
    if (self->phase() == Phase::kEnded) return;
    self->first_token_value_ = first_token;
    self->caller_->OnFirstToken(first_token);
    for (Stream& stream : self->streams_) {
      if (stream.receiver != nullptr && stream.receiver != self->caller_) {
        stream.receiver->OnFirstToken(first_token);
      }
    }
  });
}

void Job::PublishResult(ComputeResult result) {
  {
    absl::MutexLock lock(&mu_);
    result_ = std::move(result);
    if (phase_ == Phase::kCompute) phase_ = Phase::kTransfer;
  }
  environment_.sender->Post([self = shared_from_this()] { self->MaybeFinish(); });
}

metrics::PeerKind Job::PeerOf(int stream) const {
  if (is_push()) return metrics::PeerKind::kTarget;
  return stream == 0 ? metrics::PeerKind::kCaller : metrics::PeerKind::kAttached;
}

void Job::ChunkWritten(int stream, int64_t bytes, absl::Duration stall) {
  environment_.metrics->ChunkSent(is_push() ? metrics::Mode::kPush : metrics::Mode::kStream,
                                  PeerOf(stream), bytes, stall);
  // Written on the sender thread before the first chunk was given out.
  streams_[stream].kv->ChunkWritten();
}

void Job::FirstChunkHanded() {
  absl::MutexLock lock(&mu_);
  first_chunk_ = std::min(first_chunk_, absl::Now());
}

void Job::FirstTokenHanded() {
  {
    absl::MutexLock lock(&mu_);
    first_token_ = std::min(first_token_, absl::Now());
  }
  environment_.sender->Post([self = shared_from_this()] { self->MaybeFinish(); });
}

void Job::TargetFinished(int index, absl::Status status, int64_t bytes) {
  environment_.sender->Post([self = shared_from_this(), index, status = std::move(status), bytes] {
    Stream& stream = self->streams_[index];
    if (stream.target.has_value()) return;
    if (self->phase() == Phase::kEnded || self->RetryTarget(index, status)) return;
    if (status.code() == absl::StatusCode::kDataLoss) self->environment_.metrics->ChecksumFailed();
    if (!status.ok()) {
      // Nothing more goes to this target; what gRPC still holds is released with its call.
      stream.kv->Close();
      stream.released = true;
    }
    stream.target = TargetResult{self->request_.push_targets[index], status, bytes};
    const auto failed = [](const Stream& s) {
      return s.target.has_value() && !s.target->status.ok();
    };
    if (std::all_of(self->streams_.begin(), self->streams_.end(), failed)) {
      // Nobody is left to compute for.
      self->Fail(absl::Status(status.code(), absl::StrCat("push target ", stream.target->target,
                                                          ": ", status.message())));
      return;
    }
    self->MaybeFinish();
  });
}

bool Job::RetryTarget(int index, const absl::Status& status) {
  Stream& stream = streams_[index];
  if (status.code() != absl::StatusCode::kUnavailable || stream.retried) return false;
  std::shared_ptr<Receiver> renewed = stream.receiver->Renew();
  if (renewed == nullptr) return false;
  stream.retried = true;
  stream.released = false;
  stream.kv->Close();
  environment_.metrics->PushRetried();
  environment_.sender->PostAfter(kRetryDelay, [self = shared_from_this(), index, renewed] {
    if (self->phase() == Phase::kEnded) return;
    // From the beginning: the cache is complete as long as the request lives.
    renewed->OnAccepted(self, index);
    self->AddStream(index, renewed);
    if (self->phase() != Phase::kQueue) renewed->OnStarted();
    if (self->first_token_value_.has_value()) renewed->OnFirstToken(*self->first_token_value_);
  });
  return true;
}

void Job::Tick(absl::Time now) {
  if (now >= request_.deadline) {
    Fail(absl::DeadlineExceededError(absl::StrCat(
        "the deadline passed ", phase() == Phase::kQueue ? "while the request waited in the queue"
                                                         : "before the cache was delivered")));
    return;
  }
  std::string problem;
  absl::Time quiet_since = absl::InfiniteFuture();  // of a push target that has everything
  {
    absl::MutexLock lock(&mu_);
    if (!failure_.ok() || phase_ == Phase::kEnded) return;
    if (result_.has_value()) quiet_since = std::max(result_->end, last_release_);
    problem = Overdue(now);
  }
  if (!problem.empty()) {
    Fail(absl::AbortedError(problem));
    return;
  }
  if (!is_push() || now - quiet_since < environment_.stall_timeout) return;
  for (Stream& stream : streams_) {
    if (stream.released && !stream.target.has_value()) {
      stream.receiver->OnFailed(
          absl::AbortedError(absl::StrCat("the target did not confirm its cache within ",
                                          absl::FormatDuration(environment_.stall_timeout))));
    }
  }
}

std::string Job::Overdue(absl::Time now) const {
  if (!is_push() && now - request_.received >= environment_.stall_timeout) {
    for (size_t stripe = 0; stripe < attached_.size(); ++stripe) {
      if (attached_[stripe]) continue;
      return absl::StrCat("stripe ", stripe, " of ", request_.stripes, " was not attached within ",
                          absl::FormatDuration(environment_.stall_timeout));
    }
  }
  if (result_.has_value() && first_token_ == absl::InfiniteFuture() &&
      now - result_->end >= environment_.stall_timeout) {
    return absl::StrCat("the caller did not take the first token within ",
                        absl::FormatDuration(environment_.stall_timeout));
  }
  return "";
}

void Job::ReleaseAll() {
  for (Stream& stream : streams_) {
    if (stream.kv != nullptr) stream.kv->Close();
  }
  source_->DropCache();
}

void Job::EndFailed() {
  kv::KvPool::Reservation reservation;
  absl::Status status;
  {
    absl::MutexLock lock(&mu_);
    if (phase_ == Phase::kEnded) return;
    status = failure_;
    reservation = std::move(reservation_);
    const char* phase = phase_ == Phase::kQueue     ? "queue"
                        : phase_ == Phase::kCompute ? "compute"
                                                    : "transfer";
    if (status.code() == absl::StatusCode::kCancelled) {
      environment_.metrics->Cancelled(phase);
    }
    environment_.metrics->Failed(absl::StatusCodeToString(status.code()));
  }
  ReleaseAll();
  reservation.Reset();
  {
    absl::MutexLock lock(&mu_);
    phase_ = Phase::kEnded;
  }
  caller_->OnFailed(status);
  for (Stream& stream : streams_) {
    if (stream.receiver != nullptr && stream.receiver != caller_) stream.receiver->OnFailed(status);
    stream.receiver.reset();
  }
  caller_.reset();
  environment_.on_end(shared_from_this());
}

void Job::MaybeFinish() {
  const bool push = is_push();
  for (const Stream& stream : streams_) {
    if (!stream.finished(push)) return;
  }
  Summary summary;
  absl::Status failed_target;
  {
    absl::MutexLock lock(&mu_);
    if (!result_.has_value() || first_token_ == absl::InfiniteFuture() || !failure_.ok() ||
        phase_ == Phase::kEnded) {
      return;
    }
    summary = MakeSummary();
    phase_ = Phase::kEnded;
    for (const TargetResult& target : summary.targets) {
      if (!target.status.ok() && failed_target.ok()) {
        failed_target = absl::Status(
            target.status.code(),
            absl::StrCat("push target ", target.target, ": ", target.status.message()));
        failure_ = failed_target;
      }
    }
    if (failed_target.ok()) {
      Report(summary);
    } else {
      environment_.metrics->Failed(absl::StatusCodeToString(failed_target.code()));
    }
  }
  ReleaseAll();
  // A caller learns the fate of each target from done, also where the call fails.
  caller_->OnDelivered(summary);
  for (Stream& stream : streams_) {
    if (stream.receiver != nullptr && stream.receiver != caller_)
      stream.receiver->OnDelivered(summary);
    stream.receiver.reset();
  }
  caller_.reset();
  environment_.on_end(shared_from_this());
}

Summary Job::MakeSummary() {
  Summary summary;
  const ComputeResult& result = *result_;
  summary.queue = started_ - request_.received;
  summary.compute = result.end - started_;
  summary.ttft = first_token_ - request_.received;
  summary.exposed_transfer = std::max(last_release_ - result.end, absl::ZeroDuration());
  summary.index_build = result.index_build;
  summary.dense_fallback_layers = result.dense_fallback_layers;
  const int layers = result.counts.size();
  const int groups = std::min(4, layers);  // quarters, where there are four layers
  kernels::PairCounts all, group[4];
  for (int layer = 0; layer < layers; ++layer) {
    for (kernels::PairCounts* sum : {&all, &group[LayerGroup(layer, layers)]}) {
      sum->dense += result.counts[layer].dense;
      sum->unmasked += result.counts[layer].unmasked;
      sum->multiplied += result.counts[layer].multiplied;
    }
  }
  const auto ratio = [](int64_t part, int64_t whole) {
    return whole > 0 ? static_cast<double>(part) / whole : 0.0;
  };
  summary.density = ratio(all.unmasked, all.dense);
  summary.cost_ratio = ratio(all.multiplied, all.dense);
  for (int i = 0; i < groups; ++i) {
    summary.layer_group_density.push_back(ratio(group[i].unmasked, group[i].dense));
  }
  if (auto manifest = source_->Manifest(); manifest.has_value()) {
    summary.manifest = *std::move(manifest);
  }
  const int64_t stripe_bytes = source_->plan().StripeBytes(0, 1);
  summary.kv_bytes = is_push() ? 0 : stripe_bytes;
  for (const Stream& stream : streams_) {
    if (!stream.target.has_value()) continue;
    summary.targets.push_back(*stream.target);
    if (stream.target->status.ok()) summary.kv_bytes += stripe_bytes;
  }
  return summary;
}

void Job::Report(const Summary& summary) {
  metrics::Completed completed;
  completed.mode = is_push() ? metrics::Mode::kPush : metrics::Mode::kStream;
  completed.time_to_first_token = summary.ttft;
  completed.time_to_first_layer = first_chunk_ - request_.received;
  completed.time_to_last_byte = last_release_ - request_.received;
  completed.queue = summary.queue;
  completed.compute = summary.compute;
  completed.transfer = last_release_ - first_chunk_;
  completed.index_build = summary.index_build;
  completed.kv_bytes = summary.kv_bytes;
  completed.prompt_tokens = request_.token_ids.size();
  for (const kernels::PairCounts& counts : result_->counts) {
    completed.pairs_total += counts.dense;
    completed.pairs_computed += counts.unmasked;
    completed.pairs_multiplied += counts.multiplied;
    if (counts.indexes > 0) {
      completed.vertical_columns.push_back(static_cast<double>(counts.vertical_columns) /
                                           counts.indexes);
      completed.slash_diagonals.push_back(static_cast<double>(counts.slash_diagonals) /
                                          counts.indexes);
    }
  }
  completed.layer_group_density = summary.layer_group_density;
  completed.dense_fallback_layers = summary.dense_fallback_layers;
  environment_.metrics->Succeeded(completed);
}

}  // namespace vsprefill::engine
