// SeerAttention's selection: a small trained gate per layer scores pairs of blocks of 64 queries
// and 64 keys. Sequence, chunks, ties and the arithmetic of dot products, logits and shares:
// query_selection.h. The gate's file: server/model/seer_gate.h.
//
// With u(x) a query or key as it was before RoPE, row block r and key block b of the chunk:
//   a(r)     Wq[head] mean of u(q) over the block's queries
//   c(b)     Wk[kv head] (max, min, mean of u(k), side by side) over the block's keys
//   share    softmax over b <= r of dot(R(r) a(r), R(b) c(b)) / sqrt(gate_dim)
// where R(i) is RoPE at the block's first token over gate_dim. Block b is read by row block r if
// its share is at least `threshold`, or, with density > 0, if it is among the ceil(density * (r +
// 1)) largest; the prompt's last `last_dense_blocks` row blocks read everything.
// The index has blocks of 128 x 128: each is read if one of its four pairs is, and a row's own is.
//
// u is made from what attention sees: RoPE is a rotation, so it is undone with the same tables. Per
// pair (i, i + head_dim / 2), float32: u_i = fma(x_h, sin, x_i * cos), u_h = fma(-x_i, sin, x_h *
// cos); maximum, minimum and mean (sum in ascending order of the tokens, divided by the count) come
// before the factor rope_inverse. R: z_i' = fma(-z_h, sin, z_i * cos), z_h' = fma(z_i, sin, z_h *
// cos), pairs (i, i + gate_dim / 2).
//
// Ref: SeerAttention (arXiv 2410.13276), the gate "Qavg_Kmaxminavg" with a linear layer for queries
// and one for keys; differences: docs/methods.md.
#pragma once

#include <cstdint>

#include "kernels/query_selection.h"

namespace vsprefill::kernels {

inline constexpr int kSeerBlock = 64;
inline constexpr int kMaxSeerGateDim = 256;

constexpr int64_t SeerBlocks(int64_t tokens) { return (tokens + kSeerBlock - 1) / kSeerBlock; }

/// One layer's gate, in memory of the device.
struct SeerGateLayer {
  int gate_dim = 0;           // even, 2 to kMaxSeerGateDim
  const float* wq = nullptr;  // [num_q_heads, gate_dim, head_dim]
  const float* wk = nullptr;  // [num_kv_heads, gate_dim, 3 * head_dim]: maximum, minimum, mean
  /// R: [>= SeerBlocks(kv_tokens), gate_dim / 2], row b: position b * kSeerBlock.
  const float* block_cos = nullptr;
  const float* block_sin = nullptr;
  /// 1 / (cos^2 + sin^2) of the model's tables: 1, or where they hold an attention factor (YaRN)
  /// one over its square.
  float rope_inverse = 1;
};

struct SeerParams {
  double threshold = 2e-3;  // of the softmax over blocks; 0 reads everything
  double density = 0;       // above 0: share of its visible blocks that a row block reads, instead
  int32_t last_dense_blocks = 2;
};

struct SeerInput {
  QuerySelectionInput base;
  SeerGateLayer gate;
  /// The model's RoPE: float32 [>= kv_tokens, head_dim / 2], attention factor included.
  const float* rope_cos = nullptr;
  const float* rope_sin = nullptr;
};

/// Per query head. kUnsupportedShape also where gate_dim is odd or out of its range, or a table is
/// missing.
using SelectSeerFn = KernelStatus (*)(const SeerInput& input, const SeerParams& params,
                                      TileIndexView* index, Stream stream);
KernelStatus SelectSeerRef(const SeerInput&, const SeerParams&, TileIndexView*, Stream);
KernelStatus SelectSeerCpu(const SeerInput&, const SeerParams&, TileIndexView*, Stream);
KernelStatus SelectSeerCuda(const SeerInput&, const SeerParams&, TileIndexView*, Stream);

/// CUDA: a gate vector of at most kMaxSeerGateDim elements per row block and head, and per key
/// block and KV head.
inline int64_t SeerWorkspaceBytes(const QuerySelectionInput& in) {
  return (in.shape.num_q_heads * (SeerBlocks(in.sequence.q_tokens) + 1) +
          in.shape.num_kv_heads * SeerBlocks(in.sequence.kv_tokens)) *
         kMaxSeerGateDim * int64_t{4};
}

namespace selection {

constexpr bool Supported(const SeerInput& in) {
  const SeerGateLayer& g = in.gate;
  return g.gate_dim >= 2 && g.gate_dim <= kMaxSeerGateDim && g.gate_dim % 2 == 0 &&
         g.wq != nullptr && g.wk != nullptr && g.block_cos != nullptr && g.block_sin != nullptr &&
         in.rope_cos != nullptr && in.rope_sin != nullptr;
}

/// Row blocks that hold a query of the chunk: [first, end).
struct SeerRowBlocks {
  int64_t first = 0, end = 0;
};
constexpr SeerRowBlocks RowBlocksOf(const AttentionSequence& s) {
  return {(s.kv_tokens - s.q_tokens) / kSeerBlock, SeerBlocks(s.kv_tokens)};
}
/// Positions [begin, end) of a row block's queries in the chunk.
struct SeerTokens {
  int64_t begin = 0, end = 0;
};
constexpr SeerTokens QueriesOf(const AttentionSequence& s, int64_t block) {
  const int64_t q_start = s.kv_tokens - s.q_tokens, first = block * kSeerBlock;
  const int64_t end = first + kSeerBlock;
  return {first > q_start ? first : q_start, end < s.kv_tokens ? end : s.kv_tokens};
}
constexpr SeerTokens KeysOf(const AttentionSequence& s, int64_t block) {
  const int64_t first = block * kSeerBlock, end = first + kSeerBlock;
  return {first, end < s.kv_tokens ? end : s.kv_tokens};
}
/// Whether a row block is one of the prompt's last ones.
constexpr bool IsLastBlock(const SeerParams& params, int64_t block, int64_t prompt_tokens) {
  return block >= SeerBlocks(prompt_tokens) - params.last_dense_blocks;
}
/// Blocks that `density` gives to a row block that sees `visible`: at least one.
constexpr int64_t SeerBudget(double density, int64_t visible) {
  const double wanted = density * static_cast<double>(visible);
  int64_t count = static_cast<int64_t>(wanted);
  if (static_cast<double>(count) < wanted) ++count;
  return count < 1 ? 1 : count < visible ? count : visible;
}

}  // namespace selection
}  // namespace vsprefill::kernels
