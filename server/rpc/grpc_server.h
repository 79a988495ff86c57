// The gRPC server: PrefillService, grpc.health.v1 and reflection on one port.
#pragma once

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "server/engine/engine.h"
#include "server/rpc/prefill_service.h"

namespace vsprefill::rpc {

struct GrpcServerOptions {
  std::string listen;                // "host:port", port 0 picks one
  int max_concurrent_streams = 256;  // per connection
  int max_request_bytes = 16 << 20;
  absl::Duration keepalive_time = absl::Seconds(20);
  absl::Duration keepalive_timeout = absl::Seconds(10);
};

class GrpcServer {
 public:
  /// UNAVAILABLE where the address cannot be bound. `engine` must outlive the server.
  static absl::StatusOr<std::unique_ptr<GrpcServer>> Start(const GrpcServerOptions& options,
                                                           engine::Engine& engine, ServiceInfo info,
                                                           AllowList push_allow);
  ~GrpcServer();

  /// "host:port" with the port that was bound.
  const std::string& address() const;
  /// grpc.health.v1: services "" and "liveness" serve as long as the process does; "readiness" and
  /// "vsprefill.v1.PrefillService" follow this.
  void SetReady(bool ready);
  /// Takes no new calls, cancels what is left after `grace`.
  void Shutdown(absl::Duration grace);

 private:
  struct Impl;
  explicit GrpcServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace vsprefill::rpc
