#include "training/teacher.h"

#include <torch/cuda.h>

#include <map>
#include <utility>

#include "absl/strings/str_format.h"
#include "server/attention/attention_method.h"
#include "server/base/kernel_status.h"
#include "server/base/status_macros.h"

namespace vsprefill::training {
namespace {

torch::Dtype ToTorch(kernels::DType dtype) {
  return dtype == kernels::DType::kF32 ? torch::kFloat32 : torch::kBFloat16;
}

/// Dense attention that leaves the attention's sums (and, where wanted, the queries) of each layer
/// behind.
class WatchingMethod : public attention::AttentionMethod {
 public:
  WatchingMethod(model::Transformer* model, Capture* capture, bool with_sums)
      : model_(model), capture_(capture), with_sums_(with_sums) {
    const model::ModelConfig& config = model->config();
    kernels::AttentionShape shape;
    shape.num_q_heads = config.num_q_heads;
    shape.num_kv_heads = config.num_kv_heads;
    scratch_ = torch::empty({kernels::AttentionSumsScratch(shape, capture->tokens)},
                            capture->columns.options().dtype(torch::kFloat32));
  }

  absl::string_view name() const override { return "distill-teacher"; }
  const std::map<std::string, double>& parameters() const override { return parameters_; }

  absl::Status Attend(const attention::AttentionCall& call) override {
    if (call.sequences.size() != 1 ||
        call.sequences[0].attention.q_tokens != call.sequences[0].attention.kv_tokens) {
      return absl::InternalError("the teacher needs one whole text per forward call");
    }
    kernels::AttentionSequence sequence = call.sequences[0].attention;
    sequence.index = nullptr;
    if (with_sums_) VSP_RETURN_IF_ERROR(Sum(call, sequence));
    if (capture_->queries.defined()) {
      // LibTorch works on its own stream: wait for the projection, and for the copy.
      VSP_RETURN_IF_ERROR(model_->Synchronize());
      const torch::Tensor queries = torch::from_blob(
          const_cast<void*>(sequence.q),
          {sequence.q_tokens, call.shape.num_q_heads, call.shape.head_dim},
          {sequence.q_token_stride, sequence.q_head_stride, 1}, capture_->queries.options());
      capture_->queries[call.layer].copy_(queries);
      if (capture_->queries.is_cuda()) torch::cuda::synchronize();
    }
    return FromKernelStatus(model_->kernels().attention(call.shape, &sequence, 1, call.stream),
                            "attention");
  }

 private:
  absl::Status Sum(const attention::AttentionCall& call,
                   const kernels::AttentionSequence& sequence) {
    kernels::AttentionSumsArgs sums;
    sums.shape = call.shape;
    sums.sequence = sequence;
    sums.lse = scratch_.data_ptr<float>();
    sums.columns = capture_->columns[call.layer].data_ptr<float>();
    sums.diagonals = capture_->diagonals[call.layer].data_ptr<float>();
    return FromKernelStatus(model_->kernels().attention_sums(sums, call.stream), "attention_sums");
  }

  model::Transformer* model_;
  Capture* capture_;
  const bool with_sums_;
  torch::Tensor scratch_;
  std::map<std::string, double> parameters_;
};

}  // namespace

Teacher::Teacher(std::unique_ptr<model::Transformer> model, int64_t max_tokens,
                 torch::Device device)
    : model_(std::move(model)),
      device_(device),
      max_tokens_(max_tokens),
      pool_(kv::KvCache::BytesFor(model_->kv_layout(), max_tokens, /*with_logits=*/false)) {}

absl::StatusOr<std::unique_ptr<Teacher>> Teacher::Create(const model::LoadOptions& options,
                                                         int64_t max_tokens) {
  VSP_ASSIGN_OR_RETURN(std::unique_ptr<model::Transformer> model,
                       model::Transformer::Load(options));
  const int64_t longest = model->config().max_position_embeddings;
  if (max_tokens < 1 || max_tokens > longest) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "text length %d is not in [1, %d] (the model's positions)", max_tokens, longest));
  }
  const torch::Device device = options.device == kernels::DeviceKind::kCuda
                                   ? torch::Device(torch::kCUDA, 0)
                                   : torch::Device(torch::kCPU);
  std::unique_ptr<Teacher> teacher(new Teacher(std::move(model), max_tokens, device));
  VSP_ASSIGN_OR_RETURN(kv::KvPool::Reservation reservation,
                       teacher->pool_.Reserve(teacher->pool_.capacity_bytes()));
  VSP_ASSIGN_OR_RETURN(
      teacher->cache_,
      kv::KvCache::Create(teacher->model_->allocator(), std::move(reservation),
                          teacher->model_->kv_layout(), max_tokens, /*with_logits=*/false));
  return teacher;
}

StudentShape Teacher::student_shape(int hidden) const {
  const model::ModelConfig& config = model_->config();
  return {config.num_layers, config.num_kv_heads, config.head_dim, hidden};
}

absl::StatusOr<Capture> Teacher::Run(absl::Span<const int32_t> ids, bool with_queries,
                                     bool with_sums) {
  const int64_t tokens = ids.size();
  if (tokens < 1 || tokens > max_tokens_) {
    return absl::InvalidArgumentError(
        absl::StrFormat("text of %d tokens is not in [1, %d]", tokens, max_tokens_));
  }
  const model::ModelConfig& config = model_->config();
  const torch::TensorOptions stored =
      torch::TensorOptions().device(device_).dtype(ToTorch(model_->kv_layout().dtype));
  Capture capture;
  capture.tokens = tokens;
  capture.columns =
      torch::zeros({config.num_layers, config.num_kv_heads, tokens}, stored.dtype(torch::kFloat32));
  capture.diagonals = torch::zeros_like(capture.columns);
  if (with_queries) {
    capture.queries =
        torch::empty({config.num_layers, tokens, config.num_q_heads, config.head_dim}, stored);
  }
  WatchingMethod method(model_.get(), &capture, with_sums);
  // The buffers were filled on LibTorch's stream, the kernels run on the model's.
  if (device_.is_cuda()) torch::cuda::synchronize();

  cache_->set_num_tokens(0);
  model::SequenceChunk chunk;
  chunk.ids = ids;
  chunk.prompt_tokens = tokens;
  chunk.cache = cache_.get();
  model::ForwardOptions options;
  options.method = &method;
  options.all_rows = true;
  VSP_RETURN_IF_ERROR(model_->Forward({&chunk, 1}, options).status());
  VSP_RETURN_IF_ERROR(model_->Synchronize());

  std::vector<torch::Tensor> keys, values;
  auto view = [&](void* data) {
    return torch::from_blob(data, {config.num_kv_heads, tokens, config.head_dim},
                            {cache_->head_stride(), config.head_dim, 1}, stored);
  };
  for (int layer = 0; layer < config.num_layers; ++layer) {
    keys.push_back(view(cache_->k(layer)));
    values.push_back(view(cache_->v(layer)));
  }
  capture.keys = std::move(keys);
  capture.values = std::move(values);
  return capture;
}

Sample Teacher::ToSample(const Capture& capture) {
  Sample sample;
  sample.tokens = capture.tokens;
  sample.columns = capture.columns;
  sample.diagonals = capture.diagonals;
  std::vector<torch::Tensor> features;
  for (size_t layer = 0; layer < capture.keys.size(); ++layer) {
    features.push_back(
        torch::cat({RmsNormalize(capture.keys[layer]), RmsNormalize(capture.values[layer])}, -1));
  }
  sample.features = torch::stack(features);
  return sample;
}

}  // namespace vsprefill::training
