// The one interface behind which every attention method stands: a method decides, for one layer and
// a batch of sequences, which keys each row reads, and runs the kernel that reads them.
//
// A method is made for one request, with the request's parameters. Called on the engine thread
// only. One file per method; methods.inc lists them, sparse_method.h holds what the sparse ones
// share (docs/adding_a_method.md).
#pragma once

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "kernels/kernel_set.h"
#include "server/base/allocator.h"

namespace vsprefill::attention {

/// Where one layer's pair counts go, per sequence: PairCounts in memory of the device; read after
/// the request's last layer has completed.
struct SequenceCall {
  kernels::AttentionSequence attention;  // q, k, v, out, sizes; the index is the method's to set
  int64_t prompt_tokens = 0;             // length of the whole prompt (>= kv_tokens)
  /// VSIndexer logits of tokens [0, kv_tokens): [num_kv_heads, logit_stride]; null if the method
  /// needs none.
  const float* vertical_logits = nullptr;
  const float* slash_logits = nullptr;
  int64_t logit_stride = 0;
  kernels::PairCounts* counts = nullptr;  // added to; may be null
};

class RecallProbe;  // recall_probe.h

/// One layer's attention for a batch.
struct AttentionCall {
  int layer = 0;
  kernels::AttentionShape shape;
  absl::Span<SequenceCall> sequences;
  /// The model's RoPE tables in memory of the device: float32 [>= every kv_tokens, head_dim / 2],
  /// attention factor included. For methods that look at queries and keys as they were before it.
  const float* rope_cos = nullptr;
  const float* rope_sin = nullptr;
  kernels::Stream stream = nullptr;
  /// Shown the first sequence once its attention was run; null: none.
  RecallProbe* probe = nullptr;
};

/// Dense attention of a device library (cuDNN through LibTorch), passed in by the model; null where
/// our own kernel is to be used.
using LibraryAttentionFn = std::function<absl::Status(
    const kernels::AttentionShape&, absl::Span<const kernels::AttentionSequence>, kernels::Stream)>;

/// What a method may use; outlives it.
struct MethodContext {
  const kernels::KernelSet* kernels = nullptr;
  Allocator* allocator = nullptr;
  LibraryAttentionFn library_attention;
  int num_layers = 0;
  /// Width of the attention, by which its cost is guessed before it runs (crossover.h); 0: unknown.
  int num_q_heads = 0, head_dim = 0;
  /// Per-layer, per-group factors on the selection threshold, [num_layers][num_kv_heads]; empty:
  /// all 1.
  std::vector<std::vector<float>> threshold_scale;
  /// The model's SeerAttention gate, per layer; empty: none is loaded.
  std::vector<kernels::SeerGateLayer> seer_gate;
};

/// How much the index of the last chunk's first sequence held, and what choosing it cost.
struct IndexStatistics {
  /// Columns and blocks of 64 distances per layer and KV group, int32 [num_layers, num_groups] in
  /// memory of the device, valid once the layer's work is done; rows before `first_layer` are not
  /// set. Null: the method has no index, or the last chunk was dense.
  const int32_t* num_verticals = nullptr;
  const int32_t* num_bands = nullptr;
  int first_layer = 0, num_layers = 0, num_groups = 0;
  /// Time spent on selection since the method was made (CPU; 0 on CUDA, where it is enqueued).
  double select_seconds = 0;
};

class AttentionMethod {
 public:
  virtual ~AttentionMethod() = default;
  virtual absl::string_view name() const = 0;
  /// Parameters as resolved for this request, by name.
  virtual const std::map<std::string, double>& parameters() const = 0;
  /// True if the model must compute VSIndexer logits and keep them beside the KV.
  virtual bool needs_indexer_logits() const { return false; }
  /// Whether a prompt of so many tokens is not simply computed densely.
  virtual bool IsSparse(int64_t /*prompt_tokens*/) const { return false; }
  virtual IndexStatistics index_statistics() const { return {}; }
  /// Layers of which at least one chunk so far ran densely because its index would have been slower
  /// (crossover.h).
  virtual int dense_fallback_layers() const { return 0; }
  /// Runs attention of one layer. CUDA: enqueues on call.stream. The method's buffers are reused by
  /// the next call, so all calls of one method use one stream, and it outlives the enqueued work.
  virtual absl::Status Attend(const AttentionCall& call) = 0;
};

struct ParameterSpec {
  std::string name;
  double default_value, min, max;
  std::string help;
  bool whole = false;                // only whole numbers
  std::vector<double> allowed = {};  // only these, where not empty
};

struct MethodSpec {
  std::string name;
  std::string help;
  bool needs_indexer = false;
  bool needs_seer_gate = false;
  std::vector<ParameterSpec> parameters;
  /// Whether a device's kernels can run it; null: all can.
  bool (*runs_on)(const kernels::KernelSet& kernels) = nullptr;
  std::function<std::unique_ptr<AttentionMethod>(const MethodContext& context,
                                                 const std::map<std::string, double>& parameters)>
      create;
};

/// All methods this binary has, by name.
const std::vector<MethodSpec>& MethodSpecs();

/// Whether the method can run on the device of `kernels`.
bool RunsOn(const MethodSpec& spec, const kernels::KernelSet& kernels);

/// A method with `overrides` on top of its defaults, for one request. INVALID_ARGUMENT for an
/// unknown method or parameter, or a value out of range; the message names the allowed ones.
/// UNIMPLEMENTED for a method that does not run on the context's device.
absl::StatusOr<std::unique_ptr<AttentionMethod>> CreateMethod(
    const MethodContext& context, absl::string_view name,
    const std::map<std::string, double>& overrides);

}  // namespace vsprefill::attention
