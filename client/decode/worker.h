// The two ways in which vsprefill-decode gets its caches.
#pragma once

#include <ostream>

#include "absl/status/status.h"
#include "client/decode/options.h"
#include "server/model/transformer.h"

namespace vsprefill::decode {

/// Asks options.prefill for the cache of options.ids, decodes, prints to `out` (JSON or text).
/// Nothing is printed unless everything went well.
absl::Status RunStream(const Options& options, model::Transformer& transformer, std::ostream& out);

/// Prints "listening on ADDR", then one JSON line per pushed cache, until SIGTERM or SIGINT, which
/// must be blocked in every thread of the process. A cache that does not come through is its
/// sender's error and prints nothing.
absl::Status RunListen(const Options& options, model::Transformer& transformer, std::ostream& out);

}  // namespace vsprefill::decode
