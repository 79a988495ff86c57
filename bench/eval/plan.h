// What vsprefill-eval is told to do: a plan (methods, densities, how finely to look) and work
// items, both JSON, written by bench/eval/fidelity.py.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "bench/eval/density_search.h"

namespace vsprefill::eval {

/// One way to set a method up: fixed parameters, and one knob that moves the density.
struct Setting {
  std::map<std::string, double> parameters;
  KnobRange range;
  /// What the knob sets: parameter = factor * knob, rounded where `whole`.
  std::map<std::string, double> knob;
  bool whole = false;

  std::map<std::string, double> At(double t) const;
};

struct MethodPlan {
  std::string name;    // in results
  std::string method;  // registered name
  /// vsprefill's rule on the true column and diagonal sums instead of the indexer's logits; there
  /// is no serving it, so only what dense activations allow is measured.
  bool true_sums = false;
  /// Tried in order: a setting whose least density (its forced part) is above `max_forced` of the
  /// wanted one leaves the selection nothing to choose, and the next one is taken; the last is
  /// taken in any case.
  std::vector<Setting> settings;
};

struct Plan {
  std::vector<MethodPlan> methods;
  std::vector<double> densities;
  double max_forced = 0.85;
  double tolerance = 0.01;  // of the density, relative
  int max_measurements = 8;
  int64_t rows = 256;        // query rows whose attention mass is looked at, spread over the text
  int64_t kl_stride = 4;     // every so many-th scored position counts for the KL divergence
  double score_from = 0.25;  // share of the text before the first scored position
  int decode_batch = 64;     // prefills of one prompt that are decoded together
};

enum class ItemKind { kText, kCalibration, kTask };

struct Item {
  std::string id;
  ItemKind kind = ItemKind::kText;
  std::vector<int32_t> ids;
  std::vector<double> densities;  // empty: the plan's
  std::string knobs;  // calibration: the group it belongs to; task: the group whose knobs it uses
  int64_t max_new_tokens = 32;      // task
  std::vector<int32_t> stop_ids;    // task: ids that end the answer, beside the model's own
  bool timed = false;               // text: also times selection and the whole operation
  bool mass = true, logits = true;  // text: what is measured
};

/// INVALID_ARGUMENT: not such a file; the message says where and what.
absl::StatusOr<Plan> ReadPlan(const std::string& path);
absl::StatusOr<std::vector<Item>> ReadItems(const std::string& path);

}  // namespace vsprefill::eval
