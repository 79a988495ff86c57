// vsprefill-decode with a real (tiny) transformer: what it decodes from a cache that came over gRPC
// is what the transformer decodes that computed the cache; and without a whole cache, nothing.
#include <gmock/gmock.h>
#include <grpcpp/create_channel.h>
#include <gtest/gtest.h>
#include <unistd.h>

#include <cmath>
#include <csignal>
#include <cstdlib>
#include <nlohmann/json.hpp>
#include <sstream>
#include <thread>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "client/decode/cache_memory.h"
#include "client/decode/greedy.h"
#include "client/decode/options.h"
#include "client/decode/worker.h"
#include "server/model/transformer.h"
#include "tests/support/fake_prefill_server.h"
#include "vsprefill/v1/kv.grpc.pb.h"

namespace vsprefill::decode {
namespace {

using testing::FakeKv;
using testing::FakePrefillServer;
using testing::FakeServerOptions;
using ::testing::HasSubstr;
using testing::KvFault;
using testing::StreamFault;

constexpr int kNewTokens = 12;

// As the program does it: before any thread starts, so that only RunListen hears the signal.
const int kSignalBlocked = [] {
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  return pthread_sigmask(SIG_BLOCK, &signals, nullptr);
}();

std::string ModelDir() {
  const char* dir = std::getenv("VSP_FIXTURES");
  return absl::StrCat(dir != nullptr ? dir : "models/fixtures", "/llama");
}

std::unique_ptr<model::Transformer> LoadModel() {
  model::LoadOptions options;
  options.model_dir = ModelDir();
  options.indexer_path = options.seer_gate_path = "none";
  options.dtype = kernels::DType::kF32;
  options.cpu_threads = 2;
  auto transformer = model::Transformer::Load(options);
  EXPECT_TRUE(transformer.ok()) << transformer.status();
  return transformer.ok() ? *std::move(transformer) : nullptr;
}

/// A prompt, its cache as the model computed it here, and what follows it.
class DecodeTest : public ::testing::Test {
 protected:
  void SetUp() override {
    transformer_ = LoadModel();
    ASSERT_NE(transformer_, nullptr) << "make it with: tests/golden/make_fixtures.py";
    for (int i = 0; i < 150; ++i) prompt_.push_back(3 + (i * i * 31 + i * 7) % 500);
    const int64_t capacity = static_cast<int64_t>(prompt_.size()) + kNewTokens;
    const int64_t bytes = kv::KvCache::BytesFor(transformer_->kv_layout(), capacity, false);
    cache_ = *kv::KvCache::Create(transformer_->allocator(), *pool_.Reserve(bytes),
                                  transformer_->kv_layout(), capacity, false);
    auto dense = *attention::CreateMethod(transformer_->method_context(), "dense", {});
    model::SequenceChunk chunk;
    chunk.ids = prompt_;
    chunk.prompt_tokens = static_cast<int64_t>(prompt_.size());
    chunk.cache = cache_.get();
    model::ForwardOptions options;
    options.method = dense.get();
    options.logits = model::LogitsMode::kLast;
    const auto forward = transformer_->Forward(absl::MakeConstSpan(&chunk, 1), options);
    ASSERT_TRUE(forward.ok()) << forward.status();
    first_token_ = *ArgMax(forward->logits[0]);
    shape_.layout = transformer_->kv_layout();
    shape_.prompt_tokens = chunk.prompt_tokens;
    shape_.chunk_tokens = 64;
    kv_ = Kv(shape_);  // before decoding appends to the cache
    const auto greedy = DecodeGreedily(*transformer_, *cache_, first_token_, kNewTokens);
    ASSERT_TRUE(greedy.ok()) << greedy.status();
    expected_ = greedy->tokens;
  }

  FakeKv Kv(const client::KvShape& shape, KvFault fault = KvFault::kNone) const {
    const int64_t row_bytes = shape.layout.head_dim * kernels::SizeOf(shape.layout.dtype);
    return testing::MakeKvFrom(
        shape,
        [&](int layer, bool is_v, int head, int64_t token) {
          const auto* base =
              static_cast<const uint8_t*>(is_v ? cache_->v(layer) : cache_->k(layer));
          // The faulty chunk beyond the prompt needs bytes too: capacity is larger than the prompt.
          return absl::Span<const uint8_t>(
              base + (head * cache_->capacity_tokens() + token) * row_bytes, row_bytes);
        },
        fault);
  }

