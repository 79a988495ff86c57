// Finds the value of a selection's one knob that gives a wanted density.
#pragma once

#include <functional>
#include <map>

#include "absl/status/statusor.h"

namespace vsprefill::eval {

/// A knob's range as t in [0, 1]: 0 selects least, 1 most.
struct KnobRange {
  double sparse = 0, dense = 0;  // values at t = 0 and t = 1, in either order
  bool logarithmic = false;      // t moves the logarithm evenly; both ends above 0
  double At(double t) const;
};

/// Density over t of one selection on one text. Remembers what it has measured, so that several
/// wanted densities share their measurements.
class DensityCurve {
 public:
  /// Measures the density at t, which is assumed to grow with t (steps are fine).
  using Measure = std::function<absl::StatusOr<double>(double t)>;
  explicit DensityCurve(Measure measure) : measure_(std::move(measure)) {}

  /// Density at t.
  absl::StatusOr<double> At(double t);
  /// The t whose density is nearest to `wanted` (> 0), to within `tolerance` relative or as near as
  /// `max_measurements` more of them come; 0 or 1 where the density lies outside of the curve.
  /// `guess` in [0, 1] is tried first.
  absl::StatusOr<double> Reach(double wanted, double guess, double tolerance, int max_measurements);

 private:
  Measure measure_;
  std::map<double, double> known_;  // t -> density
};

}  // namespace vsprefill::eval
