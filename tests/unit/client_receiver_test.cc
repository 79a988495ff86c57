// KvReceiver: what a prefill server pushes comes out whole, once, within the bounds, or not at all.
#include <gmock/gmock.h>
#include <grpcpp/create_channel.h>
#include <gtest/gtest.h>

#include <thread>

#include "client/cc/host_kv.h"
#include "client/cc/kv_receiver.h"
#include "tests/support/fake_kv.h"
#include "vsprefill/v1/kv.grpc.pb.h"

namespace vsprefill::client {
namespace {

using testing::AllKvFaults;
using testing::FakeKv;
using testing::FakeKvByte;
using ::testing::HasSubstr;
using testing::KvFault;
using testing::MakeFakeKv;
using testing::SmallShape;

constexpr absl::Duration kPatience = absl::Seconds(20);

/// Pushes one cache, step by step.
class Pusher {
 public:
  explicit Pusher(const std::string& address)
      : stub_(v1::KvReceiver::NewStub(
            grpc::CreateChannel(address, grpc::InsecureChannelCredentials()))) {
    context_.set_deadline(absl::ToChronoTime(absl::Now() + kPatience));
    writer_ = stub_->Push(&context_, &response_);
  }
  void Begin(const std::string& id, uint32_t attempt, const KvShape& shape) {
    v1::PushRequest r;
    r.mutable_begin()->set_request_id(id);
    r.mutable_begin()->set_attempt(attempt);
    *r.mutable_begin()->mutable_layout() = testing::ToProto(shape);
    writer_->Write(r);
  }
  void Chunk(const v1::KvChunk& chunk) {
    v1::PushRequest r;
    *r.mutable_kv() = chunk;
    writer_->Write(r);
  }
  void Finish(const v1::KvManifest& manifest, int64_t prompt_tokens, int32_t first_token = 42) {
    v1::PushRequest r;
    *r.mutable_finish()->mutable_manifest() = manifest;
    r.mutable_finish()->set_first_token(first_token);
    r.mutable_finish()->set_prompt_tokens(static_cast<uint64_t>(prompt_tokens));
    writer_->Write(r);
  }
  grpc::Status End() {
    writer_->WritesDone();
    return writer_->Finish();
  }
  grpc::Status PushAll(const std::string& id, uint32_t attempt, const KvShape& shape,
                       const FakeKv& kv, int32_t first_token = 42) {
    Begin(id, attempt, shape);
    for (const v1::KvChunk& c : kv.chunks) Chunk(c);
    Finish(kv.manifest, shape.prompt_tokens, first_token);
    return End();
  }
  /// Waits until the receiver ended the call by itself.
  grpc::Status WaitForEnd() { return writer_->Finish(); }
  void Cancel() { context_.TryCancel(); }
  const v1::PushResponse& response() const { return response_; }

