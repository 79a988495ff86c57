// The results file of vsprefill-eval: JSON lines, appended as soon as something is known, so that
// an interrupted run goes on where it was.
#pragma once

#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <set>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "bench/eval/lab.h"

namespace vsprefill::eval {

/// Where a group's knobs stand: of each method and density, the setting and the mean of t over the
/// calibration texts that took it (of the last setting that any text took).
class KnobTable {
 public:
  void Add(const std::string& group, const std::string& method, double density, size_t setting,
           double t);
  /// Sets setting and t. NOT_FOUND: no text of the group has been calibrated for it.
  absl::Status Find(const std::string& group, Selection* selection) const;

 private:
  struct Entry {
    size_t setting = 0;
    double sum = 0;
    int count = 0;
  };
  std::map<std::string, Entry> entries_;
};

class Results {
 public:
  /// Reads what `path` holds (a last line that was cut off is dropped) and opens it for appending.
  static absl::StatusOr<std::unique_ptr<Results>> Open(const std::string& path);
  ~Results();

  /// Whether there is a line for the item, method and density.
  bool Has(const std::string& item, const std::string& method, double wanted) const;
  /// A line with "item", "method" and "wanted" (0: dense), flushed.
  absl::Status Append(const nlohmann::json& line);
  KnobTable& knobs() { return knobs_; }
  size_t size() const { return done_.size(); }

 private:
  Results() = default;
  void Note(const nlohmann::json& line);

  std::FILE* file_ = nullptr;
  std::set<std::string> done_;
  KnobTable knobs_;
};

}  // namespace vsprefill::eval
