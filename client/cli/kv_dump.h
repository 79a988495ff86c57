// Writes a KV cache as a safetensors file: layers.{i}.k and layers.{i}.v, [kv_heads, tokens,
// head_dim] in the KV dtype, K after RoPE.
#pragma once

#include <map>
#include <string>

#include "absl/status/status.h"
#include "client/cc/host_kv.h"

namespace vsprefill::cli {

/// Writes beside `path` and renames, so that no short file ever has that name.
absl::Status WriteKvDump(const std::string& path, const client::HostKv& kv,
                         const std::map<std::string, std::string>& metadata);

}  // namespace vsprefill::cli
