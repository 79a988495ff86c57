// A request's KV while it is computed, as its streams see it: what is ready, and what has been
// recorded about each chunk for the manifest. Thread-safe: the engine marks layers ready, the
// sender reads.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "server/kv/chunk_plan.h"
#include "server/kv/kv_cache.h"

namespace vsprefill::kv {

/// What a device leaves behind a computed layer so that a reader can wait for it (a CUDA event);
/// null where work is complete when the call returns.
using LayerMark = std::shared_ptr<void>;

struct LayerManifest {
  int layer = 0;
  int64_t tokens = 0;
  int64_t chunks = 0;
  int64_t bytes = 0;
  uint64_t checksum = 0;  // see LayerManifest in kv.proto
};

class KvSource {
 public:
  explicit KvSource(ChunkPlan plan);

  const ChunkPlan& plan() const { return plan_; }

  /// Engine thread, before the first MarkReady.
  void SetCache(std::shared_ptr<KvCache> cache);
  /// Gives up this reference to the memory; nothing can be read afterwards.
  void DropCache();
  /// Null before SetCache and after DropCache.
  std::shared_ptr<KvCache> cache() const;

  /// Layers of a step become ready in ascending order, steps one after the other.
  void MarkReady(int64_t step, int layer, LayerMark mark);
  /// The mark of (step, layer) if it is ready.
  std::optional<LayerMark> ReadyMark(int64_t step, int layer) const;

  /// Checksum of a chunk (index into plan().pieces()), if it was recorded.
  std::optional<uint64_t> Checksum(size_t piece, int layer) const;
  void RecordChecksum(size_t piece, int layer, uint64_t checksum);
  /// Every layer, ascending; nullopt while a chunk's checksum is missing.
  std::optional<std::vector<LayerManifest>> Manifest() const;

 private:
  const ChunkPlan plan_;
  mutable absl::Mutex mu_;
  std::shared_ptr<KvCache> cache_ ABSL_GUARDED_BY(mu_);
  int64_t ready_units_ ABSL_GUARDED_BY(mu_) = 0;       // a unit is one layer of one step
  std::vector<LayerMark> marks_ ABSL_GUARDED_BY(mu_);  // per unit
  std::vector<std::optional<uint64_t>> checksums_ ABSL_GUARDED_BY(mu_);  // [layer][piece]
};

}  // namespace vsprefill::kv
