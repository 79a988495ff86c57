#include "server/config/server_config.h"

#include <gtest/gtest.h>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "server/attention/preset_table.h"
#include "server/rpc/allow_list.h"

namespace vsprefill {
namespace {

TEST(ServerConfigTest, TakesBothFormsOfFlags) {
  const auto config = config::ParseServerConfig(
      {"--model", "/m/SmolLM2/", "--dtype=fp32", "--kv_pool_bytes", "3MiB", "--drain_timeout=1.5",
       "--send_stall_timeout", "200ms", "--push_allow", "a,b:1", "--push_allow=c", "--set",
       "threshold=2.5", "--set=x=1e-3", "--chunk_tokens", "512"});
  ASSERT_TRUE(config.ok()) << config.status();
  EXPECT_EQ(config->model_name, "SmolLM2");
  EXPECT_EQ(config->dtype, kernels::DType::kF32);
  EXPECT_EQ(config->kv_pool_bytes, 3 << 20);
  EXPECT_EQ(config->drain_timeout, absl::Milliseconds(1500));
  EXPECT_EQ(config->send_stall_timeout, absl::Milliseconds(200));
  EXPECT_EQ(config->push_allow, (std::vector<std::string>{"a", "b:1", "c"}));
  EXPECT_EQ(config->method_parameters,
            (std::map<std::string, double>{{"threshold", 2.5}, {"x", 1e-3}}));
  EXPECT_EQ(config->chunk_tokens, 512);
}

TEST(ServerConfigTest, APresetSetsWhatSetLeavesOpen) {
  const auto fast =
      config::ParseServerConfig({"--model", "m", "--set", "sink_tokens=4", "--preset", "fast"});
  ASSERT_TRUE(fast.ok()) << fast.status();
  EXPECT_EQ(fast->method, "vsprefill");
  EXPECT_EQ(fast->method_parameters,
            (std::map<std::string, double>{{"sink_tokens", 4}, {"threshold", 3.6}}));
  const auto own =
      config::ParseServerConfig({"--model", "m", "--preset=fast", "--set", "threshold=5"});
  EXPECT_EQ(own->method_parameters.at("threshold"), 5);
  const auto other =
      config::ParseServerConfig({"--model", "m", "--preset", "fast", "--method", "dense"});
  EXPECT_TRUE(absl::StrContains(other.status().message(), "--preset: ")) << other.status();
  EXPECT_TRUE(absl::StrContains(other.status().message(), "\"vsprefill\" or none"));
  const auto unknown = config::ParseServerConfig({"--model", "m", "--preset", "turbo"});
  EXPECT_TRUE(absl::StrContains(unknown.status().message(), "safe, balanced, fast"));
  for (const attention::PresetEntry& preset : attention::kPresets) {
    EXPECT_TRUE(absl::StrContains(
        config::ServerUsage(),
        absl::StrCat("  ", preset.name, ": ", attention::ExpectedLoss(preset), "\n")));
  }
  EXPECT_EQ(attention::ExpectedLoss({"some", 2, 0.217, 2.25, 2.34, 71.1}),
            "density 0.22, perplexity +2.2 % (median text +2.3 %, worst text +71 %)");
}

TEST(ServerConfigTest, Bytes) {
  EXPECT_EQ(*config::ParseBytes("17"), 17);
  EXPECT_EQ(*config::ParseBytes("2KiB"), 2048);
  EXPECT_EQ(*config::ParseBytes("4GiB"), int64_t{4} << 30);
  for (const char* text : {"", "GiB", "-1", "1.5MiB", "4GB", "9223372036854775807KiB"}) {
    EXPECT_FALSE(config::ParseBytes(text).ok()) << text;
  }
}

TEST(AllowListTest, MatchesHostsAndPorts) {
  const auto list = rpc::AllowList::Create({"10.0.0.1:50", "worker-1.local", "[::1]:7"});
  ASSERT_TRUE(list.ok()) << list.status();
  for (const char* target :
       {"10.0.0.1:50", "worker-1.local:1", "worker-1.local:65535", "[::1]:7"}) {
    EXPECT_TRUE(list->Check(target).ok()) << target;
  }
  for (const char* target :
       {"10.0.0.1:51", "10.0.0.10:50", "worker-1.local.evil:1", "x.worker-1.local:1", "[::1]:8"}) {
    EXPECT_EQ(list->Check(target).code(), absl::StatusCode::kPermissionDenied) << target;
  }
  for (const char* target :
       {"", ":50", "10.0.0.1", "10.0.0.1:", "10.0.0.1:0", "10.0.0.1:65536", "10.0.0.1:5x",
        "unix:/tmp/s:1", "dns:///worker-1.local:1", "::1:7", "a b:1", "worker-1.local:1,evil:2"}) {
    EXPECT_EQ(list->Check(target).code(), absl::StatusCode::kInvalidArgument) << target;
  }
  const auto none = rpc::AllowList::Create({});
  EXPECT_TRUE(absl::StrContains(none->Check("a:1").message(), "nothing"));
  for (const char* entry : {"", "unix:/x", "a:b", "a:1:2", "a/b"}) {
    EXPECT_FALSE(rpc::AllowList::Create({entry}).ok()) << entry;
  }
}

}  // namespace
}  // namespace vsprefill
