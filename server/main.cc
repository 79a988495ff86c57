// vsprefill-server: wires configuration, model, engine, gRPC and metrics together, and ends them in
// order when a signal asks for it.
#include <pthread.h>
#include <signal.h>
#include <time.h>

#include <cstdio>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/isa.h"
#include "server/attention/attention_method.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/config/server_config.h"
#include "server/engine/engine.h"
#include "server/kv/kv_stager.h"
#include "server/kv/kv_stager_device.h"
#include "server/metrics/metrics.h"
#include "server/metrics/metrics_server.h"
#include "server/model/device.h"
#include "server/model/transformer.h"
#include "server/rpc/grpc_server.h"

namespace vsprefill {
namespace {

constexpr int kExitUsage = 2;

absl::Status ChooseCpuIsa(const std::string& name) {
  if (name == "auto") {
    if (kernels::CpuIsaSupported(kernels::DetectCpuIsa())) return absl::OkStatus();
    return absl::UnavailableError("this processor has no AVX2 and FMA, which the CPU kernels need");
  }
  for (kernels::CpuIsa isa :
       {kernels::CpuIsa::kAvx2, kernels::CpuIsa::kAvx512, kernels::CpuIsa::kAvx512Bf16}) {
    if (name != kernels::CpuIsaName(isa)) continue;
    if (kernels::SetCpuIsa(isa)) return absl::OkStatus();
    return absl::InvalidArgumentError(absl::StrCat("--cpu_isa: this processor has no ", name,
                                                   "; the best it has is ",
                                                   kernels::CpuIsaName(kernels::DetectCpuIsa())));
  }
  return absl::InvalidArgumentError(absl::StrCat("--cpu_isa: unknown instruction set ", name));
}

/// What a method needs and was not loaded, and the flag that names it; null: nothing is missing.
struct MissingPart {
  const char* what = nullptr;
  const char* flag = nullptr;
};
MissingPart Missing(const attention::MethodSpec& spec, const model::Transformer& transformer) {
  if (spec.needs_indexer && !transformer.has_indexer()) return {"an indexer", "--indexer"};
  if (spec.needs_seer_gate && !transformer.has_seer_gate()) {
    return {"a SeerAttention gate", "--seer_gate"};
  }
  return {};
}

/// vsprefill where the model has an indexer, else dense; a method that was asked for must be there.
absl::StatusOr<std::string> DefaultMethod(const config::ServerConfig& config,
                                          const model::Transformer& transformer) {
  if (config.method.empty()) {
    return std::string(transformer.has_indexer() ? "vsprefill" : "dense");
  }
  for (const attention::MethodSpec& spec : attention::MethodSpecs()) {
    if (spec.name != config.method) continue;
    if (const MissingPart part = Missing(spec, transformer); part.what != nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("--method ", config.method, " needs ",
                                                     part.what, "; none is loaded (see ", part.flag,
                                                     ")"));
    }
    if (!attention::RunsOn(spec, *transformer.method_context().kernels)) {
      return absl::InvalidArgumentError(
          absl::StrCat("--method ", config.method, " does not run on this device"));
    }
  }
  return config.method;
}

/// Only methods that can run with what was loaded.
std::vector<attention::MethodSpec> UsableMethods(const model::Transformer& transformer) {
  std::vector<attention::MethodSpec> usable;
  for (const attention::MethodSpec& spec : attention::MethodSpecs()) {
    if (Missing(spec, transformer).what == nullptr &&
        attention::RunsOn(spec, *transformer.method_context().kernels)) {
      usable.push_back(spec);
    }
  }
  return usable;
}

engine::EngineOptions MakeEngineOptions(const config::ServerConfig& config,
                                        const model::Transformer& transformer,
                                        const std::string& default_method) {
  engine::EngineOptions options;
  options.kv_pool_bytes = config.kv_pool_bytes;
  options.chunk_tokens = config.chunk_tokens;
  options.max_prompt_tokens = config.max_prompt_tokens;
  options.max_waiting_requests = config.max_waiting_requests;
  options.max_waiting_tokens = config.max_waiting_tokens;
  options.send_stall_timeout = config.send_stall_timeout;
  options.default_method = default_method;
  options.recall_probe_every = config.recall_probe_every;
  options.create_method = [&transformer, default_method, defaults = config.method_parameters](
                              const std::string& name,
                              const std::map<std::string, double>& overrides)
      -> absl::StatusOr<std::unique_ptr<attention::AttentionMethod>> {
    for (const attention::MethodSpec& spec : attention::MethodSpecs()) {
      if (spec.name != name) continue;
      if (const MissingPart part = Missing(spec, transformer); part.what != nullptr) {
        return absl::InvalidArgumentError(absl::StrCat("method \"", name, "\" needs ", part.what,
                                                       ", which this server was started without (",
                                                       part.flag, ")"));
      }
    }
    std::map<std::string, double> parameters = overrides;
    if (name == default_method) parameters.insert(defaults.begin(), defaults.end());
    return attention::CreateMethod(transformer.method_context(), name, parameters);
  };
  return options;
}

/// Waits for SIGTERM or SIGINT, or until the device is lost; true for a signal.
bool AwaitStop(const sigset_t& signals, const engine::Engine& engine) {
  for (;;) {
    const timespec tick = {0, 200 * 1000 * 1000};
    if (sigtimedwait(&signals, nullptr, &tick) > 0) return true;
    if (engine.device_lost()) return false;
  }
}

absl::Status Serve(const config::ServerConfig& config, const sigset_t& signals, bool* lost) {
  VSP_RETURN_IF_ERROR(ChooseCpuIsa(config.cpu_isa));
  VSP_ASSIGN_OR_RETURN(const model::ChosenDevice device, model::ChooseDevice(config.device));
  std::printf("device: %s\n", device.reason.c_str());
  std::fflush(stdout);
  VSP_ASSIGN_OR_RETURN(rpc::AllowList push_allow, rpc::AllowList::Create(config.push_allow));

  model::LoadOptions load;
  load.model_dir = config.model_dir;
  load.indexer_path = config.indexer;
  load.seer_gate_path = config.seer_gate;
  load.device = device.kind;
  load.dtype = config.dtype;
  load.cpu_threads = config.cpu_threads;
  VSP_ASSIGN_OR_RETURN(const std::unique_ptr<model::Transformer> transformer,
                       model::Transformer::Load(load));
  VSP_ASSIGN_OR_RETURN(const std::string method, DefaultMethod(config, *transformer));
  const engine::EngineOptions options = MakeEngineOptions(config, *transformer, method);
  // Wrong defaults end the start, not the first request.
  VSP_RETURN_IF_ERROR(options.create_method(method, {}).status());
  VSP_ASSIGN_OR_RETURN(const std::unique_ptr<kv::KvStager> stager,
                       kv::CreateKvStager(transformer->device(), config.staging_bytes));

  const kv::KvLayout& layout = transformer->kv_layout();
  metrics::Info metrics_info;
  metrics_info.model_name = config.model_name;
  metrics_info.kv_dtype = kernels::Name(layout.dtype);
  metrics_info.chunk_tokens = layout.max_chunk_tokens();
  metrics_info.pool_chunks =
      config.kv_pool_bytes / (layout.max_chunk_tokens() * layout.token_bytes());
  if (config.recall_probe_every > 0) {
    for (const attention::MethodSpec& spec : UsableMethods(*transformer)) {
      if (spec.name != "dense") metrics_info.probed_methods.push_back(spec.name);
    }
  }
  metrics::Metrics metrics(metrics_info);
  engine::Engine engine(*transformer, *stager, metrics, options);
  metrics.SetSampler([&engine] { return engine::ToGauges(engine.load()); });

  rpc::ServiceInfo info;
  info.model_name = config.model_name;
  info.architecture = transformer->config().architecture;
  info.weights_id = transformer->weights_id();
  info.device = transformer->device_description();
  info.compute_dtype = kernels::Name(config.dtype);
  info.version = VSP_VERSION;
  info.num_q_heads = transformer->config().num_q_heads;
  info.methods = UsableMethods(*transformer);
  rpc::GrpcServerOptions grpc_options;
  grpc_options.listen = config.listen;
  VSP_ASSIGN_OR_RETURN(
      const std::unique_ptr<rpc::GrpcServer> server,
      rpc::GrpcServer::Start(grpc_options, engine, std::move(info), std::move(push_allow)));
  const auto ready = [&engine] { return !engine.load().draining && !engine.device_lost(); };
  VSP_ASSIGN_OR_RETURN(std::unique_ptr<metrics::MetricsServer> metrics_server,
                       metrics::MetricsServer::Start(config.metrics_listen, metrics, ready));
  server->SetReady(true);
  Log(LogLevel::kInfo, "ready",
      {{"model", config.model_name},
       {"device", transformer->device_description()},
       {"dtype", kernels::Name(config.dtype)},
       {"default_method", method},
       {"indexer", transformer->has_indexer() ? "yes" : "no"},
       {"seer_gate", transformer->has_seer_gate() ? "yes" : "no"},
       {"kv_id", layout.kv_id}});
  std::printf("listening on %s\nmetrics on %s\n", server->address().c_str(),
              metrics_server->address().c_str());
  std::fflush(stdout);

  *lost = !AwaitStop(signals, engine);
  engine.StartDrain();
  server->SetReady(false);
  Log(*lost ? LogLevel::kError : LogLevel::kInfo, *lost ? "device_lost" : "draining",
      {{"drain_timeout", absl::FormatDuration(config.drain_timeout)}});
  if (*lost || !engine.AwaitIdle(config.drain_timeout)) {
    engine.FailAll(absl::UnavailableError("the server shuts down; try another one"));
    engine.AwaitIdle(absl::Seconds(2));
  }
  server->Shutdown(absl::Milliseconds(500));
  metrics.SetSampler(nullptr);
  return absl::OkStatus();
}

int Main(int argc, char** argv) {
  const auto config = config::ParseServerConfig(std::vector<std::string>(argv + 1, argv + argc));
  if (!config.ok()) {
    std::fprintf(stderr, "vsprefill-server: %s\n", std::string(config.status().message()).c_str());
    return kExitUsage;
  }
  if (config->help) {
    std::fputs(config::ServerUsage().c_str(), stdout);
    return 0;
  }
  // Blocked in every thread, taken by sigtimedwait. A closed pipe or peer is an error code.
  sigset_t signals;
  sigemptyset(&signals);
  sigaddset(&signals, SIGTERM);
  sigaddset(&signals, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals, nullptr);
  signal(SIGPIPE, SIG_IGN);

  bool device_lost = false;
  const absl::Status status = Serve(*config, signals, &device_lost);
  if (!status.ok()) {
    std::fprintf(stderr, "vsprefill-server: %s\n", std::string(status.message()).c_str());
    return kExitUsage;
  }
  return device_lost ? 1 : 0;
}

}  // namespace
}  // namespace vsprefill

int main(int argc, char** argv) { return vsprefill::Main(argc, argv); }
