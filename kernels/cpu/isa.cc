#include "kernels/cpu/isa.h"

#include <atomic>

namespace vsprefill::kernels {
namespace {

std::atomic<int>& Active() {
  static std::atomic<int> active{static_cast<int>(DetectCpuIsa())};
  return active;
}

}  // namespace

bool CpuIsaSupported(CpuIsa isa) {
  // libgcc asks both the processor and, through XGETBV, the operating system.
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq");
  switch (isa) {
    case CpuIsa::kAvx2:
      return avx2;
    case CpuIsa::kAvx512:
      return avx512;
    case CpuIsa::kAvx512Bf16:
      return avx512 && __builtin_cpu_supports("avx512bf16");
  }
  return false;
}

CpuIsa DetectCpuIsa() {
  if (CpuIsaSupported(CpuIsa::kAvx512Bf16)) return CpuIsa::kAvx512Bf16;
  if (CpuIsaSupported(CpuIsa::kAvx512)) return CpuIsa::kAvx512;
  return CpuIsa::kAvx2;
}

CpuIsa ActiveCpuIsa() { return static_cast<CpuIsa>(Active().load(std::memory_order_relaxed)); }

bool SetCpuIsa(CpuIsa isa) {
  if (!CpuIsaSupported(isa)) return false;
  Active().store(static_cast<int>(isa), std::memory_order_relaxed);
  return true;
}

const char* CpuIsaName(CpuIsa isa) {
  switch (isa) {
    case CpuIsa::kAvx2:
      return "avx2";
    case CpuIsa::kAvx512:
      return "avx512";
    case CpuIsa::kAvx512Bf16:
      return "avx512_bf16";
  }
  return "unknown";
}

}  // namespace vsprefill::kernels
