// Between protobuf messages and the client library's structs. Everything that a peer sent is
// checked here before it is used as a size. Internal.
#pragma once

#include <grpcpp/support/status.h>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "client/cc/types.h"
#include "vsprefill/v1/kv.pb.h"
#include "vsprefill/v1/prefill.pb.h"

namespace vsprefill::client {

v1::PrefillRequest ToProto(const PrefillRequest& r);

/// DATA_LOSS: a size that is zero or beyond what any model has, an unknown dtype, or
/// start_token >= prompt_tokens.
absl::StatusOr<KvShape> ShapeFromProto(const v1::KvLayout& p);
absl::StatusOr<Accepted> FromProto(const v1::Accepted& p);
KvManifest FromProto(const v1::KvManifest& p);
PrefillStats FromProto(const v1::PrefillStats& p);
TargetStatus FromProto(const v1::TargetStatus& p);
/// DATA_LOSS as ShapeFromProto; the layout's token counts are not looked at.
absl::StatusOr<ModelInfo> FromProto(const v1::ModelInfo& p);
ServerLoad FromProto(const v1::Load& p);

/// The codes of gRPC and Abseil are the same.
absl::Status FromGrpc(const grpc::Status& s);
grpc::Status ToGrpc(const absl::Status& s);

}  // namespace vsprefill::client
