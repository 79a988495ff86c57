#include "kernels/cpu/isa.h"

#include <immintrin.h>

#include <algorithm>
#include <atomic>
#include <chrono>

namespace vsprefill::kernels {
namespace {

#define VSP_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

// Twelve chains hide the latency of either instruction; the empty asm keeps the loops.
constexpr int kChains = 12, kSteps = 400;

VSP_BF16 void RunBf16Dots() {
  __m512 sums[kChains] = {};
  const __m512bh factor = {};
  for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      sums[i] = _mm512_dpbf16_ps(sums[i], factor, factor);
      asm volatile("" : "+v"(sums[i]));
    }
  }
}

VSP_BF16 void RunFmas() {
  __m512 sums[kChains] = {};
  const __m512 factor = {};
  for (int step = 0; step < kSteps; ++step) {
#pragma GCC unroll 12
    for (int i = 0; i < kChains; ++i) {
      sums[i] = _mm512_fmadd_ps(factor, factor, sums[i]);
      asm volatile("" : "+v"(sums[i]));
    }
  }
}

double BestSeconds(void (*run)()) {
  double best = 1;
  for (int i = 0; i < 40; ++i) {  // a fraction of a millisecond; the first ones warm up
    const auto begin = std::chrono::steady_clock::now();
    run();
    const std::chrono::duration<double> seconds = std::chrono::steady_clock::now() - begin;
    best = std::min(best, seconds.count());
  }
  return best;
}

/// A bfloat16 dot product does the work of two FMAs; Intel's processors with AMX issue it so seldom
/// that FMAs on widened values are much faster, AMD's do not. Measured once per process.
bool Bf16DotPays() {
  static const bool pays = BestSeconds(RunBf16Dots) <= 2.5 * BestSeconds(RunFmas);
  return pays;
}

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
  if (CpuIsaSupported(CpuIsa::kAvx512Bf16) && Bf16DotPays()) return CpuIsa::kAvx512Bf16;
  if (CpuIsaSupported(CpuIsa::kAvx512)) return CpuIsa::kAvx512;
  return CpuIsa::kAvx2;
}

bool CpuBf16IsSlow() {
  return CpuIsaSupported(CpuIsa::kAvx512Bf16) && !__builtin_cpu_supports("amx-bf16") &&
         !Bf16DotPays();
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
