// The program vsprefill-server as a user starts it: with the tiny model of tests/golden, on
// loopback.
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <signal.h>

#include <cstdlib>
#include <fstream>
#include <thread>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "absl/time/clock.h"
#include "server/attention/attention_method.h"
#include "tests/support/subprocess.h"
#include "tests/support/test_service.h"

namespace vsprefill::testing {
namespace {

std::string Server() { return BuildFolder() + "/bin/vsprefill-server"; }
std::string TinyModel() {
  const char* fixtures = std::getenv("VSP_FIXTURES");
  return absl::StrCat(fixtures != nullptr ? fixtures : "models/fixtures", "/llama");
}

class RunningServer {
 public:
  explicit RunningServer(const std::vector<std::string>& flags = {}) {
    std::vector<std::string> argv = {Server(),
                                     "--model",
                                     TinyModel(),
                                     "--listen",
                                     "127.0.0.1:0",
                                     "--metrics_listen",
                                     "127.0.0.1:0",
                                     "--device",
                                     "cpu",
                                     "--cpu_threads",
                                     "1"};
    argv.insert(argv.end(), flags.begin(), flags.end());
    process_ = std::make_unique<Subprocess>(argv);
    address_ = process_->AwaitLine("listening on ");
    metrics_address_ = process_->AwaitLine("metrics on ");
    EXPECT_FALSE(metrics_address_.empty()) << process_->output();
    channel_ = grpc::CreateChannel(address_, grpc::InsecureChannelCredentials());
    stub_ = v1::PrefillService::NewStub(channel_);
  }
  Subprocess& process() { return *process_; }
  v1::PrefillService::Stub& stub() { return *stub_; }
  const std::shared_ptr<grpc::Channel>& channel() { return channel_; }
  const std::string& address() { return address_; }
  const std::string& metrics_address() { return metrics_address_; }

  /// grpc.health.v1 by hand: 1 SERVING, 2 NOT_SERVING, -code where the call failed. Its messages
  /// are {1: service} and {1: status}.
  int Health(const std::string& service) {
    std::string request;
    if (!service.empty()) {
      request = absl::StrCat("\n", std::string(1, static_cast<char>(service.size())), service);
    }
    const std::string response = Call("/grpc.health.v1.Health/Check", request);
    return response.size() == 2 && response[0] == 8 ? response[1] : -1;
  }

  /// The reflection service's answer to list_services (field 7 of its request), as bytes.
  std::string ListServices() {
    grpc::GenericStub stub(channel_);
    grpc::ClientContext context;
    grpc::CompletionQueue queue;
    const auto await = [&queue] {
      void* tag;
      bool ok;
      return queue.Next(&tag, &ok) && ok;
    };
    const auto call = stub.PrepareCall(
        &context, "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", &queue);
    call->StartCall(this);
    await();
    const grpc::Slice slice(std::string("\x3a\x01*", 3));
    call->WriteLast(grpc::ByteBuffer(&slice, 1), grpc::WriteOptions(), this);
    await();
    grpc::ByteBuffer response;
    call->Read(&response, this);
    const std::string text = await() ? Text(response) : "";
    grpc::Status status;
    call->Finish(&status, this);
    await();
    return text;
  }

 private:
  std::string Call(const std::string& method, const std::string& request) {
    grpc::GenericStub stub(channel_);
    grpc::ClientContext context;
    grpc::CompletionQueue queue;
    const grpc::Slice slice(request);
    const grpc::ByteBuffer bytes(&slice, 1);
    const auto call = stub.PrepareUnaryCall(&context, method, bytes, &queue);
    call->StartCall();
    grpc::ByteBuffer response;
    grpc::Status status;
    call->Finish(&response, &status, this);
    void* tag;
    bool ok;
    queue.Next(&tag, &ok);
    return status.ok() ? Text(response) : "";
  }

  static std::string Text(const grpc::ByteBuffer& bytes) {
    std::vector<grpc::Slice> slices;
    std::string out;
    if (!bytes.Dump(&slices).ok()) return out;
    for (const grpc::Slice& s : slices)
      out.append(reinterpret_cast<const char*>(s.begin()), s.size());
    return out;
  }

