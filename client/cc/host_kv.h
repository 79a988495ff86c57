// A KV cache in plain host memory of its own: what a caller uses that has no cache of its own yet
// (dumps, tests).
#pragma once

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "client/cc/kv_assembler.h"
#include "client/cc/types.h"

namespace vsprefill::client {

class HostKv {
 public:
  /// Memory for tokens [start_token, prompt_tokens) of `shape`, uninitialised.
  /// RESOURCE_EXHAUSTED where there is not so much.
  static absl::StatusOr<std::shared_ptr<HostKv>> Create(const KvShape& shape);

  const KvShape& shape() const { return shape_; }
  /// Row 0 is start_token.
  KvDestination destination() const;
  /// One layer's K or V: [num_kv_heads, tokens, head_dim].
  absl::Span<const uint8_t> k(int layer) const;
  absl::Span<const uint8_t> v(int layer) const;

 private:
  HostKv() = default;
  int64_t part_bytes() const;  // K (or V) of one layer

  KvShape shape_;
  std::unique_ptr<uint8_t[]> data_;
};

}  // namespace vsprefill::client
