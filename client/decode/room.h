// How many positions behind a prompt a decoder needs.
#pragma once

#include <algorithm>
#include <cstdint>

#include "client/cc/types.h"
#include "server/model/transformer.h"

namespace vsprefill::decode {

/// The last token that is decoded takes no room, and the model has no more than its positions.
inline int64_t RoomForNewTokens(const model::Transformer& transformer, const client::KvShape& shape,
                                int64_t max_new_tokens) {
  const int64_t left = transformer.config().max_position_embeddings - shape.prompt_tokens;
  return std::clamp<int64_t>(max_new_tokens - 1, 0, std::max<int64_t>(left, 0));
}

}  // namespace vsprefill::decode
