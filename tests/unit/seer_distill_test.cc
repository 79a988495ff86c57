// Training of SeerAttention's gate: the target is the explicit softmax's, steps lower the loss, a
// checkpoint continues, and the kernel that serves selects by the very logits that were trained.
#include <gtest/gtest.h>

#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "kernels/select_seer.h"
#include "server/model/rope.h"
#include "training/block_attention.h"
#include "training/seer_evaluate.h"
#include "training/seer_student.h"
#include "training/trainer.h"

namespace vsprefill::training {
namespace {

constexpr int64_t kBlock = kernels::kSeerBlock;

/// Block-max attention from the whole matrix.
torch::Tensor ExplicitTarget(const torch::Tensor& queries, const torch::Tensor& keys,
                             double scale) {
  const int64_t tokens = keys.size(1), heads = queries.size(1),
                blocks = kernels::SeerBlocks(tokens);
  const torch::Tensor k = keys.repeat_interleave(heads / keys.size(0), 0);
  torch::Tensor p = torch::matmul(queries.transpose(0, 1), k.transpose(1, 2)) * scale;
  p = torch::softmax(p.masked_fill(torch::ones({tokens, tokens}, torch::kBool).triu(1), -INFINITY),
                     -1);
  torch::Tensor target = torch::zeros({heads, blocks, blocks});
  for (int64_t r = 0; r < blocks; ++r) {
    for (int64_t b = 0; b <= r; ++b) {
      const auto length = [&](int64_t block) { return std::min(kBlock, tokens - block * kBlock); };
      target.select(1, r).select(1, b).copy_(
          p.narrow(1, r * kBlock, length(r)).narrow(2, b * kBlock, length(b)).amax({1, 2}));
    }
  }
  return target / target.sum(-1, true);
}

TEST(BlockMaxAttentionTest, IsTheExplicitSoftmaxsForAnySlab) {
  torch::manual_seed(1);
  for (const int64_t tokens : {1, 63, 64, 65, 300, 512}) {
    const torch::Tensor queries = torch::randn({tokens, 6, 16}) * 2;
    const torch::Tensor keys = torch::randn({2, tokens, 16});
    const torch::Tensor expected = ExplicitTarget(queries, keys, 0.25);
    for (const int64_t slab : {int64_t{1}, int64_t{700} << 10, int64_t{1} << 30}) {
      const torch::Tensor target = BlockMaxAttention(queries, keys, 0.25, slab);
      ASSERT_EQ(target.sizes(), expected.sizes());
      EXPECT_LT((target - expected).abs().max().item<float>(), 1e-5f)
          << tokens << " tokens, slab of " << slab << " bytes";
    }
  }
}

/// The llama fixture as a teacher, and a text.
class SeerDistillTest : public ::testing::Test {
 protected:
  static constexpr int64_t kTokens = 600;
  static constexpr int kGateDim = 32;
  void SetUp() override {
    const char* fixtures = std::getenv("VSP_FIXTURES");
    model::LoadOptions options;
    options.model_dir = absl::StrCat(fixtures != nullptr ? fixtures : "models/fixtures", "/llama");
    options.dtype = kernels::DType::kF32;
    options.indexer_path = options.seer_gate_path = "none";
    auto teacher = Teacher::Create(options, kTokens);
    ASSERT_TRUE(teacher.ok()) << teacher.status() << "; fixtures: deploy/local/setup.sh --fixtures";
    teacher_ = *std::move(teacher);
    shape_ = SeerShape::Of(teacher_->model().config(), kGateDim);
    for (int64_t i = 0; i < kTokens; ++i) {
      ids_.push_back(
          static_cast<int32_t>((i * i * 7 + i * 3) % teacher_->model().config().vocab_size));
    }
    auto capture = teacher_->Run(ids_, /*with_queries=*/true, /*with_sums=*/false);
    ASSERT_TRUE(capture.ok()) << capture.status();
    capture_ = *std::move(capture);
    sample_ = SeerStudent::ToSample(shape_, capture_, 1 << 24);
    options_.steps = 20;
    options_.texts_per_step = 1;
    options_.warmup_steps = 3;
    options_.learning_rate = 1e-2;
  }
  SeerTrainer::SampleSource Source() {
    return [this](int64_t) -> absl::StatusOr<SeerSample> { return sample_; };
  }

