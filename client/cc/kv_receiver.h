// The service of a decode worker to which prefill servers push KV caches (vsprefill.v1.KvReceiver).
// Assembles caches by request id, answers OK only when a cache is verified, and hands it out once.
// A higher attempt of a request replaces a lower one. Thread-safe; gRPC's threads do the copying.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "client/cc/kv_assembler.h"
#include "client/cc/types.h"

namespace vsprefill::client {

/// Memory that one cache is written to. `owner` keeps it alive and comes back in ReceivedKv.
struct KvAllocation {
  KvDestination destination;
  std::shared_ptr<void> owner;
};

/// A cache that came through.
struct ReceivedKv {
  std::string request_id;
  uint32_t attempt = 0;
  KvShape shape;
  int32_t first_token = 0;
  std::shared_ptr<void> owner;  // what the allocator gave
};

struct KvReceiverOptions {
  /// Caches that are being received, or wait to be taken.
  int max_caches = 8;
  /// Payload bytes of all of them together.
  int64_t max_bytes = int64_t{8} << 30;
  /// A push without progress for so long ends with ABORTED.
  absl::Duration stall_timeout = absl::Seconds(60);
  /// Not empty: any other kv_id is FAILED_PRECONDITION.
  std::string expected_kv_id;
  /// Memory for a cache of this shape; called on gRPC's threads, must not block. Its errors go to
  /// the pusher. Required.
  std::function<absl::StatusOr<KvAllocation>(const std::string& request_id, const KvShape& shape)>
      allocate;
};

class KvReceiver {
 public:
  /// Starts to listen. UNAVAILABLE where the address cannot be bound.
  static absl::StatusOr<std::unique_ptr<KvReceiver>> Start(absl::string_view address,
                                                           KvReceiverOptions options);
  /// Shutdown, then waits for running pushes to end.
  ~KvReceiver();

  /// host:port; the port is the one bound where `address` asked for port 0.
  const std::string& address() const;

  /// Waits for the next complete cache, in order of completion. DEADLINE_EXCEEDED after `timeout`;
  /// CANCELLED after Shutdown. What it returned no longer counts against the bounds.
  absl::StatusOr<ReceivedKv> Next(absl::Duration timeout = absl::InfiniteDuration());

  /// Ends running pushes with UNAVAILABLE, refuses new ones and ends Next. Not from a signal
  /// handler.
  void Shutdown();

  /// Caches being received or waiting, and the bytes reserved for them.
  int num_caches() const;
  int64_t reserved_bytes() const;

 private:
  class Service;
  class PushReactor;
  class Inbox;
  KvReceiver();

  std::string address_;
  std::unique_ptr<Service> service_;
};

}  // namespace vsprefill::client
