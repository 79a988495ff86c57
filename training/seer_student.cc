#include "training/seer_student.h"

#include <torch/utils.h>

#include <cmath>
#include <cstring>
#include <limits>

#include "absl/strings/str_format.h"
#include "kernels/select_seer.h"
#include "server/model/rope.h"
#include "training/block_attention.h"

namespace vsprefill::training {
namespace {

constexpr int64_t kBlock = kernels::kSeerBlock;
constexpr double kNoise = 0.001;     // maxima and minima are large beside means
constexpr double kInvisible = -1e9;  // not -infinity: 0 * -infinity would be NaN in the loss

/// What was there before RoPE: x [heads, tokens, head_dim].
torch::Tensor Unrotate(const torch::Tensor& x, const torch::Tensor& cosines,
                       const torch::Tensor& sines, float inverse) {
  const std::vector<torch::Tensor> halves = x.to(torch::kFloat32).chunk(2, -1);
  return torch::cat(
             {halves[1] * sines + halves[0] * cosines, halves[1] * cosines - halves[0] * sines},
             -1) *
         inverse;
}

/// [heads, tokens, head_dim] to [heads, blocks, kBlock, head_dim], filled up with `padding`.
torch::Tensor Blocks(const torch::Tensor& x, float padding) {
  const int64_t blocks = kernels::SeerBlocks(x.size(1));
  return torch::constant_pad_nd(x, {0, 0, 0, blocks * kBlock - x.size(1)}, padding)
      .unflatten(1, {blocks, kBlock});
}

torch::Tensor BlockMeans(const torch::Tensor& x) {
  const int64_t tokens = x.size(1), blocks = kernels::SeerBlocks(tokens);
  torch::Tensor counts = torch::full({blocks, 1}, kBlock, x.options());
  counts[blocks - 1] = tokens - (blocks - 1) * kBlock;
  return Blocks(x, 0).sum(2) / counts;
}

int64_t FirstCountedRow(int64_t blocks) { return blocks / 4; }

}  // namespace

std::string SeerLoss::ToString() const { return absl::StrFormat("KL %.4f", kl); }

SeerStudent::SeerStudent(const SeerShape& shape, torch::Device device, uint64_t seed)
    : shape_(shape),
      device_(device),
      attention_factor_(static_cast<float>(model::ResolvedAttentionFactor(shape.rope))) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  const int64_t d = shape.head_dim, gate = shape.gate_dim;
  const bool from_means = gate % d == 0;
  const auto random = [&](int heads, int64_t features) {
    return torch::randn({shape.num_layers, heads, gate, features}, generator, torch::kFloat32) *
           (from_means ? kNoise : 1 / std::sqrt(features));
  };
  torch::Tensor wq = random(shape.num_q_heads, d), wk = random(shape.num_groups, 3 * d);
  if (from_means) {
    // Pair i of head_dim has the frequency that pair i * step of gate_dim has.
    const int64_t step = gate / d;
    for (int64_t i = 0; i < d / 2; ++i) {
      for (const auto& [row, element] :
           {std::pair{i * step, i}, {gate / 2 + i * step, i + d / 2}}) {
        // The gate divides by sqrt(gate_dim), attention by sqrt(head_dim).
        wq.select(3, element).select(2, row) += std::sqrt(static_cast<double>(step));
        wk.select(3, 2 * d + element).select(2, row) += 1;
      }
    }
  }
  wq_ = wq.to(device_);
  wk_ = wk.to(device_);
  frequencies_ =
      torch::tensor(model::RopeInverseFrequencies(shape.rope, shape.gate_dim), torch::kFloat32)
          .to(device_);
  for (torch::Tensor& parameter : Parameters()) parameter.requires_grad_(true);
}

SeerSample SeerStudent::ToSample(const SeerShape& shape, const Capture& capture,
                                 int64_t slab_bytes) {
  torch::NoGradGuard no_grad;
  model::RopeTable table(shape.rope, shape.head_dim);
  table.Grow(capture.tokens);
  const auto rotations = [&](const float* data) {
    return torch::from_blob(const_cast<float*>(data), {capture.tokens, shape.head_dim / 2},
                            torch::kFloat32)
        .to(capture.queries.device(), torch::kFloat32, /*non_blocking=*/false, /*copy=*/true);
  };
  const torch::Tensor cosines = rotations(table.cos()), sines = rotations(table.sin());
  const float factor = static_cast<float>(model::ResolvedAttentionFactor(shape.rope));
  const float inverse = 1 / (factor * factor);
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  std::vector<torch::Tensor> queries, keys, targets;
  for (int layer = 0; layer < shape.num_layers; ++layer) {
    const torch::Tensor& layer_queries = capture.queries[layer];
    queries.push_back(BlockMeans(Unrotate(layer_queries.transpose(0, 1), cosines, sines, inverse)));
    const torch::Tensor k = Unrotate(capture.keys[layer], cosines, sines, inverse);
    keys.push_back(torch::cat(
        {Blocks(k, -kInfinity).amax(2), Blocks(k, kInfinity).amin(2), BlockMeans(k)}, -1));
    targets.push_back(BlockMaxAttention(layer_queries, capture.keys[layer],
                                        1 / std::sqrt(static_cast<double>(shape.head_dim)),
                                        slab_bytes));
  }
  return {capture.tokens, torch::stack(queries), torch::stack(keys), torch::stack(targets)};
}

