// Each way in which a request can be refused or end early: code, message, and that the server is as
// it was before.
#include <gtest/gtest.h>

#include <limits>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/notification.h"
#include "tests/support/test_service.h"

namespace vsprefill::testing {
namespace {

using grpc::StatusCode;

/// A service whose engine stops at its first layer until the test lets it go.
class HeldService {
 public:
  explicit HeldService(TestServiceOptions options = {}) {
    options.model.on_layer = [this](int, int64_t) {
      if (!reached_.HasBeenNotified()) reached_.Notify();
      go_.WaitForNotification();
      return absl::OkStatus();
    };
    service_ = std::make_unique<TestService>(options);
  }
  ~HeldService() { Release(); }
  void AwaitReached() { reached_.WaitForNotification(); }
  void Release() {
    if (!go_.HasBeenNotified()) go_.Notify();
  }
  TestService& operator*() { return *service_; }
  TestService* operator->() { return service_.get(); }

 private:
  absl::Notification reached_, go_;
  std::unique_ptr<TestService> service_;
};

/// Runs one Prefill on a thread of its own.
class Background {
 public:
  Background(TestService& service, v1::PrefillRequest request,
             absl::Duration deadline = absl::Seconds(20)) {
    context_.set_deadline(absl::ToChronoTime(absl::Now() + deadline));
    thread_ = std::thread([this, &service, request] {
      const auto reader = service.stub().Prefill(&context_, request);
      result_ = ReadAll(context_, *reader);
    });
  }
  ~Background() {
    if (thread_.joinable()) thread_.join();
  }
  void Cancel() { context_.TryCancel(); }
  const StreamResult& Join() {
    thread_.join();
    return result_;
  }

