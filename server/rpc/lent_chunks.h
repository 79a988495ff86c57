// What one stream has lent to gRPC, and the last resort to get it back.
//
// Cancelling a call frees what gRPC queues for it, but not what has already gone to the connection:
// where the peer's machine takes no bytes (a stopped process, a cut cable) a write that is under
// way holds its slices, and with them the request's KV, for as long as the connection lives. Memory
// must not depend on a peer, so such a connection is shut down; other streams on it were as stuck.
#pragma once

#include <memory>
#include <string>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/string_view.h"
#include "absl/synchronization/mutex.h"
#include "server/kv/kv_sender.h"
#include "server/kv/kv_stager.h"

namespace vsprefill::rpc {

/// Thread-safe.
class LentChunks : public std::enable_shared_from_this<LentChunks> {
 public:
  void Add(const std::shared_ptr<kv::StagedChunk>& chunk);
  bool AnyHeld() const;
  /// To be called when the stream has been cancelled: where gRPC still holds a chunk a moment
  /// later, shuts down the connections to `peer` (see ShutDownConnections).
  void Reclaim(kv::KvSender& sender, std::string peer);

 private:
  mutable absl::Mutex mu_;
  std::vector<std::weak_ptr<kv::StagedChunk>> chunks_ ABSL_GUARDED_BY(mu_);
};

/// Shuts down this process's TCP connections to `peer`: gRPC's name of a peer ("ipv4:ADDRESS:PORT",
/// "ipv6:[ADDRESS]:PORT") or "HOST:PORT"; a host name may block for its resolution. gRPC then sees
/// a broken connection. Returns how many there were.
int ShutDownConnections(absl::string_view peer);

}  // namespace vsprefill::rpc
