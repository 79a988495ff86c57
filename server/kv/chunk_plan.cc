#include "server/kv/chunk_plan.h"

#include <algorithm>

namespace vsprefill::kv {

ChunkPlan::ChunkPlan(const KvLayout& layout, int64_t prompt_tokens, int64_t start_token,
                     int64_t step_tokens)
    : layout_(layout),
      prompt_tokens_(prompt_tokens),
      start_token_(start_token),
      step_tokens_(step_tokens) {
  const int64_t most = layout_.max_chunk_tokens();
  for (int64_t step = 0; step < num_steps(); ++step) {
    for (int64_t begin = std::max(step_begin(step), start_token_); begin < step_end(step);) {
      const int64_t end = std::min(begin + most, step_end(step));
      pieces_.push_back({step, begin, end});
      begin = end;
    }
  }
}

int64_t ChunkPlan::step_end(int64_t step) const {
  return std::min((step + 1) * step_tokens_, prompt_tokens_);
}

int64_t ChunkPlan::StripeBytes(int stripe, int stripes) const {
  const int64_t layers = (layout_.num_layers - stripe + stripes - 1) / stripes;
  return std::max<int64_t>(layers, 0) * (prompt_tokens_ - start_token_) *
         layout_.layer_token_bytes();
}

ChunkCursor::ChunkCursor(const ChunkPlan& plan, int stripe, int stripes)
    : plan_(&plan), stripe_(stripe), stripes_(stripes) {
  // A stripe without a layer (stripes > layers) is at its end from the beginning.
  if (stripe_ < plan_->layout().num_layers) EnterStep(0);
}

void ChunkCursor::EnterStep(size_t first_piece) {
  const auto& pieces = plan_->pieces();
  step_piece_begin_ = piece_ = step_piece_end_ = first_piece;
  while (step_piece_end_ < pieces.size() &&
         pieces[step_piece_end_].step == pieces[first_piece].step) {
    ++step_piece_end_;
  }
  layer_ = stripe_;
}

ChunkRange ChunkCursor::range() const {
  const Piece& piece = plan_->pieces()[piece_];
  return {layer_, piece.token_begin, piece.token_end};
}

void ChunkCursor::Advance() {
  if (++piece_ < step_piece_end_) return;
  layer_ += stripes_;
  if (layer_ < plan_->layout().num_layers) {
    piece_ = step_piece_begin_;
  } else {
    EnterStep(step_piece_end_);
  }
}

}  // namespace vsprefill::kv
