// KV caches made of a formula, cut into chunks as a server would, and damaged on demand: what the
// client's tests receive.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/types/span.h"
#include "client/cc/types.h"
#include "vsprefill/v1/kv.pb.h"

namespace vsprefill::testing {

/// Ways in which a cache can fail to come through.
enum class KvFault {
  kNone,
  kMissingChunk,      // one chunk is left out; the manifest knows it
  kMissingLayer,      // nothing of one layer comes; the manifest knows it
  kShortLayer,        // the last chunk of one layer is left out, and the manifest agrees
  kWrongChecksum,     // a payload byte differs from what was summed
  kShortPayload,      // one payload lacks its last bytes
  kLongPayload,       // one payload has bytes too many
  kOverlap,           // one chunk begins a token early (payload and checksum fit)
  kDuplicate,         // one chunk comes twice
  kLayerOutOfRange,   // one chunk names a layer the model does not have
  kTokensOutOfRange,  // one chunk ends beyond the prompt
  kEmptyRange,        // one chunk has no tokens
  kManifestChecksum,  // the manifest's checksum of one layer is wrong
  kManifestChunks,    // the manifest counts one chunk more
  kManifestTokens,    // the manifest counts one token more
  kManifestBytes,     // the manifest's sum of bytes is wrong
  kManifestLayers,    // the manifest lacks a layer
};
/// Every fault but kNone.
std::vector<KvFault> AllKvFaults();
std::string Name(KvFault fault);

/// The byte at `offset` within the row of (layer, K or V, head, token).
uint8_t FakeKvByte(int layer, bool is_v, int head, int64_t token, int64_t offset);

/// A small cache: 3 layers, 2 heads, head_dim 8, bfloat16, 37 tokens in chunks of 10.
client::KvShape SmallShape();
v1::KvLayout ToProto(const client::KvShape& shape);

/// Chunks in the order a server sends them (chunk by chunk, in each layer by layer).
struct FakeKv {
  std::vector<v1::KvChunk> chunks;
  v1::KvManifest manifest;
};
FakeKv MakeFakeKv(const client::KvShape& shape, KvFault fault = KvFault::kNone);

/// The same with the bytes that `row` gives: head_dim elements of (layer, K or V, head, token).
using RowFn =
    std::function<absl::Span<const uint8_t>(int layer, bool is_v, int head, int64_t token)>;
FakeKv MakeKvFrom(const client::KvShape& shape, const RowFn& row, KvFault fault = KvFault::kNone);

}  // namespace vsprefill::testing
