// One table of kernels per device, so that callers name an operation and not an implementation.
#pragma once

#include "kernels/attention.h"
#include "kernels/distill.h"
#include "kernels/indexer.h"
#include "kernels/layer_ops.h"
#include "kernels/query_selection.h"
#include "kernels/select_seer.h"
#include "kernels/selection.h"

namespace vsprefill::kernels {

struct KernelSet {
  AttentionFn attention;
  CountPairsFn count_pairs;
  SelectFn select;
  IndexerFn indexer;
  KernelStatus (*rms_norm)(const RmsNormArgs&, Stream);
  KernelStatus (*qkv_rope_append)(const QkvRopeAppendArgs&, Stream);
  KernelStatus (*silu_mul)(const SiluMulArgs&, Stream);
  KernelStatus (*attention_sums)(const AttentionSumsArgs&, Stream);
  // Selections of the methods that VSPrefill is compared with; null where a device has none.
  PoolBlocksFn pool_blocks;
  SelectWindowFn select_window;
  SelectFlashFn select_flash;
  SelectMInferenceFn select_minference;
  SelectFlexFn select_flex;
  SelectXAttentionFn select_xattention;
  SelectAnchorFn select_anchor;
  SelectSeerFn select_seer;
};

const KernelSet& RefKernels();
const KernelSet& CpuKernels();
/// The CUDA table, or null in a build without CUDA (VSP_CUDA=OFF).
const KernelSet* CudaKernelsOrNull();

}  // namespace vsprefill::kernels
