// Peers that are slow, stop, vanish or never read. After each: the right status within a bound, all
// memory back within a second of the request's end, and the next request correct.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <random>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "tests/support/push_receiver.h"
#include "tests/support/subprocess.h"
#include "tests/support/test_service.h"

namespace vsprefill::testing {
namespace {

using grpc::StatusCode;

// 20 MB of KV in chunks of 512 KiB: far more than gRPC and sockets buffer.
constexpr int64_t kBigTokens = 40000;

TestServiceOptions BigChunks(absl::Duration stall = absl::Milliseconds(600)) {
  TestServiceOptions options;
  options.chunk_tokens = 4096;
  options.send_stall_timeout = stall;
  options.push_allow = {"127.0.0.1"};
  return options;
}

class PeersTest : public ::testing::Test {
 protected:
  void Start(const TestServiceOptions& options) {
    service_ = std::make_unique<TestService>(options);
  }
  void ExpectNextIsRight() {
    const v1::PrefillRequest request = MakeRequest("next", TestIds(5000, 7));
    const StreamResult result = Prefill(service_->stub(), request);
    ASSERT_TRUE(result.status.ok()) << result.status.error_message();
    EXPECT_EQ(CheckKv(request, result.chunks, result.accepted.layout(), result.done.manifest()),
              "");
    EXPECT_TRUE(service_->AwaitQuiet());
  }
  /// Waits until the request has ended (bounded), then asks for quiet within a second.
  void ExpectEndsWithin(absl::Duration bound) {
    const absl::Time until = absl::Now() + bound;
    while (absl::Now() < until) {
      const engine::Load load = service_->engine().load();
      if (load.running == 0 && load.waiting == 0) break;
      absl::SleepFor(absl::Milliseconds(5));
    }
    EXPECT_EQ(service_->engine().load().running, 0) << "the request did not end in time";
    EXPECT_TRUE(service_->AwaitQuiet()) << "memory was not given back";
    EXPECT_EQ(service_->Metric(R"(vsprefill_send_buffer_bytes{engine="0",model_name="fake"})"), 0);
    EXPECT_EQ(service_->Metric(R"(vsprefill_kv_cache_usage_perc{engine="0",model_name="fake"})"),
              0);
  }