  std::unique_ptr<Subprocess> process_;
  std::string address_, metrics_address_;
  std::shared_ptr<grpc::Channel> channel_;
  std::unique_ptr<v1::PrefillService::Stub> stub_;
};

std::vector<int32_t> Ids(int n) {
  std::vector<int32_t> ids(n);
  for (int i = 0; i < n; ++i) ids[i] = i * 7 % 100;
  return ids;
}

TEST(ServerProcessTest, ServesHealthReflectionMetricsAndPrefill) {
  RunningServer server;
  EXPECT_TRUE(absl::StrContains(server.process().output(), "device: cpu"));
  EXPECT_TRUE(absl::StrContains(server.process().output(), "default_method=dense"));
  for (const char* service : {"", "liveness", "readiness", "vsprefill.v1.PrefillService"}) {
    EXPECT_EQ(server.Health(service), 1) << service;
  }
  EXPECT_EQ(server.Health("nonsense"), -1);
  EXPECT_TRUE(absl::StrContains(server.ListServices(), "vsprefill.v1.PrefillService"));
  EXPECT_EQ(HttpGet(server.metrics_address(), "/readyz").first, 200);

  grpc::ClientContext info_context;
  v1::ModelInfo info;
  ASSERT_TRUE(server.stub().GetModelInfo(&info_context, {}, &info).ok());
  EXPECT_EQ(info.architecture(), "LlamaForCausalLM");
  EXPECT_EQ(info.weights_id().size(), 64u);
  EXPECT_EQ(info.layout().kv_id().size(), 64u);
  EXPECT_EQ(info.default_method(), "dense");
  EXPECT_EQ(info.compute_dtype(), "bfloat16");
  EXPECT_EQ(info.layout().dtype(), v1::KV_DTYPE_BFLOAT16);
  // No indexer, no gate: only what can run is listed.
  EXPECT_EQ(info.methods(0).name(), "dense");
  EXPECT_EQ(info.methods_size(), static_cast<int>(attention::MethodSpecs().size()) - 2);
  for (const v1::MethodInfo& method : info.methods()) {
    EXPECT_NE(method.name(), "vsprefill");
    EXPECT_NE(method.name(), "seer_attention");
  }
  EXPECT_GT(info.vocab_size(), 0u);

  v1::PrefillRequest request = MakeRequest("r", Ids(50));
  request.set_expected_kv_id(info.layout().kv_id());
  const StreamResult result = Prefill(server.stub(), request);
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  EXPECT_EQ(result.done.stats().density(), 1.0);
  EXPECT_LT(result.first_token.token_id(), static_cast<int32_t>(info.vocab_size()));
  EXPECT_TRUE(absl::StrContains(HttpGet(server.metrics_address(), "/metrics").second,
                                "vsprefill_request_success_total{engine=\"0\",finished_reason="
                                "\"delivered\",model_name=\"llama\"} 1"));

  for (const auto& [method, part] :
       {std::pair{"vsprefill", "an indexer"}, {"seer_attention", "a SeerAttention gate"}}) {
    request.mutable_method()->set_name(method);
    const StreamResult refused = Prefill(server.stub(), request);
    EXPECT_EQ(refused.status.error_code(), grpc::StatusCode::INVALID_ARGUMENT);
    EXPECT_EQ(
        refused.status.error_message(),
        absl::StrCat("method \"", method, "\" needs ", part,
                     ", which this server was started without (",
                     method == absl::string_view("vsprefill") ? "--indexer" : "--seer_gate", ")"));
    // The next request is served, with what the first one got.
    request.clear_method();
    const StreamResult next = Prefill(server.stub(), request);
    ASSERT_TRUE(next.status.ok()) << next.status.error_message();
    EXPECT_EQ(next.first_token.token_id(), result.first_token.token_id());
  }

  grpc::ClientContext load_context;
  v1::Load load;
  ASSERT_TRUE(server.stub().GetLoad(&load_context, {}, &load).ok());
  EXPECT_EQ(load.requests_running(), 0u);
  EXPECT_EQ(load.kv_pool_used_bytes(), 0u);
  EXPECT_EQ(load.kv_pool_bytes(), uint64_t{4} << 30);
  EXPECT_GT(load.tokens_per_second(), 0);
}

TEST(ServerProcessTest, TheRecallProbeMeasuresEveryNthSparseRequest) {
  RunningServer server({"--recall_probe_every", "2", "--chunk_tokens", "128"});
  const auto count = [&server](int group) {
    const std::string scrape = HttpGet(server.metrics_address(), "/metrics").second;
    const std::string series =
        absl::StrCat("vsprefill_attention_mass_recall_ratio_", "%s{engine=\"0\",layer_group=\"",
                     group, "\",method=\"streaming_llm\",model_name=\"llama\"} ");
    std::pair<double, double> count_and_sum(-1, -1);
    for (absl::string_view line : absl::StrSplit(scrape, '\n')) {
      if (absl::ConsumePrefix(&line, absl::StrReplaceAll(series, {{"%s", "count"}}))) {
        (void)absl::SimpleAtod(line, &count_and_sum.first);
      } else if (absl::ConsumePrefix(&line, absl::StrReplaceAll(series, {{"%s", "sum"}}))) {
        (void)absl::SimpleAtod(line, &count_and_sum.second);
      }
    }
    return count_and_sum;
  };
  v1::PrefillRequest request = MakeRequest("dense", Ids(400));
  ASSERT_TRUE(Prefill(server.stub(), request).status.ok());
  request.mutable_method()->set_name("streaming_llm");
  (*request.mutable_method()->mutable_parameters())["sink_tokens"] = 4;
  (*request.mutable_method()->mutable_parameters())["window_tokens"] = 64;
  // Sparse requests 1 to 4: probes after the second (layer 0) and the fourth (layer 1).
  for (int i = 1; i <= 4; ++i) {
    request.set_request_id(absl::StrCat("sparse", i));
    const StreamResult result = Prefill(server.stub(), request);
    ASSERT_TRUE(result.status.ok()) << result.status.error_message();
    EXPECT_LT(result.done.stats().density(), 0.9);
    EXPECT_GT(result.done.stats().index_seconds(), 0);  // selection alone: there is no indexer
    if (i == 1) {
      EXPECT_EQ(count(0), std::make_pair(0.0, 0.0));
    }
  }
  const absl::Time until = absl::Now() + absl::Seconds(10);
  while (count(1).first <= 0 && absl::Now() < until) absl::SleepFor(absl::Milliseconds(20));
  for (int group : {0, 1}) {
    const auto [heads, sum] = count(group);
    EXPECT_EQ(heads, 6) << group;  // query heads of the model
    EXPECT_GT(sum, 0.3 * heads);
    EXPECT_LT(sum, heads);
  }
  EXPECT_EQ(count(2).first, 0);
}

TEST(ServerProcessTest, WithoutTheProbeItsMetricIsAbsent) {
  RunningServer server;
  EXPECT_FALSE(absl::StrContains(HttpGet(server.metrics_address(), "/metrics").second,
                                 "attention_mass_recall"));
}

TEST(ServerProcessTest, SigtermEndsAnIdleServerWithZero) {
  RunningServer server;
  server.process().Signal(SIGTERM);
  EXPECT_EQ(server.process().Wait(absl::Seconds(10)), 0) << server.process().output();
}

TEST(ServerProcessTest, SigtermLetsARunningRequestFinishAndRefusesNewOnes) {
  // Many small chunks make the request last; the stream's reader starts the drain in its middle.
  RunningServer server({"--chunk_tokens", "16"});
  grpc::ClientContext info_context;
  v1::ModelInfo info;
  ASSERT_TRUE(server.stub().GetModelInfo(&info_context, {}, &info).ok());
  grpc::ClientContext context;
  const auto reader =
      server.stub().Prefill(&context, MakeRequest("r", Ids(info.max_prompt_tokens())));
  bool drained = false;
  grpc::Status refused;
  int readiness = 0, liveness = 0;
  const StreamResult result = ReadAll(context, *reader, [&](const v1::PrefillEvent& event) {
    if (drained || !event.has_kv()) return;
    drained = true;
    server.process().Signal(SIGTERM);
    server.process().AwaitLine("I ", absl::Seconds(5));
    const absl::Time until = absl::Now() + absl::Seconds(5);
    while (HttpGet(server.metrics_address(), "/readyz").first != 503 && absl::Now() < until) {
    }
    refused = Prefill(server.stub(), MakeRequest("late", Ids(5))).status;
    readiness = server.Health("readiness");
    liveness = server.Health("liveness");
  });
  EXPECT_TRUE(result.status.ok()) << result.status.error_message();
  EXPECT_EQ(refused.error_code(), grpc::StatusCode::UNAVAILABLE) << refused.error_message();
  EXPECT_EQ(readiness, 2);
  EXPECT_EQ(liveness, 1);
  EXPECT_EQ(server.process().Wait(absl::Seconds(10)), 0) << server.process().output();
}

TEST(ServerProcessTest, DrainTimeoutEndsRequestsThatDoNot) {
  RunningServer server({"--drain_timeout", "300ms", "--send_stall_timeout", "60s"});
  v1::PrefillRequest request = MakeRequest("r", Ids(64));
  request.set_stripes(2);  // the second is never attached, so it cannot finish
  grpc::ClientContext context;
  const auto reader = server.stub().Prefill(&context, request);
  const StreamResult result = ReadAll(context, *reader, [&](const v1::PrefillEvent& event) {
    if (event.has_accepted()) server.process().Signal(SIGTERM);
  });
  EXPECT_EQ(result.status.error_code(), grpc::StatusCode::UNAVAILABLE);
  EXPECT_EQ(server.process().Wait(absl::Seconds(10)), 0) << server.process().output();
}

struct BadStart {
  std::vector<std::string> flags;
  std::vector<std::string> words;
};

TEST(ServerProcessTest, WrongStartsEndInOneLineAndExitCode2) {
  const std::string model = TinyModel();
  RunningServer other;
  const std::vector<BadStart> starts = {
      {{}, {"--model DIR is required"}},
      {{"--modle", "x"}, {"unknown flag --modle"}},
      {{"--model"}, {"--model needs a value"}},
      {{"x"}, {"unexpected argument \"x\""}},
      {{"--model", "/nonexistent"}, {"/nonexistent"}},
      {{"--model", model, "--device", "tpu"}, {"--device", "tpu", "auto, cpu, cuda"}},
      {{"--model", model, "--dtype", "fp8"}, {"--dtype", "fp8", "bf16, fp32"}},
      {{"--model", model, "--chunk_tokens", "0"}, {"--chunk_tokens", "\"0\"", "[16, 1048576]"}},
      {{"--model", model, "--kv_pool_bytes", "many"}, {"--kv_pool_bytes", "many", "GiB"}},
      {{"--model", model, "--send_stall_timeout", "-1s"}, {"--send_stall_timeout", "-1s"}},
      {{"--model", model, "--method", "vsprefill"}, {"vsprefill", "indexer"}},
      {{"--model", model, "--method", "seer_attention"}, {"seer_attention", "SeerAttention gate"}},
      {{"--model", model, "--method", "magic"}, {"magic", "dense"}},
      {{"--model", model, "--set", "wish=1"}, {"wish"}},
      {{"--model", model, "--indexer", "/nonexistent"}, {"/nonexistent"}},
      {{"--model", model, "--seer_gate", "/nonexistent"}, {"/nonexistent"}},
      {{"--model", model, "--push_allow", "a b"}, {"a b", "HOST"}},
      {{"--model", model, "--listen", "nowhere"}, {"nowhere", "HOST:PORT"}},
      {{"--model", model, "--listen", other.address()}, {"cannot listen", other.address()}},
      {{"--model", model, "--listen", "127.0.0.1:0", "--metrics_listen", other.metrics_address()},
       {"cannot listen", other.metrics_address()}},
  };
  for (const BadStart& start : starts) {
    std::vector<std::string> argv = {Server()};
    argv.insert(argv.end(), start.flags.begin(), start.flags.end());
    Subprocess process(argv);
    const std::string line = process.AwaitLine("vsprefill-server: ");
    EXPECT_EQ(process.Wait(), 2) << process.output();
    for (const std::string& word : start.words) {
      EXPECT_TRUE(absl::StrContains(line, word)) << "\"" << word << "\" is not in: " << line;
    }
  }
}

TEST(ServerProcessTest, HelpNamesEveryFlag) {
  Subprocess process({Server(), "--help"});
  EXPECT_EQ(process.Wait(), 0);
  for (const char* flag : {"model",
                           "model_name",
                           "listen",
                           "metrics_listen",
                           "device",
                           "dtype",
                           "method",
                           "set",
                           "indexer",
                           "seer_gate",
                           "kv_pool_bytes",
                           "staging_bytes",
                           "chunk_tokens",
                           "max_prompt_tokens",
                           "max_waiting_requests",
                           "max_waiting_tokens",
                           "send_stall_timeout",
                           "drain_timeout",
                           "push_allow",
                           "cpu_threads",
                           "cpu_isa"}) {
    EXPECT_TRUE(absl::StrContains(process.output(), absl::StrCat("--", flag, " "))) << flag;
  }
}

}  // namespace
}  // namespace vsprefill::testing
