// Makes a chunk of a cache readable by the host, with its checksum. On the CPU the cache's own
// memory is lent out; on CUDA a chunk is copied into a bounded ring of pinned memory.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <optional>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "kernels/tensor_view.h"
#include "server/kv/chunk_plan.h"
#include "server/kv/kv_cache.h"
#include "server/kv/kv_source.h"

namespace vsprefill::kv {

struct Segment {
  const void* data = nullptr;
  int64_t bytes = 0;
};

/// A chunk in host memory. Its memory stays valid until the last reference goes; where the bytes
/// were handed to gRPC that is when gRPC has let go of every slice.
class StagedChunk {
 public:
  StagedChunk() = default;
  StagedChunk(const StagedChunk&) = delete;
  StagedChunk& operator=(const StagedChunk&) = delete;
  ~StagedChunk();

  ChunkRange range;
  uint64_t checksum = 0;  // XXH3-64 of the segments one after the other
  int64_t bytes = 0;
  std::vector<Segment> segments;  // K of each head, then V of each head
  std::shared_ptr<void> memory;   // what the segments point into

  /// Called by whoever moves the bytes, from any thread, whenever a part of them has gone out.
  std::function<void()> on_progress;
  /// Called once when the last reference goes, after `memory` was released.
  std::function<void()> on_released;
};

/// Thread-safe.
class KvStager {
 public:
  virtual ~KvStager() = default;

  /// Engine thread, right after a layer was computed or enqueued on `stream`.
  virtual absl::StatusOr<LayerMark> MarkLayer(kernels::Stream stream) = 0;
  /// Device time between two marks that were reached; nullopt where marks do not tell.
  virtual std::optional<absl::Duration> Elapsed(const LayerMark& begin, const LayerMark& end) {
    return std::nullopt;
  }
  /// Sender thread. A null pointer where the staging memory is full: try again after a release.
  /// `checksum` is taken over instead of computed where it is known. INTERNAL on a device error.
  virtual absl::StatusOr<std::shared_ptr<StagedChunk>> Stage(std::shared_ptr<KvCache> cache,
                                                             const LayerMark& mark,
                                                             const ChunkRange& range,
                                                             std::optional<uint64_t> checksum) = 0;
  virtual int64_t capacity_bytes() const = 0;
  /// Bytes that are staged and not yet released.
  virtual int64_t used_bytes() const = 0;
};

/// Lends out host memory, at most `capacity_bytes` at a time (one chunk is always let through).
std::unique_ptr<KvStager> CreateHostKvStager(int64_t capacity_bytes);

}  // namespace vsprefill::kv