  std::unique_ptr<TestService> service_;
};

TEST_F(PeersTest, ASlowReaderGetsEverythingAndHoldsNobodyUp) {
  Start(BigChunks());
  grpc::ClientContext context;
  v1::PrefillRequest request = MakeRequest("slow", TestIds(kBigTokens));
  const auto reader = service_->stub().Prefill(&context, request);
  bool other_done = false;
  // A second caller on another connection, while the first dawdles.
  std::thread other([&] {
    const auto stub = v1::PrefillService::NewStub(service_->NewChannel());
    EXPECT_TRUE(Prefill(*stub, MakeRequest("quick", TestIds(3000))).status.ok());
    other_done = true;
  });
  int events = 0;
  bool other_was_first = false;
  const StreamResult result = ReadAll(context, *reader, [&](const v1::PrefillEvent&) {
    if (++events > 20) {
      other_was_first = other_was_first || other_done;
      return;
    }
    absl::SleepFor(absl::Milliseconds(60));
  });
  other.join();
  EXPECT_TRUE(result.status.ok()) << result.status.error_message();
  EXPECT_TRUE(other_was_first);
  EXPECT_EQ(CheckKv(request, result.chunks, result.accepted.layout(), result.done.manifest()), "");
  ExpectEndsWithin(absl::Seconds(1));
}

TEST_F(PeersTest, AReaderThatNeverReadsIsAborted) {
  Start(BigChunks());
  grpc::ClientContext context;
  const auto reader = service_->stub().Prefill(&context, MakeRequest("r", TestIds(kBigTokens)));
  while (service_->engine().load().running == 0) absl::SleepFor(absl::Milliseconds(1));
  ExpectEndsWithin(absl::Seconds(3));
  // The caller learns why, past the data that it did not read.
  v1::PrefillEvent event;
  while (reader->Read(&event)) {
  }
  const grpc::Status status = reader->Finish();
  EXPECT_EQ(status.error_code(), StatusCode::ABORTED) << status.error_message();
  // Whichever stalled first: a KV chunk or the first token.
  EXPECT_THAT(status.error_message(),
              ::testing::AnyOf(::testing::HasSubstr("took nothing"),
                               ::testing::HasSubstr("did not take the first token")));
  ExpectNextIsRight();
}

TEST_F(PeersTest, AnAttachedReaderThatNeverReadsIsAborted) {
  Start(BigChunks());
  v1::PrefillRequest request = MakeRequest("r", TestIds(kBigTokens));
  request.set_stripes(2);
  grpc::ClientContext context, attach_context;
  std::unique_ptr<grpc::ClientReader<v1::PrefillEvent>> attached;
  const auto stub = v1::PrefillService::NewStub(service_->NewChannel());
  const auto reader = service_->stub().Prefill(&context, request);
  const StreamResult result = ReadAll(context, *reader, [&](const v1::PrefillEvent& event) {
    if (!event.has_accepted()) return;
    v1::AttachRequest attach;
    attach.set_request_id("r");
    attach.set_stripe(1);
    attached = stub->Attach(&attach_context, attach);
  });
  EXPECT_EQ(result.status.error_code(), StatusCode::ABORTED) << result.status.error_message();
  EXPECT_TRUE(absl::StrContains(result.status.error_message(), "stripe 1"));
  ExpectEndsWithin(absl::Seconds(1));
  attach_context.TryCancel();
  v1::PrefillEvent event;
  while (attached->Read(&event)) {
  }
  attached->Finish();
  ExpectNextIsRight();
}

TEST_F(PeersTest, AnAttachedReaderThatGoesFailsTheRequest) {
  Start(BigChunks(absl::Seconds(30)));
  v1::PrefillRequest request = MakeRequest("r", TestIds(kBigTokens));
  request.set_stripes(2);
  grpc::ClientContext context, attach_context;
  const auto stub = v1::PrefillService::NewStub(service_->NewChannel());
  std::thread attached;
  const auto reader = service_->stub().Prefill(&context, request);
  const StreamResult result = ReadAll(context, *reader, [&](const v1::PrefillEvent& event) {
    if (!event.has_accepted()) return;
    attached = std::thread([&] {
      v1::AttachRequest attach;
      attach.set_request_id("r");
      attach.set_stripe(1);
      const auto attach_reader = stub->Attach(&attach_context, attach);
      v1::PrefillEvent attach_event;
      for (int i = 0; i < 3; ++i) attach_reader->Read(&attach_event);
      attach_context.TryCancel();
      while (attach_reader->Read(&attach_event)) {
      }
      attach_reader->Finish();
    });
  });
  attached.join();
  EXPECT_EQ(result.status.error_code(), StatusCode::CANCELLED);
  EXPECT_TRUE(absl::StrContains(result.status.error_message(), "stripe 1"))
      << result.status.error_message();
  ExpectEndsWithin(absl::Seconds(1));
  ExpectNextIsRight();
}

TEST_F(PeersTest, ACallerThatIsKilledFreesEverything) {
  Start(BigChunks(absl::Seconds(30)));
  Subprocess caller(
      {BuildFolder() + "/tests/fault_peer", "read", service_->address(), absl::StrCat(kBigTokens)});
  for (int i = 0; i < 3; ++i) caller.AwaitLine("chunk");
  caller.Signal(SIGKILL);
  EXPECT_EQ(caller.Wait(), 128 + SIGKILL);
  ExpectEndsWithin(absl::Seconds(2));
  ExpectNextIsRight();
}

TEST_F(PeersTest, ACallerThatIsStoppedIsAbortedAndLearnsIt) {
  Start(BigChunks());
  Subprocess caller(
      {BuildFolder() + "/tests/fault_peer", "read", service_->address(), absl::StrCat(kBigTokens)});
  for (int i = 0; i < 2; ++i) caller.AwaitLine("chunk");
  caller.Signal(SIGSTOP);
  ExpectEndsWithin(absl::Seconds(4));
  caller.Signal(SIGCONT);
  const std::string status = caller.AwaitLine("status ");
  // ABORTED; or UNAVAILABLE where its connection was shut down to free what it held.
  EXPECT_TRUE(absl::StartsWith(status, "10 ") || absl::StartsWith(status, "14 ")) << status;
  ExpectNextIsRight();
}

TEST_F(PeersTest, AReceiverThatIsKilledIsUnavailable) {
  TestServiceOptions options = BigChunks(absl::Seconds(30));
  options.model.layer_delay = absl::Milliseconds(20);
  Start(options);
  Subprocess receiver({BuildFolder() + "/tests/fault_peer", "receive"});
  const std::string address = receiver.AwaitLine("address ");
  ASSERT_FALSE(address.empty()) << receiver.output();
  PushReceiver other;
  v1::PrefillRequest request = MakeRequest("p", TestIds(kBigTokens));
  request.add_push_targets(address);
  request.add_push_targets(other.address());
  std::thread killer([&] {
    for (int i = 0; i < 5; ++i) receiver.AwaitLine("chunk");
    receiver.Signal(SIGKILL);
  });
  const StreamResult result = Prefill(service_->stub(), request);
  killer.join();
  EXPECT_EQ(result.status.error_code(), StatusCode::UNAVAILABLE) << result.status.error_message();
  EXPECT_TRUE(absl::StrContains(result.status.error_message(), address));
  // The other target's cache is whole.
  ASSERT_EQ(other.pushes().size(), 1u);
  EXPECT_EQ(CheckKv(request, other.pushes()[0].chunks, other.pushes()[0].begin.layout(),
                    other.pushes()[0].finish.manifest()),
            "");
  ExpectEndsWithin(absl::Seconds(1));
  ExpectNextIsRight();
}

TEST_F(PeersTest, AReceiverThatIsStoppedIsAborted) {
  Start(BigChunks());
  Subprocess receiver({BuildFolder() + "/tests/fault_peer", "receive"});
  const std::string address = receiver.AwaitLine("address ");
  v1::PrefillRequest request = MakeRequest("p", TestIds(kBigTokens));
  request.add_push_targets(address);
  std::thread stopper([&] {
    receiver.AwaitLine("chunk");
    receiver.Signal(SIGSTOP);
  });
  const StreamResult result = Prefill(service_->stub(), request);
  stopper.join();
  EXPECT_EQ(result.status.error_code(), StatusCode::ABORTED) << result.status.error_message();
  ExpectEndsWithin(absl::Seconds(1));
  receiver.Signal(SIGCONT);
  ExpectNextIsRight();
}

TEST_F(PeersTest, AHundredRandomCancels) {
  TestServiceOptions options = BigChunks();
  options.chunk_tokens = 512;
  options.model.layer_delay = absl::Microseconds(300);
  Start(options);
  std::mt19937 random(20261123);
  std::vector<std::thread> clients;
  for (int client = 0; client < 4; ++client) {
    clients.emplace_back([&, client, seed = random()] {
      std::mt19937 own(seed);
      const auto stub = v1::PrefillService::NewStub(service_->NewChannel());
      for (int i = 0; i < 25; ++i) {
        v1::PrefillRequest request =
            MakeRequest(absl::StrCat(client, "-", i), TestIds(1000 + own() % 8000, i));
        grpc::ClientContext context;
        const auto reader = stub->Prefill(&context, request);
        v1::PrefillEvent event;
        const int events = own() % 40;
        for (int n = 0; n < events && reader->Read(&event); ++n) {
        }
        if (own() % 2 == 0) absl::SleepFor(absl::Microseconds(own() % 20000));
        context.TryCancel();
        while (reader->Read(&event)) {
        }
        const StatusCode code = reader->Finish().error_code();
        EXPECT_TRUE(code == StatusCode::CANCELLED || code == StatusCode::OK) << code;
      }
    });
  }
  for (std::thread& client : clients) client.join();
  ExpectEndsWithin(absl::Seconds(2));
  ExpectNextIsRight();
}

}  // namespace
}  // namespace vsprefill::testing
