// Arithmetic of a KV cache's shape and of its chunks on the wire. No memory, no gRPC.
#pragma once

#include <algorithm>
#include <cstdint>
#include <string>

#include "kernels/tensor_view.h"

namespace vsprefill::kv {

/// No message on the wire is larger than this, header included, so that a client with gRPC's
/// default limit can read it.
inline constexpr int64_t kMaxMessageBytes = 4 << 20;
/// Room kept for the header of a chunk message.
inline constexpr int64_t kMaxChunkHeaderBytes = 1024;

struct KvLayout {
  int num_layers = 0;
  int num_kv_heads = 0;
  int head_dim = 0;
  kernels::DType dtype = kernels::DType::kBF16;
  std::string kv_id;

  /// Bytes of K and V of one token in one layer.
  int64_t layer_token_bytes() const {
    return int64_t{2} * num_kv_heads * head_dim * kernels::SizeOf(dtype);
  }
  int64_t token_bytes() const { return layer_token_bytes() * num_layers; }
  /// Most tokens of one layer that fit a message: a multiple of 64 where at least 64 fit.
  int64_t max_chunk_tokens() const {
    const int64_t fit = (kMaxMessageBytes - kMaxChunkHeaderBytes) / layer_token_bytes();
    return fit >= 64 ? fit / 64 * 64 : std::max<int64_t>(fit, 1);
  }
};

}  // namespace vsprefill::kv