  FakeServerOptions ServerOptions(KvFault fault = KvFault::kNone) const {
    FakeServerOptions o;
    o.shape = shape_;
    o.first_token = first_token_;
    o.make_kv = [this, fault](const client::KvShape& shape) { return Kv(shape, fault); };
    return o;
  }

  Options StreamOptions(const FakePrefillServer& server) const {
    Options o;
    o.prefill = server.address();
    o.ids = prompt_;
    o.max_new_tokens = kNewTokens;
    o.kv_pool_bytes = int64_t{1} << 30;
    o.json = true;
    o.request.request_id = "decode-test";
    o.request.kv_dtype = kernels::DType::kF32;
    o.request.timeout = absl::Seconds(60);
    return o;
  }

  kv::KvPool pool_{int64_t{1} << 30};
  std::unique_ptr<model::Transformer> transformer_;
  std::vector<int32_t> prompt_, expected_;
  std::shared_ptr<kv::KvCache> cache_;
  client::KvShape shape_;
  FakeKv kv_;
  int32_t first_token_ = 0;
};

TEST_F(DecodeTest, StreamGivesTheTokensOfTheLocalCache) {
  for (int stripes : {1, 3}) {
    FakePrefillServer server(ServerOptions());
    Options options = StreamOptions(server);
    options.request.stripes = stripes;
    std::ostringstream out;
    const absl::Status s = RunStream(options, *transformer_, out);
    ASSERT_TRUE(s.ok()) << s;
    const nlohmann::json json = nlohmann::json::parse(out.str());
    EXPECT_EQ(json["tokens"].get<std::vector<int32_t>>(), expected_);
    EXPECT_EQ(json["first_token"], first_token_);
    EXPECT_GT(json["client_ttft_seconds"], 0);
    EXPECT_GT(json["inter_token_seconds"], 0);
    EXPECT_EQ(server.last_request().expected_kv_id(), transformer_->kv_layout().kv_id);
  }
}

TEST_F(DecodeTest, TextOutput) {
  FakePrefillServer server(ServerOptions());
  Options options = StreamOptions(server);
  options.json = false;
  std::ostringstream out;
  ASSERT_TRUE(RunStream(options, *transformer_, out).ok());
  EXPECT_THAT(out.str(), HasSubstr(absl::StrCat("tokens [", first_token_, ", ")));
  EXPECT_THAT(out.str(), HasSubstr("between tokens"));
}

TEST_F(DecodeTest, NothingIsPrintedWithoutAWholeCache) {
  for (KvFault fault : testing::AllKvFaults()) {
    FakePrefillServer server(ServerOptions(fault));
    std::ostringstream out;
    const absl::Status s = RunStream(StreamOptions(server), *transformer_, out);
    EXPECT_EQ(s.code(), absl::StatusCode::kDataLoss) << testing::Name(fault) << ": " << s;
    EXPECT_EQ(out.str(), "");
  }
  FakeServerOptions truncated = ServerOptions();
  truncated.stream_fault = StreamFault::kTruncated;
  FakePrefillServer server(truncated);
  std::ostringstream out;
  EXPECT_EQ(RunStream(StreamOptions(server), *transformer_, out).code(),
            absl::StatusCode::kDataLoss);
  EXPECT_EQ(out.str(), "");
}

TEST_F(DecodeTest, AnotherModelsCacheIsRefused) {
  FakeServerOptions other = ServerOptions();
  other.shape.layout.kv_id = "another";
  FakePrefillServer server(other);
  std::ostringstream out;
  const absl::Status s = RunStream(StreamOptions(server), *transformer_, out);
  EXPECT_EQ(s.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(out.str(), "");
  // A server that has the right kv_id and the wrong shape must not reach past the memory.
  client::KvShape wrong = shape_;
  wrong.layout.num_layers += 1;
  EXPECT_EQ(CacheMemory::Create(*transformer_, pool_, wrong, 0).status().code(),
            absl::StatusCode::kFailedPrecondition);
  wrong = shape_;
  wrong.start_token = 1;
  EXPECT_EQ(CacheMemory::Create(*transformer_, pool_, wrong, 0).status().code(),
            absl::StatusCode::kFailedPrecondition);
}

TEST_F(DecodeTest, ARefusalNamesTheDtypes) {
  FakeServerOptions other = ServerOptions();
  other.refuse_prefill = true;
  other.error = {grpc::StatusCode::FAILED_PRECONDITION, "another kv_id"};
  other.shape.layout.dtype = kernels::DType::kBF16;
  FakePrefillServer server(other);
  std::ostringstream out;
  EXPECT_EQ(RunStream(StreamOptions(server), *transformer_, out),
            absl::FailedPreconditionError("another kv_id; the server's KV cache is bfloat16, this "
                                          "decoder's float32 (--dtype)"));
}

TEST_F(DecodeTest, ACacheThatDoesNotFitThePool) {
  FakePrefillServer server(ServerOptions());
  Options options = StreamOptions(server);
  options.kv_pool_bytes = 1000;
  std::ostringstream out;
  EXPECT_EQ(RunStream(options, *transformer_, out).code(), absl::StatusCode::kResourceExhausted);
}

TEST_F(DecodeTest, StopsAtTheEndOfTheContext) {
  const int64_t positions = transformer_->config().max_position_embeddings;
  const int64_t bytes = kv::KvCache::BytesFor(transformer_->kv_layout(), positions, false);
  auto cache = *kv::KvCache::Create(transformer_->allocator(), *pool_.Reserve(bytes),
                                    transformer_->kv_layout(), positions, false);
  cache->set_num_tokens(positions);
  const auto greedy = DecodeGreedily(*transformer_, *cache, 5, 10);
  ASSERT_TRUE(greedy.ok()) << greedy.status();
  EXPECT_EQ(greedy->tokens, std::vector<int32_t>({5}));
  EXPECT_EQ(greedy->stop, "context");
}

TEST_F(DecodeTest, StopsAtEosAndAtLength) {
  const auto eos = DecodeGreedily(*transformer_, *cache_, 2, 10);
  ASSERT_TRUE(eos.ok());
  EXPECT_EQ(eos->tokens, std::vector<int32_t>({2}));
  EXPECT_EQ(eos->stop, "eos");
  const auto length = DecodeGreedily(*transformer_, *cache_, 5, 1);
  ASSERT_TRUE(length.ok());
  EXPECT_EQ(length->tokens, std::vector<int32_t>({5}));
  EXPECT_EQ(length->stop, "length");
  EXPECT_EQ(DecodeGreedily(*transformer_, *cache_, 100000, 1).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST(ArgMax, LowestIdAmongEquals) {
  EXPECT_EQ(*ArgMax({1.0f, 3.0f, 3.0f}), 1);
  EXPECT_EQ(*ArgMax({-5.0f}), 0);
  EXPECT_FALSE(ArgMax({}).ok());
  EXPECT_FALSE(ArgMax({1.0f, std::nanf("")}).ok());
}

/// What a listening worker prints, readable while it runs.
class SharedOutput : public std::stringbuf {
 public:
  std::string text() {
    absl::MutexLock lock(&mu_);
    return text_;
  }

 protected:
  int sync() override {
    absl::MutexLock lock(&mu_);
    text_ = str();
    return 0;
  }

 private:
  absl::Mutex mu_;
  std::string text_;
};

grpc::Status Push(const std::string& address, const std::string& id, const client::KvShape& shape,
                  const FakeKv& kv, int32_t first_token) {
  auto stub =
      v1::KvReceiver::NewStub(grpc::CreateChannel(address, grpc::InsecureChannelCredentials()));
  grpc::ClientContext context;
  v1::PushResponse response;
  auto writer = stub->Push(&context, &response);
  v1::PushRequest r;
  r.mutable_begin()->set_request_id(id);
  *r.mutable_begin()->mutable_layout() = testing::ToProto(shape);
  writer->Write(r);
  for (const v1::KvChunk& c : kv.chunks) {
    *r.mutable_kv() = c;
    writer->Write(r);
  }
  r.mutable_finish()->set_first_token(first_token);
  r.mutable_finish()->set_prompt_tokens(static_cast<uint64_t>(shape.prompt_tokens));
  *r.mutable_finish()->mutable_manifest() = kv.manifest;
  writer->Write(r);
  writer->WritesDone();
  return writer->Finish();
}

TEST_F(DecodeTest, ListenPrintsOneLinePerWholeCache) {
  ASSERT_EQ(kSignalBlocked, 0);
  Options options;
  options.listen = "127.0.0.1:0";
  options.max_new_tokens = kNewTokens;
  options.kv_pool_bytes = int64_t{1} << 30;
  options.max_caches = 4;
  SharedOutput buffer;
  std::ostream out(&buffer);
  absl::Status status = absl::UnknownError("still running");
  std::thread worker([&] { status = RunListen(options, *transformer_, out); });
  const auto lines = [&] {
    std::vector<std::string> l = absl::StrSplit(buffer.text(), '\n', absl::SkipEmpty());
    return l;
  };
  const auto wait_for_lines = [&](size_t n) {
    for (int i = 0; i < 20000 && lines().size() < n; ++i) absl::SleepFor(absl::Milliseconds(1));
    return lines().size() >= n;
  };
  EXPECT_TRUE(wait_for_lines(1));
  const std::string address =
      lines().empty() ? "" : lines()[0].substr(std::string("listening on ").size());
  EXPECT_THAT(lines()[0], HasSubstr("listening on 127.0.0.1:"));

  EXPECT_EQ(
      Push(address, "bad", shape_, Kv(shape_, KvFault::kWrongChecksum), first_token_).error_code(),
      grpc::StatusCode::DATA_LOSS);
  for (const char* id : {"a", "b"}) {
    const grpc::Status s = Push(address, id, shape_, kv_, first_token_);
    EXPECT_TRUE(s.ok()) << s.error_message();
  }
  EXPECT_TRUE(wait_for_lines(3));
  kill(getpid(), SIGTERM);
  worker.join();
  EXPECT_TRUE(status.ok()) << status;
  ASSERT_EQ(lines().size(), 3u);
  for (int i : {1, 2}) {
    const nlohmann::json json = nlohmann::json::parse(lines()[i]);
    EXPECT_EQ(json["request_id"], i == 1 ? "a" : "b");
    EXPECT_EQ(json["tokens"].get<std::vector<int32_t>>(), expected_);
    EXPECT_EQ(json["prompt_tokens"], 150);
  }
}

TEST(DecodeOptions, Modes) {
  const auto error = [](const std::vector<std::string>& args) {
    return std::string(ParseOptions(args).status().message());
  };
  EXPECT_EQ(error({"--max_new_tokens=1"}), "--model is required");
  EXPECT_EQ(error({"--model=m", "--max_new_tokens=1"}), "give either --prefill or --listen");
  EXPECT_EQ(error({"--model=m", "--max_new_tokens=1", "--prefill=a", "--listen=b"}),
            "give either --prefill or --listen");
  EXPECT_EQ(error({"--model=m", "--max_new_tokens=1", "--prefill=a"}), "--prefill needs --ids");
  EXPECT_EQ(error({"--model=m", "--max_new_tokens=1", "--listen=a", "--json"}),
            "--json needs --prefill");
  EXPECT_EQ(error({"--model=m", "--max_new_tokens=0", "--listen=a"}),
            "--max_new_tokens=0 is no integer in [1, 16777216]");
  EXPECT_EQ(error({"--model=m", "--max_new_tokens=1", "--listen=a", "--dtype=int8"}),
            "--dtype=int8 is not bf16 or fp32");
  const auto listen = ParseOptions({"--model=m", "--max_new_tokens=9", "--listen=a:1"});
  ASSERT_TRUE(listen.ok());
  EXPECT_EQ(listen->listen, "a:1");
  EXPECT_EQ(listen->max_new_tokens, 9);
  EXPECT_THAT(HelpText(), HasSubstr("--listen"));
}

}  // namespace
}  // namespace vsprefill::decode
