// A transformer that computes nothing: KV, logits and counts are formulas, each layer takes as long
// as the test wants, and a hook may stop or fail it anywhere. For tests of the service and its
// faults.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/time/time.h"
#include "server/model/transformer.h"

namespace vsprefill::testing {

struct FakeTransformerOptions {
  int num_layers = 4;
  int num_q_heads = 4, num_kv_heads = 2, head_dim = 16;
  int vocab_size = 1000;
  int64_t max_position_embeddings = 1 << 20;
  kernels::DType dtype = kernels::DType::kBF16;
  absl::Duration layer_delay;
  bool has_indexer = true;
  /// Called at every layer of every chunk before it counts as computed; may block or fail.
  std::function<absl::Status(int layer, int64_t position_begin)> on_layer;
};

/// Byte `offset` of the row (layer, K or V, head, token) of a prompt, which depends on the prompt's
/// token there.
uint8_t FakeKvRowByte(int layer, bool is_v, int head, int64_t token, int32_t id, int64_t offset);
/// The greedy token after `ids`.
int32_t FakeFirstToken(const std::vector<int32_t>& ids, int vocab_size);

std::unique_ptr<model::Transformer> MakeFakeTransformer(const FakeTransformerOptions& options);

}  // namespace vsprefill::testing
