// Element-wise passes of a transformer layer, fused so that each tensor is read and written once.
// float32 inside, rounded to the tensor's dtype once at the end. All rows are contiguous unless a
// stride is given. CPU: done on return, threaded. CUDA: enqueued on `stream`.
#pragma once

#include <cstdint>

#include "kernels/tensor_view.h"

namespace vsprefill::kernels {

/// residual += delta (where delta is not null); out = residual / rms(residual) * weight.
struct RmsNormArgs {
  void* residual = nullptr;      // [tokens, width], in-place when delta is set
  const void* delta = nullptr;   // [tokens, width] or null
  const void* weight = nullptr;  // [width], same dtype
  void* out = nullptr;           // [tokens, width]; may be null (only the addition)
  int64_t tokens = 0, width = 0;
  float eps = 1e-5f;
  DType dtype = DType::kBF16;
};

/// Splits a projected row [q | k | v], optionally RMS-normalises q and k per head (Qwen3), rotates
/// q and k (RoPE, half-split pairs (i, i + head_dim/2) as in Hugging Face), writes q back in place
/// and appends k, v to the cache.
struct QkvRopeAppendArgs {
  void* qkv = nullptr;  // [tokens, (num_q_heads + 2 * num_kv_heads) * head_dim]
  int64_t tokens = 0;
  int num_q_heads = 0, num_kv_heads = 0, head_dim = 0;
  const void* q_norm = nullptr;  // [head_dim] or null
  const void* k_norm = nullptr;
  float norm_eps = 1e-6f;
  const float* cos =
      nullptr;  // [>= position_begin + tokens, head_dim / 2], attention scaling included
  const float* sin = nullptr;
  int64_t position_begin = 0;  // position of row 0
  void* k_cache = nullptr;  // [num_kv_heads, capacity, head_dim]; rows position_begin.. are written
  void* v_cache = nullptr;
  int64_t cache_head_stride = 0;  // elements
  DType dtype = DType::kBF16;
};

/// out[t, i] = silu(gate_up[t, i]) * gate_up[t, width + i].
struct SiluMulArgs {
  const void* gate_up = nullptr;  // [tokens, 2 * width]
  void* out = nullptr;            // [tokens, width]
  int64_t tokens = 0, width = 0;
  DType dtype = DType::kBF16;
};

KernelStatus RmsNormRef(const RmsNormArgs& args, Stream stream);
KernelStatus RmsNormCpu(const RmsNormArgs& args, Stream stream);
KernelStatus RmsNormCuda(const RmsNormArgs& args, Stream stream);
KernelStatus QkvRopeAppendRef(const QkvRopeAppendArgs& args, Stream stream);
KernelStatus QkvRopeAppendCpu(const QkvRopeAppendArgs& args, Stream stream);
KernelStatus QkvRopeAppendCuda(const QkvRopeAppendArgs& args, Stream stream);
KernelStatus SiluMulRef(const SiluMulArgs& args, Stream stream);
KernelStatus SiluMulCpu(const SiluMulArgs& args, Stream stream);
KernelStatus SiluMulCuda(const SiluMulArgs& args, Stream stream);

}  // namespace vsprefill::kernels
