// Between protobuf and the engine's types. Protobuf goes no further than server/rpc.
#pragma once

#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/status.h>

#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "server/attention/presets.h"
#include "server/engine/job.h"
#include "server/engine/receiver.h"
#include "server/engine/request.h"
#include "server/kv/kv_stager.h"
#include "vsprefill/v1/prefill.pb.h"

namespace vsprefill::rpc {

/// Same code, message cut to a length that fits HTTP/2 headers.
grpc::Status ToGrpc(const absl::Status& status);
absl::Status FromGrpc(const grpc::Status& status);

/// INVALID_ARGUMENT where the bytes are no message of this type.
absl::Status Parse(const grpc::ByteBuffer& bytes, google::protobuf::Message* message);
grpc::ByteBuffer Serialize(const google::protobuf::Message& message);

/// Everything but the times. INVALID_ARGUMENT: a KV dtype that does not exist.
absl::StatusOr<engine::Request> ToRequest(const v1::PrefillRequest& request);

v1::PresetInfo ToProto(const attention::PresetEntry& preset);
v1::KvDtype ToProto(kernels::DType dtype);
v1::KvLayout ToProto(const kv::KvLayout& layout);
v1::KvLayout ToProto(const kv::ChunkPlan& plan);
v1::KvManifest ToProto(const std::vector<kv::LayerManifest>& manifest);
v1::PrefillEvent AcceptedEvent(const engine::Job& job, int stripe);
v1::PrefillEvent FirstTokenEvent(const engine::FirstToken& first_token);
v1::PrefillEvent DoneEvent(const engine::Summary& summary, bool with_stats);

/// The message PrefillEvent{kv} (the same bytes are PushRequest{kv}): a header of its own and the
/// chunk's segments lent to gRPC, no copy. The chunk lives until gRPC has let go of every slice.
grpc::ByteBuffer ChunkMessage(const std::shared_ptr<kv::StagedChunk>& chunk);

}  // namespace vsprefill::rpc
