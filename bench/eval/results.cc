#include "bench/eval/results.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "server/base/json.h"
#include "server/base/mapped_file.h"
#include "server/base/status_macros.h"

namespace vsprefill::eval {
namespace {

constexpr int64_t kMaxFileBytes = int64_t{1} << 30;

std::string Key(const std::string& a, const std::string& b, double density) {
  return absl::StrFormat("%s\n%s\n%.6f", a, b, density);
}

}  // namespace

void KnobTable::Add(const std::string& group, const std::string& method, double density,
                    size_t setting, double t) {
  Entry& entry = entries_[Key(group, method, density)];
  if (setting < entry.setting) return;
  if (setting > entry.setting) entry = {setting};
  entry.sum += t;
  ++entry.count;
}

absl::Status KnobTable::Find(const std::string& group, Selection* selection) const {
  const auto entry = entries_.find(Key(group, selection->plan->name, selection->wanted));
  if (entry == entries_.end()) {
    return absl::NotFoundError(absl::StrFormat("no calibration text of group \"%s\" for %s at %.3f",
                                               group, selection->plan->name, selection->wanted));
  }
  selection->setting = entry->second.setting;
  selection->t = entry->second.sum / entry->second.count;
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Results>> Results::Open(const std::string& path) {
  std::unique_ptr<Results> results(new Results());
  if (FileExists(path)) {
    VSP_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxFileBytes));
    size_t begin = 0;
    for (size_t end; (end = text.find('\n', begin)) != std::string::npos; begin = end + 1) {
      VSP_ASSIGN_OR_RETURN(const nlohmann::json line,
                           ParseJson(absl::string_view(text).substr(begin, end - begin), path));
      results->Note(line);
    }
    if (begin < text.size()) {
      std::error_code error;
      std::filesystem::resize_file(path, begin, error);
      if (error) return absl::InternalError(absl::StrCat(path, ": ", error.message()));
    }
  }
  results->file_ = std::fopen(path.c_str(), "a");
  if (results->file_ == nullptr) {
    return absl::InvalidArgumentError(absl::StrCat(path, ": ", std::strerror(errno)));
  }
  return results;
}

Results::~Results() {
  if (file_ != nullptr) std::fclose(file_);
}

bool Results::Has(const std::string& item, const std::string& method, double wanted) const {
  return done_.count(Key(item, method, wanted)) > 0;
}

void Results::Note(const nlohmann::json& line) {
  const auto item = line.value("item", std::string());
  const auto method = line.value("method", std::string());
  const auto wanted = line.value("wanted", 0.0);
  done_.insert(Key(item, method, wanted));
  if (line.contains("group") && line.contains("t")) {
    knobs_.Add(line.value("group", std::string()), method, wanted, line.value("setting", size_t{0}),
               line.value("t", 0.0));
  }
}

absl::Status Results::Append(const nlohmann::json& line) {
  const std::string text = line.dump() + "\n";
  if (std::fwrite(text.data(), 1, text.size(), file_) != text.size() || std::fflush(file_) != 0) {
    return absl::InternalError(absl::StrCat("cannot write the results: ", std::strerror(errno)));
  }
  Note(line);
  return absl::OkStatus();
}

}  // namespace vsprefill::eval
