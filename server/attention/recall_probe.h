// How much of the true attention mass an executed index has read, measured on a few rows of one
// layer of one request. Observe copies what the next layer overwrites (queries, index) while the
// request computes; Finish recomputes those rows' softmax over all keys afterwards, while the
// request's KV cache still lives. Engine thread only.
//
// Bounds, for n prompt tokens, H query heads of width d. Rows: kMaxRows, fewer where H n rows would
// pass kMaxProducts (at least 1). Work of Finish: that many products of d terms, on all CPU
// threads. Host memory: rows x H x (4 d + n / 8) bytes and a block of keys (below 10 MiB unless H n
// > kMaxProducts). CUDA: each chunk that holds a probed row waits once for the stream.
#pragma once

#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/attention.h"
#include "server/attention/index_rows.h"

namespace vsprefill::attention {

class RecallProbe {
 public:
  static constexpr int64_t kMaxRows = 64;
  static constexpr int64_t kMaxProducts = int64_t{1} << 24;

  /// Rows are spread evenly over the prompt; `phase` in [0, 1) says where in its stretch each lies,
  /// so that many probes with different phases see all rows.
  RecallProbe(int layer, int64_t prompt_tokens, double phase, CopyToHostFn copy);

  int layer() const { return layer_; }
  /// After the attention of the probed layer was run (CPU) or enqueued (CUDA), `sequence` with the
  /// index that it was run with. Calls without an index (dense) are not looked at. An error is kept
  /// for Finish: a probe never fails a request.
  void Observe(const kernels::AttentionShape& shape, const kernels::AttentionSequence& sequence);

  /// Per query head the share of attention mass that lies in the keys that were read, mean over the
  /// observed rows, in [0, 1]; empty where no row was observed. Reads the keys that the observed
  /// sequences pointed to, which must still be there.
  absl::StatusOr<std::vector<double>> Finish();

 private:
  struct Row {
    int64_t position = 0;
    std::vector<float> q;         // [heads, head_dim], scaled
    std::vector<uint32_t> reads;  // bit sets over keys [0, position], [index groups, words]
    int index_groups = 0;
    int64_t words() const { return position / 32 + 1; }
  };
  /// A row's running softmax for one head.
  struct Softmax {
    double max = -1e300, total = 0, read = 0;
  };

  absl::Status Copy(const kernels::AttentionShape& shape,
                    const kernels::AttentionSequence& sequence);
  void AddKeys(const Row& row, int head, int64_t first_key, int64_t num_keys,
               const float* transposed, float* scores, Softmax* softmax) const;

  const int layer_;
  const int64_t prompt_tokens_;
  const double phase_;
  const CopyToHostFn copy_;
  absl::Status status_;
  std::vector<Row> rows_;
  kernels::AttentionShape shape_;
  kernels::AttentionSequence keys_;  // of the last observed call: k and its strides
};

}  // namespace vsprefill::attention
