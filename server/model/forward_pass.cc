#include "server/model/forward_pass.h"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <utility>

#include "absl/status/status.h"
#include "server/attention/recall_probe.h"
#include "server/base/kernel_status.h"
#include "server/base/status_macros.h"

namespace vsprefill::model {
namespace {

// Rows that pass through the LM head at a time.
constexpr int64_t kScoreRows = 128;

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

ForwardPass::ForwardPass(const Model& model)
    : model_(model),
      dtype_(model.kv_layout->dtype),
      rope_(model.config->rope, model.config->head_dim) {}

absl::StatusOr<ForwardResult> ForwardPass::Run(absl::Span<const SequenceChunk> batch,
                                               const ForwardOptions& options) {
  VSP_RETURN_IF_ERROR(Validate(batch, options));
  VSP_RETURN_IF_ERROR(model_.backend->EnterThread());
  VSP_RETURN_IF_ERROR(PrepareBuffers(batch));
  int64_t positions = 0;
  int64_t row = 0;
  for (const SequenceChunk& chunk : batch) {
    const int64_t tokens = chunk.ids.size();
    positions = std::max(positions, chunk.position_begin + tokens);
    VSP_RETURN_IF_ERROR(model_.backend->Embed(
        chunk.ids, model_.weights->embedding.data(), model_.config->vocab_size,
        model_.config->hidden_size, dtype_, Row(residual_, row, model_.config->hidden_size)));
    row += tokens;
  }
  VSP_RETURN_IF_ERROR(PrepareRope(positions));

  ForwardResult result;
  linear_seconds_ = 0;
  VSP_RETURN_IF_ERROR(Norm({0, total_rows_}, nullptr, model_.weights->layers[0].input_norm.data()));
  for (int layer = 0; layer < model_.config->num_layers; ++layer) {
    VSP_RETURN_IF_ERROR(RunLayer(layer, batch, options, &result));
    if (options.after_layer) VSP_RETURN_IF_ERROR(options.after_layer(layer));
  }
  if (options.logits == LogitsMode::kLast) VSP_RETURN_IF_ERROR(LastLogits(batch, &result));
  if (options.logits == LogitsMode::kScores)
    VSP_RETURN_IF_ERROR(AllScores(batch, options, &result));
  if (model_.backend->device() == kernels::DeviceKind::kCpu) {
    result.linear_seconds = linear_seconds_;
  }
  for (const SequenceChunk& chunk : batch) {
    chunk.cache->set_num_tokens(chunk.position_begin + static_cast<int64_t>(chunk.ids.size()));
  }
  return result;
}

absl::Status ForwardPass::RunLayer(int layer, absl::Span<const SequenceChunk> batch,
                                   const ForwardOptions& options, ForwardResult* result) {
  VSP_ASSIGN_OR_RETURN(qkv_,
                       Linear(*model_.weights->layers[layer].qkv, normed_.data(), total_rows_));
  VSP_RETURN_IF_ERROR(AppendKv(layer, batch));
  const bool timed = model_.backend->device() == kernels::DeviceKind::kCpu;
  const double begin = Seconds();
  if (options.method->needs_indexer_logits()) {
    VSP_RETURN_IF_ERROR(ScoreTokens(layer, batch, *options.method));
  }
  const double scored = Seconds();
  if (timed) result->indexer_seconds += scored - begin;

  // What follows the last layer's KV only serves the logits: skip the rows that have none.
  const bool last_layer = layer + 1 == model_.config->num_layers && !options.all_rows;
  if (last_layer && options.logits == LogitsMode::kNone) return absl::OkStatus();
  const bool last_token_only = last_layer && options.logits == LogitsMode::kLast;
  VSP_RETURN_IF_ERROR(Attend(layer, batch, last_token_only, options));
  if (timed) result->attention_seconds += Seconds() - scored;
  if (!last_token_only) return FinishLayer(layer, {0, total_rows_});
  int64_t row = 0;
  for (const SequenceChunk& chunk : batch) {
    row += chunk.ids.size();
    VSP_RETURN_IF_ERROR(FinishLayer(layer, {row - 1, 1}));
  }
  return absl::OkStatus();
}

absl::Status ForwardPass::AppendKv(int layer, absl::Span<const SequenceChunk> batch) {
  const ModelConfig& config = *model_.config;
  const LayerWeights& weights = model_.weights->layers[layer];
  int64_t row = 0;
  for (const SequenceChunk& chunk : batch) {
    kernels::QkvRopeAppendArgs args;
    args.qkv = static_cast<char*>(qkv_.data()) + row * qkv_width() * kernels::SizeOf(dtype_);
    args.tokens = chunk.ids.size();
    args.num_q_heads = config.num_q_heads;
    args.num_kv_heads = config.num_kv_heads;
    args.head_dim = config.head_dim;
    args.q_norm = weights.q_norm.data();
    args.k_norm = weights.k_norm.data();
    args.norm_eps = config.rms_norm_eps;
    args.cos = cos_;
    args.sin = sin_;
    args.position_begin = chunk.position_begin;
    args.k_cache = chunk.cache->k(layer);
    args.v_cache = chunk.cache->v(layer);
    args.cache_head_stride = chunk.cache->head_stride();
    args.dtype = dtype_;
    VSP_RETURN_IF_ERROR(FromKernelStatus(
        model_.kernels->qkv_rope_append(args, model_.backend->stream()), "qkv_rope_append"));
    row += args.tokens;
  }
  return absl::OkStatus();
}

absl::Status ForwardPass::ScoreTokens(int layer, absl::Span<const SequenceChunk> batch,
                                      const attention::AttentionMethod& method) {
  for (const SequenceChunk& chunk : batch) {
    // A prompt that stays dense never reads its logits.
    if (!method.IsSparse(chunk.prompt_tokens)) continue;
    kernels::IndexerInput input;
    input.k = chunk.cache->k(layer);
    input.v = chunk.cache->v(layer);
    input.head_stride = chunk.cache->head_stride();
    input.token_stride = model_.config->head_dim;
    input.dtype = dtype_;
    input.token_begin = chunk.position_begin;
    input.token_end = chunk.position_begin + static_cast<int64_t>(chunk.ids.size());
    input.vertical_logits = chunk.cache->vertical_logits(layer);
    input.slash_logits = chunk.cache->slash_logits(layer);
    input.logit_stride = chunk.cache->capacity_tokens();
    VSP_RETURN_IF_ERROR(FromKernelStatus(
        model_.kernels->indexer(model_.indexer->layer(layer), input, model_.backend->stream()),
        "indexer"));
  }
  return absl::OkStatus();
}

absl::Status ForwardPass::Attend(int layer, absl::Span<const SequenceChunk> batch,
                                 bool last_token_only, const ForwardOptions& options) {
  const ModelConfig& config = *model_.config;
  const bool with_logits = options.method->needs_indexer_logits();
  std::vector<attention::SequenceCall> sequences;
  int64_t row = 0;
  for (const SequenceChunk& chunk : batch) {
    const int64_t tokens = chunk.ids.size();
    const int64_t skipped = last_token_only ? tokens - 1 : 0;
    attention::SequenceCall call;
    kernels::AttentionSequence& sequence = call.attention;
    sequence.q_tokens = tokens - skipped;
    sequence.kv_tokens = chunk.position_begin + tokens;
    sequence.q =
        static_cast<char*>(qkv_.data()) + (row + skipped) * qkv_width() * kernels::SizeOf(dtype_);
    sequence.q_token_stride = qkv_width();
    sequence.q_head_stride = config.head_dim;
    sequence.k = chunk.cache->k(layer);
    sequence.v = chunk.cache->v(layer);
    sequence.kv_head_stride = chunk.cache->head_stride();
    sequence.kv_token_stride = config.head_dim;
    sequence.out = Row(attended_, row + skipped, q_width());
    sequence.out_token_stride = q_width();
    sequence.out_head_stride = config.head_dim;
    call.prompt_tokens = chunk.prompt_tokens;
    if (with_logits) {
      call.vertical_logits = chunk.cache->vertical_logits(layer);
      call.slash_logits = chunk.cache->slash_logits(layer);
      call.logit_stride = chunk.cache->capacity_tokens();
    }
    if (chunk.counts != nullptr) call.counts = chunk.counts + layer;
    sequences.push_back(call);
    row += tokens;
  }
  attention::AttentionCall call;
  call.layer = layer;
  call.shape.num_q_heads = config.num_q_heads;
  call.shape.num_kv_heads = config.num_kv_heads;
  call.shape.head_dim = config.head_dim;
  call.shape.dtype = dtype_;
  call.shape.scale = 1.0f / std::sqrt(static_cast<float>(config.head_dim));
  call.sequences = absl::MakeSpan(sequences);
  call.rope_cos = cos_;
  call.rope_sin = sin_;
  call.stream = model_.backend->stream();
  if (options.probe != nullptr && options.probe->layer() == layer) call.probe = options.probe;
  return options.method->Attend(call);
}

absl::Status ForwardPass::FinishLayer(int layer, RowRange rows) {
  const LayerWeights& weights = model_.weights->layers[layer];
  const bool last_layer = layer + 1 == model_.config->num_layers;
  const void* next_norm =
      last_layer ? nullptr : model_.weights->layers[layer + 1].input_norm.data();
  const int64_t hidden = model_.config->hidden_size;
  const int64_t inner = model_.config->intermediate_size;
  const int64_t block_rows = gated_.bytes() / (inner * kernels::SizeOf(dtype_));
  for (int64_t done = 0; done < rows.count; done += block_rows) {
    const RowRange block = {rows.begin + done, std::min(block_rows, rows.count - done)};
    VSP_ASSIGN_OR_RETURN(const Activation projected,
                         Linear(*weights.o, Row(attended_, block.begin, q_width()), block.count));
    VSP_RETURN_IF_ERROR(Norm(block, projected.data(), weights.post_norm.data()));
    VSP_ASSIGN_OR_RETURN(const Activation gate_up,
                         Linear(*weights.gate_up, Row(normed_, block.begin, hidden), block.count));
    VSP_RETURN_IF_ERROR(FromKernelStatus(
        model_.kernels->silu_mul({gate_up.data(), gated_.data(), block.count, inner, dtype_},
                                 model_.backend->stream()),
        "silu_mul"));
    VSP_ASSIGN_OR_RETURN(const Activation down, Linear(*weights.down, gated_.data(), block.count));
    VSP_RETURN_IF_ERROR(Norm(block, down.data(), next_norm));
  }
  return absl::OkStatus();
}

absl::Status ForwardPass::LastLogits(absl::Span<const SequenceChunk> batch, ForwardResult* result) {
  const int64_t vocab = model_.config->vocab_size;
  int64_t row = 0;
  for (const SequenceChunk& chunk : batch) {
    row += chunk.ids.size();
    VSP_RETURN_IF_ERROR(Norm({row - 1, 1}, nullptr, model_.weights->final_norm.data()));
    VSP_ASSIGN_OR_RETURN(
        const Activation logits,
        Linear(*model_.weights->lm_head, Row(normed_, row - 1, model_.config->hidden_size), 1));
    result->logits.emplace_back(vocab);
    VSP_RETURN_IF_ERROR(
        model_.backend->ToHostFloat(logits.data(), vocab, dtype_, result->logits.back().data()));
  }
  return absl::OkStatus();
}

absl::Status ForwardPass::AllScores(absl::Span<const SequenceChunk> batch,
                                    const ForwardOptions& options, ForwardResult* result) {
  int64_t sequence_row = 0;
  for (const SequenceChunk& chunk : batch) {
    const int64_t scored = static_cast<int64_t>(chunk.ids.size()) - 1;
    std::vector<float>& log_probs = result->log_probs.emplace_back(scored);
    std::vector<uint8_t>& top1 = result->top1.emplace_back(scored);
    for (int64_t begin = 0; begin < scored; begin += kScoreRows) {
      const RowRange rows = {sequence_row + begin, std::min(kScoreRows, scored - begin)};
      VSP_RETURN_IF_ERROR(Norm(rows, nullptr, model_.weights->final_norm.data()));
      VSP_ASSIGN_OR_RETURN(
          const Activation logits,
          Linear(*model_.weights->lm_head, Row(normed_, rows.begin, model_.config->hidden_size),
                 rows.count));
      VSP_RETURN_IF_ERROR(model_.backend->Score(logits.data(), model_.config->vocab_size, dtype_,
                                                chunk.ids.subspan(begin + 1, rows.count),
                                                log_probs.data() + begin, top1.data() + begin));
      if (options.watch_logits) {
        // Score has waited for the logits.
        VSP_RETURN_IF_ERROR(
            options.watch_logits({result->log_probs.size() - 1, begin, rows.count, logits.data()}));
      }
    }
    sequence_row += chunk.ids.size();
  }
  return absl::OkStatus();
}

absl::StatusOr<Activation> ForwardPass::Linear(const LinearLayer& layer, const void* x,
                                               int64_t rows) {
  const double begin = Seconds();
  VSP_ASSIGN_OR_RETURN(Activation output, model_.backend->Linear(layer, x, rows));
  linear_seconds_ += Seconds() - begin;
  return output;
}

absl::Status ForwardPass::Norm(RowRange rows, const void* delta, const void* weight) {
  const int64_t hidden = model_.config->hidden_size;
  kernels::RmsNormArgs args;
  args.residual = Row(residual_, rows.begin, hidden);
  args.delta = delta;
  args.weight = weight;
  args.out = weight != nullptr ? Row(normed_, rows.begin, hidden) : nullptr;
  args.tokens = rows.count;
  args.width = hidden;
  args.eps = model_.config->rms_norm_eps;
  args.dtype = dtype_;
  return FromKernelStatus(model_.kernels->rms_norm(args, model_.backend->stream()), "rms_norm");
}

void* ForwardPass::Row(const Buffer& buffer, int64_t row, int64_t width) const {
  return static_cast<char*>(buffer.data()) + row * width * kernels::SizeOf(dtype_);
}

}  // namespace vsprefill::model