 private:
  std::unique_ptr<v1::KvReceiver::Stub> stub_;
  grpc::ClientContext context_;
  v1::PushResponse response_;
  std::unique_ptr<grpc::ClientWriter<v1::PushRequest>> writer_;
};

KvReceiverOptions Options() {
  KvReceiverOptions o;
  o.allocate = [](const std::string&, const KvShape& shape) -> absl::StatusOr<KvAllocation> {
    std::shared_ptr<HostKv> kv = *HostKv::Create(shape);
    return KvAllocation{kv->destination(), kv};
  };
  return o;
}

std::unique_ptr<KvReceiver> Start(KvReceiverOptions options = Options()) {
  return *KvReceiver::Start("127.0.0.1:0", std::move(options));
}

void ExpectWhole(const ReceivedKv& kv) {
  const auto& host = *static_cast<const HostKv*>(kv.owner.get());
  const KvShape& shape = host.shape();
  const int64_t row_bytes = shape.layout.head_dim * kernels::SizeOf(shape.layout.dtype);
  for (int l = 0; l < shape.layout.num_layers; ++l) {
    for (bool is_v : {false, true}) {
      const absl::Span<const uint8_t> part = is_v ? host.v(l) : host.k(l);
      size_t i = 0;
      for (int h = 0; h < shape.layout.num_kv_heads; ++h) {
        for (int64_t t = shape.start_token; t < shape.prompt_tokens; ++t) {
          for (int64_t b = 0; b < row_bytes; ++b) {
            ASSERT_EQ(part[i++], FakeKvByte(l, is_v, h, t, b));
          }
        }
      }
    }
  }
}

void WaitFor(const std::function<bool()>& condition) {
  const absl::Time end = absl::Now() + kPatience;
  while (!condition() && absl::Now() < end) absl::SleepFor(absl::Milliseconds(1));
  EXPECT_TRUE(condition());
}

TEST(KvReceiver, HandsOutWhatWasPushed) {
  auto receiver = Start();
  const KvShape shape = SmallShape();
  Pusher pusher(receiver->address());
  const grpc::Status s = pusher.PushAll("r", 3, shape, MakeFakeKv(shape), 17);
  ASSERT_TRUE(s.ok()) << s.error_message();
  EXPECT_EQ(static_cast<int64_t>(pusher.response().bytes()), shape.bytes());
  EXPECT_EQ(receiver->num_caches(), 1);
  EXPECT_EQ(receiver->reserved_bytes(), shape.bytes());
  const absl::StatusOr<ReceivedKv> kv = receiver->Next(kPatience);
  ASSERT_TRUE(kv.ok());
  EXPECT_EQ(kv->request_id, "r");
  EXPECT_EQ(kv->attempt, 3u);
  EXPECT_EQ(kv->first_token, 17);
  EXPECT_EQ(kv->shape.prompt_tokens, 37);
  ExpectWhole(*kv);
  EXPECT_EQ(receiver->num_caches(), 0);
  EXPECT_EQ(receiver->reserved_bytes(), 0);
  EXPECT_EQ(receiver->Next(absl::Milliseconds(1)).status().code(),
            absl::StatusCode::kDeadlineExceeded);
}

TEST(KvReceiver, ManyAtOnce) {
  auto receiver = Start();
  std::vector<std::thread> threads;
  for (int i = 0; i < 6; ++i) {
    threads.emplace_back([&, i] {
      Pusher pusher(receiver->address());
      EXPECT_TRUE(
          pusher.PushAll(std::to_string(i), 0, SmallShape(), MakeFakeKv(SmallShape()), i).ok());
    });
  }
  for (std::thread& t : threads) t.join();
  int sum = 0;
  for (int i = 0; i < 6; ++i) {
    const absl::StatusOr<ReceivedKv> kv = receiver->Next(kPatience);
    ASSERT_TRUE(kv.ok());
    EXPECT_EQ(kv->request_id, std::to_string(kv->first_token));
    ExpectWhole(*kv);
    sum += kv->first_token;
  }
  EXPECT_EQ(sum, 15);
}

TEST(KvReceiver, EveryFaultIsDataLossAndLeavesNothing) {
  auto receiver = Start();
  for (KvFault fault : AllKvFaults()) {
    Pusher pusher(receiver->address());
    const grpc::Status s = pusher.PushAll("r", 0, SmallShape(), MakeFakeKv(SmallShape(), fault));
    EXPECT_EQ(s.error_code(), grpc::StatusCode::DATA_LOSS) << testing::Name(fault);
    WaitFor([&] { return receiver->num_caches() == 0; });
  }
  EXPECT_EQ(receiver->reserved_bytes(), 0);
  EXPECT_FALSE(receiver->Next(absl::ZeroDuration()).ok());
}

TEST(KvReceiver, OrderOfMessages) {
  auto receiver = Start();
  const FakeKv kv = MakeFakeKv(SmallShape());
  {
    Pusher p(receiver->address());
    p.Chunk(kv.chunks[0]);
    EXPECT_EQ(p.WaitForEnd().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  }
  {
    Pusher p(receiver->address());
    p.Finish(kv.manifest, 37);
    EXPECT_EQ(p.WaitForEnd().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  }
  {
    Pusher p(receiver->address());
    p.Begin("r", 0, SmallShape());
    p.Begin("r", 1, SmallShape());
    EXPECT_EQ(p.WaitForEnd().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  }
  {
    Pusher p(receiver->address());
    p.Begin("", 0, SmallShape());
    EXPECT_EQ(p.WaitForEnd().error_code(), grpc::StatusCode::INVALID_ARGUMENT);
  }
  {
    Pusher p(receiver->address());
    p.Begin("r", 0, SmallShape());
    p.Chunk(kv.chunks[0]);
    EXPECT_EQ(p.End().error_code(), grpc::StatusCode::DATA_LOSS);  // no finish
  }
  {
    Pusher p(receiver->address());
    p.Begin("r2", 0, SmallShape());
    for (const v1::KvChunk& c : kv.chunks) p.Chunk(c);
    p.Finish(kv.manifest, 38);
    EXPECT_EQ(p.End().error_code(), grpc::StatusCode::DATA_LOSS);  // another prompt length
  }
  WaitFor([&] { return receiver->num_caches() == 0; });
}

TEST(KvReceiver, HostileLayouts) {
  auto receiver = Start();
  KvShape shape = SmallShape();
  const auto begin = [&] {
    Pusher p(receiver->address());
    p.Begin("r", 0, shape);
    return p.WaitForEnd().error_code();
  };
  shape.layout.num_layers = 0;
  EXPECT_EQ(begin(), grpc::StatusCode::INVALID_ARGUMENT);
  shape.layout.num_layers = -1;  // 2^32 - 1 on the wire
  EXPECT_EQ(begin(), grpc::StatusCode::INVALID_ARGUMENT);
  shape = SmallShape();
  shape.prompt_tokens = -1;
  EXPECT_EQ(begin(), grpc::StatusCode::INVALID_ARGUMENT);
  shape = SmallShape();
  shape.start_token = 37;
  EXPECT_EQ(begin(), grpc::StatusCode::INVALID_ARGUMENT);
  shape = SmallShape();
  shape.layout.num_layers = 1024;
  shape.layout.num_kv_heads = 1024;
  shape.layout.head_dim = 4096;
  shape.prompt_tokens = 1 << 26;
  EXPECT_EQ(begin(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(receiver->num_caches(), 0);
}

TEST(KvReceiver, WrongKvId) {
  KvReceiverOptions options = Options();
  options.expected_kv_id = "mine";
  auto receiver = Start(std::move(options));
  Pusher p(receiver->address());
  p.Begin("r", 0, SmallShape());
  const grpc::Status s = p.WaitForEnd();
  EXPECT_EQ(s.error_code(), grpc::StatusCode::FAILED_PRECONDITION);
  EXPECT_EQ(s.error_message(), "the cache has kv_id fake-kv-id, this receiver takes mine");
}

TEST(KvReceiver, ErrorOfTheAllocatorGoesToThePusher) {
  KvReceiverOptions options;
  options.allocate = [](const std::string&, const KvShape&) -> absl::StatusOr<KvAllocation> {
    return absl::ResourceExhaustedError("no room");
  };
  auto receiver = Start(std::move(options));
  Pusher p(receiver->address());
  p.Begin("r", 0, SmallShape());
  EXPECT_EQ(p.WaitForEnd().error_message(), "no room");
  WaitFor([&] { return receiver->num_caches() == 0; });
}

TEST(KvReceiver, BoundsOfCachesAndBytes) {
  KvReceiverOptions options = Options();
  options.max_caches = 2;
  options.max_bytes = 3 * SmallShape().bytes() - 1;
  auto receiver = Start(std::move(options));
  const auto push = [&](const char* id, const KvShape& shape) {
    Pusher p(receiver->address());
    return p.PushAll(id, 0, shape, MakeFakeKv(shape));
  };
  EXPECT_TRUE(push("a", SmallShape()).ok());
  KvShape large = SmallShape();
  large.prompt_tokens *= 2;
  const grpc::Status s = push("b", large);
  EXPECT_EQ(s.error_code(), grpc::StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_THAT(s.error_message(),
              HasSubstr("a cache of 14208 bytes; 14207 of 21311 bytes are free"));
  EXPECT_TRUE(push("b", SmallShape()).ok());
  KvShape small = SmallShape();
  small.start_token = 20;
  EXPECT_EQ(push("c", small).error_message(), "2 caches wait already, the most allowed");
  EXPECT_TRUE(receiver->Next(kPatience).ok());
  EXPECT_TRUE(push("c", SmallShape()).ok());
}

TEST(KvReceiver, HigherAttemptReplacesARunningOne) {
  KvReceiverOptions options = Options();
  options.max_caches = 1;
  auto receiver = Start(std::move(options));
  const FakeKv kv = MakeFakeKv(SmallShape());
  Pusher first(receiver->address());
  first.Begin("r", 1, SmallShape());
  first.Chunk(kv.chunks[0]);
  WaitFor([&] { return receiver->num_caches() == 1; });

  for (uint32_t attempt : {0u, 1u}) {
    Pusher other(receiver->address());
    EXPECT_EQ(other.PushAll("r", attempt, SmallShape(), kv).error_code(),
              grpc::StatusCode::ALREADY_EXISTS);
  }
  Pusher second(receiver->address());
  EXPECT_TRUE(second.PushAll("r", 2, SmallShape(), kv, 7).ok());
  const grpc::Status s = first.WaitForEnd();
  EXPECT_EQ(s.error_code(), grpc::StatusCode::ABORTED);
  EXPECT_EQ(s.error_message(), "request r: replaced by attempt 2");
  const absl::StatusOr<ReceivedKv> got = receiver->Next(kPatience);
  ASSERT_TRUE(got.ok());
  EXPECT_EQ(got->attempt, 2u);
  EXPECT_EQ(got->first_token, 7);
  ExpectWhole(*got);
  EXPECT_EQ(receiver->num_caches(), 0);
}

TEST(KvReceiver, HigherAttemptReplacesACompleteOne) {
  auto receiver = Start();
  for (uint32_t attempt : {0u, 1u}) {
    Pusher p(receiver->address());
    EXPECT_TRUE(p.PushAll("r", attempt, SmallShape(), MakeFakeKv(SmallShape())).ok());
  }
  EXPECT_EQ(receiver->reserved_bytes(), SmallShape().bytes());
  EXPECT_EQ(receiver->Next(kPatience)->attempt, 1u);
  EXPECT_FALSE(receiver->Next(absl::ZeroDuration()).ok());
}

TEST(KvReceiver, APusherThatGoesLeavesNothing) {
  auto receiver = Start();
  Pusher p(receiver->address());
  p.Begin("r", 0, SmallShape());
  WaitFor([&] { return receiver->num_caches() == 1; });
  p.Cancel();
  EXPECT_EQ(p.WaitForEnd().error_code(), grpc::StatusCode::CANCELLED);
  WaitFor([&] { return receiver->num_caches() == 0; });
  EXPECT_EQ(receiver->reserved_bytes(), 0);
}

TEST(KvReceiver, APusherThatStandsStillIsEnded) {
  KvReceiverOptions options = Options();
  options.stall_timeout = absl::Milliseconds(100);
  auto receiver = Start(std::move(options));
  Pusher silent(receiver->address());  // not even a begin
  Pusher begun(receiver->address());
  begun.Begin("r", 0, SmallShape());
  EXPECT_EQ(begun.WaitForEnd().error_code(), grpc::StatusCode::ABORTED);
  EXPECT_EQ(silent.WaitForEnd().error_code(), grpc::StatusCode::ABORTED);
  WaitFor([&] { return receiver->num_caches() == 0; });
}

TEST(KvReceiver, ShutdownEndsPushesAndNext) {
  auto receiver = Start();
  Pusher p(receiver->address());
  p.Begin("r", 0, SmallShape());
  WaitFor([&] { return receiver->num_caches() == 1; });
  std::thread waiter(
      [&] { EXPECT_EQ(receiver->Next().status().code(), absl::StatusCode::kCancelled); });
  receiver->Shutdown();
  waiter.join();
  EXPECT_EQ(p.WaitForEnd().error_code(), grpc::StatusCode::UNAVAILABLE);
  Pusher late(receiver->address());
  late.Begin("s", 0, SmallShape());
  EXPECT_EQ(late.WaitForEnd().error_code(), grpc::StatusCode::UNAVAILABLE);
}

TEST(KvReceiver, DestructionEndsARunningPush) {
  auto receiver = Start();
  Pusher p(receiver->address());
  p.Begin("r", 0, SmallShape());
  WaitFor([&] { return receiver->num_caches() == 1; });
  receiver.reset();
  EXPECT_FALSE(p.WaitForEnd().ok());
}

TEST(KvReceiver, AnAddressInUse) {
  auto receiver = Start();
  const auto second = KvReceiver::Start(receiver->address(), Options());
  EXPECT_EQ(second.status(), absl::UnavailableError("cannot listen on " + receiver->address()));
}

}  // namespace
}  // namespace vsprefill::client
