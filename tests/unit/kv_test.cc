// Pool, cache, chunk plan, staging and delivery thread, without gRPC.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <xxhash.h>

#include <cstring>
#include <set>

#include "absl/strings/match.h"
#include "absl/synchronization/mutex.h"
#include "absl/synchronization/notification.h"
#include "server/kv/chunk_plan.h"
#include "server/kv/kv_cache.h"
#include "server/kv/kv_pool.h"
#include "server/kv/kv_sender.h"
#include "server/kv/kv_stager.h"
#include "server/kv/mailbox.h"

namespace vsprefill::kv {
namespace {

KvLayout Layout(int layers = 3, int heads = 2, int head_dim = 8) {
  KvLayout layout;
  layout.num_layers = layers;
  layout.num_kv_heads = heads;
  layout.head_dim = head_dim;
  layout.dtype = kernels::DType::kBF16;
  return layout;
}

TEST(KvPoolTest, ReservesUpToItsCapacityAndTakesBack) {
  KvPool pool(100);
  auto first = pool.Reserve(60);
  ASSERT_TRUE(first.ok());
  const auto refused = pool.Reserve(41);
  EXPECT_EQ(refused.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_TRUE(absl::StrContains(refused.status().message(), "41"));
  EXPECT_TRUE(absl::StrContains(refused.status().message(), "40 of 100"));
  auto second = pool.Reserve(40);
  ASSERT_TRUE(second.ok());
  EXPECT_EQ(pool.used_bytes(), 100);
  KvPool::Reservation moved = *std::move(first);
  EXPECT_EQ(moved.bytes(), 60);
  EXPECT_EQ(pool.used_bytes(), 100);
  moved.Reset();
  moved.Reset();
  EXPECT_EQ(pool.used_bytes(), 40);
  *second = KvPool::Reservation();
  EXPECT_EQ(pool.used_bytes(), 0);
  EXPECT_FALSE(pool.Reserve(-1).ok());
}

TEST(KvCacheTest, TensorsDoNotOverlapAndFillTheReservation) {
  for (bool with_logits : {false, true}) {
    KvPool pool(1 << 20);
    const int64_t bytes = KvCache::BytesFor(Layout(), 37, with_logits);
    auto cache = KvCache::Create(HostAllocator(), *pool.Reserve(bytes), Layout(), 37, with_logits);
    ASSERT_TRUE(cache.ok());
    const int64_t kv = 2 * 37 * 8 * 2, logits = 2 * 37 * 4;
    std::map<char*, int64_t> ranges;
    for (int layer = 0; layer < 3; ++layer) {
      ranges[static_cast<char*>((*cache)->k(layer))] = kv;
      ranges[static_cast<char*>((*cache)->v(layer))] = kv;
      if (with_logits) {
        ranges[reinterpret_cast<char*>((*cache)->vertical_logits(layer))] = logits;
        ranges[reinterpret_cast<char*>((*cache)->slash_logits(layer))] = logits;
      } else {
        EXPECT_EQ((*cache)->vertical_logits(layer), nullptr);
        EXPECT_EQ((*cache)->slash_logits(layer), nullptr);
      }
    }
    EXPECT_EQ(ranges.size(), with_logits ? 12u : 6u);
    char* end = ranges.begin()->first;
    for (const auto& [begin, size] : ranges) {
      EXPECT_GE(begin, end);
      end = begin + size;
      std::memset(begin, 1, size);  // under asan: inside the allocation
    }
    EXPECT_LE(end - ranges.begin()->first, bytes);
    EXPECT_EQ(pool.used_bytes(), bytes);
    cache->reset();
    EXPECT_EQ(pool.used_bytes(), 0);
  }
}

TEST(KvCacheTest, RefusesAReservationThatIsTooSmall) {
  KvPool pool(1 << 20);
  const auto cache = KvCache::Create(HostAllocator(), *pool.Reserve(10), Layout(), 37, false);
  EXPECT_EQ(cache.status().code(), absl::StatusCode::kInternal);
  EXPECT_EQ(pool.used_bytes(), 0);
}

TEST(ChunkPlanTest, StripesTogetherCoverEveryTokenOfEveryLayerOnce) {
  for (int64_t tokens : {1, 63, 64, 65, 1000}) {
    for (int64_t start : {int64_t{0}, tokens / 2, tokens - 1}) {
      for (int64_t step : {16, 64, 5000}) {
        for (int stripes : {1, 2, 5}) {
          const ChunkPlan plan(Layout(5), tokens, start, step);
          std::vector<std::set<int64_t>> seen(5);
          int64_t bytes = 0;
          for (int stripe = 0; stripe < stripes; ++stripe) {
            int64_t stripe_bytes = 0;
            std::pair<int64_t, int> last = {-1, -1};
            for (ChunkCursor cursor(plan, stripe, stripes); !cursor.at_end(); cursor.Advance()) {
              const ChunkRange range = cursor.range();
              EXPECT_EQ(range.layer % stripes, stripe);
              EXPECT_GT(range.num_tokens(), 0);
              EXPECT_LE(range.num_tokens(), plan.layout().max_chunk_tokens());
              // Never before the step that computes it, and in the order of computing.
              EXPECT_GE(range.token_begin, plan.step_begin(cursor.step()));
              EXPECT_LE(range.token_end, plan.step_end(cursor.step()));
              const std::pair<int64_t, int> now = {cursor.step(), range.layer};
              EXPECT_GE(now, last);
              last = now;
              for (int64_t t = range.token_begin; t < range.token_end; ++t) {
                EXPECT_TRUE(seen[range.layer].insert(t).second);
              }
              stripe_bytes += range.num_tokens() * plan.layout().layer_token_bytes();
            }
            EXPECT_EQ(stripe_bytes, plan.StripeBytes(stripe, stripes));
            bytes += stripe_bytes;
          }
          for (const auto& layer : seen) {
            EXPECT_EQ(static_cast<int64_t>(layer.size()), tokens - start);
            EXPECT_EQ(*layer.begin(), start);
          }
          EXPECT_EQ(bytes, plan.StripeBytes(0, 1));
        }
      }
    }
  }
}

TEST(ChunkPlanTest, LargeChunksAreCutToTheMessageLimit) {
  const ChunkPlan plan(Layout(1, 8, 128), 5000, 0, 4096);
  ASSERT_EQ(plan.layout().layer_token_bytes(), 4096);
  EXPECT_EQ(plan.layout().max_chunk_tokens(), 960);
  for (const Piece& piece : plan.pieces()) {
    EXPECT_LE((piece.token_end - piece.token_begin) * 4096 + kMaxChunkHeaderBytes,
              kMaxMessageBytes);
  }
}

TEST(MailboxTest, RunsInOrderAndDropsAfterClose) {
  Mailbox mailbox;
  std::vector<int> order;
  mailbox.Post([&] { order.push_back(1); });
  mailbox.PostAt(absl::Now() + absl::Hours(1), [&] { order.push_back(9); });
  mailbox.PostAt(absl::Now() - absl::Seconds(1), [&] { order.push_back(2); });
  std::vector<std::function<void()>> tasks;
  ASSERT_TRUE(mailbox.Take(absl::ZeroDuration(), &tasks));
  for (auto& task : tasks) task();
  EXPECT_EQ(order, (std::vector<int>{1, 2}));
  const absl::Time begin = absl::Now();
  tasks.clear();
  ASSERT_TRUE(mailbox.Take(absl::Milliseconds(20), &tasks));
  EXPECT_TRUE(tasks.empty());
  EXPECT_GE(absl::Now() - begin, absl::Milliseconds(19));
  auto held = std::make_shared<int>(0);
  mailbox.Close();
  mailbox.Post([held] {});
  EXPECT_EQ(held.use_count(), 1);
  EXPECT_FALSE(mailbox.Take(absl::ZeroDuration(), &tasks));
}

/// Keeps what it gets until the test lets go.
class RecordingSink final : public KvSink {
 public:
  void OnChunk(std::shared_ptr<StagedChunk> chunk) override {
    absl::MutexLock lock(&mu_);
    ranges_.push_back(chunk->range);
    held_.push_back(std::move(chunk));
  }
  void OnEndOfChunks() override { ended_.Notify(); }
  void OnAllReleased(absl::Time) override { released_.Notify(); }
  void OnStalled(absl::Duration) override { stalled_.Notify(); }
  void OnStageError(const absl::Status&) override { FAIL(); }

  bool AwaitChunks(size_t n) {
    absl::MutexLock lock(&mu_);
    const auto enough = [this, n]()
                            ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) { return ranges_.size() >= n; };
    return mu_.AwaitWithTimeout(absl::Condition(&enough), absl::Seconds(10));
  }
  size_t chunks() {
    absl::MutexLock lock(&mu_);
    return ranges_.size();
  }
  std::vector<std::shared_ptr<StagedChunk>> Take() {
    absl::MutexLock lock(&mu_);
    return std::move(held_);
  }
  absl::Notification ended_, released_, stalled_;

 private:
  absl::Mutex mu_;
  std::vector<ChunkRange> ranges_ ABSL_GUARDED_BY(mu_);
  std::vector<std::shared_ptr<StagedChunk>> held_ ABSL_GUARDED_BY(mu_);
};

class KvSenderTest : public ::testing::Test {
 protected:
  void Start(int64_t staging_bytes = 1 << 20, absl::Duration stall = absl::Seconds(30)) {
    stager_ = CreateHostKvStager(staging_bytes);
    KvSenderOptions options;
    options.stall_timeout = stall;
    sender_ = std::make_unique<KvSender>(*stager_, options);
    source_ = std::make_shared<KvSource>(ChunkPlan(Layout(), 100, 0, 40));
    auto cache =
        KvCache::Create(HostAllocator(), *pool_.Reserve(KvCache::BytesFor(Layout(), 100, false)),
                        Layout(), 100, false);
    for (int layer = 0; layer < 3; ++layer) {
      auto* k = static_cast<uint8_t*>((*cache)->k(layer));
      auto* v = static_cast<uint8_t*>((*cache)->v(layer));
      for (int i = 0; i < 2 * 100 * 16; ++i) {
        k[i] = static_cast<uint8_t>(i * 31 + layer);
        v[i] = static_cast<uint8_t>(i * 17 + layer + 5);
      }
    }
    source_->SetCache(*std::move(cache));
  }
  void Ready(int64_t step, int layer) {
    source_->MarkReady(step, layer, nullptr);
    sender_->Wake();
  }

  KvPool pool_{1 << 20};
  std::unique_ptr<KvStager> stager_;
  std::shared_ptr<KvSource> source_;
  std::shared_ptr<RecordingSink> sink_ = std::make_shared<RecordingSink>();
  std::unique_ptr<KvSender> sender_;
};

TEST_F(KvSenderTest, GivesAWindowOfWhatIsReadyAndMoreAsItIsWritten) {
  Start();
  const auto stream = sender_->AddStream(source_, 0, 1, sink_);
  Ready(0, 0);
  ASSERT_TRUE(sink_->AwaitChunks(1));
  Ready(0, 1);
  Ready(0, 2);
  ASSERT_TRUE(sink_->AwaitChunks(2));
  absl::SleepFor(absl::Milliseconds(50));
  EXPECT_EQ(sink_->chunks(), 2u);  // the window
  stream->ChunkWritten();
  ASSERT_TRUE(sink_->AwaitChunks(3));
  for (int step : {1, 2}) {
    for (int layer : {0, 1, 2}) Ready(step, layer);
  }
  for (size_t n = 4; n <= 9; ++n) {
    stream->ChunkWritten();
    ASSERT_TRUE(sink_->AwaitChunks(n));
  }
  EXPECT_TRUE(sink_->ended_.WaitForNotificationWithTimeout(absl::Seconds(5)));
  EXPECT_FALSE(sink_->released_.HasBeenNotified());
  EXPECT_EQ(stager_->used_bytes(), 100 * Layout().token_bytes());
  for (const auto& chunk : sink_->Take()) {
    XXH3_state_t* state = XXH3_createState();
    XXH3_64bits_reset(state);
    int64_t bytes = 0;
    for (const Segment& segment : chunk->segments) {
      XXH3_64bits_update(state, segment.data, segment.bytes);
      bytes += segment.bytes;
    }
    EXPECT_EQ(XXH3_64bits_digest(state), chunk->checksum);
    EXPECT_EQ(bytes, chunk->bytes);
    XXH3_freeState(state);
    // K of head 1 begins where the cache says.
    const auto* k1 = static_cast<const uint8_t*>(chunk->segments[1].data);
    EXPECT_EQ(k1[0], static_cast<uint8_t>((1600 + chunk->range.token_begin * 16) * 31 +
                                          chunk->range.layer));
  }
  EXPECT_TRUE(sink_->released_.WaitForNotificationWithTimeout(absl::Seconds(5)));
  EXPECT_EQ(stager_->used_bytes(), 0);
  ASSERT_TRUE(source_->Manifest().has_value());
  EXPECT_EQ(source_->Manifest()->size(), 3u);
  EXPECT_EQ((*source_->Manifest())[2].chunks, 3);
}

TEST_F(KvSenderTest, FullStagingWaitsForARelease) {
  Start(/*staging_bytes=*/40 * 64);  // one chunk of 40 tokens
  const auto stream = sender_->AddStream(source_, 0, 1, sink_);
  Ready(0, 0);
  Ready(0, 1);
  ASSERT_TRUE(sink_->AwaitChunks(1));
  absl::SleepFor(absl::Milliseconds(50));
  EXPECT_EQ(sink_->chunks(), 1u);
  sink_->Take().clear();
  EXPECT_TRUE(sink_->AwaitChunks(2));
}

TEST_F(KvSenderTest, NoProgressIsAStallAndMemoryOutlivesTheSender) {
  Start(1 << 20, absl::Milliseconds(200));
  const auto stream = sender_->AddStream(source_, 0, 1, sink_);
  absl::SleepFor(absl::Milliseconds(300));
  EXPECT_FALSE(sink_->stalled_.HasBeenNotified());  // nothing to send is no stall
  Ready(0, 0);
  ASSERT_TRUE(sink_->AwaitChunks(1));
  auto held = sink_->Take();
  for (int i = 0; i < 6; ++i) {
    absl::SleepFor(absl::Milliseconds(60));
    held[0]->on_progress();
  }
  EXPECT_FALSE(sink_->stalled_.HasBeenNotified());
  EXPECT_TRUE(sink_->stalled_.WaitForNotificationWithTimeout(absl::Seconds(2)));
  source_->DropCache();
  EXPECT_GT(pool_.used_bytes(), 0);  // lent out
  sender_.reset();
  stager_.reset();
  held.clear();
  EXPECT_EQ(pool_.used_bytes(), 0);
}

TEST_F(KvSenderTest, StreamsOfOneSourceAgreeOnChecksums) {
  Start();
  auto second_sink = std::make_shared<RecordingSink>();
  const auto first = sender_->AddStream(source_, 0, 1, sink_);
  const auto second = sender_->AddStream(source_, 0, 1, second_sink);
  Ready(0, 0);
  ASSERT_TRUE(sink_->AwaitChunks(1));
  ASSERT_TRUE(second_sink->AwaitChunks(1));
  EXPECT_EQ(sink_->Take()[0]->checksum, second_sink->Take()[0]->checksum);
}

TEST(KvSourceTest, NothingIsReadyAfterDropAndTheManifestNeedsEveryChunk) {
  KvSource source(ChunkPlan(Layout(), 10, 0, 10));
  EXPECT_FALSE(source.ReadyMark(0, 0).has_value());
  source.MarkReady(0, 0, nullptr);
  EXPECT_TRUE(source.ReadyMark(0, 0).has_value());
  EXPECT_FALSE(source.ReadyMark(0, 1).has_value());
  for (int layer = 0; layer < 2; ++layer) source.RecordChecksum(0, layer, 7);
  EXPECT_FALSE(source.Manifest().has_value());
  source.RecordChecksum(0, 2, 7);
  EXPECT_TRUE(source.Manifest().has_value());
  source.DropCache();
  EXPECT_FALSE(source.ReadyMark(0, 0).has_value());
  EXPECT_EQ(source.cache(), nullptr);
}

}  // namespace
}  // namespace vsprefill::kv
