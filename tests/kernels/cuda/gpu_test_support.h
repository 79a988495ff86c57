// Buffers, random tensors and comparisons of the GPU tests.
#pragma once

#include <cuda_runtime_api.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/scalar.h"
#include "kernels/sparse_index.h"
#include "kernels/tensor_view.h"

namespace vsprefill::kernels::testing {

#define VSP_ASSERT_CUDA(call)                                           \
  do {                                                                  \
    const cudaError_t vsp_error = (call);                               \
    ASSERT_EQ(vsp_error, cudaSuccess) << cudaGetErrorString(vsp_error); \
  } while (0)

/// Waits for the device; false (with the reason in the test log) after an error.
inline bool Synchronize() {
  const cudaError_t error = cudaDeviceSynchronize();
  EXPECT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
  return error == cudaSuccess;
}

/// Device memory; filled with 0xff bytes (NaN, -1) unless made from a host vector.
class DeviceBuffer {
 public:
  DeviceBuffer() = default;
  explicit DeviceBuffer(int64_t bytes, bool poison = true) : bytes_(bytes) {
    if (bytes == 0) return;
    const cudaError_t error = cudaMalloc(&data_, bytes);
    EXPECT_EQ(error, cudaSuccess) << cudaGetErrorString(error) << ", " << bytes << " bytes";
    if (error == cudaSuccess && poison) {
      EXPECT_EQ(cudaMemset(data_, 0xff, bytes), cudaSuccess);
    }
  }
  template <typename T>
  explicit DeviceBuffer(const std::vector<T>& host)
      : DeviceBuffer(static_cast<int64_t>(host.size() * sizeof(T)), false) {
    if (!host.empty()) {
      EXPECT_EQ(cudaMemcpy(data_, host.data(), bytes_, cudaMemcpyHostToDevice), cudaSuccess);
    }
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept { *this = std::move(other); }
  DeviceBuffer& operator=(DeviceBuffer&& other) noexcept {
    std::swap(data_, other.data_);
    std::swap(bytes_, other.bytes_);
    return *this;
  }
  ~DeviceBuffer() { cudaFree(data_); }

  void* data() const { return data_; }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }
  template <typename T>
  std::vector<T> Download() const {
    std::vector<T> host(bytes_ / sizeof(T));
    const cudaError_t error = cudaMemcpy(host.data(), data_, bytes_, cudaMemcpyDeviceToHost);
    EXPECT_EQ(error, cudaSuccess) << cudaGetErrorString(error);
    return host;
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_ = 0;
};

/// A host tensor of one dtype, as raw bytes, so that reference and device see the same values.
struct HostTensor {
  DType dtype = DType::kF32;
  std::vector<char> bytes;

