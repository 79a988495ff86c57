// SeerAttention's selection, literally.
#include <cmath>
#include <vector>

#include "kernels/ref/query_scores_ref.h"
#include "kernels/select_seer.h"

namespace vsprefill::kernels {
namespace {

using ref::Vector;

/// A query or key before RoPE, up to the factor rope_inverse.
Vector Unrotated(const SeerInput& in, const Vector& x, int64_t position) {
  const size_t half = x.size() / 2;
  Vector u(x.size());
  for (size_t i = 0; i < half; ++i) {
    const float c = in.rope_cos[position * half + i], s = in.rope_sin[position * half + i];
    u[i] = std::fma(x[i + half], s, x[i] * c);
    u[i + half] = std::fma(-x[i], s, x[i + half] * c);
  }
  return u;
}

struct Pools {
  Vector max, min, mean;
};
Pools Pool(const std::vector<Vector>& rows, float factor) {
  Pools pools = {rows[0], rows[0], Vector(rows[0].size(), 0.0f)};
  for (const Vector& row : rows) {
    for (size_t e = 0; e < row.size(); ++e) {
      pools.max[e] = row[e] > pools.max[e] ? row[e] : pools.max[e];
      pools.min[e] = row[e] < pools.min[e] ? row[e] : pools.min[e];
      pools.mean[e] += row[e];
    }
  }
  for (size_t e = 0; e < rows[0].size(); ++e) {
    pools.max[e] *= factor;
    pools.min[e] *= factor;
    pools.mean[e] = pools.mean[e] / static_cast<float>(rows.size()) * factor;
  }
  return pools;
}

/// R(block) W x, W: [gate_dim, x.size()].
Vector GateVector(const SeerGateLayer& gate, const float* weights, const Vector& x, int64_t block) {
  const int half = gate.gate_dim / 2;
  Vector z(gate.gate_dim), rotated(gate.gate_dim);
  for (int g = 0; g < gate.gate_dim; ++g) {
    z[g] = ref::Dot(Vector(weights + g * x.size(), weights + (g + 1) * x.size()), x);
  }
  for (int i = 0; i < half; ++i) {
    const float c = gate.block_cos[block * half + i], s = gate.block_sin[block * half + i];
    rotated[i] = std::fma(-z[i + half], s, z[i] * c);
    rotated[i + half] = std::fma(z[i], s, z[i + half] * c);
  }
  return rotated;
}

}  // namespace

KernelStatus SelectSeerRef(const SeerInput& input, const SeerParams& params, TileIndexView* index,
                           Stream) {
  const QuerySelectionInput& in = input.base;
  if (!ref::Supported(in) || !selection::Supported(input)) return KernelStatus::kUnsupportedShape;
  const AttentionSequence& s = in.sequence;
  const SeerGateLayer& gate = input.gate;
  const int64_t d = in.shape.head_dim;
  const float scale = 1.0f / std::sqrt(static_cast<float>(gate.gate_dim));
  const selection::SeerRowBlocks row_blocks = selection::RowBlocksOf(s);
  ref::Clear(s, in.shape.num_q_heads, 1, index);
  for (int head = 0; head < in.shape.num_q_heads; ++head) {
    const int64_t kv_head = head / in.shape.group_size();
    std::vector<Vector> key_vectors;
    for (int64_t b = 0; b < row_blocks.end; ++b) {
      const selection::SeerTokens tokens = selection::KeysOf(s, b);
      std::vector<Vector> keys;
      for (int64_t i = tokens.begin; i < tokens.end; ++i) {
        keys.push_back(Unrotated(input, ref::Key(in, head, i), i));
      }
      const Pools pools = Pool(keys, gate.rope_inverse);
      Vector features = pools.max;
      features.insert(features.end(), pools.min.begin(), pools.min.end());
      features.insert(features.end(), pools.mean.begin(), pools.mean.end());
      key_vectors.push_back(
          GateVector(gate, gate.wk + kv_head * gate.gate_dim * 3 * d, features, b));
    }
    for (int64_t r = row_blocks.first; r < row_blocks.end; ++r) {
      uint32_t* const bits = index->BlocksOf(head, r * kSeerBlock / kKeyBlock);
      const auto read = [bits](int64_t b) { SetBit(bits, b * kSeerBlock / kKeyBlock); };
      read(r);
      const selection::SeerTokens tokens = selection::QueriesOf(s, r);
      std::vector<Vector> queries;
      for (int64_t i = tokens.begin; i < tokens.end; ++i) {
        queries.push_back(Unrotated(input, ref::Query(in, head, i), i));
      }
      const Vector query = GateVector(gate, gate.wq + head * gate.gate_dim * d,
                                      Pool(queries, gate.rope_inverse).mean, r);
      Vector logits;
      for (int64_t b = 0; b <= r; ++b) {
        logits.push_back(selection::Sanitize(ref::Dot(key_vectors[b], query) * scale));
      }
      const std::vector<uint64_t> shares = ref::Shares(logits);
      const std::vector<int64_t> order = ref::Descending(shares);
      for (int64_t i = 0; i <= r; ++i) {
        const bool kept = params.density > 0
                              ? i < selection::SeerBudget(params.density, r + 1)
                              : selection::ReachesThreshold(shares[order[i]], params.threshold,
                                                            selection::kShareOne);
        if (kept || selection::IsLastBlock(params, r, in.prompt_tokens)) read(order[i]);
      }
    }
  }
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels
