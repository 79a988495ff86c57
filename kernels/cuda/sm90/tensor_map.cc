#include "kernels/cuda/sm90/tensor_map.h"

#include <cuda_runtime_api.h>

namespace vsprefill::kernels::cuda::sm90 {
namespace {

using EncodeFn = decltype(&cuTensorMapEncodeTiled);

/// The driver's function, found at run time: the library does not link to the driver.
EncodeFn FindEncode() {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult result;
  const cudaError_t error = cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function,
                                                             12000, cudaEnableDefault, &result);
  if (error != cudaSuccess || result != cudaDriverEntryPointSuccess) return nullptr;
  return reinterpret_cast<EncodeFn>(function);
}

}  // namespace

bool DescribeRows(CUtensorMap* map, const void* rows, int64_t head_dim, int64_t tokens,
                  int64_t heads, int64_t token_stride, int64_t head_stride) {
  static const EncodeFn encode = FindEncode();
  if (encode == nullptr) return false;
  const cuuint64_t sizes[3] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(tokens),
                               static_cast<cuuint64_t>(heads)};
  const cuuint64_t strides[2] = {static_cast<cuuint64_t>(token_stride) * 2,
                                 static_cast<cuuint64_t>(head_stride) * 2};
  const cuuint32_t box[3] = {64, 64, 1};
  const cuuint32_t steps[3] = {1, 1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(rows), sizes, strides,
                box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace vsprefill::kernels::cuda::sm90
