// Element-wise passes of a layer in float64. The residual is rounded to its dtype before the norm
// reads it, because that is the tensor the next layer sees; every other result is rounded once.
#include <cmath>
#include <vector>

#include "kernels/layer_ops.h"
#include "kernels/scalar.h"

namespace vsprefill::kernels {

KernelStatus RmsNormRef(const RmsNormArgs& a, Stream /*stream*/) {
  for (int64_t t = 0; t < a.tokens; ++t) {
    const int64_t row = t * a.width;
    double squares = 0;
    for (int64_t i = row; i < row + a.width; ++i) {
      if (a.delta != nullptr) {
        const double sum =
            double{LoadScalar(a.residual, i, a.dtype)} + double{LoadScalar(a.delta, i, a.dtype)};
        StoreScalar(a.residual, i, a.dtype, static_cast<float>(sum));
      }
      const double x = LoadScalar(a.residual, i, a.dtype);
      squares += x * x;
    }
    if (a.out == nullptr) continue;
    const double inverse = 1.0 / std::sqrt(squares / double(a.width) + double{a.eps});
    for (int64_t i = 0; i < a.width; ++i) {
      const double x = LoadScalar(a.residual, row + i, a.dtype);
      const double weight = LoadScalar(a.weight, i, a.dtype);
      StoreScalar(a.out, row + i, a.dtype, static_cast<float>(x * inverse * weight));
    }
  }
  return KernelStatus::kOk;
}

namespace {

// Normalises (where `norm` is set) and rotates one head.
std::vector<double> RotateHead(const QkvRopeAppendArgs& a, int64_t first, const void* norm,
                               int64_t position) {
  const int half = a.head_dim / 2;
  std::vector<double> x(a.head_dim), y(a.head_dim);
  double squares = 0;
  for (int i = 0; i < a.head_dim; ++i) {
    x[i] = LoadScalar(a.qkv, first + i, a.dtype);
    squares += x[i] * x[i];
  }
  if (norm != nullptr) {
    const double inverse = 1.0 / std::sqrt(squares / a.head_dim + double{a.norm_eps});
    for (int i = 0; i < a.head_dim; ++i) {
      x[i] *= inverse * double{LoadScalar(norm, i, a.dtype)};
    }
  }
  for (int i = 0; i < half; ++i) {
    const double c = a.cos[position * half + i], s = a.sin[position * half + i];
    y[i] = x[i] * c - x[i + half] * s;
    y[i + half] = x[i + half] * c + x[i] * s;
  }
  return y;
}

}  // namespace

KernelStatus QkvRopeAppendRef(const QkvRopeAppendArgs& a, Stream /*stream*/) {
  if (a.head_dim % 2 != 0) return KernelStatus::kUnsupportedShape;
  const int64_t d = a.head_dim, width = (a.num_q_heads + 2 * a.num_kv_heads) * d;
  for (int64_t t = 0; t < a.tokens; ++t) {
    const int64_t position = a.position_begin + t;
    for (int head = 0; head < a.num_q_heads; ++head) {
      const int64_t first = t * width + head * d;
      const std::vector<double> y = RotateHead(a, first, a.q_norm, position);
      for (int64_t i = 0; i < d; ++i) StoreScalar(a.qkv, first + i, a.dtype, float(y[i]));
    }
    for (int head = 0; head < a.num_kv_heads; ++head) {
      const int64_t k_first = t * width + (a.num_q_heads + head) * d;
      const int64_t v_first = k_first + a.num_kv_heads * d;
      const int64_t cache = head * a.cache_head_stride + position * d;
      const std::vector<double> y = RotateHead(a, k_first, a.k_norm, position);
      for (int64_t i = 0; i < d; ++i) {
        StoreScalar(a.k_cache, cache + i, a.dtype, float(y[i]));
        StoreScalar(a.v_cache, cache + i, a.dtype, LoadScalar(a.qkv, v_first + i, a.dtype));
      }
    }
  }
  return KernelStatus::kOk;
}

KernelStatus SiluMulRef(const SiluMulArgs& a, Stream /*stream*/) {
  for (int64_t t = 0; t < a.tokens; ++t) {
    for (int64_t i = 0; i < a.width; ++i) {
      const double gate = LoadScalar(a.gate_up, t * 2 * a.width + i, a.dtype);
      const double up = LoadScalar(a.gate_up, t * 2 * a.width + a.width + i, a.dtype);
      StoreScalar(a.out, t * a.width + i, a.dtype,
                  static_cast<float>(gate / (1.0 + std::exp(-gate)) * up));
    }
  }
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels
