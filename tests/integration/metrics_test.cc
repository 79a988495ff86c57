// Every metric through a real scrape after real requests, and against docs/metrics.md.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <array>
#include <cstdio>
#include <fstream>
#include <set>
#include <sstream>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/strings/strip.h"
#include "tests/support/push_receiver.h"
#include "tests/support/test_service.h"

namespace vsprefill::testing {
namespace {

constexpr int64_t kTokens = 130, kLayers = 4, kTokenLayerBytes = 128;

/// `vsprefill_NAME{engine="0",LABELS...}`: prometheus-cpp writes labels in alphabetical order.
std::string Series(const std::string& name, std::vector<std::string> labels = {}) {
  labels.push_back("engine=\"0\"");
  labels.push_back("model_name=\"fake\"");
  std::sort(labels.begin(), labels.end());
  std::string joined;
  for (const std::string& label : labels) {
    absl::StrAppend(&joined, joined.empty() ? "" : ",", label);
  }
  return absl::StrCat("vsprefill_", name, "{", joined, "}");
}

class MetricsTest : public ::testing::Test {
 protected:
  static TestServiceOptions Options() {
    TestServiceOptions options;
    options.push_allow = {"127.0.0.1"};
    options.model.layer_delay = absl::Milliseconds(2);
    return options;
  }
  double Get(const std::string& name, const std::vector<std::string>& labels = {}) {
    return service_.Metric(Series(name, labels));
  }
  v1::PrefillRequest SparseRequest(const std::string& id) {
    v1::PrefillRequest request = MakeRequest(id, TestIds(kTokens));
    request.mutable_method()->set_name("vsprefill");
    return request;
  }

  TestService service_{Options()};
};

TEST_F(MetricsTest, AStreamedRequestMovesEverythingThatItShould) {
  const StreamResult result = Prefill(service_.stub(), SparseRequest("r"));
  ASSERT_TRUE(result.status.ok()) << result.status.error_message();
  const v1::PrefillStats& stats = result.done.stats();
  const std::string stream = "mode=\"stream\"";
  const double bytes = kTokens * kLayers * kTokenLayerBytes;

  EXPECT_EQ(Get("time_to_first_token_seconds_count", {stream}), 1);
  EXPECT_NEAR(Get("time_to_first_token_seconds_sum", {stream}), stats.ttft_seconds(), 1e-6);
  EXPECT_EQ(Get("time_to_first_layer_seconds_count", {stream}), 1);
  EXPECT_GT(Get("time_to_first_layer_seconds_sum", {stream}), 0.002);
  EXPECT_LT(Get("time_to_first_layer_seconds_sum", {stream}), stats.ttft_seconds());
  EXPECT_EQ(Get("time_to_last_byte_seconds_count", {stream}), 1);
  EXPECT_NEAR(Get("time_to_last_byte_seconds_sum", {stream}),
              stats.queue_seconds() + stats.compute_seconds() + stats.exposed_transfer_seconds(),
              1e-6);
  EXPECT_EQ(Get("request_queue_time_seconds_count"), 1);
  EXPECT_NEAR(Get("request_queue_time_seconds_sum"), stats.queue_seconds(), 1e-6);
  EXPECT_NEAR(Get("request_prefill_time_seconds_sum"), stats.compute_seconds(), 1e-6);
  EXPECT_GT(Get("kv_transfer_time_seconds_sum", {stream}), 0);
  EXPECT_EQ(Get("kv_transfer_bytes_sum", {stream}), bytes);
  EXPECT_EQ(Get("kv_bytes_sent_total", {stream, "peer_kind=\"caller\""}), bytes);
  EXPECT_EQ(Get("layer_compute_seconds_count"), 3 * kLayers);  // 130 tokens in chunks of 64
  EXPECT_GE(Get("layer_compute_seconds_sum"), 3 * kLayers * 0.002);
  EXPECT_EQ(Get("layer_send_stall_seconds_count", {stream}), 3 * kLayers);
  EXPECT_EQ(Get("request_prompt_tokens_sum"), kTokens);
  EXPECT_EQ(Get("prompt_tokens_total"), kTokens);
  EXPECT_EQ(Get("request_success_total", {"finished_reason=\"delivered\""}), 1);
  for (int group = 0; group < 4; ++group) {
    EXPECT_DOUBLE_EQ(
        Get("attention_density_ratio_sum", {absl::StrCat("layer_group=\"", group, "\"")}), 0.25);
  }
  EXPECT_EQ(Get("attention_pairs_total"), 4 * kTokens * kLayers);
  EXPECT_EQ(Get("attention_pairs_computed_total"), kTokens * kLayers);
  EXPECT_EQ(Get("attention_pairs_multiplied_total"), 2 * kTokens * kLayers);
  EXPECT_EQ(Get("vertical_columns_count"), kLayers);
  EXPECT_EQ(Get("vertical_columns_sum"), 100 * kLayers);
  EXPECT_EQ(Get("slash_diagonals_count"), kLayers);
  EXPECT_EQ(Get("slash_diagonals_sum"), 192 * kLayers);
  EXPECT_NEAR(Get("index_build_seconds_sum"), 0.03, 1e-9);
  EXPECT_GT(Get("last_progress_timestamp_seconds"), absl::ToUnixSeconds(absl::Now()) - 60);
  EXPECT_EQ(Get("cache_config_info",
                {"block_size=\"32704\"", "kv_dtype=\"bfloat16\"", "num_gpu_blocks=\"1\""}),
            1);
}

TEST_F(MetricsTest, APushedRequestCountsAsPush) {
  PushReceiver one, two;
  v1::PrefillRequest request = MakeRequest("p", TestIds(kTokens));
  request.add_push_targets(one.address());
  request.add_push_targets(two.address());
  ASSERT_TRUE(Prefill(service_.stub(), request).status.ok());
  const std::string push = "mode=\"push\"";
  const double bytes = 2 * kTokens * kLayers * kTokenLayerBytes;
  for (const char* name : {"time_to_first_token_seconds_count", "time_to_first_layer_seconds_count",
                           "time_to_last_byte_seconds_count", "kv_transfer_time_seconds_count"}) {
    EXPECT_EQ(Get(name, {push}), 1) << name;
    EXPECT_EQ(Get(name, {"mode=\"stream\""}), 0) << name;
  }
  EXPECT_EQ(Get("kv_transfer_bytes_sum", {push}), bytes);
  EXPECT_EQ(Get("kv_bytes_sent_total", {push, "peer_kind=\"target\""}), bytes);
  EXPECT_EQ(Get("layer_send_stall_seconds_count", {push}), 2 * 3 * kLayers);
  EXPECT_EQ(Get("vertical_columns_count"), 0);  // dense has no index
}

TEST_F(MetricsTest, WhatDoesNotSucceedIsCountedWhereItEnded) {
  v1::PrefillRequest request = MakeRequest("r", {});
  Prefill(service_.stub(), request);
  EXPECT_EQ(Get("requests_rejected_total", {"reason=\"invalid\""}), 1);
  request = MakeRequest("r", TestIds(5));
  request.set_expected_kv_id("x");
  Prefill(service_.stub(), request);
  EXPECT_EQ(Get("requests_rejected_total", {"reason=\"kv_id\""}), 1);
  request = MakeRequest("r", TestIds(5));
  request.add_push_targets("10.0.0.1:1");
  Prefill(service_.stub(), request);
  EXPECT_EQ(Get("requests_rejected_total", {"reason=\"push_target\""}), 1);

  grpc::ClientContext context;
  const auto reader = service_.stub().Prefill(&context, MakeRequest("c", TestIds(64 * 100)));
  v1::PrefillEvent event;
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(reader->Read(&event));
  EXPECT_EQ(Get("num_requests_running"), 1);
  EXPECT_GT(Get("kv_cache_usage_perc"), 0);
  EXPECT_LT(Get("kv_cache_usage_perc"), 1);
  context.TryCancel();
  while (reader->Read(&event)) {
  }
  EXPECT_EQ(reader->Finish().error_code(), grpc::StatusCode::CANCELLED);
  EXPECT_TRUE(service_.AwaitQuiet());
  EXPECT_EQ(Get("requests_cancelled_total", {"phase=\"compute\""}), 1);
  EXPECT_EQ(Get("requests_failed_total", {"code=\"CANCELLED\""}), 1);
  EXPECT_EQ(Get("request_success_total", {"finished_reason=\"delivered\""}), 0);
  EXPECT_EQ(Get("num_requests_running"), 0);
  EXPECT_EQ(Get("kv_cache_usage_perc"), 0);
  EXPECT_EQ(Get("send_buffer_bytes"), 0);
}

TEST_F(MetricsTest, GaugesShowTheQueueAndTheDrain) {
  std::vector<std::unique_ptr<grpc::ClientContext>> contexts;
  std::vector<std::unique_ptr<grpc::ClientReader<v1::PrefillEvent>>> readers;
  for (int i = 0; i < 3; ++i) {
    contexts.push_back(std::make_unique<grpc::ClientContext>());
    readers.push_back(service_.stub().Prefill(contexts.back().get(),
                                              MakeRequest(absl::StrCat(i), TestIds(6400))));
    v1::PrefillEvent accepted;
    ASSERT_TRUE(readers.back()->Read(&accepted));
  }
  EXPECT_EQ(Get("num_requests_waiting"), 2);
  EXPECT_EQ(Get("waiting_tokens"), 12800);
  EXPECT_EQ(Get("draining"), 0);
  service_.engine().StartDrain();
  EXPECT_EQ(Get("draining"), 1);
  for (auto& context : contexts) context->TryCancel();
  for (auto& reader : readers) reader->Finish();
  EXPECT_TRUE(service_.AwaitQuiet());
  EXPECT_EQ(Get("num_requests_waiting"), 0);
}

TEST_F(MetricsTest, TheDocumentationListsExactlyWhatIsServed) {
  std::set<std::string> served, documented;
  for (absl::string_view line : absl::StrSplit(service_.Scrape(), '\n')) {
    if (absl::ConsumePrefix(&line, "# TYPE ")) {
      const std::vector<std::string> words = absl::StrSplit(line, ' ');
      served.insert(absl::StrCat(words[0], " ", words[1]));
    }
  }
  std::ifstream file("docs/metrics.md");
  ASSERT_TRUE(file) << "run from the source folder";
  for (std::string line; std::getline(file, line);) {
    const std::vector<std::string> cells = absl::StrSplit(line, '|');
    if (cells.size() < 4 || !absl::StartsWith(cells[1], " `vsprefill_")) continue;
    const std::string name(absl::StripAsciiWhitespace(cells[1]));
    documented.insert(
        absl::StrCat(name.substr(1, name.size() - 2), " ", absl::StripAsciiWhitespace(cells[2])));
  }
  EXPECT_GT(served.size(), 30u);
  EXPECT_EQ(served, documented);
}

TEST_F(MetricsTest, PromtoolFindsNothing) {
  ASSERT_TRUE(Prefill(service_.stub(), SparseRequest("r")).status.ok());
  if (std::system("command -v promtool > /dev/null") != 0) GTEST_SKIP() << "no promtool";
  const std::string path = ::testing::TempDir() + "/metrics.txt";
  std::ofstream(path) << service_.Scrape();
  EXPECT_EQ(std::system(absl::StrCat("promtool check metrics < ", path).c_str()), 0);
}

TEST_F(MetricsTest, UnknownPathsAndMethodsAreRefused) {
  EXPECT_EQ(HttpGet(service_.metrics_address(), "/").first, 404);
  EXPECT_EQ(HttpGet(service_.metrics_address(), "/livez"),
            std::make_pair(200, std::string("ok\n")));
  EXPECT_EQ(HttpGet(service_.metrics_address(), "/readyz").first, 200);
}

}  // namespace
}  // namespace vsprefill::testing
