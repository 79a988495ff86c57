// The PrefillService: turns calls into jobs. Prefill and Attach take and give raw bytes, so that KV
// is lent to gRPC instead of copied into protobuf messages.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "server/attention/attention_method.h"
#include "server/attention/presets.h"
#include "server/engine/engine.h"
#include "server/rpc/allow_list.h"
#include "server/rpc/push_stream.h"
#include "vsprefill/v1/prefill.grpc.pb.h"

namespace vsprefill::rpc {

/// What GetModelInfo tells beside the engine's limits.
struct ServiceInfo {
  std::string model_name, architecture, weights_id, device, compute_dtype, version;
  int num_q_heads = 0;
  std::vector<attention::MethodSpec> methods;  // presets are told where theirs is among them
};

using RawPrefillService = v1::PrefillService::WithRawCallbackMethod_Prefill<
    v1::PrefillService::WithRawCallbackMethod_Attach<
        v1::PrefillService::WithCallbackMethod_GetModelInfo<
            v1::PrefillService::WithCallbackMethod_GetLoad<v1::PrefillService::Service>>>>;

class PrefillService final : public RawPrefillService {
 public:
  /// `engine` must outlive the service.
  PrefillService(engine::Engine& engine, ServiceInfo info, AllowList push_allow);
  /// Waits for pushes that gRPC has not ended.
  ~PrefillService() override;

  grpc::ServerWriteReactor<grpc::ByteBuffer>* Prefill(grpc::CallbackServerContext* context,
                                                      const grpc::ByteBuffer* request) override;
  grpc::ServerWriteReactor<grpc::ByteBuffer>* Attach(grpc::CallbackServerContext* context,
                                                     const grpc::ByteBuffer* request) override;
  grpc::ServerUnaryReactor* GetModelInfo(grpc::CallbackServerContext* context,
                                         const v1::GetModelInfoRequest* request,
                                         v1::ModelInfo* response) override;
  grpc::ServerUnaryReactor* GetLoad(grpc::CallbackServerContext* context,
                                    const v1::GetLoadRequest* request, v1::Load* response) override;

 private:
  absl::Status StartPrefill(grpc::CallbackServerContext* context, const grpc::ByteBuffer& bytes,
                            std::shared_ptr<engine::Receiver> caller);

  engine::Engine& engine_;
  const ServiceInfo info_;
  const AllowList push_allow_;
  const std::shared_ptr<PushTracker> pushes_ = std::make_shared<PushTracker>();
};

}  // namespace vsprefill::rpc