  HostTensor() = default;
  HostTensor(DType type, int64_t elements) : dtype(type), bytes(elements * SizeOf(type)) {}
  int64_t size() const { return static_cast<int64_t>(bytes.size()) / SizeOf(dtype); }
  void* data() { return bytes.data(); }
  const void* data() const { return bytes.data(); }
  float operator[](int64_t i) const { return LoadScalar(bytes.data(), i, dtype); }
  void Set(int64_t i, float x) { StoreScalar(bytes.data(), i, dtype, x); }
};

inline HostTensor RandomTensor(DType dtype, int64_t elements, std::mt19937& rng,
                               float scale = 1.0f) {
  HostTensor tensor(dtype, elements);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < elements; ++i) tensor.Set(i, normal(rng) * scale);
  return tensor;
}

inline HostTensor DownloadTensor(const DeviceBuffer& buffer, DType dtype) {
  HostTensor tensor;
  tensor.dtype = dtype;
  tensor.bytes = buffer.Download<char>();
  return tensor;
}

/// Fails with the worst element where ||a - b|| / ||b|| or max |a - b| is above its bound, or
/// where anything is not finite.
inline void ExpectClose(const HostTensor& actual, const HostTensor& expected, double relative,
                        double absolute, const std::string& what) {
  ASSERT_EQ(actual.size(), expected.size()) << what;
  double difference = 0, norm = 0, worst = -1;
  int64_t worst_at = 0, not_finite = 0, first_bad = -1;
  for (int64_t i = 0; i < actual.size(); ++i) {
    const double a = actual[i], b = expected[i];
    if (!std::isfinite(a)) {
      if (not_finite++ == 0) first_bad = i;
      continue;
    }
    difference += (a - b) * (a - b);
    norm += b * b;
    if (std::abs(a - b) > worst) {
      worst = std::abs(a - b);
      worst_at = i;
    }
  }
  EXPECT_EQ(not_finite, 0) << what << ": first not finite at element " << first_bad << " of "
                           << actual.size();
  if (actual.size() == not_finite) return;
  const double error = std::sqrt(difference / (norm > 0 ? norm : 1));
  EXPECT_LE(error, relative) << what << ": relative error";
  EXPECT_LE(worst, absolute) << what << ": element " << worst_at << " is " << actual[worst_at]
                             << ", expected " << expected[worst_at];
}

inline HostTensor FloatTensor(const std::vector<float>& values) {
  HostTensor tensor(DType::kF32, static_cast<int64_t>(values.size()));
  if (!values.empty()) std::memcpy(tensor.data(), values.data(), tensor.bytes.size());
  return tensor;
}

/// A sparse index on the host and its copy on the device.
struct HostIndex {
  std::vector<int32_t> verticals, num_verticals, bands, num_bands;
  std::vector<uint32_t> bits;
  SparseIndexView host, device;
  std::vector<DeviceBuffer> buffers;

  /// Each group: column c is a vertical with probability `vertical`, block b >= 2 a band with
  /// probability `band`; blocks 0 and 1 always (the local band).
  HostIndex(int num_groups, int64_t kv_tokens, int row_tile, double vertical, double band,
            int64_t dense_from, std::mt19937& rng) {
    host.num_groups = num_groups;
    host.vertical_stride = kv_tokens + 3;
    host.band_stride = BandWords(kv_tokens, row_tile) + 1;
    host.band_list_stride = BandBlocks(kv_tokens, row_tile) + 2;
    host.dense_from = dense_from;
    verticals.assign(num_groups * host.vertical_stride, -7);
    bands.assign(num_groups * host.band_list_stride, -7);
    bits.assign(num_groups * host.band_stride, 0);
    num_verticals.assign(num_groups, 0);
    num_bands.assign(num_groups, 0);
    std::uniform_real_distribution<double> uniform;
    for (int g = 0; g < num_groups; ++g) {
      for (int64_t c = 0; c < kv_tokens; ++c) {
        if (uniform(rng) < vertical) {
          verticals[g * host.vertical_stride + num_verticals[g]++] = static_cast<int32_t>(c);
        }
      }
      for (int64_t b = 0; b < BandBlocks(kv_tokens, row_tile); ++b) {
        if (b >= 2 && uniform(rng) >= band) continue;
        bands[g * host.band_list_stride + num_bands[g]++] = static_cast<int32_t>(b);
        bits[g * host.band_stride + b / 32] |= 1u << (b % 32);
      }
    }
    host.verticals = verticals.data();
    host.num_verticals = num_verticals.data();
    host.band_bits = bits.data();
    host.bands = bands.data();
    host.num_bands = num_bands.data();
    buffers.emplace_back(verticals);
    buffers.emplace_back(num_verticals);
    buffers.emplace_back(bits);
    buffers.emplace_back(bands);
    buffers.emplace_back(num_bands);
    device = host;
    device.verticals = buffers[0].as<int32_t>();
    device.num_verticals = buffers[1].as<int32_t>();
    device.band_bits = buffers[2].as<uint32_t>();
    device.bands = buffers[3].as<int32_t>();
    device.num_bands = buffers[4].as<int32_t>();
  }
  HostIndex(const HostIndex&) = delete;
};

}  // namespace vsprefill::kernels::testing
