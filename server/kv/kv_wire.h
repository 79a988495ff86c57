// The bytes of a KV chunk message: valid protobuf of PrefillEvent{kv} and of PushRequest{kv} (both
// hold KvChunk in field 2), written by hand so that the payload can be borrowed memory.
// docs/kv_wire_format.md has the grammar.
#pragma once

#include <cstdint>
#include <string>

#include "server/kv/chunk_plan.h"

namespace vsprefill::kv {

/// Everything of the message that stands before the payload's bytes: at most kMaxChunkHeaderBytes.
/// Equal to what protobuf's serializer would write.
std::string EncodeChunkHeader(const ChunkRange& range, uint64_t checksum, int64_t payload_bytes);

/// Appends the 24 bytes that a chunk adds to its layer's manifest checksum.
void AppendManifestRecord(int64_t token_begin, int64_t token_end, uint64_t checksum,
                          std::string* records);

}  // namespace vsprefill::kv
