// Calls a prefill server and brings the KV cache home. Blocking; thread-safe; one client may run
// several calls at a time. docs/clients.md shows a decode node in 30 lines.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "client/cc/cancellation.h"
#include "client/cc/kv_assembler.h"
#include "client/cc/types.h"

namespace vsprefill::client {

/// What a caller takes part in while a call runs. All may be empty but `destination`, which only a
/// call with push targets may leave out.
struct PrefillHandlers {
  /// Asked once, when the server has accepted the request: memory for the cache, which must stay
  /// until Prefill returned. An error ends the call with it.
  std::function<absl::StatusOr<KvDestination>(const Accepted&)> destination;
  /// The first token, as soon as it is here: the cache may not be complete, and may still fail.
  std::function<void(const FirstToken&)> on_first_token;
  /// After each chunk, from the threads of the call, one at a time.
  std::function<void(int complete_layers, int64_t bytes)> on_progress;
  /// With push targets: how each of them fared, also where the call then fails.
  std::function<void(const std::vector<TargetStatus>&)> on_targets;
};

class PrefillClient {
 public:
  /// `address`: what gRPC takes, e.g. "127.0.0.1:8470", "dns:///prefill:8470", "unix:/run/x.sock".
  /// Connects when the first call is made. Insecure channels.
  explicit PrefillClient(absl::string_view address);
  ~PrefillClient();

  /// Runs one prefill. OK: the destination holds the verified cache (or every push target verified
  /// its own). Any error: the destination's content is undefined. Errors are the server's, and
  ///   DATA_LOSS            chunk, manifest or order of events is not as promised;
  ///   FAILED_PRECONDITION  the server's kv_id is not expected_kv_id;
  ///   INVALID_ARGUMENT     a request that cannot be sent (no destination, stripes < 1);
  ///   DEADLINE_EXCEEDED, CANCELLED, UNAVAILABLE as in gRPC.
  /// Where the server names a time to wait before a retry, the message ends with it.
  absl::StatusOr<PrefillResult> Prefill(const PrefillRequest& request,
                                        const PrefillHandlers& handlers,
                                        Cancellation* cancellation = nullptr);

  absl::StatusOr<ModelInfo> GetModelInfo(absl::Duration timeout = absl::Seconds(10));
  absl::StatusOr<ServerLoad> GetLoad(absl::Duration timeout = absl::Seconds(10));

 private:
  class Connections;
  std::unique_ptr<Connections> connections_;
};

/// 128 random bits in hexadecimal.
std::string RandomRequestId();

}  // namespace vsprefill::client
