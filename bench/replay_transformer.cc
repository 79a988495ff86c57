// replay-server: vsprefill-server with a model that computes nothing. server/main.cc is linked
// against this file instead of the transformer, so flags, admission, queue, sender, checksums,
// gRPC and metrics are the server's own, and a client that is measured against it cannot wait for
// compute. It poses as the model of --model (shape, kv_id); what it sends is a cache full of
// finite numbers, and the first token is always 0.
#include <bit>
#include <cmath>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "server/base/mapped_file.h"
#include "server/base/status_macros.h"
#include "server/model/device.h"
#include "server/model/identity.h"
#include "server/model/safetensors.h"
#include "server/model/transformer.h"

namespace vsprefill::model {
namespace {

/// Fills with finite numbers of the dtype, in [-2, 2].
void Fill(void* data, int64_t bytes, kernels::DType dtype) {
  std::mt19937 random(static_cast<uint32_t>(bytes));
  std::uniform_real_distribution<float> value(-2.0f, 2.0f);
  // A pattern that no chunk size divides: every chunk has other bytes and another checksum.
  std::vector<uint8_t> pattern;
  for (int i = 0; i < 99991; ++i) {
    const uint32_t bits = std::bit_cast<uint32_t>(value(random));
    for (int shift = dtype == kernels::DType::kBF16 ? 16 : 0; shift < 32; shift += 8) {
      pattern.push_back(static_cast<uint8_t>(bits >> shift));
    }
  }
  auto* to = static_cast<uint8_t*>(data);
  for (int64_t at = 0; at < bytes; at += static_cast<int64_t>(pattern.size())) {
    std::memcpy(to + at, pattern.data(),
                std::min<int64_t>(static_cast<int64_t>(pattern.size()), bytes - at));
  }
}

/// Memory that keeps its content when it is given back, so that the next cache of the same size is
/// there without a byte being written.
class ReplayAllocator final : public Allocator {
 public:
  explicit ReplayAllocator(kernels::DType dtype) : dtype_(dtype) {}
  ~ReplayAllocator() override {
    for (const auto& [bytes, data] : free_) HostAllocator().Free(data, bytes);
  }
  absl::StatusOr<void*> Allocate(int64_t bytes) override {
    {
      absl::MutexLock lock(&mu_);
      if (auto found = free_.extract(bytes)) return found.mapped();
    }
    VSP_ASSIGN_OR_RETURN(void* data, HostAllocator().Allocate(bytes));
    Fill(data, bytes, dtype_);
    return data;
  }
  void Free(void* data, int64_t bytes) noexcept override {
    absl::MutexLock lock(&mu_);
    free_.emplace(bytes, data);
  }
  kernels::DeviceKind device() const override { return kernels::DeviceKind::kCpu; }

 private:
  const kernels::DType dtype_;
  absl::Mutex mu_;
  std::multimap<int64_t, void*> free_ ABSL_GUARDED_BY(mu_);
};

class ReplayTransformer final : public Transformer {
 public:
  ReplayTransformer(ModelConfig config, std::string weights_id, kernels::DType dtype)
      : config_(std::move(config)), weights_id_(std::move(weights_id)), allocator_(dtype) {
    kv_layout_.num_layers = config_.num_layers;
    kv_layout_.num_kv_heads = config_.num_kv_heads;
    kv_layout_.head_dim = config_.head_dim;
    kv_layout_.dtype = dtype;
    kv_layout_.kv_id = KvId(config_, weights_id_, dtype);
    context_.kernels = &kernels::CpuKernels();
    context_.allocator = &allocator_;
    context_.num_layers = config_.num_layers;
  }

  const ModelConfig& config() const override { return config_; }
  const kv::KvLayout& kv_layout() const override { return kv_layout_; }
  const std::string& weights_id() const override { return weights_id_; }
  bool has_indexer() const override { return false; }
  std::string device_description() const override { return "replay, nothing is computed"; }
  kernels::DeviceKind device() const override { return kernels::DeviceKind::kCpu; }
  Allocator& allocator() override { return allocator_; }
  kernels::Stream stream() const override { return nullptr; }
  const attention::MethodContext& method_context() const override { return context_; }
  const kernels::KernelSet& kernels() const override { return *context_.kernels; }
  absl::Status Synchronize() override { return absl::OkStatus(); }

  absl::StatusOr<ForwardResult> Forward(absl::Span<const SequenceChunk> batch,
                                        const ForwardOptions& options) override {
    ForwardResult result;
    for (int layer = 0; layer < config_.num_layers; ++layer) {
      for (const SequenceChunk& chunk : batch) {
        if (chunk.counts == nullptr) continue;
        const auto tokens = static_cast<int64_t>(chunk.ids.size());
        chunk.counts[layer].dense += tokens;
        chunk.counts[layer].unmasked += tokens;
        chunk.counts[layer].multiplied += tokens;
      }
      if (options.after_layer) VSP_RETURN_IF_ERROR(options.after_layer(layer));
    }
    for (const SequenceChunk& chunk : batch) {
      chunk.cache->set_num_tokens(chunk.position_begin + static_cast<int64_t>(chunk.ids.size()));
      if (options.logits == LogitsMode::kLast) {
        result.logits.emplace_back(config_.vocab_size, 0.0f);
      }
    }
    return result;
  }

 private:
  const ModelConfig config_;
  const std::string weights_id_;
  ReplayAllocator allocator_;
  kv::KvLayout kv_layout_;
  attention::MethodContext context_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<Transformer>> Transformer::Load(const LoadOptions& options) {
  const std::string& dir = options.model_dir;
  VSP_ASSIGN_OR_RETURN(const std::string config_json, ReadTextFile(dir + "/config.json"));
  VSP_ASSIGN_OR_RETURN(ModelConfig config, ParseModelConfig(config_json));
  VSP_ASSIGN_OR_RETURN(const SafetensorsReader file, SafetensorsReader::OpenDirectory(dir));
  return std::make_unique<ReplayTransformer>(std::move(config), WeightsId(file.tensors()),
                                             options.dtype);
}

absl::StatusOr<ChosenDevice> ChooseDevice(absl::string_view device) {
  if (device == "cuda") return absl::UnavailableError("replay-server has no cuda");
  return ChosenDevice{kernels::DeviceKind::kCpu, "none, replay"};
}

}  // namespace vsprefill::model
