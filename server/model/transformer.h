// The transformer forward pass over a KV cache: dense linear algebra by LibTorch (hidden in the
// .cc), everything between by our kernels. One instance per process and device; not thread-safe
// (engine thread).
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/tensor_view.h"
#include "server/attention/attention_method.h"
#include "server/base/allocator.h"
#include "server/kv/kv_cache.h"
#include "server/model/model_config.h"

namespace vsprefill::model {

struct LoadOptions {
  std::string model_dir;
  /// Empty: model_dir/indexer.safetensors where it exists; "none": without.
  std::string indexer_path;
  /// Likewise for model_dir/seer_gate.safetensors, SeerAttention's gate.
  std::string seer_gate_path;
  kernels::DeviceKind device = kernels::DeviceKind::kCpu;
  kernels::DType dtype = kernels::DType::kBF16;
  int cpu_threads = 0;  // 0: all cores
};

/// Tokens [position_begin, position_begin + ids.size()) of one prompt.
struct SequenceChunk {
  absl::Span<const int32_t> ids;
  int64_t position_begin = 0;  // == cache->num_tokens()
  int64_t prompt_tokens = 0;   // length of the whole prompt
  kv::KvCache* cache = nullptr;
  kernels::PairCounts* counts = nullptr;  // [num_layers], memory of the device; may be null
};

enum class LogitsMode { kNone, kLast, kScores };

/// Logits of tokens [first, first + rows) of a chunk: [rows, vocab_size] of the model's dtype in
/// memory of the device, complete, valid during the call that shows them.
struct LogitsBlock {
  size_t sequence = 0;
  int64_t first = 0, rows = 0;
  const void* data = nullptr;
};

struct ForwardOptions {
  attention::AttentionMethod* method = nullptr;
  LogitsMode logits = LogitsMode::kNone;
  /// The last layer's attention runs only for rows whose logits are wanted; true: for every row.
  /// For a method that watches attention instead of serving logits (the trainer's).
  bool all_rows = false;
  /// Watches the attention of its layer, of the first sequence; null: none.
  attention::RecallProbe* probe = nullptr;
  /// Called on the engine thread after layer `layer` of the chunk was computed (CPU) or enqueued
  /// (CUDA; the caller records an event on stream()). An error ends the forward call with it: this
  /// is where cancellation and deadlines are checked.
  std::function<absl::Status(int layer)> after_layer;
  /// kScores: shown every block of logits, in order. For measurements; an error ends the call.
  std::function<absl::Status(const LogitsBlock& block)> watch_logits;
};

struct ForwardResult {
  /// kLast: float32 [num_sequences][vocab_size], logits of each chunk's last token (host).
  std::vector<std::vector<float>> logits;
  /// kScores: for token i of the chunk (but its last) the log-probability of ids[i + 1] and whether
  /// it is the arg max, [num_sequences][tokens - 1].
  std::vector<std::vector<float>> log_probs;
  std::vector<std::vector<uint8_t>> top1;
  /// Seconds spent in indexer, attention and linear layers (CPU only; 0 on CUDA).
  double indexer_seconds = 0, attention_seconds = 0, linear_seconds = 0;
};

class Transformer {
 public:
  /// Loads a Hugging Face directory. INVALID_ARGUMENT: bad file or unsupported model, one clear
  /// line; FAILED_PRECONDITION: an indexer or gate trained for other weights; NOT_FOUND: no such
  /// file.
  static absl::StatusOr<std::unique_ptr<Transformer>> Load(const LoadOptions& options);
  virtual ~Transformer() = default;

  virtual const ModelConfig& config() const = 0;
  virtual const kv::KvLayout& kv_layout() const = 0;  // kv_id set
  virtual const std::string& weights_id() const = 0;
  virtual bool has_indexer() const = 0;
  bool has_seer_gate() const { return !method_context().seer_gate.empty(); }
  virtual std::string device_description() const = 0;
  virtual kernels::DeviceKind device() const = 0;
  virtual Allocator& allocator() = 0;
  virtual kernels::Stream stream() const = 0;
  /// For CreateMethod.
  virtual const attention::MethodContext& method_context() const = 0;
  virtual const kernels::KernelSet& kernels() const = 0;

  /// Runs one chunk of each sequence, appends K, V (and logits where the method needs them) to the
  /// caches and advances their num_tokens. All sequences share the method. On error the caches'
  /// num_tokens are unchanged.
  virtual absl::StatusOr<ForwardResult> Forward(absl::Span<const SequenceChunk> batch,
                                                const ForwardOptions& options) = 0;
  /// Waits until all enqueued work is done (no-op on the CPU). INTERNAL on a device error.
  virtual absl::Status Synchronize() = 0;
  /// Copies between host and device memory (pair counts), after all enqueued work; done on return.
  virtual absl::Status CopyToHost(const void* device, int64_t bytes, void* host) {
    if (bytes > 0) std::memcpy(host, device, bytes);
    return absl::OkStatus();
  }
  virtual absl::Status CopyToDevice(const void* host, int64_t bytes, void* device) {
    if (bytes > 0) std::memcpy(device, host, bytes);
    return absl::OkStatus();
  }
};

}  // namespace vsprefill::model
