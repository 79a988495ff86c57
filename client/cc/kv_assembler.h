// Puts the chunks of one KV cache into the caller's memory and decides whether the cache came
// through. Chunks may come in any order and from several threads (one per stripe). The memory holds
// a cache only after Finish returned OK; until then, and after any error, its content is undefined
// and must not be read. Every defect is DATA_LOSS and sticks: no later call can make it good.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/synchronization/mutex.h"
#include "absl/types/span.h"
#include "client/cc/types.h"

namespace vsprefill::client {

/// Host memory for a cache: per layer K and V, each [num_kv_heads][rows][head_dim] in the KV dtype.
struct KvDestination {
  struct Layer {
    uint8_t* k = nullptr;
    uint8_t* v = nullptr;
  };
  std::vector<Layer> layers;
  int64_t rows = 0;        // tokens that fit each head; heads are rows * head_dim elements apart
  int64_t row0_token = 0;  // the token whose K and V stand in row 0
};

/// Borrowed parts of a payload, in order.
using PayloadPieces = absl::Span<const absl::Span<const uint8_t>>;

class KvAssembler {
 public:
  /// INVALID_ARGUMENT unless `destination` has room for shape's tokens in every layer.
  static absl::StatusOr<std::unique_ptr<KvAssembler>> Create(const KvShape& shape,
                                                             KvDestination destination);

  /// Copies one chunk and verifies its checksum. Thread-safe. DATA_LOSS: layer or tokens out of
  /// range, tokens that came before, payload of the wrong size, wrong checksum.
  absl::Status Add(const ChunkHeader& header, PayloadPieces payload);

  /// Verifies that all of it came and that it is what the sender says it sent. Call it once, after
  /// the last Add returned. OK: the destination holds tokens [start_token, prompt_tokens).
  absl::Status Finish(const KvManifest& manifest);

  /// Payload bytes verified so far.
  int64_t bytes() const;
  /// Layers of which every token has come.
  int complete_layers() const;
  const KvShape& shape() const { return shape_; }

 private:
  struct Record {
    int64_t token_end = 0;
    uint64_t checksum = 0;
  };
  struct LayerState {
    std::map<int64_t, Record> chunks;  // by token_begin, disjoint
    int64_t verified_tokens = 0;
  };

  KvAssembler(const KvShape& shape, KvDestination destination);

  absl::Status Reserve(const ChunkHeader& header, int64_t payload_bytes)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  /// Copies and returns XXH3-64 of what was copied.
  uint64_t CopyAndHash(const ChunkHeader& header, PayloadPieces payload) const;
  absl::Status CheckLayer(int64_t layer, const LayerManifest& manifest) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status Fail(absl::Status status) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const KvShape shape_;
  const KvDestination destination_;
  mutable absl::Mutex mu_;
  absl::Status failure_ ABSL_GUARDED_BY(mu_);
  std::vector<LayerState> layers_ ABSL_GUARDED_BY(mu_);
  int64_t bytes_ ABSL_GUARDED_BY(mu_) = 0;
  int complete_layers_ ABSL_GUARDED_BY(mu_) = 0;
  int adds_running_ ABSL_GUARDED_BY(mu_) = 0;
};

/// XXH3-64 (seed 0) of bytes that lie in pieces.
uint64_t Checksum(PayloadPieces pieces);
/// A layer's checksum in the manifest, from its chunks in token order.
uint64_t ManifestChecksum(absl::Span<const ChunkHeader> chunks);

}  // namespace vsprefill::client