 private:
  grpc::ClientContext context_;
  StreamResult result_;
  std::thread thread_;
};

void AwaitWaiting(TestService& service, int waiting) {
  const absl::Time until = absl::Now() + absl::Seconds(10);
  while (service.engine().load().waiting != waiting && absl::Now() < until) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  ASSERT_EQ(service.engine().load().waiting, waiting);
}

struct Refusal {
  std::string name;
  std::function<void(v1::PrefillRequest&)> change;
  StatusCode code;
  std::vector<std::string> words;  // in the message
};

TEST(ErrorsTest, RefusalsNameTheValueAndWhatIsAllowed) {
  TestServiceOptions options;
  options.model.max_position_embeddings = 500;
  options.push_allow = {"127.0.0.1:9999"};
  TestService service(options);
  const std::vector<Refusal> refusals = {
      {"empty prompt",
       [](auto& r) { r.clear_token_ids(); },
       StatusCode::INVALID_ARGUMENT,
       {"0 tokens", "1 to 500"}},
      {"too long",
       [](auto& r) { r.mutable_token_ids()->Resize(501, 1); },
       StatusCode::INVALID_ARGUMENT,
       {"501", "1 to 500"}},
      {"negative id",
       [](auto& r) { r.set_token_ids(2, -5); },
       StatusCode::INVALID_ARGUMENT,
       {"token_ids[2] = -5", "[0, 1000)"}},
      {"id too large",
       [](auto& r) { r.set_token_ids(7, 1000); },
       StatusCode::INVALID_ARGUMENT,
       {"token_ids[7] = 1000", "[0, 1000)"}},
      {"start_token",
       [](auto& r) { r.set_start_token(10); },
       StatusCode::INVALID_ARGUMENT,
       {"start_token 10", "[0, 10)"}},
      {"huge start_token",
       [](auto& r) { r.set_start_token(std::numeric_limits<uint64_t>::max()); },
       StatusCode::INVALID_ARGUMENT,
       {"start_token", "[0, 10)"}},
      {"empty id",
       [](auto& r) { r.clear_request_id(); },
       StatusCode::INVALID_ARGUMENT,
       {"request_id has 0 bytes", "1 to 256"}},
      {"long id",
       [](auto& r) { r.set_request_id(std::string(257, 'x')); },
       StatusCode::INVALID_ARGUMENT,
       {"257", "1 to 256"}},
      {"method",
       [](auto& r) { r.mutable_method()->set_name("flash"); },
       StatusCode::INVALID_ARGUMENT,
       {"\"flash\"", "dense", "vsprefill"}},
      {"parameter",
       [](auto& r) {
         r.mutable_method()->set_name("vsprefill");
         (*r.mutable_method()->mutable_parameters())["wish"] = 1;
       },
       StatusCode::INVALID_ARGUMENT,
       {"\"wish\"", "threshold"}},
      {"preset",
       [](auto& r) { r.mutable_method()->set_preset("turbo"); },
       grpc::StatusCode::INVALID_ARGUMENT,
       {"\"turbo\"", "safe, balanced, fast"}},
      {"preset of another method",
       [](auto& r) {
         r.mutable_method()->set_preset("fast");
         r.mutable_method()->set_name("dense");
       },
       grpc::StatusCode::INVALID_ARGUMENT,
       {"\"fast\"", "\"dense\"", "\"vsprefill\" or none"}},
      {"parameter beside a preset",
       [](auto& r) {
         r.mutable_method()->set_preset("fast");
         (*r.mutable_method()->mutable_parameters())["threshold"] = -1;
       },
       grpc::StatusCode::INVALID_ARGUMENT,
       {"-1", "[0, "}},
      {"parameter of the default method",
       [](auto& r) { (*r.mutable_method()->mutable_parameters())["wish"] = 1; },
       StatusCode::INVALID_ARGUMENT,
       {"\"wish\"", "dense"}},
      {"parameter out of range",
       [](auto& r) {
         r.mutable_method()->set_name("vsprefill");
         (*r.mutable_method()->mutable_parameters())["threshold"] = -1;
       },
       StatusCode::INVALID_ARGUMENT,
       {"threshold = -1", "["}},
      {"parameter that allows some values only",
       [](auto& r) {
         r.mutable_method()->set_name("xattention");
         (*r.mutable_method()->mutable_parameters())["stride"] = 12;
       },
       StatusCode::INVALID_ARGUMENT,
       {"stride = 12", "4, 8, 16, 32, 64"}},
      {"parameter NaN",
       [](auto& r) {
         r.mutable_method()->set_name("vsprefill");
         (*r.mutable_method()->mutable_parameters())["threshold"] = std::nan("");
       },
       StatusCode::INVALID_ARGUMENT,
       {"threshold = nan"}},
      {"stripes",
       [](auto& r) { r.set_stripes(5); },
       StatusCode::INVALID_ARGUMENT,
       {"stripes 5", "[1, 4]"}},
      {"huge stripes",
       [](auto& r) { r.set_stripes(4000000000u); },
       StatusCode::INVALID_ARGUMENT,
       {"stripes", "[1, 4]"}},
      {"stripes and push",
       [](auto& r) {
         r.set_stripes(2);
         r.add_push_targets("127.0.0.1:9999");
       },
       StatusCode::INVALID_ARGUMENT,
       {"stripes 2"}},
      {"target twice",
       [](auto& r) {
         r.add_push_targets("127.0.0.1:9999");
         r.add_push_targets("127.0.0.1:9999");
       },
       StatusCode::INVALID_ARGUMENT,
       {"127.0.0.1:9999", "twice"}},
      {"no address",
       [](auto& r) { r.add_push_targets("unix:/tmp/x"); },
       StatusCode::INVALID_ARGUMENT,
       {"unix:/tmp/x", "HOST:PORT"}},
      {"target not allowed",
       [](auto& r) { r.add_push_targets("127.0.0.1:22"); },
       StatusCode::PERMISSION_DENIED,
       {"127.0.0.1:22", "127.0.0.1:9999"}},
      {"kv_id",
       [](auto& r) { r.set_expected_kv_id("other"); },
       StatusCode::FAILED_PRECONDITION,
       {"other", "fake-kv-id"}},
      {"dtype",
       [](auto& r) { r.set_kv_dtype(v1::KV_DTYPE_FLOAT32); },
       StatusCode::FAILED_PRECONDITION,
       {"float32", "bfloat16"}},
      {"unknown dtype",
       [](auto& r) { r.set_kv_dtype(static_cast<v1::KvDtype>(77)); },
       StatusCode::FAILED_PRECONDITION,
       {"77"}},
  };
  for (const Refusal& refusal : refusals) {
    v1::PrefillRequest request = MakeRequest("r", TestIds(10));
    refusal.change(request);
    const StreamResult result = Prefill(service.stub(), request);
    EXPECT_EQ(result.status.error_code(), refusal.code)
        << refusal.name << ": " << result.status.error_message();
    for (const std::string& word : refusal.words) {
      EXPECT_TRUE(absl::StrContains(result.status.error_message(), word))
          << refusal.name << ": " << result.status.error_message();
    }
    EXPECT_TRUE(result.events.empty()) << refusal.name;
    EXPECT_TRUE(service.AwaitQuiet(absl::ZeroDuration())) << refusal.name;
  }
  EXPECT_TRUE(Prefill(service.stub(), MakeRequest("r", TestIds(10))).status.ok());
}

TEST(ErrorsTest, SameAttemptInFlightAlreadyExists) {
  HeldService service;
  v1::PrefillRequest request = MakeRequest("same", TestIds(10));
  request.set_attempt(3);
  Background first(*service, request);
  service.AwaitReached();
  for (uint32_t attempt : {3u, 2u, 0u}) {
    request.set_attempt(attempt);
    const StreamResult second = Prefill(service->stub(), request);
    EXPECT_EQ(second.status.error_code(), StatusCode::ALREADY_EXISTS);
    EXPECT_TRUE(absl::StrContains(second.status.error_message(), "attempt 3 is in flight"));
  }
  service.Release();
  EXPECT_TRUE(first.Join().status.ok());
  // Once it has ended the id is free.
  EXPECT_TRUE(Prefill(service->stub(), request).status.ok());
}

TEST(ErrorsTest, HigherAttemptCancelsTheLower) {
  HeldService service;
  v1::PrefillRequest request = MakeRequest("again", TestIds(10));
  Background first(*service, request);
  service.AwaitReached();
  request.set_attempt(1);
  Background second(*service, request);
  AwaitWaiting(*service, 1);
  const StreamResult& lower = first.Join();
  EXPECT_EQ(lower.status.error_code(), StatusCode::ABORTED);
  EXPECT_TRUE(absl::StrContains(lower.status.error_message(), "superseded by attempt 1"));
  service.Release();
  EXPECT_TRUE(second.Join().status.ok());
  EXPECT_TRUE(service->AwaitQuiet());
}

TEST(ErrorsTest, FullQueuesPushBack) {
  TestServiceOptions options;
  options.max_waiting_requests = 2;
  options.max_waiting_tokens = 100;
  HeldService service(options);
  Background running(*service, MakeRequest("0", TestIds(10)));
  service.AwaitReached();
  Background first(*service, MakeRequest("1", TestIds(60)));
  AwaitWaiting(*service, 1);

  StreamResult result = Prefill(service->stub(), MakeRequest("2", TestIds(41)));
  EXPECT_EQ(result.status.error_code(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(absl::StrContains(result.status.error_message(), "60 tokens are waiting"));
  EXPECT_TRUE(absl::StrContains(result.status.error_message(), "41; allowed are 100"));
  EXPECT_GT(std::stoi(result.pushback), 0);

  Background second(*service, MakeRequest("3", TestIds(40)));
  AwaitWaiting(*service, 2);
  result = Prefill(service->stub(), MakeRequest("4", TestIds(1)));
  EXPECT_EQ(result.status.error_code(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(absl::StrContains(result.status.error_message(), "2 requests are waiting"));
  EXPECT_GT(std::stoi(result.pushback), 0);
  EXPECT_EQ(service->engine().load().waiting_tokens, 100);
  service.Release();
  EXPECT_TRUE(running.Join().status.ok());
  EXPECT_TRUE(first.Join().status.ok());
  EXPECT_TRUE(second.Join().status.ok());
  EXPECT_TRUE(service->AwaitQuiet());
}

TEST(ErrorsTest, FullPoolPushesBack) {
  TestServiceOptions options;
  options.kv_pool_bytes = 100 * 4 * 128 + 8 * 256;  // a good 100 tokens of 4 layers, 128 bytes each
  HeldService service(options);
  Background running(*service, MakeRequest("0", TestIds(64)));
  service.AwaitReached();
  const int64_t used = service->engine().load().pool_used_bytes;
  EXPECT_EQ(used, 64 * 4 * 128);
  StreamResult result = Prefill(service->stub(), MakeRequest("1", TestIds(64)));
  EXPECT_EQ(result.status.error_code(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_TRUE(absl::StrContains(result.status.error_message(), absl::StrCat(used)));
  EXPECT_GT(std::stoi(result.pushback), 0);
  EXPECT_EQ(service->engine().load().pool_used_bytes, used);
  // What can never fit shall not be tried again.
  result = Prefill(service->stub(), MakeRequest("2", TestIds(200)));
  EXPECT_EQ(result.status.error_code(), StatusCode::RESOURCE_EXHAUSTED);
  EXPECT_EQ(result.pushback, "-1");
  service.Release();
  EXPECT_TRUE(running.Join().status.ok());
  EXPECT_TRUE(service->AwaitQuiet());
  EXPECT_TRUE(Prefill(service->stub(), MakeRequest("1", TestIds(64))).status.ok());
}

TEST(ErrorsTest, CancelWhileComputingStopsWithinALayer) {
  TestServiceOptions options;
  options.model.layer_delay = absl::Milliseconds(30);
  TestService service(options);
  Background request(service, MakeRequest("r", TestIds(64 * 100)));
  while (service.engine().load().staging_used_bytes == 0 && service.engine().load().running == 0) {
    absl::SleepFor(absl::Milliseconds(1));
  }
  absl::SleepFor(absl::Milliseconds(50));
  request.Cancel();
  EXPECT_EQ(request.Join().status.error_code(), StatusCode::CANCELLED);
  EXPECT_TRUE(service.AwaitQuiet());
  // The engine is free: the next one is not behind 100 chunks.
  const absl::Time begin = absl::Now();
  EXPECT_TRUE(Prefill(service.stub(), MakeRequest("next", TestIds(64))).status.ok());
  EXPECT_LT(absl::Now() - begin, absl::Seconds(2));
}

TEST(ErrorsTest, CancelWhileQueuedFreesItsPlace) {
  HeldService service;
  Background running(*service, MakeRequest("0", TestIds(10)));
  service.AwaitReached();
  Background queued(*service, MakeRequest("1", TestIds(10)));
  AwaitWaiting(*service, 1);
  queued.Cancel();
  AwaitWaiting(*service, 0);
  EXPECT_EQ(queued.Join().status.error_code(), StatusCode::CANCELLED);
  EXPECT_EQ(service->engine().load().waiting_tokens, 0);
  service.Release();
  EXPECT_TRUE(running.Join().status.ok());
  EXPECT_TRUE(service->AwaitQuiet());
}

TEST(ErrorsTest, DeadlinesHoldWhereverTheRequestIs) {
  TestServiceOptions options;
  options.model.layer_delay = absl::Milliseconds(50);
  TestService service(options);
  Background running(service, MakeRequest("run", TestIds(64 * 20)), absl::Milliseconds(400));
  while (service.engine().load().running == 0) absl::SleepFor(absl::Milliseconds(1));
  Background queued(service, MakeRequest("queue", TestIds(10)), absl::Milliseconds(200));
  EXPECT_EQ(queued.Join().status.error_code(), StatusCode::DEADLINE_EXCEEDED);
  EXPECT_EQ(running.Join().status.error_code(), StatusCode::DEADLINE_EXCEEDED);
  EXPECT_TRUE(service.AwaitQuiet());
}

TEST(ErrorsTest, AFailureOfTheModelFailsOneRequest) {
  TestServiceOptions options;
  options.model.on_layer = [](int layer, int64_t position) {
    return layer == 2 && position == 64 ? absl::InternalError("layer 2 broke") : absl::OkStatus();
  };
  TestService service(options);
  const StreamResult result = Prefill(service.stub(), MakeRequest("r", TestIds(100)));
  EXPECT_EQ(result.status.error_code(), StatusCode::INTERNAL);
  EXPECT_TRUE(absl::StrContains(result.status.error_message(), "layer 2 broke"));
  EXPECT_FALSE(result.has_done);
  EXPECT_TRUE(service.AwaitQuiet());
  EXPECT_TRUE(Prefill(service.stub(), MakeRequest("r", TestIds(64))).status.ok());
}

StreamResult Attach(TestService& service, const std::string& id, uint32_t attempt,
                    uint32_t stripe) {
  v1::AttachRequest attach;
  attach.set_request_id(id);
  attach.set_attempt(attempt);
  attach.set_stripe(stripe);
  grpc::ClientContext context;
  const auto reader = service.stub().Attach(&context, attach);
  return ReadAll(context, *reader);
}

TEST(ErrorsTest, AttachIsRefusedWhereItDoesNotFit) {
  HeldService service;
  v1::PrefillRequest request = MakeRequest("r", TestIds(10));
  request.set_stripes(2);
  Background first(*service, request);
  service.AwaitReached();
  EXPECT_EQ(Attach(*service, "other", 0, 1).status.error_code(), StatusCode::NOT_FOUND);
  EXPECT_EQ(Attach(*service, "r", 1, 1).status.error_code(), StatusCode::NOT_FOUND);
  for (uint32_t stripe : {0u, 2u, 4000000000u}) {
    const StreamResult result = Attach(*service, "r", 0, stripe);
    EXPECT_EQ(result.status.error_code(), StatusCode::INVALID_ARGUMENT);
    EXPECT_TRUE(absl::StrContains(result.status.error_message(), "[1, 2)"));
  }
  StreamResult attached;
  std::thread second([&] { attached = Attach(*service, "r", 0, 1); });
  absl::SleepFor(absl::Milliseconds(50));
  EXPECT_EQ(Attach(*service, "r", 0, 1).status.error_code(), StatusCode::ALREADY_EXISTS);
  service.Release();
  EXPECT_TRUE(first.Join().status.ok());
  second.join();
  EXPECT_TRUE(attached.status.ok()) << attached.status.error_message();
}

TEST(ErrorsTest, MissingAttachFailsAfterTheStallTimeout) {
  TestServiceOptions options;
  options.send_stall_timeout = absl::Milliseconds(300);
  TestService service(options);
  v1::PrefillRequest request = MakeRequest("r", TestIds(100));
  request.set_stripes(2);
  const absl::Time begin = absl::Now();
  const StreamResult result = Prefill(service.stub(), request);
  EXPECT_EQ(result.status.error_code(), StatusCode::ABORTED);
  EXPECT_TRUE(absl::StrContains(result.status.error_message(), "stripe 1 of 2 was not attached"));
  EXPECT_GE(absl::Now() - begin, absl::Milliseconds(290));
  EXPECT_TRUE(service.AwaitQuiet());
}

TEST(ErrorsTest, DrainingRefusesNewAndFinishesOld) {
  HeldService service;
  Background running(*service, MakeRequest("0", TestIds(10)));
  service.AwaitReached();
  EXPECT_EQ(HttpGet(service->metrics_address(), "/readyz").first, 200);
  service->engine().StartDrain();
  const StreamResult refused = Prefill(service->stub(), MakeRequest("1", TestIds(10)));
  EXPECT_EQ(refused.status.error_code(), StatusCode::UNAVAILABLE);
  EXPECT_EQ(HttpGet(service->metrics_address(), "/readyz").first, 503);
  EXPECT_EQ(HttpGet(service->metrics_address(), "/livez").first, 200);
  EXPECT_FALSE(service->engine().AwaitIdle(absl::Milliseconds(10)));
  service.Release();
  EXPECT_TRUE(running.Join().status.ok());
  EXPECT_TRUE(service->engine().AwaitIdle(absl::Seconds(5)));
}

}  // namespace
}  // namespace vsprefill::testing
