// A text's activations under dense attention, on which all methods are compared alike: how much of
// the true attention mass each reads, how far its output is off, and what it costs.
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "bench/eval/lab.h"
#include "training/teacher.h"

namespace vsprefill::eval {

/// How a selection covers a text. Heads are (layer, query head) pairs, each the mean over the
/// measured rows; a tenth is the mean of the worst tenth.
struct Fidelity {
  double mass_mean = 0, mass_lowest_tenth = 0, mass_minimum = 0;  // over heads
  double row_lowest_tenth = 0, row_minimum = 0;                   // over (head, row) pairs
  double error = 0;  // |output - dense output| / |dense output|, mean over layers
  std::vector<double> mass_by_layer, lowest_by_layer, error_by_layer;
  Shares shares;
};

/// Seconds over all layers: the indexer and the selection; these and the attention.
struct OpTimes {
  double select = 0, op = 0;
};

class CapturedText {
 public:
  /// One dense forward pass; valid until the lab's teacher runs again. `lab` outlives it.
  static absl::StatusOr<std::unique_ptr<CapturedText>> Create(Lab& lab,
                                                              absl::Span<const int32_t> ids);

  /// Pairs that the selection reads here.
  absl::StatusOr<Shares> Count(const Selection& selection);
  /// All selections side by side, layer by layer, on `rows` rows spread over the text.
  absl::StatusOr<std::vector<Fidelity>> Measure(const std::vector<Selection>& selections,
                                                int64_t rows);
  absl::StatusOr<OpTimes> Time(const Selection& selection);
  /// The same of dense attention; `select` is 0.
  absl::StatusOr<OpTimes> TimeDense();

 private:
  CapturedText(Lab& lab, training::Capture capture) : lab_(lab), capture_(std::move(capture)) {}

  /// One layer of the method on the captured activations; `done` then holds the index that was
  /// read, valid until the method's next call. out: like the queries; may be null where the
  /// attention is left out.
  absl::Status Attend(attention::AttentionMethod& method, bool true_sums, int layer, void* out,
                      kernels::PairCounts* counts, attention::SequenceCall* done);
  kernels::AttentionShape Shape() const;
  absl::Status RunIndexer();

  Lab& lab_;
  training::Capture capture_;
  torch::Tensor logits_;  // of the indexer, [2, layers, groups, tokens]; undefined without one
  torch::Tensor truth_;   // logarithms of the true sums, the same shape
  torch::Tensor out_;     // [tokens, num_q_heads, head_dim]
};

}  // namespace vsprefill::eval
