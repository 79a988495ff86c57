// Which chunks carry a request's KV, in which order: a pure function of the prompt's length, the
// first token to send, the compute chunk and the model's shape. Every stream of a request walks the
// same plan, so a stream's whole state is a cursor.
#pragma once

#include <cstdint>
#include <vector>

#include "server/kv/kv_layout.h"

namespace vsprefill::kv {

/// Tokens [token_begin, token_end) of one layer.
struct ChunkRange {
  int layer = 0;
  int64_t token_begin = 0;
  int64_t token_end = 0;
  int64_t num_tokens() const { return token_end - token_begin; }
};

/// One token range, the same for every layer; computed in step `step`.
struct Piece {
  int64_t step = 0;
  int64_t token_begin = 0;
  int64_t token_end = 0;
};

/// A step is one forward call over `step_tokens` tokens (the last one may be shorter). Immutable.
class ChunkPlan {
 public:
  /// REQUIRES: 0 <= start_token < prompt_tokens, step_tokens > 0.
  ChunkPlan(const KvLayout& layout, int64_t prompt_tokens, int64_t start_token,
            int64_t step_tokens);

  const KvLayout& layout() const { return layout_; }
  int64_t prompt_tokens() const { return prompt_tokens_; }
  int64_t start_token() const { return start_token_; }
  int64_t num_steps() const { return (prompt_tokens_ + step_tokens_ - 1) / step_tokens_; }
  int64_t step_begin(int64_t step) const { return step * step_tokens_; }
  int64_t step_end(int64_t step) const;
  /// Token ranges to send, ascending; they cover [start_token, prompt_tokens) exactly.
  const std::vector<Piece>& pieces() const { return pieces_; }
  /// Payload bytes of all layers l with l % stripes == stripe.
  int64_t StripeBytes(int stripe, int stripes) const;

 private:
  const KvLayout layout_;
  const int64_t prompt_tokens_, start_token_, step_tokens_;
  std::vector<Piece> pieces_;
};

/// Walks the chunks of one stripe in the order in which they become ready: by step, then layer,
/// then token. `plan` must outlive it.
class ChunkCursor {
 public:
  ChunkCursor(const ChunkPlan& plan, int stripe, int stripes);

  bool at_end() const { return piece_ >= step_piece_end_; }
  /// The following need !at_end().
  int64_t step() const { return plan_->pieces()[piece_].step; }
  size_t piece() const { return piece_; }
  ChunkRange range() const;
  void Advance();

 private:
  void EnterStep(size_t first_piece);

  const ChunkPlan* plan_;
  int stripe_, stripes_;
  int layer_ = 0;
  size_t piece_ = 0;
  size_t step_piece_begin_ = 0, step_piece_end_ = 0;  // pieces of the current step
};

}  // namespace vsprefill::kv
