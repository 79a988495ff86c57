#include "bench/eval/density_search.h"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "server/base/status_macros.h"

namespace vsprefill::eval {

double KnobRange::At(double t) const {
  if (logarithmic) return sparse * std::pow(dense / sparse, t);
  return sparse + (dense - sparse) * t;
}

absl::StatusOr<double> DensityCurve::At(double t) {
  const auto known = known_.find(t);
  if (known != known_.end()) return known->second;
  VSP_ASSIGN_OR_RETURN(const double density, measure_(t));
  known_[t] = density;
  return density;
}

absl::StatusOr<double> DensityCurve::Reach(double wanted, double guess, double tolerance,
                                           int max_measurements) {
  double best = 0, best_error = 1e300;
  const auto look = [&](double t) -> absl::Status {
    VSP_ASSIGN_OR_RETURN(const double density, At(t));
    const double error = std::abs(std::log(std::max(density, 1e-9) / wanted));
    if (error < best_error) {
      best = t;
      best_error = error;
    }
    return absl::OkStatus();
  };
  // The floor decides whether the density can be had at all; the ceiling only if nothing above is
  // known yet.
  VSP_RETURN_IF_ERROR(look(0));
  if (known_.at(0) >= wanted) return 0.0;
  VSP_RETURN_IF_ERROR(look(guess));
  for (const auto& [t, density] : known_) VSP_RETURN_IF_ERROR(look(t));
  for (int i = 0; i < max_measurements && best_error > std::log1p(tolerance); ++i) {
    // The narrowest bracket of what is known: last below, first at or above.
    auto above = known_.begin();
    while (above != known_.end() && above->second < wanted) ++above;
    if (above == known_.end()) {
      if (known_.count(1) > 0) return 1.0;
      VSP_RETURN_IF_ERROR(look(1));
      continue;
    }
    const auto below = std::prev(above);  // exists: the floor is below
    const double width = above->first - below->first;
    if (width < 1e-6) break;
    // Interpolates the logarithm of the density; every third step halves, so that steps and bends
    // cannot stall it.
    double part = 0.5;
    if (i % 3 != 2) {
      const double low = std::log(std::max(below->second, 1e-9));
      const double high = std::log(std::max(above->second, 1e-9));
      if (high > low) part = std::clamp((std::log(wanted) - low) / (high - low), 0.02, 0.98);
    }
    VSP_RETURN_IF_ERROR(look(below->first + part * width));
  }
  return best;
}

}  // namespace vsprefill::eval
