#include "tests/support/test_service.h"

#include <httplib.h>
#include <xxhash.h>

#include <cmath>
#include <map>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"

namespace vsprefill::testing {

TestService::TestService(const TestServiceOptions& options)
    : transformer_(MakeFakeTransformer(options.model)),
      stager_(kv::CreateHostKvStager(options.staging_bytes)) {
  metrics::Info info;
  info.model_name = "fake";
  info.kv_dtype = kernels::Name(options.model.dtype);
  info.chunk_tokens = transformer_->kv_layout().max_chunk_tokens();
  info.pool_chunks = 1;
  info.probed_methods = {"vsprefill"};
  metrics_ = std::make_unique<metrics::Metrics>(info);
  engine::EngineOptions engine_options;
  engine_options.kv_pool_bytes = options.kv_pool_bytes;
  engine_options.chunk_tokens = options.chunk_tokens;
  engine_options.max_waiting_requests = options.max_waiting_requests;
  engine_options.max_waiting_tokens = options.max_waiting_tokens;
  engine_options.send_stall_timeout = options.send_stall_timeout;
  engine_options.create_method = [this](const std::string& name,
                                        const std::map<std::string, double>& parameters) {
    return attention::CreateMethod(transformer_->method_context(), name, parameters);
  };
  engine_ = std::make_unique<engine::Engine>(*transformer_, *stager_, *metrics_, engine_options);
  metrics_->SetSampler([this] { return engine::ToGauges(engine_->load()); });
  rpc::GrpcServerOptions grpc_options;
  grpc_options.listen = "127.0.0.1:0";
  rpc::ServiceInfo service_info;
  service_info.model_name = "fake";
  service_info.weights_id = transformer_->weights_id();
  service_info.methods = attention::MethodSpecs();
  server_ = *rpc::GrpcServer::Start(grpc_options, *engine_, service_info,
                                    *rpc::AllowList::Create(options.push_allow));
  server_->SetReady(true);
  metrics_server_ = *metrics::MetricsServer::Start("127.0.0.1:0", *metrics_,
                                                   [this] { return !engine_->load().draining; });
  stub_ = v1::PrefillService::NewStub(NewChannel());
}

TestService::~TestService() {
  engine_->FailAll(absl::UnavailableError("the test ends"));
  metrics_server_.reset();
  server_.reset();
  metrics_->SetSampler(nullptr);
  engine_.reset();
}

std::shared_ptr<grpc::Channel> TestService::NewChannel() {
  grpc::ChannelArguments arguments;
  arguments.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return grpc::CreateCustomChannel(address(), grpc::InsecureChannelCredentials(), arguments);
}

std::string TestService::Scrape() { return HttpGet(metrics_address(), "/metrics").second; }

double TestService::Metric(const std::string& series) {
  for (absl::string_view line : absl::StrSplit(Scrape(), '\n')) {
    double value;
    if (absl::StartsWith(line, absl::StrCat(series, " ")) &&
        absl::SimpleAtod(line.substr(series.size() + 1), &value)) {
      return value;
    }
  }
  return std::nan("");
}

bool TestService::AwaitQuiet(absl::Duration timeout) {
  const absl::Time until = absl::Now() + timeout;
  for (;;) {
    const engine::Load load = engine_->load();
    if (load.pool_used_bytes == 0 && load.staging_used_bytes == 0 && load.running == 0 &&
        load.waiting == 0 && load.waiting_tokens == 0) {
      return true;
    }
    if (absl::Now() > until) return false;
    absl::SleepFor(absl::Milliseconds(5));
  }
}

std::pair<int, std::string> HttpGet(const std::string& address, const std::string& path) {
  httplib::Client client("http://" + address);
  const auto response = client.Get(path.c_str());
  if (!response) return {-1, ""};
  return {response->status, response->body};
}

std::vector<int32_t> TestIds(int64_t n, int seed) {
  std::vector<int32_t> ids(n);
  for (int64_t i = 0; i < n; ++i) ids[i] = static_cast<int32_t>((i * 7919 + seed * 104729) % 1000);
  return ids;
}

v1::PrefillRequest MakeRequest(const std::string& id, const std::vector<int32_t>& token_ids) {
  v1::PrefillRequest request;
  request.set_request_id(id);
  request.mutable_token_ids()->Add(token_ids.begin(), token_ids.end());
  return request;
}

StreamResult ReadAll(grpc::ClientContext& context, grpc::ClientReader<v1::PrefillEvent>& reader,
                     const std::function<void(const v1::PrefillEvent&)>& on_event) {
  StreamResult result;
  v1::PrefillEvent event;
  while (reader.Read(&event)) {
    if (on_event) on_event(event);
    result.events.push_back(event);
    if (event.has_accepted()) {
      result.has_accepted = true;
      result.accepted = event.accepted();
    } else if (event.has_kv()) {
      result.chunks.push_back(event.kv());
    } else if (event.has_first_token()) {
      result.has_first_token = true;
      result.first_token = event.first_token();
    } else if (event.has_done()) {
      result.has_done = true;
      result.done = event.done();
    }
  }
  result.status = reader.Finish();
  const auto& trailing = context.GetServerTrailingMetadata();
  if (const auto it = trailing.find("grpc-retry-pushback-ms"); it != trailing.end()) {
    result.pushback = std::string(it->second.data(), it->second.size());
  }
  return result;
}

StreamResult Prefill(v1::PrefillService::Stub& stub, const v1::PrefillRequest& request,
                     absl::Duration deadline) {
  grpc::ClientContext context;
  context.set_deadline(absl::ToChronoTime(absl::Now() + deadline));
  const auto reader = stub.Prefill(&context, request);
  return ReadAll(context, *reader);
}

std::string CheckKv(const v1::PrefillRequest& request, const std::vector<v1::KvChunk>& chunks,
                    const v1::KvLayout& layout, const v1::KvManifest& manifest) {
  const int64_t element = layout.dtype() == v1::KV_DTYPE_FLOAT32 ? 4 : 2;
  const int64_t row_bytes = layout.head_dim() * element;
  const int64_t heads = layout.num_kv_heads();
  std::vector<int64_t> next(layout.num_layers(), layout.start_token());
  std::vector<std::string> records(layout.num_layers());
  std::vector<int64_t> counts(layout.num_layers(), 0);
  for (const v1::KvChunk& chunk : chunks) {
    const int layer = chunk.layer();
    if (layer >= static_cast<int>(next.size())) return absl::StrCat("layer ", layer);
    if (static_cast<int64_t>(chunk.token_begin()) != next[layer]) {
      return absl::StrCat("layer ", layer, " goes on at ", chunk.token_begin(), ", not ",
                          next[layer]);
    }
    const int64_t tokens = chunk.token_end() - chunk.token_begin();
    const std::string& payload = chunk.payload();
    if (tokens <= 0 || tokens > layout.chunk_tokens() ||
        static_cast<int64_t>(payload.size()) != 2 * heads * tokens * row_bytes) {
      return absl::StrCat("layer ", layer, ": ", payload.size(), " bytes for ", tokens, " tokens");
    }
    if (XXH3_64bits(payload.data(), payload.size()) != chunk.checksum()) {
      return absl::StrCat("layer ", layer, ": wrong checksum");
    }
    size_t at = 0;
    for (int is_v = 0; is_v < 2; ++is_v) {
      for (int head = 0; head < heads; ++head) {
        for (int64_t token = chunk.token_begin(); token < static_cast<int64_t>(chunk.token_end());
             ++token) {
          for (int64_t b = 0; b < row_bytes; ++b, ++at) {
            if (static_cast<uint8_t>(payload[at]) !=
                FakeKvRowByte(layer, is_v == 1, head, token, request.token_ids(token), b)) {
              return absl::StrCat("layer ", layer, is_v ? " V" : " K", " head ", head, " token ",
                                  token, " byte ", b, " differs");
            }
          }
        }
      }
    }
    for (uint64_t value : {chunk.token_begin(), chunk.token_end(), chunk.checksum()}) {
      records[layer].append(reinterpret_cast<const char*>(&value), 8);
    }
    next[layer] = chunk.token_end();
    ++counts[layer];
  }
  if (manifest.layers_size() != static_cast<int>(next.size())) {
    return absl::StrCat("the manifest has ", manifest.layers_size(), " layers");
  }
  int64_t bytes = 0;
  for (size_t layer = 0; layer < next.size(); ++layer) {
    const v1::LayerManifest& entry = manifest.layers(layer);
    if (next[layer] != request.token_ids_size()) {
      return absl::StrCat("layer ", layer, " ends at ", next[layer]);
    }
    if (entry.layer() != layer || static_cast<int64_t>(entry.chunks()) != counts[layer] ||
        static_cast<int64_t>(entry.tokens()) !=
            next[layer] - static_cast<int64_t>(layout.start_token()) ||
        entry.checksum() != XXH3_64bits(records[layer].data(), records[layer].size())) {
      return absl::StrCat("manifest of layer ", layer, ": ", entry.ShortDebugString());
    }
    bytes += entry.bytes();
  }
  if (static_cast<int64_t>(manifest.bytes()) != bytes) return "the manifest's bytes";
  return "";
}

}  // namespace vsprefill::testing
