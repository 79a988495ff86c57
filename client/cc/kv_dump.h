// Writes a KV cache as a safetensors file: layers.{i}.k and layers.{i}.v, [kv_heads, tokens,
// head_dim] in the KV dtype, K after RoPE. Metadata: kv_id, request_id, start_token, first_token.
#pragma once

#include <cstdint>
#include <map>
#include <string>

#include "absl/status/status.h"
#include "client/cc/host_kv.h"

namespace vsprefill::client {

/// Writes beside `path` and renames, so that no short file ever has that name. The error names the
/// file and the system's reason.
absl::Status WriteKvDump(const std::string& path, const HostKv& kv,
                         const std::map<std::string, std::string>& metadata);

}  // namespace vsprefill::client
