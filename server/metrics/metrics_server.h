// The HTTP side: /metrics for Prometheus, /livez and /readyz for probes. cpp-httplib instead of
// prometheus-cpp's Exposer, whose civetweb cannot start threads in a process with libtorch_cuda.
#pragma once

#include <functional>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "server/metrics/metrics.h"

namespace vsprefill::metrics {

class MetricsServer {
 public:
  /// Listens on "host:port" (port 0 picks one) with threads of its own. `ready` is called on them.
  /// INVALID_ARGUMENT: not an address; UNAVAILABLE: it cannot be bound. `metrics` must outlive it.
  static absl::StatusOr<std::unique_ptr<MetricsServer>> Start(const std::string& address,
                                                              Metrics& metrics,
                                                              std::function<bool()> ready);
  ~MetricsServer();

  /// "host:port" with the port that was bound.
  const std::string& address() const;

 private:
  struct Impl;
  explicit MetricsServer(std::unique_ptr<Impl> impl);
  std::unique_ptr<Impl> impl_;
};

}  // namespace vsprefill::metrics
