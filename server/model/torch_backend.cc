#include "server/model/torch_backend.h"

#include <ATen/Parallel.h>
#include <omp.h>

#include <algorithm>
#include <cstring>
#include <thread>

#include "absl/strings/str_cat.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/parallel.h"
#include "server/base/status_macros.h"
#include "server/model/torch_backend_cuda.h"
#include "server/model/torch_guard.h"
#include "server/model/torch_ops.h"

namespace vsprefill::model {
namespace {

// Kernels and linear layers share the OpenMP threads that LibTorch uses.
int OpenMpWorkers() { return at::get_num_threads(); }

void RunOnOpenMp(void (*body)(void* context, int worker), void* context) {
#pragma omp parallel num_threads(OpenMpWorkers())
  body(context, omp_get_thread_num());
}

class CpuBackend final : public TorchBackend {
 public:
  explicit CpuBackend(int threads) : threads_(threads) {}

  kernels::DeviceKind device() const override { return kernels::DeviceKind::kCpu; }
  std::string description() const override {
    return absl::StrCat("cpu (", kernels::CpuIsaName(kernels::ActiveCpuIsa()), ", ", threads_,
                        threads_ == 1 ? " thread)" : " threads)");
  }
  Allocator& allocator() override { return HostAllocator(); }
  kernels::Stream stream() const override { return nullptr; }
  attention::LibraryAttentionFn library_attention() const override { return nullptr; }

  absl::Status EnterThread() override {
    // OpenMP keeps the number of threads per calling thread.
    if (omp_get_max_threads() != threads_) omp_set_num_threads(threads_);
    return absl::OkStatus();
  }
  absl::StatusOr<Activation> Linear(const LinearLayer& layer, const void* x,
                                    int64_t rows) override {
    return layer.Run(x, rows);
  }
  absl::Status Embed(absl::Span<const int32_t> ids, const void* table, int64_t vocab, int64_t width,
                     kernels::DType dtype, void* out) override {
    const int64_t row_bytes = width * kernels::SizeOf(dtype);
    for (size_t i = 0; i < ids.size(); ++i) {
      std::memcpy(static_cast<char*>(out) + i * row_bytes,
                  static_cast<const char*>(table) + ids[i] * row_bytes, row_bytes);
    }
    return absl::OkStatus();
  }
  absl::Status Score(const void* logits, int64_t vocab, kernels::DType dtype,
                     absl::Span<const int32_t> targets, float* log_probs, uint8_t* top1) override {
    return TorchScore(logits, vocab, dtype, targets, log_probs, top1, kernels::DeviceKind::kCpu);
  }
  absl::Status ToHostFloat(const void* data, int64_t elements, kernels::DType dtype,
                           float* out) override {
    return TorchToHostFloat(data, elements, dtype, out, kernels::DeviceKind::kCpu);
  }
  absl::Status Upload(const void* host, int64_t bytes, void* device) override {
    if (bytes > 0) std::memcpy(device, host, bytes);
    return absl::OkStatus();
  }
  absl::Status Download(const void* device, int64_t bytes, void* host) override {
    return Upload(device, bytes, host);
  }
  absl::Status Synchronize() override { return absl::OkStatus(); }

 private:
  const int threads_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<TorchBackend>> TorchBackend::Create(kernels::DeviceKind device,
                                                                   int cpu_threads) {
  const int cores = static_cast<int>(std::max(1u, std::thread::hardware_concurrency()));
  if (cpu_threads < 0 || cpu_threads > 1024) {
    return absl::InvalidArgumentError(
        absl::StrCat("cpu_threads ", cpu_threads, " is not in 0 (all cores) to 1024"));
  }
  const int threads = cpu_threads > 0 ? cpu_threads : cores;
  std::unique_ptr<TorchBackend> backend;
  VSP_RETURN_IF_ERROR(TorchGuard("LibTorch start", [&] {
    at::set_num_threads(threads);
    return absl::OkStatus();
  }));
  kernels::SetParallelRunner({&OpenMpWorkers, &RunOnOpenMp});
  if (device == kernels::DeviceKind::kCuda) return CreateCudaBackend();
  return std::make_unique<CpuBackend>(threads);
}

}  // namespace vsprefill::model
