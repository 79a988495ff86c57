#include "server/model/transformer.h"

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/base/mapped_file.h"
#include "server/base/status_macros.h"
#include "server/model/forward_pass.h"
#include "server/model/identity.h"
#include "server/model/model_weights.h"
#include "server/model/safetensors.h"
#include "server/model/seer_gate.h"
#include "server/model/torch_backend.h"
#include "server/model/torch_guard.h"
#include "server/model/vs_indexer.h"

namespace vsprefill::model {
namespace {

class LoadedTransformer final : public Transformer {
 public:
  absl::Status Init(const LoadOptions& options);

  const ModelConfig& config() const override { return config_; }
  const kv::KvLayout& kv_layout() const override { return kv_layout_; }
  const std::string& weights_id() const override { return weights_id_; }
  bool has_indexer() const override { return indexer_ != nullptr; }
  std::string device_description() const override { return backend_->description(); }
  kernels::DeviceKind device() const override { return backend_->device(); }
  Allocator& allocator() override { return backend_->allocator(); }
  kernels::Stream stream() const override { return backend_->stream(); }
  const attention::MethodContext& method_context() const override { return method_context_; }
  const kernels::KernelSet& kernels() const override { return *method_context_.kernels; }
  absl::StatusOr<ForwardResult> Forward(absl::Span<const SequenceChunk> batch,
                                        const ForwardOptions& options) override {
    return forward_->Run(batch, options);
  }
  absl::Status Synchronize() override { return backend_->Synchronize(); }
  absl::Status CopyToHost(const void* device, int64_t bytes, void* host) override {
    return backend_->Download(device, bytes, host);
  }
  absl::Status CopyToDevice(const void* host, int64_t bytes, void* device) override {
    return backend_->Upload(host, bytes, device);
  }

 private:
  absl::Status LoadIndexer(const LoadOptions& options);
  absl::Status LoadSeerGate(const LoadOptions& options);

  ModelConfig config_;
  std::string weights_id_;
  kv::KvLayout kv_layout_;
  std::unique_ptr<TorchBackend> backend_;
  ModelWeights weights_;
  std::unique_ptr<VsIndexer> indexer_;
  std::unique_ptr<SeerGate> seer_gate_;
  attention::MethodContext method_context_;
  std::unique_ptr<ForwardPass> forward_;
};

absl::Status LoadedTransformer::Init(const LoadOptions& options) {
  const std::string& dir = options.model_dir;
  VSP_ASSIGN_OR_RETURN(const std::string config_json, ReadTextFile(dir + "/config.json"));
  std::string generation_json;
  if (FileExists(dir + "/generation_config.json")) {
    VSP_ASSIGN_OR_RETURN(generation_json, ReadTextFile(dir + "/generation_config.json"));
  }
  absl::StatusOr<ModelConfig> config = ParseModelConfig(config_json, generation_json);
  if (!config.ok()) {
    return absl::Status(config.status().code(), absl::StrCat(dir, "/", config.status().message()));
  }
  config_ = *std::move(config);

  const kernels::KernelSet* kernel_set = options.device == kernels::DeviceKind::kCpu
                                             ? &kernels::CpuKernels()
                                             : kernels::CudaKernelsOrNull();
  VSP_ASSIGN_OR_RETURN(backend_, TorchBackend::Create(options.device, options.cpu_threads));
  if (kernel_set == nullptr) {
    return absl::UnavailableError("this binary was built without CUDA kernels");
  }
  VSP_RETURN_IF_ERROR(backend_->EnterThread());

  VSP_ASSIGN_OR_RETURN(const SafetensorsReader file, SafetensorsReader::OpenDirectory(dir));
  weights_id_ = WeightsId(file.tensors());
  VSP_ASSIGN_OR_RETURN(weights_, LoadWeights(file, config_, options.dtype, *backend_));
  kv_layout_.num_layers = config_.num_layers;
  kv_layout_.num_kv_heads = config_.num_kv_heads;
  kv_layout_.head_dim = config_.head_dim;
  kv_layout_.dtype = options.dtype;
  kv_layout_.kv_id = KvId(config_, weights_id_, options.dtype);
  VSP_RETURN_IF_ERROR(LoadIndexer(options));
  VSP_RETURN_IF_ERROR(LoadSeerGate(options));

  method_context_.kernels = kernel_set;
  method_context_.allocator = &backend_->allocator();
  method_context_.library_attention = backend_->library_attention();
  method_context_.num_layers = config_.num_layers;
  method_context_.num_q_heads = config_.num_q_heads;
  method_context_.head_dim = config_.head_dim;
  if (indexer_ != nullptr) method_context_.threshold_scale = indexer_->threshold_scale();
  if (seer_gate_ != nullptr) method_context_.seer_gate = seer_gate_->layers();
  forward_ = std::make_unique<ForwardPass>(ForwardPass::Model{
      &config_, &kv_layout_, &weights_, indexer_.get(), kernel_set, backend_.get()});
  return absl::OkStatus();
}

/// Where a trained part of the model lies: what was asked for, else `name` in the model's directory
/// where it exists; empty: nowhere.
std::string PartPath(const LoadOptions& options, const std::string& asked, const char* name) {
  if (asked == "none") return "";
  if (!asked.empty()) return asked;
  const std::string own = absl::StrCat(options.model_dir, "/", name);
  return FileExists(own) ? own : "";
}

absl::Status LoadedTransformer::LoadIndexer(const LoadOptions& options) {
  const std::string path = PartPath(options, options.indexer_path, "indexer.safetensors");
  if (path.empty()) return absl::OkStatus();
  IndexerExpectation expectation;
  expectation.weights_id = weights_id_;
  expectation.num_layers = config_.num_layers;
  expectation.num_groups = config_.num_kv_heads;
  expectation.head_dim = config_.head_dim;
  VSP_ASSIGN_OR_RETURN(const IndexerWeights weights, ReadIndexer(path, expectation));
  VSP_ASSIGN_OR_RETURN(indexer_, VsIndexer::Create(weights, options.device));
  return absl::OkStatus();
}

absl::Status LoadedTransformer::LoadSeerGate(const LoadOptions& options) {
  const std::string path = PartPath(options, options.seer_gate_path, "seer_gate.safetensors");
  if (path.empty()) return absl::OkStatus();
  SeerGateExpectation expectation;
  expectation.weights_id = weights_id_;
  expectation.num_layers = config_.num_layers;
  expectation.num_q_heads = config_.num_q_heads;
  expectation.num_kv_heads = config_.num_kv_heads;
  expectation.head_dim = config_.head_dim;
  VSP_ASSIGN_OR_RETURN(const SeerGateWeights weights, ReadSeerGate(path, expectation));
  VSP_ASSIGN_OR_RETURN(
      seer_gate_,
      SeerGate::Create(weights, config_.rope, config_.max_position_embeddings, options.device));
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<Transformer>> Transformer::Load(const LoadOptions& options) {
  auto transformer = std::make_unique<LoadedTransformer>();
  VSP_RETURN_IF_ERROR(
      TorchGuard("loading of the model", [&] { return transformer->Init(options); }));
  return transformer;
}

}  // namespace vsprefill::model
