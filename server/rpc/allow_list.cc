#include "server/rpc/allow_list.h"

#include <cstdint>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/string_view.h"
#include "server/engine/request.h"

namespace vsprefill::rpc {
namespace {

constexpr absl::string_view kHostCharacters =
    "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_[]:";

// Splits "host:port"; an IPv6 host stands in brackets. False where it has no valid port.
bool Split(absl::string_view target, absl::string_view* host, int* port) {
  const size_t colon = target.rfind(':');
  if (colon == absl::string_view::npos || colon == 0) return false;
  *host = target.substr(0, colon);
  if (host->front() != '[' && host->find(':') != absl::string_view::npos) return false;
  return absl::SimpleAtoi(target.substr(colon + 1), port) && *port > 0 && *port <= 65535;
}

// Only plain hosts: no scheme ("unix:", "dns:///") that would reach around the list.
bool IsPlain(absl::string_view text) {
  return !text.empty() && text.find_first_not_of(kHostCharacters) == absl::string_view::npos;
}

}  // namespace

absl::StatusOr<AllowList> AllowList::Create(const std::vector<std::string>& entries) {
  AllowList list;
  for (const std::string& entry : entries) {
    absl::string_view host = entry;
    int port = 0;
    const bool has_port = Split(entry, &host, &port);
    const bool bare =
        entry.find(':') == std::string::npos || (entry.front() == '[' && entry.back() == ']');
    if (!IsPlain(entry) || (!has_port && !bare)) {
      return absl::InvalidArgumentError(
          absl::StrCat("push_allow entry \"", entry, "\" is neither HOST:PORT nor HOST"));
    }
    list.entries_.push_back(entry);
  }
  return list;
}

absl::Status AllowList::Check(const std::string& target) const {
  absl::string_view host;
  int port = 0;
  if (!IsPlain(target) || !Split(target, &host, &port)) {
    return engine::Rejection(
        absl::StatusCode::kInvalidArgument, "push_target",
        absl::StrCat("push target \"", target, "\" is not HOST:PORT with a port of 1..65535"));
  }
  for (const std::string& entry : entries_) {
    if (entry == target || entry == host) return absl::OkStatus();
  }
  return engine::Rejection(
      absl::StatusCode::kPermissionDenied, "push_target",
      absl::StrCat("push target \"", target, "\" is not allowed; --push_allow holds ",
                   entries_.empty() ? "nothing" : absl::StrJoin(entries_, ", ")));
}

}  // namespace vsprefill::rpc
