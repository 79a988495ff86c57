// Which keys a query reads: an executed index, copied to host memory and expanded row by row. The
// walk over a tile's columns is the CPU kernel's own (kernels/cpu/tile_walk.h). For measurements;
// the kernels never expand an index.
#pragma once

#include <cstdint>
#include <functional>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/attention.h"

namespace vsprefill::attention {

/// Copies `bytes` from memory of the device to host memory, after all work enqueued before; done on
/// return.
using CopyToHostFn = std::function<absl::Status(const void* device, int64_t bytes, void* host)>;

/// Calls the function below once per (index group, position), positions ascending within a group:
/// `columns` are the keys that the query at `position` reads in `group`, each once, none past
/// `position`; valid during the call. Pseudo-keys (means of blocks) are not keys and do not appear.
using RowColumnsFn =
    std::function<void(int group, int64_t position, absl::Span<const int32_t> columns)>;

/// Expands the index of `sequence` (vertical-slash or tiles, per KV group or per query head; none:
/// every key up to the position) for `positions`, which are ascending and lie within the sequence's
/// queries. Work and memory: what the rows read, and one copy of the vertical-slash index or of the
/// rows' tiles. INVALID_ARGUMENT: a position outside [kv_tokens - q_tokens, kv_tokens), or an index
/// of neither head count; what `copy` returns.
absl::Status ForEachRow(const kernels::AttentionShape& shape,
                        const kernels::AttentionSequence& sequence,
                        absl::Span<const int64_t> positions, const CopyToHostFn& copy,
                        const RowColumnsFn& visit);

}  // namespace vsprefill::attention
