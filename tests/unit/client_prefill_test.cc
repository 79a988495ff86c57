// PrefillClient against a server in this process: the cache, its faults, stripes, time and errors.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <numeric>
#include <set>
#include <thread>

#include "absl/strings/str_cat.h"
#include "client/cc/host_kv.h"
#include "client/cc/prefill_client.h"
#include "tests/support/fake_prefill_server.h"

namespace vsprefill::client {
namespace {

using testing::AllKvFaults;
using ::testing::AnyOf;
using ::testing::ElementsAre;
using testing::FakePrefillServer;
using testing::FakeServerOptions;
using ::testing::HasSubstr;
using testing::KvFault;
using testing::StreamFault;

struct Outcome {
  absl::StatusOr<PrefillResult> result = absl::UnknownError("not run");
  std::shared_ptr<HostKv> kv;
  std::vector<TargetStatus> targets;
  int first_tokens = 0;
  int last_layers = 0;
};

class PrefillClientTest : public ::testing::Test {
 protected:
  PrefillClientTest() {
    ids_.resize(37);
    std::iota(ids_.begin(), ids_.end(), 0);
    request_.request_id = "test";
    request_.token_ids = ids_;
    request_.timeout = absl::Seconds(20);
  }

  Outcome Run(const FakeServerOptions& options, Cancellation* cancellation = nullptr) {
    server_ = std::make_unique<FakePrefillServer>(options);
    PrefillClient client(server_->address());
    Outcome o;
    PrefillHandlers handlers;
    handlers.destination = [&](const Accepted& a) -> absl::StatusOr<KvDestination> {
      o.kv = *HostKv::Create(a.shape);
      return o.kv->destination();
    };
    handlers.on_first_token = [&](const FirstToken&) { ++o.first_tokens; };
    handlers.on_progress = [&](int layers, int64_t) { o.last_layers = layers; };
    handlers.on_targets = [&](const std::vector<TargetStatus>& t) { o.targets = t; };
    o.result = client.Prefill(request_, handlers, cancellation);
    return o;
  }

  static void ExpectWholeCache(const HostKv& kv) {
    const testing::FakeKv fake = testing::MakeFakeKv(kv.shape());
    const KvShape& shape = kv.shape();
    const int64_t row_bytes = shape.layout.head_dim * kernels::SizeOf(shape.layout.dtype);
    for (int l = 0; l < shape.layout.num_layers; ++l) {
      for (bool is_v : {false, true}) {
        const absl::Span<const uint8_t> part = is_v ? kv.v(l) : kv.k(l);
        size_t i = 0;
        for (int h = 0; h < shape.layout.num_kv_heads; ++h) {
          for (int64_t t = shape.start_token; t < shape.prompt_tokens; ++t) {
            for (int64_t b = 0; b < row_bytes; ++b) {
              ASSERT_EQ(part[i++], testing::FakeKvByte(l, is_v, h, t, b));
            }
          }
        }
      }
    }
  }

