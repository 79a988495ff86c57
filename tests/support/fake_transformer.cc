#include "tests/support/fake_transformer.h"

#include <utility>

#include "absl/time/clock.h"
#include "server/base/status_macros.h"

namespace vsprefill::testing {
namespace {

constexpr int64_t kDenseShare = 4, kUnmaskedShare = 1, kMultipliedShare = 2;

class FakeTransformer final : public model::Transformer {
 public:
  explicit FakeTransformer(const FakeTransformerOptions& options) : options_(options) {
    config_.architecture = "FakeForCausalLM";
    config_.num_layers = options.num_layers;
    config_.num_q_heads = options.num_q_heads;
    config_.num_kv_heads = options.num_kv_heads;
    config_.head_dim = options.head_dim;
    config_.vocab_size = options.vocab_size;
    config_.max_position_embeddings = options.max_position_embeddings;
    layout_.num_layers = options.num_layers;
    layout_.num_kv_heads = options.num_kv_heads;
    layout_.head_dim = options.head_dim;
    layout_.dtype = options.dtype;
    layout_.kv_id = "fake-kv-id";
    context_.kernels = &kernels::CpuKernels();
    context_.allocator = &HostAllocator();
    context_.num_layers = options.num_layers;
  }

  const model::ModelConfig& config() const override { return config_; }
  const kv::KvLayout& kv_layout() const override { return layout_; }
  const std::string& weights_id() const override { return weights_id_; }
  bool has_indexer() const override { return options_.has_indexer; }
  std::string device_description() const override { return "cpu (fake)"; }
  kernels::DeviceKind device() const override { return kernels::DeviceKind::kCpu; }
  Allocator& allocator() override { return HostAllocator(); }
  kernels::Stream stream() const override { return nullptr; }
  const attention::MethodContext& method_context() const override { return context_; }
  const kernels::KernelSet& kernels() const override { return kernels::CpuKernels(); }
  absl::Status Synchronize() override { return absl::OkStatus(); }

  absl::StatusOr<model::ForwardResult> Forward(absl::Span<const model::SequenceChunk> batch,
                                               const model::ForwardOptions& options) override {
    model::ForwardResult result;
    for (const model::SequenceChunk& chunk : batch) {
      if (chunk.position_begin != chunk.cache->num_tokens()) {
        return absl::InternalError("chunk does not begin where the cache ends");
      }
    }
    const bool sparse = options.method->needs_indexer_logits();
    if (sparse) result.indexer_seconds = 0.01;
    for (int layer = 0; layer < options_.num_layers; ++layer) {
      if (options_.layer_delay > absl::ZeroDuration()) absl::SleepFor(options_.layer_delay);
      for (const model::SequenceChunk& chunk : batch) Fill(layer, chunk, sparse);
      if (options_.on_layer) {
        VSP_RETURN_IF_ERROR(options_.on_layer(layer, batch[0].position_begin));
      }
      if (options.after_layer) VSP_RETURN_IF_ERROR(options.after_layer(layer));
    }
    for (const model::SequenceChunk& chunk : batch) {
      const int64_t end = chunk.position_begin + static_cast<int64_t>(chunk.ids.size());
      chunk.cache->set_num_tokens(end);
      sum_ = chunk.position_begin == 0 ? 0 : sum_;
      for (int32_t id : chunk.ids) sum_ += id;
      if (options.logits == model::LogitsMode::kLast) {
        std::vector<float> logits(options_.vocab_size, -1.0f);
        logits[sum_ % options_.vocab_size] = 2.0f;
        result.logits.push_back(std::move(logits));
      }
    }
    return result;
  }

 private:
  void Fill(int layer, const model::SequenceChunk& chunk, bool sparse) {
    const int64_t row_bytes = options_.head_dim * kernels::SizeOf(options_.dtype);
    const int64_t head_bytes = chunk.cache->head_stride() * kernels::SizeOf(options_.dtype);
    for (int head = 0; head < options_.num_kv_heads; ++head) {
      for (size_t i = 0; i < chunk.ids.size(); ++i) {
        const int64_t token = chunk.position_begin + static_cast<int64_t>(i);
        const int64_t offset = head * head_bytes + token * row_bytes;
        auto* k = static_cast<uint8_t*>(chunk.cache->k(layer)) + offset;
        auto* v = static_cast<uint8_t*>(chunk.cache->v(layer)) + offset;
        for (int64_t b = 0; b < row_bytes; ++b) {
          k[b] = FakeKvRowByte(layer, false, head, token, chunk.ids[i], b);
          v[b] = FakeKvRowByte(layer, true, head, token, chunk.ids[i], b);
        }
      }
    }
    if (chunk.counts != nullptr) {
      const auto tokens = static_cast<int64_t>(chunk.ids.size());
      chunk.counts[layer].dense += kDenseShare * tokens;
      chunk.counts[layer].unmasked += kUnmaskedShare * tokens;
      chunk.counts[layer].multiplied += kMultipliedShare * tokens;
      if (sparse) {
        chunk.counts[layer].indexes += options_.num_kv_heads;
        chunk.counts[layer].vertical_columns += 100 * options_.num_kv_heads;
        chunk.counts[layer].slash_diagonals += 192 * options_.num_kv_heads;
      }
    }
  }

  const FakeTransformerOptions options_;
  const std::string weights_id_ = "fake-weights-id";
  model::ModelConfig config_;
  kv::KvLayout layout_;
  attention::MethodContext context_;
  int64_t sum_ = 0;
};

}  // namespace

uint8_t FakeKvRowByte(int layer, bool is_v, int head, int64_t token, int32_t id, int64_t offset) {
  uint64_t x = static_cast<uint64_t>(layer) * 0x9E3779B97F4A7C15u + (is_v ? 0x1234567u : 0u);
  x ^= (static_cast<uint64_t>(head) << 48) ^ (static_cast<uint64_t>(token) << 16) ^ offset;
  x += static_cast<uint64_t>(id) * 0xC2B2AE3D27D4EB4Fu;
  x ^= x >> 29;
  x *= 0xBF58476D1CE4E5B9u;
  return static_cast<uint8_t>(x >> 56);
}

int32_t FakeFirstToken(const std::vector<int32_t>& ids, int vocab_size) {
  int64_t sum = 0;
  for (int32_t id : ids) sum += id;
  return static_cast<int32_t>(sum % vocab_size);
}

std::unique_ptr<model::Transformer> MakeFakeTransformer(const FakeTransformerOptions& options) {
  return std::make_unique<FakeTransformer>(options);
}

}  // namespace vsprefill::testing