torch::Tensor SeerStudent::RotateBlocks(const torch::Tensor& x) const {
  const torch::Tensor angles =
      (torch::arange(x.size(1), frequencies_.options()) * kBlock).unsqueeze(1) * frequencies_;
  const torch::Tensor cosines = angles.cos() * attention_factor_,
                      sines = angles.sin() * attention_factor_;
  const std::vector<torch::Tensor> halves = x.chunk(2, -1);
  return torch::cat(
      {halves[0] * cosines - halves[1] * sines, halves[0] * sines + halves[1] * cosines}, -1);
}

torch::Tensor SeerStudent::Logits(const SeerSample& sample, int layer) const {
  const int64_t blocks = sample.target.size(2);
  const torch::Tensor q =
      RotateBlocks(torch::matmul(sample.queries[layer], wq_[layer].transpose(1, 2)));
  const torch::Tensor k =
      RotateBlocks(torch::matmul(sample.keys[layer], wk_[layer].transpose(1, 2)));
  const torch::Tensor logits =
      torch::matmul(q.view({k.size(0), -1, shape_.gate_dim}), k.transpose(1, 2))
          .view({shape_.num_q_heads, blocks, blocks}) /
      std::sqrt(static_cast<double>(shape_.gate_dim));
  const torch::Tensor hidden =
      torch::ones({blocks, blocks}, logits.options().dtype(torch::kBool)).triu(1);
  return logits.masked_fill(hidden, kInvisible);
}

torch::Tensor SeerStudent::LayerLoss(const SeerSample& sample, int layer) const {
  const int64_t blocks = sample.target.size(2), first = FirstCountedRow(blocks);
  const torch::Tensor target = sample.target[layer].narrow(1, first, blocks - first);
  const torch::Tensor log_gate =
      torch::log_softmax(Logits(sample, layer).narrow(1, first, blocks - first), -1);
  return (torch::xlogy(target, target) - target * log_gate).sum(-1).mean();
}

SeerLoss SeerStudent::Accumulate(const SeerSample& sample, double weight, int64_t /*slab_bytes*/) {
  torch::Tensor sum = torch::zeros({}, device_);
  for (int layer = 0; layer < shape_.num_layers; ++layer) {
    const torch::Tensor loss = LayerLoss(sample, layer);
    (loss * weight).backward();
    sum += loss.detach();
  }
  return {sum.item<double>() / shape_.num_layers};
}

SeerLoss SeerStudent::Evaluate(const SeerSample& sample, int64_t /*slab_bytes*/) const {
  torch::NoGradGuard no_grad;
  torch::Tensor sum = torch::zeros({}, device_);
  for (int layer = 0; layer < shape_.num_layers; ++layer) sum += LayerLoss(sample, layer);
  return {sum.item<double>() / shape_.num_layers};
}

double SeerStudent::ProxyRecall(const SeerSample& sample, int64_t /*slab_bytes*/) const {
  torch::NoGradGuard no_grad;
  const int64_t blocks = sample.target.size(2), first = FirstCountedRow(blocks);
  const torch::Tensor item = torch::arange(blocks, sample.target.options());
  const torch::Tensor budget = ((item + 1) * 0.1).ceil().unsqueeze(1);
  const torch::Tensor kept = item.unsqueeze(0) < budget;  // [row, rank]
  torch::Tensor sum = torch::zeros({}, device_);
  for (int layer = 0; layer < shape_.num_layers; ++layer) {
    const torch::Tensor order = torch::argsort(Logits(sample, layer), -1, /*descending=*/true);
    sum += (sample.target[layer].gather(-1, order) * kept)
               .sum(-1)
               .narrow(1, first, blocks - first)
               .mean();
  }
  return sum.item<double>() / shape_.num_layers;
}

model::SeerGateWeights SeerStudent::Export() const {
  model::SeerGateWeights weights;
  weights.num_q_heads = shape_.num_q_heads;
  weights.num_kv_heads = shape_.num_groups;
  weights.head_dim = shape_.head_dim;
  weights.gate_dim = shape_.gate_dim;
  const auto bits = [](const torch::Tensor& x) {
    const torch::Tensor host = x.detach().to(torch::kCPU, torch::kBFloat16).contiguous();
    std::vector<uint16_t> values(host.numel());
    std::memcpy(values.data(), host.const_data_ptr(), values.size() * sizeof(uint16_t));
    return values;
  };
  for (int layer = 0; layer < shape_.num_layers; ++layer) {
    weights.layers.push_back({bits(wq_[layer]), bits(wk_[layer])});
  }
  return weights;
}

}  // namespace vsprefill::training
