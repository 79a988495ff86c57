#include "server/base/json.h"

#include <set>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace vsprefill {

absl::StatusOr<nlohmann::json> ParseJson(absl::string_view text, absl::string_view source,
                                         int max_depth) {
  using nlohmann::json;
  std::vector<std::set<std::string>> keys;
  std::string problem;
  // Called for every element; false drops it, so that after a problem nothing more is stored.
  const json::parser_callback_t check = [&](int depth, json::parse_event_t event, json& parsed) {
    if (!problem.empty()) return false;
    switch (event) {
      case json::parse_event_t::object_start:
      case json::parse_event_t::array_start:
        if (depth >= max_depth) {
          problem = absl::StrCat("nested deeper than ", max_depth, " levels");
          return false;
        }
        if (event == json::parse_event_t::object_start) keys.emplace_back();
        break;
      case json::parse_event_t::object_end:
        keys.pop_back();
        break;
      case json::parse_event_t::key: {
        const std::string& key = parsed.get_ref<const std::string&>();
        if (!keys.back().insert(key).second) {
          problem = absl::StrCat("key \"", absl::CHexEscape(key.substr(0, 100)), "\" occurs twice");
          return false;
        }
        break;
      }
      case json::parse_event_t::array_end:
      case json::parse_event_t::value:
        break;
    }
    return true;
  };
  json value = json::parse(text.begin(), text.end(), check, /*allow_exceptions=*/false);
  if (!problem.empty()) return absl::InvalidArgumentError(absl::StrCat(source, ": ", problem));
  if (value.is_discarded()) {
    return absl::InvalidArgumentError(
        absl::StrCat(source, ": not valid JSON (", text.size(), " bytes)"));
  }
  return value;
}

std::string ShortJson(const nlohmann::json& value) {
  constexpr size_t kMaxCharacters = 100;
  std::string text =
      value.dump(-1, ' ', /*ensure_ascii=*/true, nlohmann::json::error_handler_t::replace);
  if (text.size() > kMaxCharacters) text = text.substr(0, kMaxCharacters) + "...";
  return text;
}

}  // namespace vsprefill
