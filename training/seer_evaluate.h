// How much true attention mass SeerAttention with a given gate covers at a given density, as it is
// executed: blocks of 128 x 128 per query head, chosen by the selection kernel that serves.
#pragma once

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "server/model/seer_gate.h"
#include "training/evaluate.h"
#include "training/teacher.h"

namespace vsprefill::training {

/// Measures texts of one length (all of the same size), without the dense last rows. Beside both
/// ways to select with the gate: the blocks with the most true mass (the best that this tile shape
/// can do) and sinks with a window. INVALID_ARGUMENT: no texts.
absl::StatusOr<LengthReport> EvaluateSeer(Teacher& teacher, const model::SeerGateWeights& gate,
                                          absl::Span<const absl::Span<const int32_t>> texts,
                                          const EvaluateOptions& options);

}  // namespace vsprefill::training
