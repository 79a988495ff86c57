#include "server/rpc/convert.h"

#include <grpcpp/impl/codegen/proto_utils.h>
#include <grpcpp/support/slice.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "server/kv/kv_wire.h"

namespace vsprefill::rpc {
namespace {

constexpr size_t kMaxMessageBytes = 2048;
// Slices of this size or less: the release of each is progress that the stall time-out sees.
constexpr int64_t kMaxSliceBytes = 256 << 10;

void ReleaseSlice(void* owner) {
  auto* chunk = static_cast<std::shared_ptr<kv::StagedChunk>*>(owner);
  if ((*chunk)->on_progress) (*chunk)->on_progress();
  delete chunk;
}

}  // namespace

grpc::Status ToGrpc(const absl::Status& status) {
  return grpc::Status(static_cast<grpc::StatusCode>(status.code()),
                      std::string(status.message().substr(0, kMaxMessageBytes)));
}

absl::Status FromGrpc(const grpc::Status& status) {
  return absl::Status(static_cast<absl::StatusCode>(status.error_code()), status.error_message());
}

absl::Status Parse(const grpc::ByteBuffer& bytes, google::protobuf::Message* message) {
  grpc::ByteBuffer copy = bytes;  // shares the slices
  const grpc::Status status =
      grpc::GenericDeserialize<grpc::ProtoBufferReader, google::protobuf::Message>(&copy, message);
  if (status.ok()) return absl::OkStatus();
  return engine::Rejection(absl::StatusCode::kInvalidArgument, "invalid",
                           absl::StrCat("the ", bytes.Length(), " bytes received are not a valid ",
                                        message->GetTypeName()));
}

grpc::ByteBuffer Serialize(const google::protobuf::Message& message) {
  grpc::Slice slice(message.SerializeAsString());
  return grpc::ByteBuffer(&slice, 1);
}

absl::StatusOr<engine::Request> ToRequest(const v1::PrefillRequest& proto) {
  engine::Request request;
  request.request_id = proto.request_id();
  request.attempt = proto.attempt();
  request.token_ids.assign(proto.token_ids().begin(), proto.token_ids().end());
  request.expected_kv_id = proto.expected_kv_id();
  switch (proto.kv_dtype()) {
    case v1::KV_DTYPE_UNSPECIFIED:
      break;
    case v1::KV_DTYPE_FLOAT32:
      request.kv_dtype = kernels::DType::kF32;
      break;
    case v1::KV_DTYPE_BFLOAT16:
      request.kv_dtype = kernels::DType::kBF16;
      break;
    default:
      return engine::Rejection(
          absl::StatusCode::kFailedPrecondition, "dtype",
          absl::StrCat("KV dtype ", static_cast<int>(proto.kv_dtype()),
                       " cannot be served; KvDtype has 1 (float32) and 2 (bfloat16)"));
  }
  request.method = proto.method().name();
  request.preset = proto.method().preset();
  request.method_parameters.insert(proto.method().parameters().begin(),
                                   proto.method().parameters().end());
  // Beyond int range is beyond any model's layers and any prompt: validation names the value.
  request.stripes = proto.stripes() == 0 ? 1 : std::min<uint32_t>(proto.stripes(), INT32_MAX);
  request.start_token = std::min<uint64_t>(proto.start_token(), INT64_MAX);
  request.want_logits = proto.want_logits();
  request.push_targets.assign(proto.push_targets().begin(), proto.push_targets().end());
  return request;
}

v1::PresetInfo ToProto(const attention::PresetEntry& preset) {
  v1::PresetInfo proto;
  proto.set_name(preset.name);
  proto.set_method(attention::kPresetMethod);
  for (const auto& [name, value] : attention::PresetParameters(preset)) {
    (*proto.mutable_parameters())[name] = value;
  }
  proto.set_density(preset.density);
  proto.set_perplexity_change_mean(preset.loss_mean / 100);
  proto.set_perplexity_change_median(preset.loss_median / 100);
  proto.set_perplexity_change_worst(preset.loss_worst / 100);
  proto.set_measured_on(attention::kPresetsMeasuredOn);
  return proto;
}

v1::KvDtype ToProto(kernels::DType dtype) {
  return dtype == kernels::DType::kF32 ? v1::KV_DTYPE_FLOAT32 : v1::KV_DTYPE_BFLOAT16;
}

v1::KvLayout ToProto(const kv::KvLayout& layout) {
  v1::KvLayout proto;
  proto.set_num_layers(layout.num_layers);
  proto.set_num_kv_heads(layout.num_kv_heads);
  proto.set_head_dim(layout.head_dim);
  proto.set_dtype(ToProto(layout.dtype));
  proto.set_kv_id(layout.kv_id);
  proto.set_chunk_tokens(layout.max_chunk_tokens());
  return proto;
}

v1::KvLayout ToProto(const kv::ChunkPlan& plan) {
  v1::KvLayout proto = ToProto(plan.layout());
  proto.set_prompt_tokens(plan.prompt_tokens());
  proto.set_start_token(plan.start_token());
  return proto;
}

v1::KvManifest ToProto(const std::vector<kv::LayerManifest>& manifest) {
  v1::KvManifest proto;
  int64_t bytes = 0;
  for (const kv::LayerManifest& layer : manifest) {
    v1::LayerManifest* out = proto.add_layers();
    out->set_layer(layer.layer);
    out->set_tokens(layer.tokens);
    out->set_chunks(layer.chunks);
    out->set_bytes(layer.bytes);
    out->set_checksum(layer.checksum);
    bytes += layer.bytes;
  }
  proto.set_bytes(bytes);
  return proto;
}

v1::PrefillEvent AcceptedEvent(const engine::Job& job, int stripe) {
  const engine::Request& request = job.request();
  v1::PrefillEvent event;
  v1::Accepted* accepted = event.mutable_accepted();
  *accepted->mutable_layout() = ToProto(job.source().plan());
  accepted->set_stripe(stripe);
  accepted->set_stripes(request.stripes);
  accepted->set_stripe_bytes(
      job.is_push() ? 0 : job.source().plan().StripeBytes(stripe, request.stripes));
  accepted->set_method(std::string(job.method().name()));
  for (const auto& [name, value] : job.method().parameters()) {
    (*accepted->mutable_method_parameters())[name] = value;
  }
  return event;
}

v1::PrefillEvent FirstTokenEvent(const engine::FirstToken& first_token) {
  v1::PrefillEvent event;
  event.mutable_first_token()->set_token_id(first_token.token_id);
  event.mutable_first_token()->mutable_logits()->Add(first_token.logits.begin(),
                                                     first_token.logits.end());
  return event;
}

v1::PrefillEvent DoneEvent(const engine::Summary& summary, bool with_stats) {
  v1::PrefillEvent event;
  v1::Done* done = event.mutable_done();
  *done->mutable_manifest() = ToProto(summary.manifest);
  if (!with_stats) return event;
  v1::PrefillStats* stats = done->mutable_stats();
  stats->set_queue_seconds(absl::ToDoubleSeconds(summary.queue));
  stats->set_compute_seconds(absl::ToDoubleSeconds(summary.compute));
  stats->set_ttft_seconds(absl::ToDoubleSeconds(summary.ttft));
  stats->set_exposed_transfer_seconds(absl::ToDoubleSeconds(summary.exposed_transfer));
  stats->set_density(summary.density);
  stats->set_cost_ratio(summary.cost_ratio);
  for (double density : summary.layer_group_density) stats->add_layer_group_density(density);
  stats->set_kv_bytes(summary.kv_bytes);
  stats->set_dense_fallback_layers(summary.dense_fallback_layers);
  stats->set_index_seconds(absl::ToDoubleSeconds(summary.index_build));
  for (const engine::TargetResult& target : summary.targets) {
    v1::TargetStatus* status = done->add_targets();
    status->set_target(target.target);
    status->set_code(static_cast<int>(target.status.code()));
    status->set_message(std::string(target.status.message().substr(0, kMaxMessageBytes)));
    status->set_bytes(target.bytes);
  }
  return event;
}

grpc::ByteBuffer ChunkMessage(const std::shared_ptr<kv::StagedChunk>& chunk) {
  std::vector<grpc::Slice> slices;
  slices.emplace_back(kv::EncodeChunkHeader(chunk->range, chunk->checksum, chunk->bytes));
  for (const kv::Segment& segment : chunk->segments) {
    for (int64_t offset = 0; offset < segment.bytes; offset += kMaxSliceBytes) {
      slices.emplace_back(const_cast<char*>(static_cast<const char*>(segment.data)) + offset,
                          std::min(kMaxSliceBytes, segment.bytes - offset), &ReleaseSlice,
                          new std::shared_ptr<kv::StagedChunk>(chunk));
    }
  }
  return grpc::ByteBuffer(slices.data(), slices.size());
}

}  // namespace vsprefill::rpc
