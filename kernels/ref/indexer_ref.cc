// VSIndexer inference in float64; features are not rounded.
#include <cmath>
#include <vector>

#include "kernels/indexer.h"
#include "kernels/scalar.h"

namespace vsprefill::kernels {
namespace {

constexpr double kFeatureEps = 1e-6;

void NormalisedHead(const void* base, int64_t first, int d, DType dtype, double* out) {
  double squares = 0;
  for (int i = 0; i < d; ++i) {
    out[i] = LoadScalar(base, first + i, dtype);
    squares += out[i] * out[i];
  }
  const double inverse = 1.0 / std::sqrt(squares / d + kFeatureEps);
  for (int i = 0; i < d; ++i) out[i] *= inverse;
}

}  // namespace

KernelStatus IndexerRef(const IndexerLayer& layer, const IndexerInput& in, Stream /*stream*/) {
  const int d = layer.head_dim;
  std::vector<double> features(2 * d);
  for (int group = 0; group < layer.num_groups; ++group) {
    for (int64_t t = in.token_begin; t < in.token_end; ++t) {
      const int64_t first = group * in.head_stride + t * in.token_stride;
      NormalisedHead(in.k, first, d, in.dtype, features.data());
      NormalisedHead(in.v, first, d, in.dtype, features.data() + d);
      double vertical = layer.b2[group * 2], slash = layer.b2[group * 2 + 1];
      for (int64_t h = 0; h < layer.hidden; ++h) {
        const int64_t unit = int64_t{group} * layer.hidden + h;
        double x = layer.b1[unit];
        for (int i = 0; i < 2 * d; ++i) {
          x += double{LoadScalar(layer.w1, unit * 2 * d + i, layer.weight_dtype)} * features[i];
        }
        const double activation = x / (1.0 + std::exp(-x));
        vertical += double{layer.w2[int64_t{group} * 2 * layer.hidden + h]} * activation;
        slash += double{layer.w2[(int64_t{group} * 2 + 1) * layer.hidden + h]} * activation;
      }
      slash += layer.slash_prior[group * kSlashBuckets + SlashBucket(t)];
      in.vertical_logits[group * in.logit_stride + t] = static_cast<float>(vertical);
      in.slash_logits[group * in.logit_stride + t] = static_cast<float>(slash);
    }
  }
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels
