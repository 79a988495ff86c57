// The program vsprefill, its command line, ids files, output and exit codes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cstdio>
#include <fstream>
#include <nlohmann/json.hpp>
#include <numeric>
#include <sstream>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "client/cli/args.h"
#include "client/cli/commands.h"
#include "client/cli/exit_code.h"
#include "client/cli/ids_file.h"
#include "client/cli/report.h"
#include "server/model/safetensors.h"
#include "tests/support/fake_prefill_server.h"

namespace vsprefill::cli {
namespace {

using ::testing::ElementsAre;
using testing::FakePrefillServer;
using testing::FakeServerOptions;
using ::testing::HasSubstr;
using testing::KvFault;
using testing::StreamFault;

// --- args ---------------------------------------------------------------------------------------

const std::vector<FlagSpec>& Specs() {
  static const auto* const specs = new std::vector<FlagSpec>{
      {.name = "n", .value = "N", .help = "a number"},
      {.name = "set", .value = "NAME=VALUE", .help = "pairs", .repeated = true},
      {.name = "json", .value = "", .help = "a switch"},
      {.name = "must", .value = "X", .help = "required", .required = true},
  };
  return *specs;
}

std::string ParseError(const std::vector<std::string>& args) {
  return std::string(Args::Parse(args, Specs()).status().message());
}

TEST(Args, BothFormsAndRepetition) {
  const auto args =
      Args::Parse({"--must", "a=b", "--set=x=1", "--set", "y=-2.5e3", "--json", "--n=7"}, Specs());
  ASSERT_TRUE(args.ok()) << args.status();
  EXPECT_EQ(args->Get("must"), "a=b");
  EXPECT_TRUE(args->Has("json"));
  EXPECT_EQ(*args->GetInt("n", 0, 0, 10), 7);
  EXPECT_THAT(args->GetAll("set"), ElementsAre("x=1", "y=-2.5e3"));
  const auto numbers = args->GetNumbers("set");
  ASSERT_TRUE(numbers.ok());
  EXPECT_EQ(numbers->at("x"), 1);
  EXPECT_EQ(numbers->at("y"), -2500);
}

TEST(Args, AbsentFlagsHaveDefaults) {
  const auto args = Args::Parse({"--must=1"}, Specs());
  ASSERT_TRUE(args.ok());
  EXPECT_EQ(*args->GetInt("n", 5, 0, 10), 5);
  EXPECT_EQ(args->Get("n", "z"), "z");
  EXPECT_EQ(*args->GetSeconds("n", absl::Seconds(3)), absl::Seconds(3));
  EXPECT_TRUE(args->GetNumbers("set")->empty());
}

TEST(Args, ErrorsNameTheFlag) {
  EXPECT_EQ(ParseError({"--must=1", "--nope"}), "unknown flag --nope");
  EXPECT_EQ(ParseError({"--must=1", "x"}), "unexpected argument \"x\"");
  EXPECT_EQ(ParseError({"--must=1", "-n"}), "unexpected argument \"-n\"");
  EXPECT_EQ(ParseError({"--must=1", "--"}), "unexpected argument \"--\"");
  EXPECT_EQ(ParseError({"--must"}), "--must needs a value: X");
  EXPECT_EQ(ParseError({"--must=1", "--json=yes"}), "--json takes no value");
  EXPECT_EQ(ParseError({"--must=1", "--must=2"}), "--must is given twice");
  EXPECT_EQ(ParseError({}), "--must is required");
  const auto value = [](const char* n) { return *Args::Parse({"--must=1", "--n", n}, Specs()); };
  EXPECT_EQ(value("11").GetInt("n", 0, 0, 10).status().message(),
            "--n=11 is no integer in [0, 10]");
  for (const char* bad : {"x", "", "1.5", "1x", "-1", "99999999999999999999"}) {
    EXPECT_FALSE(value(bad).GetInt("n", 0, 0, 10).ok()) << bad;
  }
  for (const char* bad : {"0", "-1", "nan", "inf", "s"}) {
    EXPECT_FALSE(value(bad).GetSeconds("n", absl::Seconds(1)).ok()) << bad;
  }
  EXPECT_EQ(*value("0.5").GetSeconds("n", absl::Seconds(1)), absl::Milliseconds(500));
  for (const char* bad : {"x", "x=", "=1", "x=1y", "x=nan", "x=inf"}) {
    EXPECT_FALSE(Args::Parse({"--must=1", "--set", bad}, Specs())->GetNumbers("set").ok()) << bad;
  }
  EXPECT_FALSE(
      Args::Parse({"--must=1", "--set=x=1", "--set=x=2"}, Specs())->GetNumbers("set").ok());
}

TEST(Args, HelpNamesEveryFlag) {
  const std::string help = FlagHelp(Specs());
  for (const FlagSpec& s : Specs()) EXPECT_THAT(help, HasSubstr("--" + s.name));
  EXPECT_TRUE(WantsHelp({"--n", "--help"}));
  EXPECT_FALSE(WantsHelp({"--n"}));
}

// --- ids files ----------------------------------------------------------------------------------

std::string IdsError(const std::string& text) {
  return std::string(ParseIds(text, "f").status().message());
}

TEST(IdsFile, Reads) {
  EXPECT_THAT(*ParseIds("[1,2,3]", "f"), ElementsAre(1, 2, 3));
  EXPECT_THAT(*ParseIds(" [\n 0 ,\t2147483647\r\n]\n", "f"), ElementsAre(0, 2147483647));
  EXPECT_THAT(*ParseIds("[-0]", "f"), ElementsAre(0));
}

TEST(IdsFile, ErrorsHaveAPosition) {
  EXPECT_EQ(IdsError(""), "f:1:1: expected '[', found the end of the file");
  EXPECT_EQ(IdsError("{}"), "f:1:1: expected '[', found \"{}\"");
  EXPECT_EQ(IdsError("[]"), "f:1:2: the list of ids is empty, found \"]\"");
  EXPECT_EQ(IdsError("[1,\n2,\n x]"), "f:3:2: expected an integer, found \"x]\"");
  EXPECT_EQ(IdsError("[1,]"), "f:1:4: expected an integer, found \"]\"");
  EXPECT_EQ(IdsError("[1 2]"), "f:1:4: expected ',' or ']', found \"2]\"");
  EXPECT_EQ(IdsError("[1"), "f:1:3: expected ',' or ']', found the end of the file");
  EXPECT_EQ(IdsError("[1] x"), "f:1:5: expected the end of the file, found \"x\"");
  EXPECT_EQ(IdsError("[1.0]"), "f:1:2: expected an integer, found \"1.0]\"");
  EXPECT_EQ(IdsError("[1e3]"), "f:1:2: expected an integer, found \"1e3]\"");
  EXPECT_EQ(IdsError("[01]"), "f:1:2: expected an integer, found \"01]\"");
  EXPECT_EQ(IdsError("[-1]"), "f:1:2: the id is not in [0, 2147483647], found \"-1]\"");
  EXPECT_EQ(IdsError("[2147483648]"),
            "f:1:2: the id is not in [0, 2147483647], found \"2147483648]\"");
  EXPECT_EQ(IdsError("[99999999999999999999999999]"),
            "f:1:2: the id is not in [0, 2147483647], found \"999999999999\"");
  EXPECT_EQ(IdsError("[\"\x01\xff\"]"),
            "f:1:2: expected an integer, found \"\\\"\\x01\\xff\\\"]\"");
  EXPECT_FALSE(ParseIds(std::string("[1\0]", 4), "f").ok());
}

TEST(IdsFile, NoSuchFile) {
  EXPECT_EQ(ReadIdsFile("/nowhere/ids.json").status(),
            absl::NotFoundError("/nowhere/ids.json: No such file or directory"));
}

// --- the program --------------------------------------------------------------------------------

struct CliRun {
  int code = -1;
  std::string out, err;
};

CliRun Cli(const std::vector<std::string>& args, bool progress = false) {
  std::ostringstream out, err;
  CliRun r;
  r.code = RunCli(args, Console{out, err, progress});
  r.out = out.str();
  r.err = err.str();
  return r;
}

class CliTest : public ::testing::Test {
 protected:
  CliTest() {
    std::vector<int> ids(37);
    std::iota(ids.begin(), ids.end(), 5);
    ids_path_ = Write("ids.json", absl::StrCat("[", absl::StrJoin(ids, ", "), "]\n"));
  }
  ~CliTest() override {
    for (const std::string& path : files_) std::remove(path.c_str());
  }
  std::string Path(const std::string& name) {
    // CTest may run two of these programs at a time.
    files_.push_back(absl::StrCat(::testing::TempDir(), "vsp_cli_", getpid(), "_", name));
    return files_.back();
  }
  std::string Write(const std::string& name, const std::string& text) {
    const std::string path = Path(name);
    std::ofstream(path) << text;
    return path;
  }
  std::vector<std::string> Prefill(const FakePrefillServer& server,
                                   const std::vector<std::string>& more = {}) {
    std::vector<std::string> args = {"prefill", "--server", server.address(), "--ids", ids_path_};
    args.insert(args.end(), more.begin(), more.end());
    return args;
  }

  std::string ids_path_;
  std::vector<std::string> files_;
};

TEST_F(CliTest, PrefillJsonHasEveryField) {
  FakePrefillServer server({});
  const CliRun r = Cli(
      Prefill(server, {"--json", "--method", "vsprefill", "--set", "threshold=3", "--request_id",
                       "me", "--attempt=4", "--stripes=2", "--preset", "fast"}));
  ASSERT_EQ(r.code, kExitOk) << r.err;
  EXPECT_EQ(r.err, "");
  const nlohmann::json j = nlohmann::json::parse(r.out);
  EXPECT_EQ(j["request_id"], "me");
  EXPECT_EQ(j["attempt"], 4);
  EXPECT_EQ(j["first_token"], 42);
  EXPECT_EQ(j["prompt_tokens"], 37);
  EXPECT_EQ(j["method"], "vsprefill");
  EXPECT_EQ(j["parameters"]["threshold"], 3.0);
  EXPECT_EQ(j["density"], 0.1);
  EXPECT_EQ(j["cost_ratio"], 0.2);
  EXPECT_EQ(j["layer_group_density"], nlohmann::json::parse("[0.4, 0.3, 0.2, 0.1]"));
  EXPECT_EQ(j["queue_seconds"], 0.25);
  EXPECT_EQ(j["compute_seconds"], 1.5);
  EXPECT_EQ(j["ttft_seconds"], 1.75);
  EXPECT_EQ(j["exposed_transfer_seconds"], 0.125);
  EXPECT_EQ(j["bytes"], testing::SmallShape().bytes());
  EXPECT_EQ(j["received_bytes"], testing::SmallShape().bytes());
  EXPECT_EQ(j["layout"]["kv_id"], "fake-kv-id");
  EXPECT_EQ(server.last_request().request_id(), "me");
  EXPECT_EQ(server.last_request().attempt(), 4u);
  EXPECT_EQ(server.last_request().method().preset(), "fast");
}

TEST_F(CliTest, HelpSaysWhatPresetsCost) {
  const std::string help = Cli({"prefill", "--help"}).out;
  EXPECT_THAT(help, HasSubstr("--preset NAME"));
  for (const char* name : {"safe (density 0.", "balanced (density 0.", "fast (density 0."}) {
    EXPECT_THAT(absl::StrJoin(absl::StrSplit(help, absl::ByAnyChar(" \n"), absl::SkipEmpty()), " "),
                HasSubstr(name));
  }
}

TEST_F(CliTest, PrefillTextNamesTheFigures) {
  FakePrefillServer server({});
  const CliRun r = Cli(Prefill(server));
  ASSERT_EQ(r.code, kExitOk) << r.err;
  for (const char* text :
       {"first token           42\n", "1.750 s at the server", "queue                 0.250 s\n",
        "exposed transfer      0.125 s\n", "0.1000 (cost ratio 0.2000)",
        "0.4000  0.3000  0.2000  0.1000", "6.9 KiB received and verified"}) {
    EXPECT_THAT(r.out, HasSubstr(text));
  }
  EXPECT_EQ(server.last_request().request_id().size(), 32u);  // a random one
}

TEST_F(CliTest, ProgressGoesToTheTerminalOnly) {
  FakePrefillServer server({});
  EXPECT_THAT(Cli(Prefill(server), true).err, HasSubstr("\r3 of 3 layers"));
  EXPECT_EQ(Cli(Prefill(server), false).err, "");
}

TEST_F(CliTest, DumpHoldsTheCache) {
  FakePrefillServer server({});
  const std::string path = Path("dump.safetensors");
  const CliRun r = Cli(Prefill(server, {"--dump", path, "--start_token=10", "--request_id=q"}));
  ASSERT_EQ(r.code, kExitOk) << r.err;
  const auto reader = model::SafetensorsReader::OpenFile(path);
  ASSERT_TRUE(reader.ok()) << reader.status();
  EXPECT_EQ(reader->tensors().size(), 6u);
  EXPECT_EQ(reader->metadata().at("kv_id"), "fake-kv-id");
  EXPECT_EQ(reader->metadata().at("first_token"), "42");
  EXPECT_EQ(reader->metadata().at("start_token"), "10");
  for (int l = 0; l < 3; ++l) {
    for (bool is_v : {false, true}) {
      const auto tensor = reader->Get(absl::StrCat("layers.", l, is_v ? ".v" : ".k"), {2, 27, 8});
      ASSERT_TRUE(tensor.ok()) << tensor.status();
      EXPECT_EQ((*tensor)->dtype, "BF16");
      size_t i = 0;
      for (int h = 0; h < 2; ++h) {
        for (int64_t t = 10; t < 37; ++t) {
          for (int64_t b = 0; b < 16; ++b) {
            ASSERT_EQ((*tensor)->data[i++], testing::FakeKvByte(l, is_v, h, t, b));
          }
        }
      }
    }
  }
}

TEST_F(CliTest, NoDumpOfACacheThatDidNotComeThrough) {
  for (KvFault fault : {KvFault::kWrongChecksum, KvFault::kMissingChunk}) {
    FakePrefillServer server({.kv_fault = fault});
    const std::string path = Path("bad.safetensors");
    const CliRun r = Cli(Prefill(server, {"--dump", path, "--json"}));
    EXPECT_EQ(r.code, kExitDataLoss);
    EXPECT_EQ(r.out, "");
    EXPECT_THAT(r.err, HasSubstr("vsprefill: DATA_LOSS: layer 2"));
    EXPECT_FALSE(std::ifstream(path).good());
  }
}

TEST_F(CliTest, DumpThatCannotBeWritten) {
  FakePrefillServer server({});
  const CliRun r = Cli(Prefill(server, {"--dump", "/nowhere/x.safetensors"}));
  EXPECT_EQ(r.code, kExitFailed);
  EXPECT_THAT(r.err, HasSubstr("/nowhere/x.safetensors"));
}

TEST_F(CliTest, ExitCodesOfServerErrors) {
  const std::pair<grpc::StatusCode, int> codes[] = {
      {grpc::StatusCode::INVALID_ARGUMENT, kExitRefused},
      {grpc::StatusCode::FAILED_PRECONDITION, kExitRefused},
      {grpc::StatusCode::PERMISSION_DENIED, kExitRefused},
      {grpc::StatusCode::ALREADY_EXISTS, kExitRefused},
      {grpc::StatusCode::NOT_FOUND, kExitRefused},
      {grpc::StatusCode::UNIMPLEMENTED, kExitRefused},
      {grpc::StatusCode::UNAVAILABLE, kExitRetry},
      {grpc::StatusCode::RESOURCE_EXHAUSTED, kExitRetry},
      {grpc::StatusCode::ABORTED, kExitRetry},
      {grpc::StatusCode::DEADLINE_EXCEEDED, kExitTime},
      {grpc::StatusCode::CANCELLED, kExitTime},
      {grpc::StatusCode::DATA_LOSS, kExitDataLoss},
      {grpc::StatusCode::INTERNAL, kExitFailed},
  };
  for (const auto& [code, exit_code] : codes) {
    FakeServerOptions options;
    options.refuse = true;
    options.error = {code, "the reason"};
    FakePrefillServer server(options);
    const CliRun r = Cli(Prefill(server));
    EXPECT_EQ(r.code, exit_code) << code;
    EXPECT_EQ(r.out, "");
    EXPECT_EQ(r.err, absl::StrCat("vsprefill: ",
                                  absl::StatusCodeToString(static_cast<absl::StatusCode>(code)),
                                  ": the reason\n"));
    EXPECT_EQ(Cli({"info", "--server", server.address()}).code, exit_code);
    EXPECT_EQ(Cli({"load", "--server", server.address()}).code, exit_code);
  }
}

TEST_F(CliTest, Deadline) {
  FakePrefillServer server({.stream_fault = StreamFault::kHang});
  EXPECT_EQ(Cli(Prefill(server, {"--deadline=0.2"})).code, kExitTime);
}

TEST_F(CliTest, PushPrintsTheTargets) {
  FakeServerOptions options;
  for (const char* name : {"a:1", "b:2"}) {
    v1::TargetStatus t;
    t.set_target(name);
    t.set_bytes(2048);
    options.targets.push_back(t);
  }
  {
    FakePrefillServer server(options);
    const CliRun r = Cli(Prefill(server, {"--push", "a:1", "--push", "b:2"}));
    EXPECT_EQ(r.code, kExitOk) << r.err;
    EXPECT_THAT(r.out, HasSubstr("b:2  OK, 2.0 KiB"));
    EXPECT_THAT(server.last_request().push_targets(), ElementsAre("a:1", "b:2"));
    const CliRun json = Cli(Prefill(server, {"--push=a:1", "--json"}));
    EXPECT_EQ(nlohmann::json::parse(json.out)["targets"][1]["target"], "b:2");
  }
  options.targets[1].set_code(grpc::StatusCode::UNAVAILABLE);
  options.targets[1].set_message("dead");
  FakePrefillServer server(options);
  const CliRun r = Cli(Prefill(server, {"--push", "a:1", "--push", "b:2"}));
  EXPECT_EQ(r.code, kExitRetry);
  EXPECT_THAT(r.err, HasSubstr("target a:1  OK"));
  EXPECT_THAT(r.err, HasSubstr("target b:2  UNAVAILABLE: dead"));
}

TEST_F(CliTest, UsageErrors) {
  const std::string bad = Write("bad.json", "[1, x]");
  const std::pair<std::vector<std::string>, const char*> cases[] = {
      {{}, "Usage"},
      {{"what"}, "unknown command \"what\""},
      {{"prefill"}, "--server is required"},
      {{"prefill", "--server", "a:1", "--ids", bad}, "bad.json:1:5: expected an integer"},
      {{"prefill", "--server", "a:1", "--ids", "/nowhere"}, "/nowhere: No such file"},
      {{"prefill", "--server=a:1", "--ids", ids_path_, "--stripes=0"}, "--stripes=0"},
      {{"prefill", "--server=a:1", "--ids", ids_path_, "--push=b", "--stripes=2"}, "excludes"},
      {{"info"}, "--server is required"},
      {{"load", "--server=a:1", "--deadline=x"}, "--deadline=x"},
  };
  for (const auto& [args, message] : cases) {
    const CliRun r = Cli(args);
    EXPECT_EQ(r.code, kExitUsage) << message;
    EXPECT_EQ(r.out, "");
    EXPECT_THAT(r.err, HasSubstr(message));
  }
}

TEST_F(CliTest, Help) {
  EXPECT_THAT(Cli({"--help"}).out, HasSubstr("prefill"));
  for (const char* command : {"prefill", "info", "load"}) {
    const CliRun r = Cli({command, "--help"});
    EXPECT_EQ(r.code, kExitOk);
    EXPECT_THAT(r.out, HasSubstr("--server ADDR"));
  }
}

TEST_F(CliTest, InfoAndLoad) {
  FakePrefillServer server({});
  const nlohmann::json info =
      nlohmann::json::parse(Cli({"info", "--server", server.address(), "--json"}).out);
  EXPECT_EQ(info["layout"]["kv_id"], "fake-kv-id");
  EXPECT_EQ(info["methods"][0]["parameters"][0]["name"], "threshold");
  EXPECT_EQ(info["presets"],
            nlohmann::json::parse(R"([{"name": "safe", "method": "vsprefill", "density": 0.25,
                                       "parameters": {"threshold": 1.5}, "measured_on": "a model",
                                       "perplexity_change_mean": 0.0625,
                                       "perplexity_change_median": 0.03125,
                                       "perplexity_change_worst": 0.5}])"));
  const CliRun text = Cli({"info", "--server", server.address()});
  EXPECT_THAT(text.out, HasSubstr("vsprefill (default): vertical-slash"));
  EXPECT_THAT(text.out, HasSubstr("safe: vsprefill (threshold=1.5), density 0.250, perplexity "
                                  "+6.2 % (median text +3.1 %, worst text +50 %)"));
  EXPECT_THAT(text.out, HasSubstr("measured on a model"));
  EXPECT_THAT(text.out, HasSubstr("threshold = 2.5, in [0, 100]: mass per cost"));
  const nlohmann::json load =
      nlohmann::json::parse(Cli({"load", "--server", server.address(), "--json"}).out);
  EXPECT_EQ(load["waiting_tokens"], 300);
  EXPECT_EQ(load["draining"], false);
  EXPECT_THAT(Cli({"load", "--server", server.address()}).out, HasSubstr("400 B of 1000 B"));
}

TEST(StatusLine, IsOneLine) {
  EXPECT_EQ(StatusLine(absl::InternalError("a\nb\r\nc")), "INTERNAL: a b  c");
}

TEST(BytesText, Units) {
  EXPECT_EQ(BytesText(0), "0 B");
  EXPECT_EQ(BytesText(1023), "1023 B");
  EXPECT_EQ(BytesText(1536), "1.5 KiB");
  EXPECT_EQ(BytesText(int64_t{5} << 30), "5.0 GiB");
}

}  // namespace
}  // namespace vsprefill::cli
