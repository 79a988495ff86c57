// Column and diagonal sums of the causal softmax, row by row in float64.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "kernels/distill.h"
#include "kernels/scalar.h"

namespace vsprefill::kernels {

KernelStatus AttentionSumsRef(const AttentionSumsArgs& args, Stream /*stream*/) {
  const AttentionShape& shape = args.shape;
  const AttentionSequence& s = args.sequence;
  if (shape.num_kv_heads <= 0 || shape.num_q_heads % shape.num_kv_heads != 0 ||
      s.q_tokens != s.kv_tokens) {
    return KernelStatus::kUnsupportedShape;
  }
  const int64_t n = s.kv_tokens;
  const int g = shape.group_size();
  std::vector<double> p(n), columns(n), diagonals(n);
  for (int group = 0; group < shape.num_kv_heads; ++group) {
    std::fill(columns.begin(), columns.end(), 0.0);
    std::fill(diagonals.begin(), diagonals.end(), 0.0);
    for (int head = group * g; head < (group + 1) * g; ++head) {
      for (int64_t i = 0; i < n; ++i) {
        double max = -std::numeric_limits<double>::infinity(), total = 0;
        for (int64_t j = 0; j <= i; ++j) {
          double dot = 0;
          for (int e = 0; e < shape.head_dim; ++e) {
            dot += double{LoadScalar(s.q, i * s.q_token_stride + head * s.q_head_stride + e,
                                     shape.dtype)} *
                   double{LoadScalar(s.k, group * s.kv_head_stride + j * s.kv_token_stride + e,
                                     shape.dtype)};
          }
          p[j] = dot * double{shape.scale};
          max = std::max(max, p[j]);
        }
        for (int64_t j = 0; j <= i; ++j) total += (p[j] = std::exp(p[j] - max));
        for (int64_t j = 0; j <= i; ++j) {
          columns[j] += p[j] / total;
          diagonals[i - j] += p[j] / total;
        }
        args.lse[head * n + i] = static_cast<float>(max + std::log(total));
      }
    }
    const double mean = 1.0 / (double(n) * g);
    for (int64_t j = 0; j < n; ++j) {
      args.columns[group * n + j] = static_cast<float>(columns[j] * mean);
      args.diagonals[group * n + j] = static_cast<float>(diagonals[j] * mean);
    }
  }
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels
