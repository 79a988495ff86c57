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

bool DescribeTensor(CUtensorMap* map, const void* data, const std::array<int64_t, 3>& sizes,
                    const std::array<int64_t, 2>& strides, const std::array<int, 3>& box) {
  static const EncodeFn encode = FindEncode();
  if (encode == nullptr) return false;
  const cuuint64_t size[3] = {static_cast<cuuint64_t>(sizes[0]), static_cast<cuuint64_t>(sizes[1]),
                              static_cast<cuuint64_t>(sizes[2])};
  const cuuint64_t stride[2] = {static_cast<cuuint64_t>(strides[0]) * 2,
                                static_cast<cuuint64_t>(strides[1]) * 2};
  const cuuint32_t extent[3] = {static_cast<cuuint32_t>(box[0]), static_cast<cuuint32_t>(box[1]),
                                static_cast<cuuint32_t>(box[2])};
  const cuuint32_t steps[3] = {1, 1, 1};
  return encode(map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, const_cast<void*>(data), size, stride,
                extent, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace vsprefill::kernels::cuda::sm90
