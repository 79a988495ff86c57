#include "server/attention/recall_probe.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "kernels/cpu/parallel.h"
#include "kernels/scalar.h"
#include "kernels/tile_index.h"
#include "server/base/status_macros.h"

namespace vsprefill::attention {
namespace {

constexpr int64_t kKeysAtATime = 1024;

/// Elements [first, first + count) of a tensor, as floats.
void Widen(const void* base, int64_t count, kernels::DType dtype, float scale, float* out) {
  for (int64_t i = 0; i < count; ++i) out[i] = kernels::LoadScalar(base, i, dtype) * scale;
}

}  // namespace

RecallProbe::RecallProbe(int layer, int64_t prompt_tokens, double phase, CopyToHostFn copy)
    : layer_(layer), prompt_tokens_(prompt_tokens), phase_(phase), copy_(std::move(copy)) {}

void RecallProbe::Observe(const kernels::AttentionShape& shape,
                          const kernels::AttentionSequence& sequence) {
  if (sequence.dense() || !status_.ok()) return;
  status_ = Copy(shape, sequence);
}

absl::Status RecallProbe::Copy(const kernels::AttentionShape& shape,
                               const kernels::AttentionSequence& sequence) {
  shape_ = shape;
  keys_ = sequence;
  const int64_t count = std::clamp<int64_t>(kMaxProducts / (shape.num_q_heads * prompt_tokens_), 1,
                                            std::min(kMaxRows, prompt_tokens_));
  const int64_t q_start = sequence.kv_tokens - sequence.q_tokens;
  std::vector<int64_t> positions;
  for (int64_t i = 0; i < count; ++i) {
    const auto position =
        std::min(prompt_tokens_ - 1, static_cast<int64_t>((i + phase_) * prompt_tokens_ / count));
    if (position >= q_start && position < sequence.kv_tokens) positions.push_back(position);
  }
  if (positions.empty()) return absl::OkStatus();

  const int64_t d = shape.head_dim, element = kernels::SizeOf(shape.dtype);
  const int64_t span = (shape.num_q_heads - 1) * sequence.q_head_stride + d;
  std::vector<char> raw(span * element);
  const size_t first = rows_.size();
  for (const int64_t position : positions) {
    const int64_t offset = (position - q_start) * sequence.q_token_stride;
    VSP_RETURN_IF_ERROR(copy_(static_cast<const char*>(sequence.q) + offset * element,
                              static_cast<int64_t>(raw.size()), raw.data()));
    Row& row = rows_.emplace_back();
    row.position = position;
    row.q.resize(shape.num_q_heads * d);
    for (int head = 0; head < shape.num_q_heads; ++head) {
      Widen(raw.data() + head * sequence.q_head_stride * element, d, shape.dtype, shape.scale,
            &row.q[head * d]);
    }
    row.index_groups = kernels::IndexGroups(shape, sequence);
    row.reads.resize(row.index_groups * row.words());
  }
  size_t next = 0;
  return ForEachRow(shape, sequence, positions, copy_,
                    [&](int group, int64_t /*position*/, absl::Span<const int32_t> columns) {
                      Row& row = rows_[first + next++ % positions.size()];
                      uint32_t* const reads = &row.reads[group * row.words()];
                      for (const int32_t column : columns) kernels::SetBit(reads, column);
                    });
}

void RecallProbe::AddKeys(const Row& row, int head, int64_t first_key, int64_t num_keys,
                          const float* transposed, float* scores, Softmax* softmax) const {
  const int64_t count = std::min(num_keys, row.position + 1 - first_key);
  if (count <= 0) return;
  const int64_t d = shape_.head_dim;
  const float* const q = &row.q[head * d];
  std::fill_n(scores, count, 0.0f);
  // Keys are contiguous: this vectorises without reordering any sum.
  for (int64_t e = 0; e < d; ++e) {
    const float* const line = transposed + e * kKeysAtATime;
    for (int64_t j = 0; j < count; ++j) scores[j] += q[e] * line[j];
  }
  const double max = std::max<double>(softmax->max, *std::max_element(scores, scores + count));
  const double correction = std::exp(softmax->max - max);
  softmax->max = max;
  softmax->total *= correction;
  softmax->read *= correction;
  const uint32_t* const reads =
      &row.reads[head / (shape_.num_q_heads / row.index_groups) * row.words()];
  for (int64_t j = 0; j < count; ++j) {
    const double p = std::exp(static_cast<float>(scores[j] - max));
    softmax->total += p;
    if (kernels::TestBit(reads, first_key + j)) softmax->read += p;
  }
}

absl::StatusOr<std::vector<double>> RecallProbe::Finish() {
  VSP_RETURN_IF_ERROR(status_);
  std::vector<double> recall;
  if (rows_.empty()) return recall;
  const int64_t d = shape_.head_dim, element = kernels::SizeOf(shape_.dtype);
  const int64_t num_rows = static_cast<int64_t>(rows_.size());
  const int heads_per_key = shape_.group_size();
  std::vector<char> raw((kKeysAtATime - 1) * keys_.kv_token_stride * element + d * element);
  std::vector<float> wide(d), transposed(d * kKeysAtATime);
  std::vector<float> scores(kKeysAtATime * kernels::NumWorkers());
  std::vector<Softmax> softmax(num_rows * heads_per_key);
  for (int kv_head = 0; kv_head < shape_.num_kv_heads; ++kv_head) {
    softmax.assign(softmax.size(), {});
    for (int64_t begin = 0; begin <= rows_.back().position; begin += kKeysAtATime) {
      const int64_t count = std::min(kKeysAtATime, rows_.back().position + 1 - begin);
      const int64_t offset = kv_head * keys_.kv_head_stride + begin * keys_.kv_token_stride;
      VSP_RETURN_IF_ERROR(copy_(static_cast<const char*>(keys_.k) + offset * element,
                                ((count - 1) * keys_.kv_token_stride + d) * element, raw.data()));
      for (int64_t j = 0; j < count; ++j) {
        Widen(raw.data() + j * keys_.kv_token_stride * element, d, shape_.dtype, 1, wide.data());
        for (int64_t e = 0; e < d; ++e) transposed[e * kKeysAtATime + j] = wide[e];
      }
      kernels::ParallelFor(num_rows * heads_per_key, [&](int64_t task, int worker) {
        AddKeys(rows_[task / heads_per_key],
                kv_head * heads_per_key + static_cast<int>(task % heads_per_key), begin, count,
                transposed.data(), &scores[worker * kKeysAtATime], &softmax[task]);
      });
    }
    for (int h = 0; h < heads_per_key; ++h) {
      double sum = 0;
      for (int64_t r = 0; r < num_rows; ++r) {
        const Softmax& row = softmax[r * heads_per_key + h];
        sum += row.read / row.total;
      }
      recall.push_back(sum / static_cast<double>(num_rows));
    }
  }
  for (const double share : recall) {
    if (!std::isfinite(share))
      return absl::InternalError("the attention of a probed row is not finite");
  }
  return recall;
}

}  // namespace vsprefill::attention
