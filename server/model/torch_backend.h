// Dense linear algebra by LibTorch behind plain pointers: the rest of the model sees no torch
// header and no exception. One instance per process and device; engine thread only.
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/tensor_view.h"
#include "server/attention/attention_method.h"
#include "server/base/allocator.h"
#include "server/model/linear.h"

namespace vsprefill::model {

class TorchBackend {
 public:
  /// CPU: sets the number of intra-op threads (0: all cores) and lets our kernels run on LibTorch's
  /// pool. CUDA: takes device 0 and a stream of its own; UNAVAILABLE where there is none (one line
  /// says why).
  static absl::StatusOr<std::unique_ptr<TorchBackend>> Create(kernels::DeviceKind device,
                                                              int cpu_threads);
  virtual ~TorchBackend() = default;

  virtual kernels::DeviceKind device() const = 0;
  virtual std::string description() const = 0;
  virtual Allocator& allocator() = 0;
  virtual kernels::Stream stream() const = 0;
  /// Dense attention of the device's library; null where our own kernel is the best there is.
  virtual attention::LibraryAttentionFn library_attention() const = 0;

  /// Must be called before a batch of the calls below by the thread that makes them.
  virtual absl::Status EnterThread() = 0;
  /// CUDA: all of these enqueue on stream() unless they say otherwise.
  virtual absl::StatusOr<Activation> Linear(const LinearLayer& layer, const void* x,
                                            int64_t rows) = 0;
  /// out[i] = table[ids[i]]; ids in host memory, table [vocab, width], out [ids.size(), width].
  /// REQUIRES: 0 <= id < vocab.
  virtual absl::Status Embed(absl::Span<const int32_t> ids, const void* table, int64_t vocab,
                             int64_t width, kernels::DType dtype, void* out) = 0;
  /// log_softmax(logits)[i, targets[i]] and whether targets[i] is the arg max; logits
  /// [targets.size(), vocab] on the device; results in host memory, waits for them.
  virtual absl::Status Score(const void* logits, int64_t vocab, kernels::DType dtype,
                             absl::Span<const int32_t> targets, float* log_probs,
                             uint8_t* top1) = 0;
  /// The tensor as float32 in host memory; waits for it.
  virtual absl::Status ToHostFloat(const void* data, int64_t elements, kernels::DType dtype,
                                   float* out) = 0;
  /// Host to device; on the CPU a plain copy. Waits until the source may be reused.
  virtual absl::Status Upload(const void* host, int64_t bytes, void* device) = 0;
  /// Device to host after all enqueued work; done on return.
  virtual absl::Status Download(const void* device, int64_t bytes, void* host) = 0;
  virtual absl::Status Synchronize() = 0;
};

}  // namespace vsprefill::model
