#include "server/kv/kv_sender.h"

#include <algorithm>
#include <optional>
#include <utility>

namespace vsprefill::kv {
namespace {

constexpr absl::Duration kTick = absl::Milliseconds(100);

int64_t NowNanos() { return absl::ToUnixNanos(absl::Now()); }

}  // namespace

KvStream::KvStream(std::shared_ptr<Mailbox> mailbox, std::shared_ptr<KvSource> source, int stripe,
                   int stripes, std::shared_ptr<KvSink> sink)
    : mailbox_(std::move(mailbox)),
      source_(std::move(source)),
      sink_(std::move(sink)),
      cursor_(source_->plan(), stripe, stripes),
      last_progress_nanos_(std::make_shared<std::atomic<int64_t>>(NowNanos())) {}

void KvStream::ChunkWritten() {
  last_progress_nanos_->store(NowNanos());
  mailbox_->Post([self = shared_from_this()] { --self->window_used_; });
}

KvSender::KvSender(KvStager& stager, const KvSenderOptions& options)
    : stager_(stager),
      options_(options),
      mailbox_(std::make_shared<Mailbox>()),
      thread_([this] { Loop(); }) {}

KvSender::~KvSender() {
  mailbox_->Close();
  thread_.join();
}

std::shared_ptr<KvStream> KvSender::AddStream(std::shared_ptr<KvSource> source, int stripe,
                                              int stripes, std::shared_ptr<KvSink> sink) {
  auto stream =
      std::make_shared<KvStream>(mailbox_, std::move(source), stripe, stripes, std::move(sink));
  Post([this, stream] { streams_.push_back(stream); });
  return stream;
}

void KvSender::Loop() {
  std::vector<std::function<void()>> tasks;
  while (mailbox_->Take(kTick, &tasks)) {
    for (auto& task : tasks) task();
    tasks.clear();
    // One chunk per stream and round: no stream waits for another's backlog.
    for (bool busy = true; busy;) {
      busy = false;
      for (auto& stream : streams_) busy |= PumpOne(*stream);
    }
    for (auto& stream : streams_) CheckStall(*stream);
    streams_.erase(std::remove_if(streams_.begin(), streams_.end(),
                                  [](const std::shared_ptr<KvStream>& stream) {
                                    if (stream->closed_) {
                                      stream->sink_.reset();
                                      stream->source_.reset();
                                    }
                                    return stream->closed_;
                                  }),
                   streams_.end());
  }
  streams_.clear();
}

bool KvSender::PumpOne(KvStream& stream) {
  if (stream.closed_) return false;
  if (stream.cursor_.at_end()) {
    if (!stream.ended_) {
      stream.ended_ = true;
      stream.sink_->OnEndOfChunks();
    }
    if (stream.unreleased_chunks_ == 0) {
      stream.closed_ = true;
      stream.sink_->OnAllReleased(stream.last_release_);
    }
    return false;
  }
  if (stream.window_used_ >= options_.window_chunks) return false;
  const ChunkRange range = stream.cursor_.range();
  const size_t piece = stream.cursor_.piece();
  const std::optional<LayerMark> mark =
      stream.source_->ReadyMark(stream.cursor_.step(), range.layer);
  if (!mark.has_value()) return false;
  std::shared_ptr<KvCache> cache = stream.source_->cache();
  if (cache == nullptr) return false;  // the request has failed; Close follows

  absl::StatusOr<std::shared_ptr<StagedChunk>> staged =
      stager_.Stage(std::move(cache), *mark, range, stream.source_->Checksum(piece, range.layer));
  if (!staged.ok()) {
    stream.closed_ = true;
    stream.sink_->OnStageError(staged.status());
    return false;
  }
  if (*staged == nullptr) return false;  // staging is full; a release wakes this thread
  StagedChunk& chunk = **staged;
  stream.source_->RecordChecksum(piece, range.layer, chunk.checksum);
  chunk.on_progress = [clock = stream.last_progress_nanos_] { clock->store(NowNanos()); };
  chunk.on_released = [self = stream.shared_from_this()] {
    const absl::Time now = absl::Now();
    self->last_progress_nanos_->store(absl::ToUnixNanos(now));
    self->mailbox_->Post([self, now] {
      --self->unreleased_chunks_;
      self->last_release_ = std::max(self->last_release_, now);
    });
  };
  if (stream.unreleased_chunks_ == 0) stream.last_progress_nanos_->store(NowNanos());
  ++stream.unreleased_chunks_;
  ++stream.window_used_;
  stream.cursor_.Advance();
  stream.sink_->OnChunk(*std::move(staged));
  return true;
}

void KvSender::CheckStall(KvStream& stream) {
  if (stream.closed_ || stream.unreleased_chunks_ == 0) return;
  const absl::Duration idle =
      absl::Now() - absl::FromUnixNanos(stream.last_progress_nanos_->load());
  if (idle < options_.stall_timeout) return;
  stream.closed_ = true;
  stream.sink_->OnStalled(idle);
}

}  // namespace vsprefill::kv
