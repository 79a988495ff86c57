// Reads the two message kinds that can carry a KV chunk (PrefillEvent and PushRequest; in both the
// chunk is field 2) straight from gRPC's slices, so that payload bytes are copied once, from the
// slice into the cache. Messages without a chunk are small and go to protobuf. Internal.
#pragma once

#include <grpcpp/support/byte_buffer.h>
#include <grpcpp/support/slice.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/cc/types.h"

namespace vsprefill::client {

/// A chunk within a message; `payload` points into the message's slices.
struct WireChunk {
  ChunkHeader header;
  std::vector<absl::Span<const uint8_t>> payload;
};

/// The slices of one message, kept alive while they are looked at.
class MessageSlices {
 public:
  /// INTERNAL if gRPC cannot hand out the slices.
  static absl::StatusOr<MessageSlices> Create(const grpc::ByteBuffer& message);
  absl::Span<const absl::Span<const uint8_t>> pieces() const { return pieces_; }

 private:
  std::vector<grpc::Slice> slices_;
  std::vector<absl::Span<const uint8_t>> pieces_;
};

/// The chunk in field 2 of the message in `pieces`, or nothing where the message has none.
/// DATA_LOSS: not a protobuf message, or one with a chunk and something else beside it.
absl::StatusOr<std::optional<WireChunk>> ParseChunk(
    absl::Span<const absl::Span<const uint8_t>> pieces);

}  // namespace vsprefill::client
