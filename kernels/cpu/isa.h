// Instruction sets of the CPU kernels, chosen at run time (never by -march=native).
#pragma once

namespace vsprefill::kernels {

enum class CpuIsa : int { kAvx2 = 0, kAvx512 = 1, kAvx512Bf16 = 2 };

/// Fastest instruction set that this processor and operating system support: the highest one, but
/// AVX-512 bf16 only where a short measurement shows that its dot product pays. The binary needs
/// AVX2 and FMA; without them this returns kAvx2 and CpuIsaSupported(kAvx2) is false.
CpuIsa DetectCpuIsa();
bool CpuIsaSupported(CpuIsa isa);
/// Whether a library that multiplies bfloat16 with this processor's own instructions would be
/// faster on values widened to float32: it has the dot product, which does not pay, and no AMX.
bool CpuBf16IsSlow();
/// The instruction set in use: the detected one, or a lower one set by SetCpuIsa (--cpu_isa).
CpuIsa ActiveCpuIsa();
/// Returns false and changes nothing where `isa` is not supported.
bool SetCpuIsa(CpuIsa isa);
const char* CpuIsaName(CpuIsa isa);  // "avx2", "avx512", "avx512_bf16"

}  // namespace vsprefill::kernels
