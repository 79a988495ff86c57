// Shared by the kernel suites: seeded tensors, comparison with a report that names the case, and a
// scope that forces an instruction set.
#pragma once

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "kernels/cpu/isa.h"
#include "kernels/scalar.h"
#include "kernels/tensor_view.h"

namespace vsprefill::kernels::testing {

/// A tensor of `dtype` in host memory; values are rounded to the dtype when they are written, so an
/// oracle sees what the kernel sees.
class Tensor {
 public:
  Tensor(int64_t elements, DType dtype)
      : dtype_(dtype), bytes_(static_cast<size_t>(elements * SizeOf(dtype))) {}
  Tensor(int64_t elements, DType dtype, uint32_t seed, float deviation = 1.0f)
      : Tensor(elements, dtype) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal(0.0f, deviation);
    for (int64_t i = 0; i < elements; ++i) Set(i, normal(generator));
  }
  void* data() { return bytes_.data(); }
  const void* data() const { return bytes_.data(); }
  int64_t size() const { return static_cast<int64_t>(bytes_.size()) / SizeOf(dtype_); }
  DType dtype() const { return dtype_; }
  float operator[](int64_t i) const { return LoadScalar(bytes_.data(), i, dtype_); }
  void Set(int64_t i, float value) { StoreScalar(bytes_.data(), i, dtype_, value); }
  bool operator==(const Tensor& other) const { return bytes_ == other.bytes_; }

 private:
  DType dtype_;
  std::vector<char> bytes_;
};

/// |actual - expected| <= absolute + relative * |expected| for each element.
struct Tolerance {
  double absolute = 0, relative = 0;
};

inline ::testing::AssertionResult Near(const Tensor& actual, const Tensor& expected,
                                       Tolerance tolerance, const std::string& what) {
  for (int64_t i = 0; i < expected.size(); ++i) {
    const double a = actual[i], e = expected[i];
    if (!(std::abs(a - e) <= tolerance.absolute + tolerance.relative * std::abs(e))) {
      return ::testing::AssertionFailure() << what << ": element " << i << " of " << expected.size()
                                           << " is " << a << ", expected " << e;
    }
  }
  return ::testing::AssertionSuccess();
}

/// Forces an instruction set; skip the test where !supported().
class ScopedIsa {
 public:
  explicit ScopedIsa(CpuIsa isa) : before_(ActiveCpuIsa()), supported_(SetCpuIsa(isa)) {}
  ~ScopedIsa() { SetCpuIsa(before_); }
  ScopedIsa(const ScopedIsa&) = delete;
  ScopedIsa& operator=(const ScopedIsa&) = delete;
  bool supported() const { return supported_; }

 private:
  CpuIsa before_;
  bool supported_;
};

inline constexpr CpuIsa kAllIsas[] = {CpuIsa::kAvx2, CpuIsa::kAvx512, CpuIsa::kAvx512Bf16};
inline constexpr DType kAllDTypes[] = {DType::kBF16, DType::kF32};

/// "avx512_bf16_bfloat16", for the names of parametrised tests.
inline std::string IsaDTypeName(CpuIsa isa, DType dtype) {
  return std::string(CpuIsaName(isa)) + "_" + Name(dtype);
}

}  // namespace vsprefill::kernels::testing
