#include "training/student.h"

#include <torch/utils.h>

#include <algorithm>
#include <cmath>
#include <cstring>

#include "absl/strings/str_format.h"
#include "kernels/indexer.h"

namespace vsprefill::training {
namespace {

/// Features that hardly vary would otherwise get huge weights, which bfloat16 cannot hold apart.
constexpr double kSmallestDeviation = 0.2;
/// Columns of one band block.
constexpr int64_t kBlock = 64;

torch::Tensor Buckets(int64_t tokens, torch::Device device) {
  std::vector<int64_t> buckets(tokens);
  for (int64_t offset = 0; offset < tokens; ++offset) {
    buckets[offset] = kernels::SlashBucket(offset);
  }
  return torch::tensor(buckets, torch::kInt64).to(device);
}

/// KL(target || softmax(logits)) over the last dimension, [...].
torch::Tensor KlDivergence(const torch::Tensor& target, const torch::Tensor& logits) {
  return (torch::xlogy(target, target) - target * torch::log_softmax(logits, -1)).sum(-1);
}

/// True mass of the items with the best score per cost, until `budget` of the total cost is
/// reached: the item that crosses it still counts, so that short texts with few blocks have a
/// figure too.
torch::Tensor MassAtCost(const torch::Tensor& mass, const torch::Tensor& predicted,
                         const torch::Tensor& cost, double budget) {
  const torch::Tensor order = torch::argsort(predicted / cost, -1, /*descending=*/true);
  const torch::Tensor ordered = cost.expand_as(predicted).gather(-1, order);
  const torch::Tensor spent_before = (torch::cumsum(ordered, -1) - ordered) / cost.sum();
  return (mass.gather(-1, order) * (spent_before < budget)).sum(-1);
}

}  // namespace

torch::Tensor RmsNormalize(const torch::Tensor& x) {
  const torch::Tensor wide = x.to(torch::kFloat32);
  return wide * torch::rsqrt(wide.square().mean(-1, /*keepdim=*/true) + 1e-6);
}

std::string KlLoss::ToString() const {
  return absl::StrFormat("KL vertical %.4f slash %.4f", vertical, slash);
}

Student::Student(const StudentShape& shape, torch::Device device, uint64_t seed, bool bf16_hidden)
    : shape_(shape), device_(device), bf16_hidden_(bf16_hidden) {
  at::Generator generator = at::make_generator<at::CPUGeneratorImpl>(seed);
  const int64_t layers = shape.num_layers, groups = shape.num_groups, hidden = shape.hidden;
  const int64_t features = 2 * int64_t{shape.head_dim};
  auto random = [&](std::vector<int64_t> size, double deviation) {
    return (torch::randn(size, generator, torch::kFloat32) * deviation).to(device_);
  };
  w1_ = random({layers, groups, hidden, features}, 1 / std::sqrt(features));
  b1_ = torch::zeros({layers, groups, hidden}, device_);
  w2_ = random({layers, groups, 2, hidden}, 0.3 / std::sqrt(hidden));
  slash_prior_ = torch::zeros({layers, groups, kernels::kSlashBuckets}, device_);
  mean_ = torch::zeros({layers, groups, features}, device_);
  scale_ = torch::ones({layers, groups, features}, device_);
  for (torch::Tensor& parameter : Parameters()) parameter.requires_grad_(true);
}

std::vector<torch::Tensor> Student::Parameters() const { return {w1_, b1_, w2_, slash_prior_}; }

std::vector<torch::Tensor> Student::State() const {
  return {w1_, b1_, w2_, slash_prior_, mean_, scale_};
}

void Student::Calibrate(const std::vector<Sample>& samples) {
  torch::NoGradGuard no_grad;
  torch::Tensor sum = torch::zeros_like(mean_), squares = torch::zeros_like(mean_);
  torch::Tensor mass = torch::zeros_like(slash_prior_), width = torch::zeros_like(slash_prior_);
  double tokens = 0;
  for (const Sample& sample : samples) {
    const int64_t length = sample.columns.size(2);
    sum += sample.features.sum(2);
    squares += sample.features.square().sum(2);
    tokens += length;
    const torch::Tensor buckets = Buckets(length, device_).expand_as(sample.diagonals);
    // Mass relative to the mean of 1 / length, so that texts of all lengths add up.
    mass.scatter_add_(2, buckets, sample.diagonals * length);
    width.scatter_add_(2, buckets, torch::ones_like(sample.diagonals));
  }
  mean_.copy_(sum / tokens);
  const torch::Tensor deviation = (squares / tokens - mean_.square()).clamp_min(0).sqrt();
  scale_.copy_(1 / deviation.clamp_min(kSmallestDeviation));
  // Buckets that no sample reached take the value of the last one that was reached.
  torch::Tensor prior = torch::log(mass / width.clamp_min(1) + 1e-6);
  for (int64_t bucket = 1; bucket < kernels::kSlashBuckets; ++bucket) {
    if (width.select(2, bucket).max().item<float>() == 0) {
      prior.select(2, bucket).copy_(prior.select(2, bucket - 1));
    }
  }
  slash_prior_.copy_(prior);
}

torch::Tensor Student::Logits(const torch::Tensor& features, int layer_begin) const {
  const int64_t layers = features.size(0), groups = shape_.num_groups, tokens = features.size(2);
  auto slab = [&](const torch::Tensor& x) {
    return x.narrow(0, layer_begin, layers).flatten(0, 1);
  };
  const torch::Dtype dtype = bf16_hidden_ ? torch::kBFloat16 : torch::kFloat32;
  const torch::Tensor x =
      ((features.flatten(0, 1) - slab(mean_).unsqueeze(1)) * slab(scale_).unsqueeze(1)).to(dtype);
  const torch::Tensor hidden = torch::silu(
      torch::baddbmm(slab(b1_).unsqueeze(1).to(dtype), x, slab(w1_).to(dtype).transpose(1, 2))
          .to(torch::kFloat32));
  torch::Tensor logits = torch::bmm(slab(w2_), hidden.transpose(1, 2));  // [layers*groups, 2, n]
  const torch::Tensor prior = slab(slash_prior_).index_select(1, Buckets(tokens, device_));
  logits = torch::stack({logits.select(1, 0), logits.select(1, 1) + prior}, 1);
  return logits.view({layers, groups, 2, tokens});
}

template <typename Fn>
void Student::ForSlabs(int64_t tokens, int64_t slab_bytes, const Fn& fn) const {
  const int64_t per_layer = int64_t{4} * shape_.num_groups * tokens * shape_.hidden;
  const int step = static_cast<int>(
      std::clamp<int64_t>(slab_bytes / std::max<int64_t>(per_layer, 1), 1, shape_.num_layers));
  for (int begin = 0; begin < shape_.num_layers; begin += step) {
    fn(begin, std::min(begin + step, shape_.num_layers));
  }
}

torch::Tensor Student::SlabLoss(const Sample& sample, int layer_begin, int layer_end) const {
  const int64_t layers = layer_end - layer_begin;
  const torch::Tensor logits = Logits(sample.features.narrow(0, layer_begin, layers), layer_begin);
  return torch::stack(
      {KlDivergence(sample.columns.narrow(0, layer_begin, layers), logits.select(2, 0)).sum(),
       KlDivergence(sample.diagonals.narrow(0, layer_begin, layers), logits.select(2, 1)).sum()});
}

KlLoss Student::Accumulate(const Sample& sample, double weight, int64_t slab_bytes) {
  torch::Tensor sums = torch::zeros({2}, device_);
  ForSlabs(sample.columns.size(2), slab_bytes, [&](int begin, int end) {
    const torch::Tensor loss = SlabLoss(sample, begin, end);
    (loss.sum() * weight).backward();
    sums += loss.detach();
  });
  const torch::Tensor host = (sums / (shape_.num_layers * shape_.num_groups)).cpu();
  return {host[0].item<double>(), host[1].item<double>()};
}

KlLoss Student::Evaluate(const Sample& sample, int64_t slab_bytes) const {
  torch::NoGradGuard no_grad;
  torch::Tensor sums = torch::zeros({2}, device_);
  ForSlabs(sample.columns.size(2), slab_bytes,
           [&](int begin, int end) { sums += SlabLoss(sample, begin, end); });
  const torch::Tensor host = (sums / (shape_.num_layers * shape_.num_groups)).cpu();
  return {host[0].item<double>(), host[1].item<double>()};
}

double Student::ProxyRecall(const Sample& sample, int64_t slab_bytes) const {
  torch::NoGradGuard no_grad;
  const int64_t tokens = sample.columns.size(2), blocks = (tokens + kBlock - 1) / kBlock;
  const torch::Tensor cost = torch::arange(tokens, 0, -1, device_).to(torch::kFloat32);
  auto by_block = [&](const torch::Tensor& x) {
    return torch::constant_pad_nd(x, {0, blocks * kBlock - tokens})
        .unflatten(-1, {blocks, kBlock})
        .sum(-1);
  };
  double sum = 0;
  ForSlabs(tokens, slab_bytes, [&](int begin, int end) {
    const torch::Tensor p =
        torch::softmax(Logits(sample.features.narrow(0, begin, end - begin), begin), -1);
    const torch::Tensor vertical =
        MassAtCost(sample.columns.narrow(0, begin, end - begin), p.select(2, 0), cost, 0.05);
    const torch::Tensor slash = MassAtCost(by_block(sample.diagonals.narrow(0, begin, end - begin)),
                                           by_block(p.select(2, 1)), by_block(cost), 0.05);
    sum += (1 - (1 - vertical) * (1 - slash)).sum().item<double>();
  });
  return sum / (shape_.num_layers * shape_.num_groups);
}

model::IndexerWeights Student::Export() const {
  torch::NoGradGuard no_grad;
  const torch::Tensor folded = w1_ * scale_.unsqueeze(2);
  // The rounded weights decide the bias, so that the mean feature is centred exactly.
  const torch::Tensor rounded = folded.to(torch::kBFloat16);
  const torch::Tensor bias =
      b1_ - torch::matmul(rounded.to(torch::kFloat32), mean_.unsqueeze(3)).squeeze(3);
  auto floats = [](const torch::Tensor& x) {
    const torch::Tensor host = x.detach().to(torch::kCPU, torch::kFloat32).contiguous();
    return std::vector<float>(host.data_ptr<float>(), host.data_ptr<float>() + host.numel());
  };
  model::IndexerWeights weights;
  weights.num_groups = shape_.num_groups;
  weights.head_dim = shape_.head_dim;
  weights.hidden = shape_.hidden;
  for (int i = 0; i < shape_.num_layers; ++i) {
    model::IndexerWeights::Layer& layer = weights.layers.emplace_back();
    const torch::Tensor w1 = rounded[i].cpu().contiguous();
    layer.w1.resize(w1.numel());
    std::memcpy(layer.w1.data(), w1.data_ptr(), layer.w1.size() * sizeof(uint16_t));
    layer.b1 = floats(bias[i]);
    layer.w2 = floats(w2_[i]);
    // A softmax does not see a constant: the output bias stays zero.
    layer.b2.assign(size_t{2} * shape_.num_groups, 0.0f);
    layer.slash_prior = floats(slash_prior_[i]);
  }
  return weights;
}

}  // namespace vsprefill::training