  std::vector<int32_t> ids_;
  PrefillRequest request_;
  std::unique_ptr<FakePrefillServer> server_;
};

TEST_F(PrefillClientTest, BringsTheCacheAndTheFigures) {
  request_.want_logits = true;
  request_.method = "dense";
  request_.parameters = {{"threshold", 2.5}};
  request_.expected_kv_id = "fake-kv-id";
  request_.kv_dtype = kernels::DType::kBF16;
  const Outcome o = Run({});
  ASSERT_TRUE(o.result.ok()) << o.result.status();
  ExpectWholeCache(*o.kv);
  EXPECT_EQ(o.result->first_token.token_id, 42);
  EXPECT_THAT(o.result->first_token.logits, ElementsAre(0.5f, -1.0f, 2.0f));
  EXPECT_EQ(o.result->accepted.method, "dense");
  EXPECT_EQ(o.result->accepted.parameters.at("threshold"), 2.5);
  EXPECT_EQ(o.result->accepted.shape.prompt_tokens, 37);
  EXPECT_EQ(o.result->stats.queue_seconds, 0.25);
  EXPECT_EQ(o.result->stats.compute_seconds, 1.5);
  EXPECT_EQ(o.result->stats.index_seconds, 0.0625);
  EXPECT_EQ(o.result->stats.ttft_seconds, 1.75);
  EXPECT_EQ(o.result->stats.exposed_transfer_seconds, 0.125);
  EXPECT_EQ(o.result->stats.density, 0.1);
  EXPECT_EQ(o.result->stats.cost_ratio, 0.2);
  EXPECT_THAT(o.result->stats.layer_group_density, ElementsAre(0.4, 0.3, 0.2, 0.1));
  EXPECT_EQ(o.result->stats.kv_bytes, o.kv->shape().bytes());
  EXPECT_EQ(o.result->received_bytes, o.kv->shape().bytes());
  EXPECT_GT(o.result->client_ttft, absl::ZeroDuration());
  EXPECT_GE(o.result->client_total, o.result->client_ttft);
  EXPECT_EQ(o.first_tokens, 1);
  EXPECT_EQ(o.last_layers, 3);
  const v1::PrefillRequest sent = server_->last_request();
  EXPECT_EQ(sent.token_ids_size(), 37);
  EXPECT_EQ(sent.token_ids(36), 36);
  EXPECT_EQ(sent.expected_kv_id(), "fake-kv-id");
  EXPECT_EQ(sent.kv_dtype(), v1::KV_DTYPE_BFLOAT16);
  EXPECT_TRUE(sent.want_logits());
}

TEST_F(PrefillClientTest, StartToken) {
  request_.start_token = 20;
  const Outcome o = Run({});
  ASSERT_TRUE(o.result.ok()) << o.result.status();
  EXPECT_EQ(o.kv->shape().sent_tokens(), 17);
  ExpectWholeCache(*o.kv);
}

TEST_F(PrefillClientTest, StripesComeOverConnectionsOfTheirOwn) {
  for (int stripes : {2, 3, 4}) {  // with 4, one stripe has no layer
    request_.stripes = stripes;
    const Outcome o = Run({});
    ASSERT_TRUE(o.result.ok()) << o.result.status();
    ExpectWholeCache(*o.kv);
    const std::vector<std::string> peers = server_->peers();
    EXPECT_EQ(static_cast<int>(peers.size()), stripes);
    EXPECT_EQ(static_cast<int>(std::set<std::string>(peers.begin(), peers.end()).size()), stripes);
  }
}

TEST_F(PrefillClientTest, LargeChunks) {
  FakeServerOptions options;
  options.shape.layout.num_kv_heads = 8;
  options.shape.layout.head_dim = 128;
  options.shape.chunk_tokens = 960;  // just under 4 MiB
  ids_.resize(2000);
  request_.token_ids = ids_;
  request_.stripes = 2;
  const Outcome o = Run(options);
  ASSERT_TRUE(o.result.ok()) << o.result.status();
  ExpectWholeCache(*o.kv);
}

TEST_F(PrefillClientTest, EveryCacheFaultIsDataLoss) {
  for (int stripes : {1, 2}) {
    for (KvFault fault : AllKvFaults()) {
      request_.stripes = stripes;
      const Outcome o = Run({.kv_fault = fault});
      EXPECT_EQ(o.result.status().code(), absl::StatusCode::kDataLoss)
          << testing::Name(fault) << ", " << stripes << " stripes: " << o.result.status();
    }
  }
}

TEST_F(PrefillClientTest, EveryStreamFaultIsAnError) {
  const std::pair<StreamFault, const char*> faults[] = {
      {StreamFault::kTruncated, "ended before the server said that it is done"},
      {StreamFault::kNotAccepted, "first event is not accepted"},
      {StreamFault::kAcceptedTwice, "accepted twice"},
      {StreamFault::kOtherPrompt, "accepted tokens [0, 38), asked was [0, 37)"},
      {StreamFault::kNoFirstToken, "no first token"},
      {StreamFault::kEventAfterDone, "after done"},
  };
  for (const auto& [fault, message] : faults) {
    const Outcome o = Run({.stream_fault = fault});
    EXPECT_EQ(o.result.status().code(), absl::StatusCode::kDataLoss) << message;
    EXPECT_THAT(std::string(o.result.status().message()), HasSubstr(message));
  }
}

TEST_F(PrefillClientTest, StripeFaults) {
  request_.stripes = 2;
  Outcome o = Run({.stream_fault = StreamFault::kWrongStripe});
  EXPECT_EQ(o.result.status().code(), absl::StatusCode::kDataLoss);
  EXPECT_THAT(std::string(o.result.status().message()), HasSubstr("layer 1 came on stripe 0 of 2"));
  o = Run({.stream_fault = StreamFault::kStripeHasOtherShape});
  EXPECT_EQ(o.result.status().code(), absl::StatusCode::kDataLoss);
  o = Run({.stream_fault = StreamFault::kAttachFails});
  EXPECT_EQ(o.result.status().code(), absl::StatusCode::kNotFound);
  EXPECT_THAT(std::string(o.result.status().message()), HasSubstr("stripe 1: no request test"));
}

TEST_F(PrefillClientTest, ChecksTheServersKvId) {
  request_.expected_kv_id = "fake-kv-id";
  const Outcome o = Run({.stream_fault = StreamFault::kOtherKvId});
  EXPECT_EQ(o.result.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(o.kv, nullptr);
}

TEST_F(PrefillClientTest, ChecksTheKvDtype) {
  request_.kv_dtype = kernels::DType::kF32;
  const Outcome o = Run({});
  EXPECT_EQ(o.result.status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST_F(PrefillClientTest, ServersErrorComesAsItIs) {
  FakeServerOptions options;
  options.error = {grpc::StatusCode::RESOURCE_EXHAUSTED, "queue is full: 8 of 8"};
  options.refuse = true;
  EXPECT_EQ(Run(options).result.status(), absl::ResourceExhaustedError("queue is full: 8 of 8"));
  options.retry_pushback_ms = 250;
  EXPECT_EQ(Run(options).result.status(),
            absl::ResourceExhaustedError("queue is full: 8 of 8 (retry after 250 ms)"));
}

TEST_F(PrefillClientTest, ErrorHalfWay) {
  FakeServerOptions options;
  options.stream_fault = StreamFault::kError;
  options.error = {grpc::StatusCode::INTERNAL, "device lost"};
  EXPECT_EQ(Run(options).result.status(), absl::InternalError("device lost"));
}

TEST_F(PrefillClientTest, Deadline) {
  for (int stripes : {1, 2}) {
    request_.stripes = stripes;
    request_.timeout = absl::Milliseconds(200);
    const Outcome o = Run({.stream_fault = StreamFault::kHang});
    EXPECT_EQ(o.result.status().code(), absl::StatusCode::kDeadlineExceeded) << o.result.status();
  }
}

TEST_F(PrefillClientTest, Cancel) {
  for (int stripes : {1, 2}) {
    request_.stripes = stripes;
    Cancellation cancellation;
    std::thread canceller([&] {
      absl::SleepFor(absl::Milliseconds(50));
      cancellation.Cancel();
    });
    const Outcome o = Run({.stream_fault = StreamFault::kHang}, &cancellation);
    canceller.join();
    EXPECT_EQ(o.result.status().code(), absl::StatusCode::kCancelled) << o.result.status();
  }
}

TEST_F(PrefillClientTest, CancelledBefore) {
  Cancellation cancellation;
  cancellation.Cancel();
  const Outcome o = Run({}, &cancellation);
  EXPECT_EQ(o.result.status().code(), absl::StatusCode::kCancelled);
  EXPECT_TRUE(cancellation.cancelled());
}

TEST_F(PrefillClientTest, ErrorOfTheDestinationEndsTheCall) {
  FakePrefillServer server({.stream_fault = StreamFault::kHang});
  PrefillClient client(server.address());
  PrefillHandlers handlers;
  handlers.destination = [](const Accepted&) -> absl::StatusOr<KvDestination> {
    return absl::ResourceExhaustedError("no room");
  };
  EXPECT_EQ(client.Prefill(request_, handlers).status(), absl::ResourceExhaustedError("no room"));
}

TEST_F(PrefillClientTest, NobodyThere) {
  std::string address;
  { address = FakePrefillServer({}).address(); }
  PrefillClient client(address);
  PrefillHandlers handlers;
  handlers.destination = [](const Accepted&) -> absl::StatusOr<KvDestination> {
    return absl::InternalError("nobody should ask");
  };
  EXPECT_EQ(client.Prefill(request_, handlers).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(client.GetModelInfo().status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(client.GetLoad().status().code(), absl::StatusCode::kUnavailable);
}

TEST_F(PrefillClientTest, PushBringsNoKv) {
  request_.push_targets = {"a:1", "b:2"};
  FakeServerOptions options;
  for (const char* name : {"a:1", "b:2"}) {
    v1::TargetStatus t;
    t.set_target(name);
    t.set_bytes(100);
    options.targets.push_back(t);
  }
  Outcome o = Run(options);
  ASSERT_TRUE(o.result.ok()) << o.result.status();
  EXPECT_EQ(o.kv, nullptr);
  EXPECT_EQ(o.result->received_bytes, 0);
  ASSERT_EQ(o.result->targets.size(), 2u);
  EXPECT_EQ(o.result->targets[1].target, "b:2");
  EXPECT_EQ(o.result->targets[1].bytes, 100);

  options.targets[1].set_code(grpc::StatusCode::UNAVAILABLE);
  options.targets[1].set_message("dead");
  o = Run(options);
  EXPECT_EQ(o.result.status(), absl::UnavailableError("b:2: dead"));
  ASSERT_EQ(o.targets.size(), 2u);  // the caller still learns that a:1 has its cache
  EXPECT_EQ(o.targets[0].code, 0);
}

TEST_F(PrefillClientTest, RefusesWhatCannotBeSent) {
  PrefillClient client("127.0.0.1:1");
  const auto code = [&] { return client.Prefill(request_, {}).status().code(); };
  EXPECT_EQ(code(), absl::StatusCode::kInvalidArgument);  // no destination
  request_.push_targets = {"a:1"};
  request_.stripes = 2;
  EXPECT_EQ(code(), absl::StatusCode::kInvalidArgument);
  request_.stripes = 0;
  EXPECT_EQ(code(), absl::StatusCode::kInvalidArgument);
  request_.stripes = 1;
  request_.start_token = -1;
  EXPECT_EQ(code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(PrefillClientTest, InfoAndLoad) {
  FakePrefillServer server({});
  PrefillClient client(server.address());
  const absl::StatusOr<ModelInfo> info = client.GetModelInfo();
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(info->model_name, "fake");
  EXPECT_EQ(info->layout.kv_id, "fake-kv-id");
  EXPECT_EQ(info->layout.head_dim, 8);
  ASSERT_EQ(info->methods.size(), 1u);
  EXPECT_EQ(info->methods[0].parameters[0].name, "threshold");
  const absl::StatusOr<ServerLoad> load = client.GetLoad();
  ASSERT_TRUE(load.ok());
  EXPECT_EQ(load->requests_waiting, 2);
  EXPECT_EQ(load->tokens_per_second, 1234.5);
}

TEST(RandomRequestId, AreDifferent) {
  EXPECT_EQ(RandomRequestId().size(), 32u);
  EXPECT_NE(RandomRequestId(), RandomRequestId());
}

}  // namespace
}  // namespace vsprefill::client
