// A text through the whole model: how far a method's predictions are from dense attention's.
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "bench/eval/lab.h"

namespace vsprefill::eval {

/// Means over the scored positions.
struct Score {
  double nll = 0;  // nats per token
  double kl = 0;   // of the method's prediction from dense's, nats; every kl_stride-th position
  double same_top = 1;    // share whose most likely token is dense's
  double seconds = 0;     // until all layers are done for all rows; without the logits
  int64_t positions = 0;  // scored
  Shares shares;
};

class Scorer {
 public:
  /// Runs the text densely, whole. Scored: predictions of the tokens after the first `score_from`
  /// share of the text. `lab` and `ids` outlive it.
  static absl::StatusOr<std::unique_ptr<Scorer>> Create(Lab& lab, absl::Span<const int32_t> ids,
                                                        double score_from, int64_t kl_stride);

  const Score& dense() const { return dense_; }
  absl::StatusOr<Score> Run(const Selection& selection);

 private:
  Scorer(Lab& lab, absl::Span<const int32_t> ids, int64_t first, int64_t kl_stride)
      : lab_(lab), ids_(ids), first_(first), kl_stride_(kl_stride) {}

  absl::StatusOr<Score> Forward(attention::AttentionMethod& method, bool is_dense);
  struct Sums {
    size_t block = 0;  // next block with scored positions: they come in one order and size
    double kl = 0;
    int64_t kl_positions = 0, same_top = 0;
  };
  /// Keeps (dense) or compares a block of logits.
  void Look(const model::LogitsBlock& block, bool is_dense, Sums* sums);

  Lab& lab_;
  const absl::Span<const int32_t> ids_;
  const int64_t first_;  // first scored position
  const int64_t kl_stride_;
  std::shared_ptr<kv::KvCache> cache_;
  Score dense_;
  std::vector<torch::Tensor> dense_top_;     // per block of logits, int64
  std::vector<torch::Tensor> dense_logits_;  // per block, the rows that count for the KL
};

}  // namespace vsprefill::eval