  std::unique_ptr<Teacher> teacher_;
  SeerShape shape_;
  std::vector<int32_t> ids_;
  Capture capture_;
  SeerSample sample_;
  TrainOptions options_;
};

TEST_F(SeerDistillTest, TheTargetComesFromTheTeachersAttention) {
  EXPECT_EQ(capture_.columns.abs().max().item<float>(), 0) << "no sums were asked for";
  const torch::Tensor expected =
      ExplicitTarget(capture_.queries[1], capture_.keys[1], 1 / std::sqrt(shape_.head_dim));
  EXPECT_LT((sample_.target[1] - expected).abs().max().item<float>(), 1e-5f);
}

TEST_F(SeerDistillTest, StepsLowerTheLossAndRaiseTheRecall) {
  SeerTrainer trainer(options_, shape_, torch::kCPU);
  const double before = trainer.student().Evaluate(sample_, 0).total();
  const double recall = trainer.student().ProxyRecall(sample_, 0);
  double first = 0;
  for (int64_t i = 0; i < options_.steps; ++i) {
    const auto loss = trainer.Step(Source());
    ASSERT_TRUE(loss.ok()) << loss.status();
    if (i == 0) first = loss->total();
  }
  EXPECT_NEAR(first, before, 1e-5) << "the first loss is that of the start";
  EXPECT_LT(trainer.student().Evaluate(sample_, 0).total(), 0.7 * before);
  EXPECT_GE(trainer.student().ProxyRecall(sample_, 0), recall);
}

TEST_F(SeerDistillTest, ACheckpointContinuesAsIfNothingHadHappened) {
  const std::string path = ::testing::TempDir() + "seer_distill_test.ckpt";
  SeerTrainer straight(options_, shape_, torch::kCPU);
  for (int i = 0; i < 3; ++i) ASSERT_TRUE(straight.Step(Source()).ok());
  ASSERT_TRUE(straight.Save(path, "id").ok());
  options_.seed = 77;  // what it begins with is replaced
  SeerTrainer resumed(options_, shape_, torch::kCPU);
  ASSERT_TRUE(resumed.Restore(path, "id").ok());
  EXPECT_EQ(resumed.step(), 3);
  for (int i = 0; i < 2; ++i) {
    ASSERT_TRUE(straight.Step(Source()).ok());
    ASSERT_TRUE(resumed.Step(Source()).ok());
  }
  EXPECT_NEAR(resumed.student().Evaluate(sample_, 0).total(),
              straight.student().Evaluate(sample_, 0).total(), 1e-6);
  EXPECT_EQ(resumed.Restore(path, "other").code(), absl::StatusCode::kFailedPrecondition);
  SeerShape wider = shape_;
  wider.gate_dim = 64;
  SeerTrainer other(options_, wider, torch::kCPU);
  EXPECT_EQ(other.Restore(path, "id").code(), absl::StatusCode::kInvalidArgument);
  std::filesystem::remove(path);
}

// Where gate_dim is a multiple of head_dim, an untrained gate is the attention of block means.
TEST_F(SeerDistillTest, TheStartIsTheAttentionOfBlockMeans) {
  const int64_t d = shape_.head_dim, half = d / 2;
  shape_.gate_dim = 2 * shape_.head_dim;
  const SeerStudent student(shape_, torch::kCPU, 1);
  torch::NoGradGuard no_grad;
  // Means before RoPE, rotated by the block's first position as a query or key would be.
  model::RopeTable table(shape_.rope, shape_.head_dim);
  table.Grow(kTokens);
  const auto at_blocks = [&](const float* data) {
    return torch::from_blob(const_cast<float*>(data), {kTokens, half}, torch::kFloat32)
        .slice(0, 0, kTokens, kBlock)
        .clone();
  };
  const torch::Tensor cosines = at_blocks(table.cos()), sines = at_blocks(table.sin());
  const auto rotate = [&](const torch::Tensor& x) {
    const torch::Tensor low = x.narrow(2, 0, half), high = x.narrow(2, half, half);
    return torch::cat({low * cosines - high * sines, low * sines + high * cosines}, 2);
  };
  const torch::Tensor q = rotate(sample_.queries[0]);
  const torch::Tensor k = rotate(sample_.keys[0].narrow(2, 2 * d, d));
  const torch::Tensor means =
      torch::matmul(q, k.repeat_interleave(q.size(0) / k.size(0), 0).transpose(1, 2)) /
      std::sqrt(static_cast<double>(d));
  const torch::Tensor visible = torch::ones_like(means).tril();
  const torch::Tensor a = (student.Logits(sample_, 0) * visible).flatten();
  const torch::Tensor b = (means * visible).flatten();
  // Up to the noise.
  EXPECT_GT((a.dot(b) / (a.norm() * b.norm())).item<float>(), 0.9f);
  EXPECT_NEAR((a.norm() / b.norm()).item<float>(), 1, 0.3);
}

// The serving kernel, given the exported weights, keeps the blocks whose trained share is above the
// threshold.
/// Of the blocks of 64 x 64 in tile t and key block b, both of 128; share: [blocks, blocks].
float LargestShare(const torch::Tensor& share, int64_t t, int64_t b) {
  float largest = 0;
  for (int64_t r = 2 * t; r < std::min(2 * t + 2, share.size(0)); ++r) {
    for (int64_t c = 2 * b; c < 2 * b + 2; ++c) {
      largest = std::max(largest, share[r][c].item<float>());
    }
  }
  return largest;
}

TEST_F(SeerDistillTest, TheKernelSelectsByTheTrainedLogits) {
  SeerTrainer trainer(options_, shape_, torch::kCPU);
  for (int i = 0; i < 5; ++i) ASSERT_TRUE(trainer.Step(Source()).ok());
  model::SeerGateWeights weights = trainer.student().Export();
  // The student with the rounded weights.
  {
    torch::NoGradGuard no_grad;
    for (torch::Tensor& x : trainer.student().Parameters()) {
      x.copy_(x.to(torch::kBFloat16).to(torch::kFloat32));
    }
  }
  const auto gate =
      model::SeerGate::Create(weights, shape_.rope, kTokens, kernels::DeviceKind::kCpu);
  ASSERT_TRUE(gate.ok()) << gate.status();
  model::RopeTable table(shape_.rope, shape_.head_dim);
  table.Grow(kTokens);
  const int64_t tiles = kernels::KeyBlocks(kTokens), words = kernels::KeyBlockWords(kTokens);
  // In the middle of what the trained gate gives, so that it keeps some and drops some.
  std::vector<float> shares;
  for (int layer = 0; layer < shape_.num_layers; ++layer) {
    torch::NoGradGuard no_grad;
    const torch::Tensor share = torch::softmax(trainer.student().Logits(sample_, layer), -1);
    for (int head = 0; head < shape_.num_q_heads; ++head) {
      for (int64_t t = 0; t < tiles; ++t) {
        for (int64_t b = 0; b < t; ++b) shares.push_back(LargestShare(share[head], t, b));
      }
    }
  }
  std::nth_element(shares.begin(), shares.begin() + shares.size() / 2, shares.end());
  const double threshold = double{shares[shares.size() / 2]};
  int64_t kept = 0, near = 0;
  for (int layer = 0; layer < shape_.num_layers; ++layer) {
    torch::NoGradGuard no_grad;
    const torch::Tensor queries = capture_.queries[layer];
    kernels::SeerInput input;
    input.base.shape = {shape_.num_q_heads, shape_.num_groups, shape_.head_dim,
                        kernels::DType::kF32, 0.25f};
    kernels::AttentionSequence& s = input.base.sequence;
    s.q = queries.data_ptr();
    s.q_token_stride = queries.stride(0);
    s.q_head_stride = queries.stride(1);
    s.k = capture_.keys[layer].data_ptr();
    s.kv_head_stride = capture_.keys[layer].stride(0);
    s.kv_token_stride = capture_.keys[layer].stride(1);
    s.q_tokens = s.kv_tokens = input.base.prompt_tokens = kTokens;
    input.gate = (*gate)->layers()[layer];
    input.rope_cos = table.cos();
    input.rope_sin = table.sin();
    std::vector<uint32_t> bits(shape_.num_q_heads * tiles * words);
    kernels::TileIndexView index;
    index.blocks = bits.data();
    index.block_words = words;
    ASSERT_EQ(kernels::SelectSeerCpu(input, {threshold, 0, 0}, &index, nullptr),
              kernels::KernelStatus::kOk);
    const torch::Tensor share = torch::softmax(trainer.student().Logits(sample_, layer), -1);
    for (int head = 0; head < shape_.num_q_heads; ++head) {
      for (int64_t t = 0; t < tiles; ++t) {
        for (int64_t b = 0; b < t; ++b) {
          const float largest = LargestShare(share[head], t, b);
          if (std::abs(largest - threshold) < 1e-3) {
            ++near;  // float32 sums in another order may fall on either side
            continue;
          }
          const bool read = kernels::TestBit(index.BlocksOf(head, t), b);
          ASSERT_EQ(read, largest >= threshold)
              << "layer " << layer << ", head " << head << ", tile " << t << ", block " << b
              << ", share " << largest;
          kept += read;
        }
      }
    }
  }
  const int64_t pairs = shape_.num_layers * shape_.num_q_heads * tiles * (tiles - 1) / 2;
  EXPECT_GT(kept, 0);
  EXPECT_LT(kept, pairs);
  EXPECT_LT(near, pairs / 5);
}

TEST_F(SeerDistillTest, TheReportReachesItsDensitiesAndTheOracleIsBest) {
  const model::SeerGateWeights weights = SeerStudent(shape_, torch::kCPU, 1).Export();
  const std::vector<absl::Span<const int32_t>> texts = {ids_};
  EvaluateOptions options;
  options.densities = {0.6};
  const auto report = EvaluateSeer(*teacher_, weights, texts, options);
  ASSERT_TRUE(report.ok()) << report.status();
  ASSERT_EQ(report->results.size(), size_t{5});
  double oracle = 0;
  for (const CoverageResult& result : report->results) {
    if (result.method.starts_with("oracle")) oracle = result.mean;
  }
  for (const CoverageResult& result : report->results) {
    EXPECT_GT(result.mean, result.density - 0.1) << result.method;
    if (result.wanted_density == 0) continue;  // the served default
    EXPECT_LE(result.density, 0.6) << result.method;
    EXPECT_GT(result.density, 0.4) << result.method;
    EXPECT_LE(result.mean, oracle + 1e-6) << result.method;
  }
  EXPECT_FALSE(EvaluateSeer(*teacher_, weights, {}, options).ok());
}

}  // namespace
}  // namespace vsprefill::training
