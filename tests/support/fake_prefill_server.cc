#include "tests/support/fake_prefill_server.h"

#include <grpcpp/server_builder.h>

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace vsprefill::testing {

FakePrefillServer::FakePrefillServer(FakeServerOptions options) : options_(std::move(options)) {
  int port = 0;
  grpc::ServerBuilder builder;
  builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(this);
  server_ = builder.BuildAndStart();
  address_ = absl::StrCat("127.0.0.1:", port);
}

FakePrefillServer::~FakePrefillServer() {
  server_->Shutdown(absl::ToChronoTime(absl::Now() + absl::Seconds(1)));
  server_->Wait();
}

v1::PrefillRequest FakePrefillServer::last_request() const {
  absl::MutexLock lock(&mu_);
  return last_request_;
}

std::vector<std::string> FakePrefillServer::peers() const {
  absl::MutexLock lock(&mu_);
  return peers_;
}

grpc::Status FakePrefillServer::Refuse(grpc::ServerContext* context) const {
  if (options_.retry_pushback_ms >= 0) {
    context->AddTrailingMetadata("grpc-retry-pushback-ms",
                                 absl::StrCat(options_.retry_pushback_ms));
  }
  return options_.error;
}

client::KvShape FakePrefillServer::ShapeOf(const v1::PrefillRequest& request) const {
  client::KvShape shape = options_.shape;
  shape.prompt_tokens = request.token_ids_size();
  shape.start_token = static_cast<int64_t>(request.start_token());
  return shape;
}

FakeKv FakePrefillServer::MakeKv(const v1::PrefillRequest& request) const {
  const client::KvShape shape = ShapeOf(request);
  return options_.make_kv ? options_.make_kv(shape) : MakeFakeKv(shape, options_.kv_fault);
}

v1::PrefillEvent FakePrefillServer::AcceptedEvent(const v1::PrefillRequest& request,
                                                  int stripe) const {
  client::KvShape shape = ShapeOf(request);
  if (options_.stream_fault == StreamFault::kOtherPrompt) ++shape.prompt_tokens;
  if (options_.stream_fault == StreamFault::kOtherKvId) shape.layout.kv_id = "another";
  if (options_.stream_fault == StreamFault::kStripeHasOtherShape && stripe != 0) {
    ++shape.layout.num_layers;
  }
  v1::PrefillEvent event;
  v1::Accepted& a = *event.mutable_accepted();
  *a.mutable_layout() = ToProto(shape);
  a.set_stripe(static_cast<uint32_t>(stripe));
  a.set_stripes(std::max<uint32_t>(request.stripes(), 1));
  a.set_method(request.method().name().empty() ? "vsprefill" : request.method().name());
  *a.mutable_method_parameters() = request.method().parameters();
  return event;
}

grpc::Status FakePrefillServer::Prefill(grpc::ServerContext* context,
                                        const v1::PrefillRequest* request,
                                        grpc::ServerWriter<v1::PrefillEvent>* out) {
  {
    absl::MutexLock lock(&mu_);
    requests_[request->request_id()] = *request;
    last_request_ = *request;
    peers_.push_back(context->peer());
  }
  if (options_.refuse || options_.refuse_prefill) return Refuse(context);
  const StreamFault fault = options_.stream_fault;
  const FakeKv kv = MakeKv(*request);
  const uint32_t stripes = std::max<uint32_t>(request->stripes(), 1);
  v1::PrefillEvent event;
  if (fault != StreamFault::kNotAccepted) out->Write(AcceptedEvent(*request, 0));
  if (fault == StreamFault::kAcceptedTwice) out->Write(AcceptedEvent(*request, 0));
  const size_t half = kv.chunks.size() / 2;
  for (size_t i = 0; i < kv.chunks.size() && request->push_targets().empty(); ++i) {
    if (i == half && fault == StreamFault::kTruncated) return grpc::Status::OK;
    if (i == half && fault == StreamFault::kError) return options_.error;
    if (i == half && fault == StreamFault::kHang) {
      while (!context->IsCancelled()) absl::SleepFor(absl::Milliseconds(2));
      return grpc::Status::CANCELLED;
    }
    if (fault != StreamFault::kWrongStripe && kv.chunks[i].layer() % stripes != 0) continue;
    *event.mutable_kv() = kv.chunks[i];
    out->Write(event);
  }
  if (fault != StreamFault::kNoFirstToken) {
    event.mutable_first_token()->set_token_id(options_.first_token);
    if (request->want_logits()) {
      for (float x : {0.5f, -1.0f, 2.0f}) event.mutable_first_token()->add_logits(x);
    }
    out->Write(event);
  }
  v1::Done& done = *event.mutable_done();
  *done.mutable_manifest() = kv.manifest;
  v1::PrefillStats& stats = *done.mutable_stats();
  stats.set_queue_seconds(0.25);
  stats.set_compute_seconds(1.5);
  stats.set_ttft_seconds(1.75);
  stats.set_exposed_transfer_seconds(0.125);
  stats.set_density(0.1);
  stats.set_cost_ratio(0.2);
  stats.set_index_seconds(0.0625);
  stats.set_kv_bytes(kv.manifest.bytes());
  for (double d : {0.4, 0.3, 0.2, 0.1}) stats.add_layer_group_density(d);
  for (const v1::TargetStatus& t : options_.targets) *done.add_targets() = t;
  out->Write(event);
  if (fault == StreamFault::kEventAfterDone) {
    *event.mutable_kv() = kv.chunks[0];
    out->Write(event);
  }
  for (const v1::TargetStatus& t : options_.targets) {
    if (t.code() != 0) {
      return {static_cast<grpc::StatusCode>(t.code()), absl::StrCat(t.target(), ": ", t.message())};
    }
  }
  return grpc::Status::OK;
}

grpc::Status FakePrefillServer::Attach(grpc::ServerContext* context,
                                       const v1::AttachRequest* attach,
                                       grpc::ServerWriter<v1::PrefillEvent>* out) {
  v1::PrefillRequest request;
  {
    absl::MutexLock lock(&mu_);
    peers_.push_back(context->peer());
    const auto it = requests_.find(attach->request_id());
    if (it == requests_.end() || it->second.attempt() != attach->attempt() ||
        options_.stream_fault == StreamFault::kAttachFails) {
      return {grpc::StatusCode::NOT_FOUND, absl::StrCat("no request ", attach->request_id())};
    }
    request = it->second;
  }
  const FakeKv kv = MakeKv(request);
  out->Write(AcceptedEvent(request, static_cast<int>(attach->stripe())));
  v1::PrefillEvent event;
  for (const v1::KvChunk& c : kv.chunks) {
    if (c.layer() % request.stripes() != attach->stripe()) continue;
    *event.mutable_kv() = c;
    out->Write(event);
  }
  *event.mutable_done()->mutable_manifest() = kv.manifest;
  out->Write(event);
  return grpc::Status::OK;
}

grpc::Status FakePrefillServer::GetModelInfo(grpc::ServerContext* context,
                                             const v1::GetModelInfoRequest*, v1::ModelInfo* info) {
  if (options_.refuse) return Refuse(context);
  info->set_model_name("fake");
  info->set_architecture("FakeForCausalLM");
  info->set_weights_id("fake-weights-id");
  *info->mutable_layout() = ToProto(options_.shape);
  info->set_vocab_size(100);
  info->set_max_prompt_tokens(1000);
  info->set_device("cpu (fake)");
  info->set_compute_dtype("bfloat16");
  info->set_default_method("vsprefill");
  info->set_num_q_heads(6);
  info->set_server_version("1.2.3");
  v1::MethodInfo& m = *info->add_methods();
  m.set_name("vsprefill");
  m.set_help("vertical-slash");
  v1::MethodParameter& p = *m.add_parameters();
  p.set_name("threshold");
  p.set_default_value(2.5);
  p.set_min(0);
  p.set_max(100);
  p.set_help("mass per cost");
  v1::PresetInfo& preset = *info->add_presets();
  preset.set_name("safe");
  preset.set_method("vsprefill");
  (*preset.mutable_parameters())["threshold"] = 1.5;
  preset.set_density(0.25);
  preset.set_perplexity_change_mean(0.0625);
  preset.set_perplexity_change_median(0.03125);
  preset.set_perplexity_change_worst(0.5);
  preset.set_measured_on("a model");
  return grpc::Status::OK;
}

grpc::Status FakePrefillServer::GetLoad(grpc::ServerContext* context, const v1::GetLoadRequest*,
                                        v1::Load* load) {
  if (options_.refuse) return Refuse(context);
  load->set_requests_running(1);
  load->set_requests_waiting(2);
  load->set_waiting_tokens(300);
  load->set_kv_pool_bytes(1000);
  load->set_kv_pool_used_bytes(400);
  load->set_tokens_per_second(1234.5);
  return grpc::Status::OK;
}

}  // namespace vsprefill::testing
