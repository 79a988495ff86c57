// Descriptors of the copy engine (TMA).
#pragma once

#include <cuda.h>

#include <cstdint>

namespace vsprefill::kernels::cuda::sm90 {

/// Describes bf16 rows [heads, tokens, head_dim] for boxes of 64 elements x 64 tokens x 1 head,
/// 128-byte swizzle; what lies outside reads as zero. Strides count elements. False where the copy
/// engine cannot address the tensor (address or strides not multiples of 16 bytes, strides of 2^40
/// bytes and more) or the driver has no such call.
bool DescribeRows(CUtensorMap* map, const void* rows, int64_t head_dim, int64_t tokens,
                  int64_t heads, int64_t token_stride, int64_t head_stride);

}  // namespace vsprefill::kernels::cuda::sm90
