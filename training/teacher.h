// The frozen backbone as a teacher: one forward pass of a text gives every layer's post-RoPE keys
// and values and the column and diagonal sums of its true attention. Uses the server's own
// transformer, through an attention method that watches and then attends densely. Not thread-safe.
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/kv/kv_cache.h"
#include "server/kv/kv_pool.h"
#include "server/model/transformer.h"
#include "training/student.h"

namespace vsprefill::training {

/// What one forward pass left behind; tensors on the model's device, in the model's dtype unless
/// said.
struct Capture {
  int64_t tokens = 0;
  torch::Tensor columns, diagonals;  // float32 [layers, groups, tokens]; 0 where not asked for
  torch::Tensor
      queries;  // [layers, tokens, num_q_heads, head_dim], after RoPE; only where asked for
  /// Per layer [groups, tokens, head_dim], after RoPE; views into the teacher's cache.
  std::vector<torch::Tensor> keys, values;
};

class Teacher {
 public:
  /// `max_tokens`: longest text. Errors as Transformer::Load and KvCache::Create.
  static absl::StatusOr<std::unique_ptr<Teacher>> Create(const model::LoadOptions& options,
                                                         int64_t max_tokens);

  /// Runs a text of 1..max_tokens ids. The result's keys and values are valid until the next call.
  absl::StatusOr<Capture> Run(absl::Span<const int32_t> ids, bool with_queries,
                              bool with_sums = true);

  /// The student's view of a capture.
  static Sample ToSample(const Capture& capture);

  model::Transformer& model() { return *model_; }
  StudentShape student_shape(int hidden) const;
  torch::Device device() const { return device_; }

 private:
  Teacher(std::unique_ptr<model::Transformer> model, int64_t max_tokens, torch::Device device);

  std::unique_ptr<model::Transformer> model_;
  torch::Device device_;
  int64_t max_tokens_;
  kv::KvPool pool_;
  std::shared_ptr<kv::KvCache> cache_;
};

}  // namespace vsprefill::training
