// The model and what all measurements of vsprefill-eval share: methods made from a plan, caches,
// and a copy of the kernels that selects but does not attend.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "bench/eval/plan.h"
#include "server/attention/attention_method.h"
#include "server/kv/kv_cache.h"
#include "server/model/transformer.h"
#include "server/model/vs_indexer.h"

namespace vsprefill::training {
class Teacher;
}

namespace vsprefill::eval {

/// A method at one density: what is measured.
struct Selection {
  const MethodPlan* plan = nullptr;
  double wanted = 0;   // density
  size_t setting = 0;  // of plan->settings
  double t = 0;        // of the setting's knob

  std::map<std::string, double> parameters() const { return plan->settings[setting].At(t); }
};

/// Shares of the causal pairs of all layers and heads.
struct Shares {
  double density = 0, cost_ratio = 0;
  std::vector<double> density_by_layer;
};

class Lab {
 public:
  /// Errors as Transformer::Load. Texts and prompts with their answers hold at most `max_tokens`.
  static absl::StatusOr<std::unique_ptr<Lab>> Create(const model::LoadOptions& options,
                                                     int64_t max_tokens);

  ~Lab();

  /// Captures dense activations.
  training::Teacher& teacher() { return *teacher_; }
  model::Transformer& model() { return *model_; }
  /// Null where the model has none.
  const model::VsIndexer* indexer() const { return indexer_.get(); }
  int64_t max_tokens() const { return max_tokens_; }
  /// The model's RoPE tables on the device, for methods that undo the rotation.
  const float* rope_cos() const { return static_cast<const float*>(rope_cos_.data()); }
  const float* rope_sin() const { return static_cast<const float*>(rope_sin_.data()); }

  /// Whether this binary and model have the method; `why_not` says what is missing.
  bool Has(const MethodPlan& plan, std::string* why_not);
  /// `select_only`: a method that chooses its index and leaves the output unwritten.
  absl::StatusOr<std::unique_ptr<attention::AttentionMethod>> Make(const Selection& selection,
                                                                   bool select_only);
  absl::StatusOr<std::unique_ptr<attention::AttentionMethod>> MakeDense();

  /// An empty cache, for logits of the indexer as well where the model has one.
  absl::StatusOr<std::shared_ptr<kv::KvCache>> MakeCache(int64_t tokens);

  /// Pair counts per layer in the device's memory, zeroed.
  absl::StatusOr<Buffer> MakeCounts();
  absl::StatusOr<Shares> ReadCounts(const Buffer& counts);

 private:
  Lab();

  int64_t max_tokens_ = 0;
  std::unique_ptr<training::Teacher> teacher_;
  model::Transformer* model_ = nullptr;  // the teacher's
  std::unique_ptr<model::VsIndexer> indexer_;
  Buffer rope_cos_, rope_sin_;  // [max_tokens, head_dim / 2]
  kernels::KernelSet select_only_kernels_;
  attention::MethodContext select_only_;
  std::unique_ptr<kv::KvPool> pool_;
};

double Seconds();

}  // namespace vsprefill::eval
