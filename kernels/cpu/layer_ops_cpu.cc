// Element-wise passes of a layer over threads: a task is a run of rows.
#include <algorithm>

#include "kernels/cpu/isa_kernels.h"
#include "kernels/cpu/parallel.h"
#include "kernels/layer_ops.h"

namespace vsprefill::kernels {
namespace {

// Elements per task: large enough to hide the cost of handing it out.
constexpr int64_t kTaskElements = 64 * 1024;

template <class Args>
void ForEachRow(const Args& args, int64_t row_elements, void (*row)(const Args&, int64_t)) {
  const int64_t rows = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, row_elements));
  ParallelFor((args.tokens + rows - 1) / rows, [&](int64_t task, int /*worker*/) {
    const int64_t end = std::min(args.tokens, (task + 1) * rows);
    for (int64_t t = task * rows; t < end; ++t) row(args, t);
  });
}

}  // namespace

KernelStatus RmsNormCpu(const RmsNormArgs& args, Stream /*stream*/) {
  ForEachRow(args, args.width, cpu::ActiveKernels().rms_norm);
  return KernelStatus::kOk;
}

KernelStatus QkvRopeAppendCpu(const QkvRopeAppendArgs& args, Stream /*stream*/) {
  if (args.head_dim % 2 != 0) return KernelStatus::kUnsupportedShape;
  ForEachRow(args, int64_t{args.num_q_heads + 2 * args.num_kv_heads} * args.head_dim,
             cpu::ActiveKernels().qkv_rope_append);
  return KernelStatus::kOk;
}

KernelStatus SiluMulCpu(const SiluMulArgs& args, Stream /*stream*/) {
  ForEachRow(args, 2 * args.width, cpu::ActiveKernels().silu_mul);
  return KernelStatus::kOk;
}

}  // namespace vsprefill::kernels
