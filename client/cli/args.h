// Command lines of the client programs: long flags that may repeat (which absl's cannot), as
// --name value or --name=value, and --name alone for switches.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace vsprefill::cli {

struct FlagSpec {
  std::string name;   // without dashes
  std::string value;  // how --help names the value; empty for a switch
  std::string help;
  bool repeated = false;
  bool required = false;
  std::string default_value;  // only shown by --help
};

/// What one command line said. Getters of absent flags return the given default; they return
/// INVALID_ARGUMENT, naming the flag, for values that are no such thing.
class Args {
 public:
  /// INVALID_ARGUMENT: unknown flag, missing or superfluous value, a flag given twice that does not
  /// repeat, a required one missing, or an argument that is no flag.
  static absl::StatusOr<Args> Parse(const std::vector<std::string>& args,
                                    const std::vector<FlagSpec>& specs);

  bool Has(absl::string_view name) const { return values_.contains(std::string(name)); }
  std::string Get(absl::string_view name, absl::string_view otherwise = "") const;
  const std::vector<std::string>& GetAll(absl::string_view name) const;
  /// An integer in [min, max].
  absl::StatusOr<int64_t> GetInt(absl::string_view name, int64_t otherwise, int64_t min,
                                 int64_t max) const;
  /// Seconds > 0.
  absl::StatusOr<absl::Duration> GetSeconds(absl::string_view name, absl::Duration otherwise) const;
  /// Repeated name=value pairs with finite numbers; no name twice.
  absl::StatusOr<std::map<std::string, double>> GetNumbers(absl::string_view name) const;

 private:
  std::map<std::string, std::vector<std::string>> values_;
};

/// True where "--help" or "-h" is among the arguments.
bool WantsHelp(const std::vector<std::string>& args);
/// The flags in two aligned columns.
std::string FlagHelp(const std::vector<FlagSpec>& specs);

}  // namespace vsprefill::cli
