// Descriptors of the copy engine (TMA).
#pragma once

#include <cuda.h>

#include <array>
#include <cstdint>

namespace vsprefill::kernels::cuda::sm90 {

/// Describes a bf16 tensor of three dimensions, the contiguous one first, for copies of boxes of
/// box[0] = 64 elements = 128 bytes each, 128-byte swizzle; what lies outside reads as zero. Sizes,
/// strides (of the second and third dimension) and box count elements. False where the copy engine
/// cannot address the tensor (address or strides not multiples of 16 bytes, strides of 2^40 bytes
/// and more, boxes of more than 256 per dimension) or the driver has no such call.
bool DescribeTensor(CUtensorMap* map, const void* data, const std::array<int64_t, 3>& sizes,
                    const std::array<int64_t, 2>& strides, const std::array<int, 3>& box);

}  // namespace vsprefill::kernels::cuda::sm90
