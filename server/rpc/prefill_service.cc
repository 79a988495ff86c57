#include "server/rpc/prefill_service.h"

#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/base/log.h"
#include "server/base/status_macros.h"
#include "server/rpc/convert.h"
#include "server/rpc/event_stream.h"

namespace vsprefill::rpc {

PrefillService::PrefillService(engine::Engine& engine, ServiceInfo info, AllowList push_allow)
    : engine_(engine), info_(std::move(info)), push_allow_(std::move(push_allow)) {}

PrefillService::~PrefillService() { pushes_->AwaitNone(absl::Seconds(10)); }

grpc::ServerWriteReactor<grpc::ByteBuffer>* PrefillService::Prefill(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) {
  auto stream =
      EventStream::Create(context, engine_.sender(), engine_.options().send_stall_timeout);
  EventStream* reactor = stream.get();
  if (absl::Status status = StartPrefill(context, *request, stream); !status.ok()) {
    stream->Reject(status);
  }
  return reactor;
}

absl::Status PrefillService::StartPrefill(grpc::CallbackServerContext* context,
                                          const grpc::ByteBuffer& bytes,
                                          std::shared_ptr<engine::Receiver> caller) {
  const absl::Time received = absl::Now();
  // What is refused before the engine sees it counts as a rejection too.
  const auto rejected = [this](absl::Status status) {
    const auto reason = status.GetPayload(engine::kReasonPayload);
    engine_.metrics().Rejected(reason.has_value() ? std::string(*reason) : "other");
    return status;
  };
  v1::PrefillRequest proto;
  if (absl::Status status = Parse(bytes, &proto); !status.ok()) return rejected(status);
  auto parsed = ToRequest(proto);
  if (!parsed.ok()) return rejected(parsed.status());
  engine::Request request = *std::move(parsed);
  request.received = received;
  if (context->deadline() != std::chrono::system_clock::time_point::max()) {
    request.deadline = absl::FromChrono(context->deadline());
  }
  std::vector<std::shared_ptr<engine::Receiver>> targets;
  for (const std::string& target : request.push_targets) {
    if (absl::Status status = push_allow_.Check(target); !status.ok()) return rejected(status);
    targets.push_back(std::make_shared<PushStream>(target, pushes_, engine_.sender()));
  }
  VSP_ASSIGN_OR_RETURN(const std::shared_ptr<engine::Job> job,
                       engine_.Submit(std::move(request), std::move(caller), std::move(targets)));
  Log(LogLevel::kInfo, "request_accepted",
      {{"request_id", job->request().request_id},
       {"attempt", absl::StrCat(job->request().attempt)},
       {"prompt_tokens", absl::StrCat(job->request().token_ids.size())},
       {"method", std::string(job->method().name())},
       {"stripes", absl::StrCat(job->request().stripes)},
       {"push_targets", absl::StrCat(job->request().push_targets.size())}});
  return absl::OkStatus();
}

grpc::ServerWriteReactor<grpc::ByteBuffer>* PrefillService::Attach(
    grpc::CallbackServerContext* context, const grpc::ByteBuffer* request) {
  auto stream =
      EventStream::Create(context, engine_.sender(), engine_.options().send_stall_timeout);
  EventStream* reactor = stream.get();
  v1::AttachRequest proto;
  absl::Status status = Parse(*request, &proto);
  if (!status.ok()) {
    engine_.metrics().Rejected("attach");
  } else {
    const int stripe = std::min<uint32_t>(proto.stripe(), INT32_MAX);
    status = engine_.Attach(proto.request_id(), proto.attempt(), stripe, stream).status();
  }
  if (!status.ok()) stream->Reject(status);
  return reactor;
}

grpc::ServerUnaryReactor* PrefillService::GetModelInfo(grpc::CallbackServerContext* context,
                                                       const v1::GetModelInfoRequest* request,
                                                       v1::ModelInfo* response) {
  response->set_model_name(info_.model_name);
  response->set_architecture(info_.architecture);
  response->set_weights_id(info_.weights_id);
  *response->mutable_layout() = ToProto(engine_.kv_layout());
  response->set_vocab_size(engine_.limits().vocab_size);
  response->set_max_prompt_tokens(engine_.limits().max_prompt_tokens);
  response->set_device(info_.device);
  response->set_compute_dtype(info_.compute_dtype);
  response->set_default_method(engine_.options().default_method);
  for (const attention::MethodSpec& method : info_.methods) {
    v1::MethodInfo* out = response->add_methods();
    out->set_name(method.name);
    out->set_help(method.help);
    for (const attention::ParameterSpec& parameter : method.parameters) {
      v1::MethodParameter* p = out->add_parameters();
      p->set_name(parameter.name);
      p->set_default_value(parameter.default_value);
      p->set_min(parameter.min);
      p->set_max(parameter.max);
      p->set_help(parameter.help);
    }
    if (method.name != attention::kPresetMethod) continue;
    for (const attention::PresetEntry& preset : attention::kPresets) {
      *response->add_presets() = ToProto(preset);
    }
  }
  response->set_server_version(info_.version);
  response->set_num_q_heads(info_.num_q_heads);
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

grpc::ServerUnaryReactor* PrefillService::GetLoad(grpc::CallbackServerContext* context,
                                                  const v1::GetLoadRequest* request,
                                                  v1::Load* response) {
  const engine::Load load = engine_.load();
  response->set_requests_running(load.running);
  response->set_requests_waiting(load.waiting);
  response->set_waiting_tokens(load.waiting_tokens);
  response->set_max_waiting_requests(engine_.options().max_waiting_requests);
  response->set_max_waiting_tokens(engine_.options().max_waiting_tokens);
  response->set_kv_pool_bytes(load.pool_bytes);
  response->set_kv_pool_used_bytes(load.pool_used_bytes);
  response->set_staging_bytes(load.staging_bytes);
  response->set_staging_used_bytes(load.staging_used_bytes);
  response->set_draining(load.draining);
  response->set_tokens_per_second(load.tokens_per_second);
  grpc::ServerUnaryReactor* reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

}  // namespace vsprefill::rpc
