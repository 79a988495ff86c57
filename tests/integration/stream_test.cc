// The response stream end to end: order of events, bytes of the cache, stripes, first token.
#include <gtest/gtest.h>

#include <thread>

#include "absl/strings/str_cat.h"
#include "tests/support/test_service.h"

namespace vsprefill::testing {
namespace {

TEST(StreamTest, CarriesTheWholeCache) {
  TestService service;
  const v1::PrefillRequest request = MakeRequest("r", TestIds(200));
  const StreamResult result = Prefill(service.stub(), request);
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  EXPECT_EQ(CheckKv(request, result.chunks, result.accepted.layout(), result.done.manifest()), "");
  EXPECT_EQ(result.chunks.size(), 4u * 4u);  // 4 layers, 64 + 64 + 64 + 8 tokens
  EXPECT_TRUE(result.events.front().has_accepted());
  EXPECT_TRUE(result.events.back().has_done());
  EXPECT_EQ(result.first_token.token_id(), FakeFirstToken(TestIds(200), 1000));
  EXPECT_EQ(result.first_token.logits_size(), 0);
  EXPECT_EQ(result.accepted.layout().kv_id(), "fake-kv-id");
  EXPECT_EQ(result.accepted.layout().prompt_tokens(), 200u);
  EXPECT_EQ(result.accepted.method(), "dense");
  int64_t bytes = 0;
  for (const v1::KvChunk& chunk : result.chunks) bytes += chunk.payload().size();
  EXPECT_EQ(static_cast<int64_t>(result.accepted.stripe_bytes()), bytes);
  EXPECT_EQ(static_cast<int64_t>(result.done.stats().kv_bytes()), bytes);
  EXPECT_TRUE(service.AwaitQuiet());
}

TEST(StreamTest, StatsAreThoseOfTheRequest) {
  TestServiceOptions options;
  options.model.layer_delay = absl::Milliseconds(5);
  TestService service(options);
  const StreamResult result = Prefill(service.stub(), MakeRequest("r", TestIds(128)));
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  const v1::PrefillStats& stats = result.done.stats();
  EXPECT_DOUBLE_EQ(stats.density(), 0.25);
  EXPECT_DOUBLE_EQ(stats.cost_ratio(), 0.5);
  ASSERT_EQ(stats.layer_group_density_size(), 4);
  EXPECT_DOUBLE_EQ(stats.layer_group_density(3), 0.25);
  EXPECT_GE(stats.compute_seconds(), 8 * 0.005);
  EXPECT_GE(stats.ttft_seconds(), stats.queue_seconds() + stats.compute_seconds());
  EXPECT_GT(stats.exposed_transfer_seconds(), 0);
  EXPECT_LT(stats.exposed_transfer_seconds(), 1);
}

TEST(StreamTest, ChunksLeaveWhileLaterLayersCompute) {
  TestServiceOptions options;
  absl::Mutex mu;
  bool received_layer_0 = false;
  // Layer 1 is not computed before the client has layer 0.
  options.model.on_layer = [&](int layer, int64_t) {
    if (layer != 1) return absl::OkStatus();
    absl::MutexLock lock(&mu);
    return mu.AwaitWithTimeout(absl::Condition(&received_layer_0), absl::Seconds(10))
               ? absl::OkStatus()
               : absl::InternalError("layer 0 never arrived");
  };
  TestService service(options);
  grpc::ClientContext context;
  const v1::PrefillRequest request = MakeRequest("r", TestIds(50));
  const auto reader = service.stub().Prefill(&context, request);
  const StreamResult result = ReadAll(context, *reader, [&](const v1::PrefillEvent& event) {
    if (event.has_kv() && event.kv().layer() == 0) {
      absl::MutexLock lock(&mu);
      received_layer_0 = true;
    }
  });
  EXPECT_TRUE(result.status.ok()) << result.status.error_message();
}

TEST(StreamTest, StartTokenLeavesOutWhatTheDecoderHas) {
  TestService service;
  for (uint64_t start : {1u, 63u, 64u, 65u, 199u}) {
    v1::PrefillRequest request = MakeRequest(absl::StrCat("r", start), TestIds(200));
    request.set_start_token(start);
    const StreamResult result = Prefill(service.stub(), request);
    ASSERT_TRUE(result.status.ok()) << result.status.error_message();
    EXPECT_EQ(result.accepted.layout().start_token(), start);
    EXPECT_EQ(CheckKv(request, result.chunks, result.accepted.layout(), result.done.manifest()),
              "");
  }
}

TEST(StreamTest, LogitsOnDemand) {
  TestService service;
  v1::PrefillRequest request = MakeRequest("r", TestIds(3));
  request.set_want_logits(true);
  const StreamResult result = Prefill(service.stub(), request);
  ASSERT_TRUE(result.status.ok());
  ASSERT_EQ(result.first_token.logits_size(), 1000);
  EXPECT_EQ(result.first_token.logits(result.first_token.token_id()), 2.0f);
}

TEST(StreamTest, NoMessageIsLargerThanADefaultClientTakes) {
  TestServiceOptions options;
  options.chunk_tokens = 60000;  // 128 bytes per token and layer: 7.7 MB per layer
  options.model.num_layers = 2;
  TestService service(options);
  const v1::PrefillRequest request = MakeRequest("r", TestIds(60000));
  const StreamResult result = Prefill(service.stub(), request);
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  EXPECT_EQ(CheckKv(request, result.chunks, result.accepted.layout(), result.done.manifest()), "");
  size_t largest = 0;
  for (const v1::PrefillEvent& event : result.events) {
    largest = std::max(largest, event.ByteSizeLong());
  }
  EXPECT_LE(largest, 4u << 20);
  EXPECT_GT(largest, 3u << 20);
}

TEST(StreamTest, StripesCarryTheirLayers) {
  TestService service;
  v1::PrefillRequest request = MakeRequest("striped", TestIds(300));
  request.set_stripes(3);
  std::vector<StreamResult> results(3);
  std::vector<std::thread> threads;
  grpc::ClientContext context;
  const auto reader = service.stub().Prefill(&context, request);
  results[0] = ReadAll(context, *reader, [&](const v1::PrefillEvent& event) {
    if (!event.has_accepted()) return;
    for (int stripe = 1; stripe < 3; ++stripe) {
      threads.emplace_back([&, stripe] {
        const auto stub = v1::PrefillService::NewStub(service.NewChannel());
        v1::AttachRequest attach;
        attach.set_request_id("striped");
        attach.set_stripe(stripe);
        grpc::ClientContext attach_context;
        const auto attach_reader = stub->Attach(&attach_context, attach);
        results[stripe] = ReadAll(attach_context, *attach_reader);
      });
    }
  });
  for (std::thread& thread : threads) thread.join();
  std::vector<v1::KvChunk> all;
  for (int stripe = 0; stripe < 3; ++stripe) {
    ASSERT_TRUE(results[stripe].status.ok()) << stripe << results[stripe].status.error_message();
    EXPECT_EQ(results[stripe].accepted.stripe(), static_cast<uint32_t>(stripe));
    EXPECT_TRUE(results[stripe].has_done);
    EXPECT_EQ(results[stripe].has_first_token, stripe == 0);
    EXPECT_EQ(results[stripe].done.has_stats(), stripe == 0);
    EXPECT_EQ(results[stripe].done.manifest().SerializeAsString(),
              results[0].done.manifest().SerializeAsString());
    uint64_t bytes = 0;
    for (const v1::KvChunk& chunk : results[stripe].chunks) {
      EXPECT_EQ(chunk.layer() % 3, static_cast<uint32_t>(stripe));
      bytes += chunk.payload().size();
      all.push_back(chunk);
    }
    EXPECT_EQ(bytes, results[stripe].accepted.stripe_bytes());
  }
  EXPECT_EQ(CheckKv(request, all, results[0].accepted.layout(), results[0].done.manifest()), "");
  EXPECT_TRUE(service.AwaitQuiet());
}

TEST(StreamTest, RequestsRunInOrderOfArrival) {
  TestServiceOptions options;
  absl::Mutex mu;
  size_t released = 0;
  size_t entered = 0;
  // The n-th request to be computed waits for the n-th release.
  options.model.on_layer = [&](int layer, int64_t) {
    if (layer != 0) return absl::OkStatus();
    absl::MutexLock lock(&mu);
    ++entered;
    const auto may_run = [&] { return released >= entered; };
    mu.Await(absl::Condition(&may_run));
    return absl::OkStatus();
  };
  TestService service(options);
  std::vector<std::string> order;
  std::vector<std::thread> threads;
  for (int i = 0; i < 4; ++i) {
    threads.emplace_back([&, i] {
      grpc::ClientContext context;
      const auto reader =
          service.stub().Prefill(&context, MakeRequest(absl::StrCat("r", i), TestIds(10, i)));
      const StreamResult result = ReadAll(context, *reader, [&](const v1::PrefillEvent& event) {
        if (!event.has_first_token()) return;
        absl::MutexLock lock(&mu);
        order.push_back(absl::StrCat("r", i));
      });
      EXPECT_TRUE(result.status.ok());
      EXPECT_EQ(result.first_token.token_id(), FakeFirstToken(TestIds(10, i), 1000));
    });
    // The next one is sent when this one has been admitted.
    while (service.engine().load().running + service.engine().load().waiting <= i) {
      absl::SleepFor(absl::Milliseconds(1));
    }
  }
  // One at a time, so that what the clients see is the order of computing.
  for (size_t i = 0; i < threads.size(); ++i) {
    absl::MutexLock lock(&mu);
    ++released;
    const auto seen = [&] { return order.size() > i; };
    mu.Await(absl::Condition(&seen));
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(order, (std::vector<std::string>{"r0", "r1", "r2", "r3"}));
}

}  // namespace
}  // namespace vsprefill::testing
