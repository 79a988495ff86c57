// Push: the server sends the cache to decode workers, the caller gets the rest.
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "tests/support/push_receiver.h"
#include "tests/support/test_service.h"

namespace vsprefill::testing {
namespace {

using grpc::StatusCode;

TestServiceOptions AllowLoopback() {
  TestServiceOptions options;
  options.push_allow = {"127.0.0.1"};
  return options;
}

void ExpectWholeCache(const v1::PrefillRequest& request, const Pushed& pushed) {
  EXPECT_TRUE(pushed.complete);
  EXPECT_EQ(pushed.order.front(), "begin");
  EXPECT_EQ(pushed.order.back(), "finish");
  EXPECT_EQ(pushed.begin.request_id(), request.request_id());
  EXPECT_EQ(pushed.begin.attempt(), request.attempt());
  EXPECT_EQ(CheckKv(request, pushed.chunks, pushed.begin.layout(), pushed.finish.manifest()), "");
  EXPECT_EQ(pushed.finish.prompt_tokens(), static_cast<uint64_t>(request.token_ids_size()));
  const std::vector<int32_t> ids(request.token_ids().begin(), request.token_ids().end());
  EXPECT_EQ(pushed.finish.first_token(), FakeFirstToken(ids, 1000));
}

TEST(PushTest, TargetsGetTheCacheAndTheCallerTheRest) {
  TestService service(AllowLoopback());
  PushReceiver first, second;
  v1::PrefillRequest request = MakeRequest("p", TestIds(200));
  request.set_attempt(4);
  request.set_start_token(70);
  request.set_want_logits(true);
  request.add_push_targets(first.address());
  request.add_push_targets(second.address());
  const StreamResult result = Prefill(service.stub(), request);
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  ASSERT_EQ(result.events.size(), 3u);
  EXPECT_TRUE(result.events[0].has_accepted());
  EXPECT_TRUE(result.events[1].has_first_token());
  EXPECT_TRUE(result.events[2].has_done());
  EXPECT_EQ(result.accepted.stripe_bytes(), 0u);
  EXPECT_EQ(result.first_token.logits_size(), 1000);
  ASSERT_EQ(result.done.targets_size(), 2);
  const uint64_t bytes = result.done.manifest().bytes();
  EXPECT_EQ(result.done.stats().kv_bytes(), 2 * bytes);
  for (PushReceiver* receiver : {&first, &second}) {
    ASSERT_EQ(receiver->pushes().size(), 1u);
    ExpectWholeCache(request, receiver->pushes()[0]);
    EXPECT_EQ(receiver->pushes()[0].finish.manifest().SerializeAsString(),
              result.done.manifest().SerializeAsString());
  }
  for (int i = 0; i < 2; ++i) {
    EXPECT_EQ(result.done.targets(i).target(), request.push_targets(i));
    EXPECT_EQ(result.done.targets(i).code(), 0);
    EXPECT_EQ(result.done.targets(i).bytes(), bytes);
  }
  EXPECT_TRUE(service.AwaitQuiet());
}

TEST(PushTest, DoneWaitsForTheTargetsVerdict) {
  TestService service(AllowLoopback());
  std::atomic<bool> answered = false;
  PushReceiver slow([&](int count) {
    if (count == 3) absl::SleepFor(absl::Milliseconds(300));
    answered = count >= 3;
    return grpc::Status::OK;
  });
  v1::PrefillRequest request = MakeRequest("p", TestIds(50));
  request.add_push_targets(slow.address());
  const StreamResult result = Prefill(service.stub(), request);
  EXPECT_TRUE(answered);
  EXPECT_TRUE(result.status.ok());
  EXPECT_GE(result.done.stats().exposed_transfer_seconds(), 0);
}

TEST(PushTest, DeadTargetIsUnavailableAndTheOtherKeepsItsCache) {
  TestService service(AllowLoopback());
  PushReceiver alive;
  std::string dead;
  {
    PushReceiver gone;
    dead = gone.address();
  }
  v1::PrefillRequest request = MakeRequest("p", TestIds(100));
  request.add_push_targets(dead);
  request.add_push_targets(alive.address());
  const StreamResult result = Prefill(service.stub(), request);
  EXPECT_EQ(result.status.error_code(), StatusCode::UNAVAILABLE);
  EXPECT_TRUE(absl::StrContains(result.status.error_message(), dead));
  ASSERT_TRUE(result.has_done);
  ASSERT_EQ(result.done.targets_size(), 2);
  EXPECT_EQ(result.done.targets(0).code(), static_cast<int>(StatusCode::UNAVAILABLE));
  EXPECT_EQ(result.done.targets(0).bytes(), 0u);
  EXPECT_EQ(result.done.targets(1).code(), 0);
  ASSERT_EQ(alive.pushes().size(), 1u);
  ExpectWholeCache(request, alive.pushes()[0]);
  EXPECT_TRUE(service.AwaitQuiet());
}

TEST(PushTest, OnlyDeadTargetsEndTheComputeEarly) {
  TestServiceOptions options = AllowLoopback();
  options.model.layer_delay = absl::Milliseconds(50);
  TestService service(options);
  std::string dead;
  {
    PushReceiver gone;
    dead = gone.address();
  }
  v1::PrefillRequest request = MakeRequest("p", TestIds(64 * 50));  // 10 s of compute
  request.add_push_targets(dead);
  const absl::Time begin = absl::Now();
  const StreamResult result = Prefill(service.stub(), request);
  EXPECT_EQ(result.status.error_code(), StatusCode::UNAVAILABLE);
  EXPECT_TRUE(absl::StrContains(result.status.error_message(), dead));
  EXPECT_LT(absl::Now() - begin, absl::Seconds(3));
  EXPECT_TRUE(service.AwaitQuiet());
  EXPECT_GE(service.Metric(R"(vsprefill_push_retries_total{engine="0",model_name="fake"})"), 1);
}

TEST(PushTest, ATargetThatComesBackIsTriedOnceMore) {
  TestServiceOptions options = AllowLoopback();
  options.model.layer_delay = absl::Milliseconds(50);
  TestService service(options);
  std::atomic<int> calls = 0;
  PushReceiver flaky([&](int count) {
    if (count == 0 && calls++ == 0) {
      return grpc::Status(StatusCode::UNAVAILABLE, "starting");
    }
    return grpc::Status::OK;
  });
  v1::PrefillRequest request = MakeRequest("p", TestIds(200));
  request.add_push_targets(flaky.address());
  const StreamResult result = Prefill(service.stub(), request);
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  ASSERT_EQ(flaky.pushes().size(), 2u);
  ExpectWholeCache(request, flaky.pushes()[1]);
  EXPECT_TRUE(service.AwaitQuiet());
}

TEST(PushTest, ATargetThatRefusesFailsTheCallWithItsCode) {
  TestService service(AllowLoopback());
  PushReceiver corrupt(nullptr, grpc::Status(StatusCode::DATA_LOSS, "checksum of layer 2"));
  v1::PrefillRequest request = MakeRequest("p", TestIds(100));
  request.add_push_targets(corrupt.address());
  const StreamResult result = Prefill(service.stub(), request);
  EXPECT_EQ(result.status.error_code(), StatusCode::DATA_LOSS);
  EXPECT_TRUE(absl::StrContains(result.status.error_message(), "checksum of layer 2"));
  EXPECT_EQ(service.Metric(R"(vsprefill_checksum_failures_total{engine="0",model_name="fake"})"),
            1);
  EXPECT_TRUE(service.AwaitQuiet());
}

TEST(PushTest, ATargetThatNeverReadsIsAbortedAlone) {
  TestServiceOptions options = AllowLoopback();
  options.send_stall_timeout = absl::Milliseconds(500);
  options.chunk_tokens = 4096;  // 512 KiB chunks: more than flow control lets pass
  TestService service(options);
  absl::Mutex mu;
  bool release = false;
  PushReceiver stuck([&](int count) {
    absl::MutexLock lock(&mu);
    if (count == 1) mu.AwaitWithTimeout(absl::Condition(&release), absl::Seconds(20));
    return grpc::Status::OK;
  });
  PushReceiver fine;
  v1::PrefillRequest request = MakeRequest("p", TestIds(20000));
  request.add_push_targets(stuck.address());
  request.add_push_targets(fine.address());
  const StreamResult result = Prefill(service.stub(), request);
  EXPECT_EQ(result.status.error_code(), StatusCode::ABORTED) << result.status.error_message();
  EXPECT_TRUE(absl::StrContains(result.status.error_message(), stuck.address()));
  ASSERT_EQ(result.done.targets_size(), 2);
  EXPECT_EQ(result.done.targets(1).code(), 0);
  ASSERT_EQ(fine.pushes().size(), 1u);
  ExpectWholeCache(request, fine.pushes()[0]);
  EXPECT_TRUE(service.AwaitQuiet());
  absl::MutexLock lock(&mu);
  release = true;
}

TEST(PushTest, CancellingTheCallerCancelsTheTargets) {
  TestServiceOptions options = AllowLoopback();
  options.model.layer_delay = absl::Milliseconds(20);
  TestService service(options);
  PushReceiver receiver;
  v1::PrefillRequest request = MakeRequest("p", TestIds(64 * 50));
  request.add_push_targets(receiver.address());
  grpc::ClientContext context;
  const auto reader = service.stub().Prefill(&context, request);
  v1::PrefillEvent event;
  ASSERT_TRUE(reader->Read(&event));
  absl::SleepFor(absl::Milliseconds(100));
  context.TryCancel();
  while (reader->Read(&event)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), StatusCode::CANCELLED);
  EXPECT_TRUE(service.AwaitQuiet());
  const absl::Time until = absl::Now() + absl::Seconds(5);
  while (receiver.pushes().empty() && absl::Now() < until) absl::SleepFor(absl::Milliseconds(5));
  ASSERT_EQ(receiver.pushes().size(), 1u);
  EXPECT_FALSE(receiver.pushes()[0].complete);
}

}  // namespace
}  // namespace vsprefill::testing
