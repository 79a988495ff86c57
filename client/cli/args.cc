#include "client/cli/args.h"

#include <algorithm>
#include <cmath>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"

namespace vsprefill::cli {
namespace {

constexpr size_t kHelpColumn = 28, kHelpWidth = 98;

const FlagSpec* Find(const std::vector<FlagSpec>& specs, absl::string_view name) {
  const auto it =
      std::find_if(specs.begin(), specs.end(), [&](const FlagSpec& s) { return s.name == name; });
  return it == specs.end() ? nullptr : &*it;
}

/// Text broken between words, the lines after the first indented.
std::string Wrap(absl::string_view text, size_t indent, size_t width) {
  std::string out;
  size_t column = indent;
  for (absl::string_view word : absl::StrSplit(text, ' ')) {
    if (column > indent && column + 1 + word.size() > width) {
      absl::StrAppend(&out, "\n", std::string(indent, ' '));
      column = indent;
    } else if (column > indent) {
      absl::StrAppend(&out, " ");
      ++column;
    }
    absl::StrAppend(&out, word);
    column += word.size();
  }
  return out;
}

}  // namespace

absl::StatusOr<Args> Args::Parse(const std::vector<std::string>& args,
                                 const std::vector<FlagSpec>& specs) {
  Args result;
  for (size_t i = 0; i < args.size(); ++i) {
    absl::string_view arg = args[i];
    if (!absl::StartsWith(arg, "--") || arg.size() == 2) {
      return absl::InvalidArgumentError(absl::StrCat("unexpected argument \"", arg, "\""));
    }
    arg.remove_prefix(2);
    const size_t equals = arg.find('=');
    const absl::string_view name = arg.substr(0, equals);
    const FlagSpec* spec = Find(specs, name);
    if (spec == nullptr) {
      return absl::InvalidArgumentError(absl::StrCat("unknown flag --", name));
    }
    std::string value;
    if (spec->value.empty()) {
      if (equals != absl::string_view::npos) {
        return absl::InvalidArgumentError(absl::StrCat("--", name, " takes no value"));
      }
    } else if (equals != absl::string_view::npos) {
      value = std::string(arg.substr(equals + 1));
    } else if (i + 1 < args.size()) {
      value = args[++i];
    } else {
      return absl::InvalidArgumentError(absl::StrCat("--", name, " needs a value: ", spec->value));
    }
    std::vector<std::string>& values = result.values_[spec->name];
    if (!values.empty() && !spec->repeated) {
      return absl::InvalidArgumentError(absl::StrCat("--", name, " is given twice"));
    }
    values.push_back(std::move(value));
  }
  for (const FlagSpec& spec : specs) {
    if (spec.required && !result.Has(spec.name)) {
      return absl::InvalidArgumentError(absl::StrCat("--", spec.name, " is required"));
    }
  }
  return result;
}

std::string Args::Get(absl::string_view name, absl::string_view otherwise) const {
  const std::vector<std::string>& all = GetAll(name);
  return all.empty() ? std::string(otherwise) : all.front();
}

const std::vector<std::string>& Args::GetAll(absl::string_view name) const {
  static const auto* const none = new std::vector<std::string>;
  const auto it = values_.find(std::string(name));
  return it == values_.end() ? *none : it->second;
}

absl::StatusOr<int64_t> Args::GetInt(absl::string_view name, int64_t otherwise, int64_t min,
                                     int64_t max) const {
  if (!Has(name)) return otherwise;
  int64_t value;
  if (!absl::SimpleAtoi(Get(name), &value) || value < min || value > max) {
    return absl::InvalidArgumentError(
        absl::StrFormat("--%s=%s is no integer in [%d, %d]", name, Get(name), min, max));
  }
  return value;
}

absl::StatusOr<absl::Duration> Args::GetSeconds(absl::string_view name,
                                                absl::Duration otherwise) const {
  if (!Has(name)) return otherwise;
  double value;
  if (!absl::SimpleAtod(Get(name), &value) || !std::isfinite(value) || value <= 0) {
    return absl::InvalidArgumentError(
        absl::StrFormat("--%s=%s is no number of seconds above 0", name, Get(name)));
  }
  return absl::Seconds(value);
}

absl::StatusOr<std::map<std::string, double>> Args::GetNumbers(absl::string_view name) const {
  std::map<std::string, double> result;
  for (const std::string& text : GetAll(name)) {
    const std::pair<absl::string_view, absl::string_view> parts =
        absl::StrSplit(text, absl::MaxSplits('=', 1));
    double value;
    if (parts.first.empty() || !absl::SimpleAtod(parts.second, &value) || !std::isfinite(value)) {
      return absl::InvalidArgumentError(absl::StrFormat("--%s %s is not name=number", name, text));
    }
    if (!result.emplace(std::string(parts.first), value).second) {
      return absl::InvalidArgumentError(absl::StrFormat("--%s gives %s twice", name, parts.first));
    }
  }
  return result;
}

bool WantsHelp(const std::vector<std::string>& args) {
  return std::any_of(args.begin(), args.end(),
                     [](const std::string& a) { return a == "--help" || a == "-h"; });
}

std::string FlagHelp(const std::vector<FlagSpec>& specs) {
  std::string out;
  for (const FlagSpec& spec : specs) {
    std::string left = absl::StrCat("  --", spec.name, spec.value.empty() ? "" : " ", spec.value);
    std::string help = spec.help;
    if (spec.required) absl::StrAppend(&help, " (required)");
    if (spec.repeated) absl::StrAppend(&help, " (may repeat)");
    if (!spec.default_value.empty()) absl::StrAppend(&help, " (default ", spec.default_value, ")");
    if (left.size() + 2 > kHelpColumn) {
      absl::StrAppend(&out, left, "\n", std::string(kHelpColumn, ' '));
    } else {
      absl::StrAppend(&out, left, std::string(kHelpColumn - left.size(), ' '));
    }
    absl::StrAppend(&out, Wrap(help, kHelpColumn, kHelpWidth), "\n");
  }
  return out;
}

}  // namespace vsprefill::cli
