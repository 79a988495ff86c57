// What the programs print: each result as one JSON object or as short aligned lines.
#pragma once

#include <string>

#include "client/cc/types.h"

namespace vsprefill::cli {

std::string PrefillJson(const client::PrefillRequest& request, const client::PrefillResult& result);
std::string PrefillText(const client::PrefillRequest& request, const client::PrefillResult& result);
std::string InfoJson(const client::ModelInfo& info);
std::string InfoText(const client::ModelInfo& info);
std::string LoadJson(const client::ServerLoad& load);
std::string LoadText(const client::ServerLoad& load);
/// "worker:9000  OK, 12.0 MiB" or "worker:9000  UNAVAILABLE: message".
std::string TargetText(const client::TargetStatus& target);
/// "312.5 MiB".
std::string BytesText(int64_t bytes);

}  // namespace vsprefill::cli
