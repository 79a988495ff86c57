// SeerAttention's selection: gate vectors of all key blocks first, then a task is a lane block of
// row blocks of one query head.
#include <algorithm>
#include <cmath>
#include <vector>

#include "kernels/cpu/isa_kernels.h"
#include "kernels/cpu/parallel.h"
#include "kernels/cpu/query_scores.h"
#include "kernels/select_seer.h"

namespace vsprefill::kernels {
namespace {

using cpu::QueryLanes;

constexpr int64_t kTaskBlocks = 64;  // row or key blocks that one task handles

/// Maximum, minimum and mean of tokens' rows before RoPE, side by side; only the mean where
/// `mean_only`.
void Pool(const SeerInput& in, const void* base, int64_t offset, int64_t row_stride,
          const selection::SeerTokens& tokens, bool mean_only, float* out) {
  const int d = in.base.shape.head_dim;
  float* const sum = mean_only ? out : out + 2 * d;
  cpu::UnrotatePoolTask task;
  task.base = base;
  task.offset = offset;
  task.row_stride = row_stride;
  task.rows = tokens.end - tokens.begin;
  task.head_dim = d;
  task.dtype = in.base.shape.dtype;
  task.cos = in.rope_cos + tokens.begin * (d / 2);
  task.sin = in.rope_sin + tokens.begin * (d / 2);
  task.max = mean_only ? nullptr : out;
  task.min = mean_only ? nullptr : out + d;
  task.sum = sum;
  cpu::ActiveKernels().unrotate_pool(task);
  for (int e = 0; e < d; ++e) sum[e] /= static_cast<float>(task.rows);
  for (float* x = out; x < sum + d; ++x) *x *= in.gate.rope_inverse;
}

/// R(block) W x for the lanes of `features`, lane i being block first + i; [count, gate_dim].
void GateVectors(const SeerGateLayer& gate, const float* weights, const QueryLanes& features,
                 int64_t first, int64_t count, float* out) {
  const int g = gate.gate_dim, half = g / 2, lanes = features.lanes();
  std::vector<float> z(int64_t{g} * lanes);
  cpu::ActiveKernels().dot_products(weights, g, features.values(), features.depth(), lanes,
                                    z.data());
  for (int64_t i = 0; i < count; ++i) {
    const float* const cosines = gate.block_cos + (first + i) * half;
    const float* const sines = gate.block_sin + (first + i) * half;
    for (int e = 0; e < half; ++e) {
      const float low = z[e * lanes + i], high = z[(e + half) * lanes + i];
      out[i * g + e] = std::fma(-high, sines[e], low * cosines[e]);
      out[i * g + e + half] = std::fma(low, sines[e], high * cosines[e]);
    }
  }
}

/// Key vectors of blocks [first, first + count) of a KV head.
void KeyVectors(const SeerInput& in, int kv_head, int64_t first, int64_t count, float* out) {
  const AttentionSequence& s = in.base.sequence;
  const int d = in.base.shape.head_dim;
  QueryLanes features(count, 3 * d);
  std::vector<float> pools(3 * d);
  for (int64_t i = 0; i < count; ++i) {
    const selection::SeerTokens tokens = selection::KeysOf(s, first + i);
    Pool(in, s.k, kv_head * s.kv_head_stride + tokens.begin * s.kv_token_stride, s.kv_token_stride,
         tokens, false, pools.data());
    features.Set(static_cast<int>(i), 0, pools.data(), 3 * d);
  }
  GateVectors(in.gate, in.gate.wk + int64_t{kv_head} * in.gate.gate_dim * 3 * d, features, first,
              count, out);
}

/// Marks what row block r reads, by the shares of the blocks that it sees.
void SelectRow(const SeerInput& in, const SeerParams& params, int64_t r, const uint64_t* shares,
               uint32_t* bits) {
  const auto read = [bits](int64_t b) { SetBit(bits, b * kSeerBlock / kKeyBlock); };
  const int64_t visible = r + 1;
  read(r);
  if (selection::IsLastBlock(params, r, in.base.prompt_tokens)) {
    for (int64_t b = 0; b < visible; ++b) read(b);
  } else if (params.density > 0) {
    const int64_t budget = selection::SeerBudget(params.density, visible);
    for (int32_t b : cpu::TopPositions(shares, visible, 0, budget)) read(b);
  } else {
    for (int64_t b = 0; b < visible; ++b) {
      if (selection::ReachesThreshold(shares[b], params.threshold, selection::kShareOne)) read(b);
    }
  }
}

/// Row blocks [first, first + count) of a head.
void SelectRows(const SeerInput& in, const SeerParams& params, int head, int64_t first,
                int64_t count, const float* key_vectors, TileIndexView* index) {
  const AttentionSequence& s = in.base.sequence;
  const SeerGateLayer& gate = in.gate;
  const int d = in.base.shape.head_dim, g = gate.gate_dim;
  QueryLanes means(count, d);
  std::vector<float> mean(d), vectors(count * g);
  for (int64_t i = 0; i < count; ++i) {
    const selection::SeerTokens tokens = selection::QueriesOf(s, first + i);
    Pool(in, s.q, cpu::QueryOffset(s, head, tokens.begin), s.q_token_stride, tokens, true,
         mean.data());
    means.Set(static_cast<int>(i), 0, mean.data(), d);
  }
  GateVectors(gate, gate.wq + int64_t{head} * g * d, means, first, count, vectors.data());
  QueryLanes queries(count, g);
  std::vector<int64_t> visible(queries.lanes(), 0);
  for (int64_t i = 0; i < count; ++i) {
    queries.Set(static_cast<int>(i), 0, vectors.data() + i * g, g);
    visible[i] = first + i + 1;
  }
  const int64_t blocks = first + count;
  std::vector<float> logits(blocks * queries.lanes());
  cpu::RowLogits(key_vectors, blocks, queries, 1.0f / std::sqrt(static_cast<float>(g)),
                 logits.data());
  std::vector<uint64_t> shares(count * blocks);
  cpu::ForShares(logits.data(), blocks, queries.lanes(), visible.data(),
                 [&](int64_t b, const uint64_t* lane_shares) {
                   for (int64_t i = 0; i < count; ++i) shares[i * blocks + b] = lane_shares[i];
                 });
  for (int64_t i = 0; i < count; ++i) {
    const int64_t r = first + i;
    SelectRow(in, params, r, shares.data() + i * blocks,
              index->BlocksOf(head, r * kSeerBlock / kKeyBlock));
  }
}

}  // namespace

KernelStatus SelectSeerCpu(const SeerInput& input, const SeerParams& params, TileIndexView* index,
                           Stream /*stream*/) {
  const QuerySelectionInput& in = input.base;
  if (!cpu::SupportedSelection(in) || !selection::Supported(input)) {
    return KernelStatus::kUnsupportedShape;
  }
  const int heads = in.shape.num_q_heads, kv_heads = in.shape.num_kv_heads;
  const int64_t g = input.gate.gate_dim;
  const selection::SeerRowBlocks rows = selection::RowBlocksOf(in.sequence);
  cpu::ClearBlocks(in.sequence, heads, 1, index);

  std::vector<float> key_vectors(kv_heads * rows.end * g);
  const int64_t key_tasks = (rows.end + kTaskBlocks - 1) / kTaskBlocks;
  ParallelFor(key_tasks * kv_heads, [&](int64_t i, int /*worker*/) {
    const int64_t first = i / kv_heads * kTaskBlocks, kv_head = i % kv_heads;
    KeyVectors(input, static_cast<int>(kv_head), first, std::min(kTaskBlocks, rows.end - first),
               key_vectors.data() + (kv_head * rows.end + first) * g);
  });
  // Aligned to row tiles, because two row blocks write to the same words.
  const int64_t first_row = rows.first / kTaskBlocks * kTaskBlocks;
  const int64_t row_tasks = (rows.end - first_row + kTaskBlocks - 1) / kTaskBlocks;
  ParallelFor(row_tasks * heads, [&](int64_t i, int /*worker*/) {
    const int64_t begin = first_row + (row_tasks - 1 - i / heads) * kTaskBlocks;  // heavy first
    const int64_t first = std::max(begin, rows.first);
    const int head = static_cast<int>(i % heads);
    SelectRows(input, params, head, first, std::min(begin + kTaskBlocks, rows.end) - first,
               key_vectors.data() + head / in.shape.group_size() * rows.end * g, index);
  });
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels
