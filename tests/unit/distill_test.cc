// The trainer: learning works on a tiny fixture, its checkpoints continue exactly, what it exports
// is what the kernels compute, and the coverage arithmetic agrees with a naive softmax.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <torch/torch.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <numeric>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "kernels/indexer.h"
#include "server/attention/methods.h"
#include "server/model/safetensors.h"
#include "server/model/vs_indexer.h"
#include "training/corpus.h"
#include "training/coverage.h"
#include "training/covered_mass.h"
#include "training/progress.h"
#include "training/student.h"
#include "training/teacher.h"
#include "training/threshold_scale.h"
#include "training/trainer.h"

namespace vsprefill::training {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr StudentShape kShape = {2, 2, 16, 32};
constexpr int64_t kSlab = 1 << 20;

/// Features with a rule to learn: columns whose first feature is large hold more mass, near offsets
/// too.
Sample MakeSample(int64_t tokens, uint64_t seed) {
  torch::manual_seed(seed);
  Sample sample;
  const torch::Tensor raw = torch::randn({kShape.num_layers, kShape.num_groups, tokens, 2, 16});
  sample.features = RmsNormalize(raw).flatten(3);
  sample.columns = torch::softmax(sample.features.select(3, 0) * 2, -1);
  sample.diagonals = torch::softmax(
      sample.features.select(3, 20) - torch::arange(tokens).to(torch::kFloat32).add(1).log(), -1);
  return sample;
}

TrainOptions TinyOptions() {
  TrainOptions options;
  options.steps = 60;
  options.texts_per_step = 1;
  options.warmup_steps = 5;
  options.learning_rate = 1e-2;
  options.hidden = kShape.hidden;
  options.slab_bytes = kSlab;
  return options;
}

Trainer::SampleSource Always(const Sample& sample) {
  return [&sample](int64_t) -> absl::StatusOr<Sample> { return sample; };
}

TEST(StudentTest, GradientStepsLowerTheLoss) {
  const Sample sample = MakeSample(96, 3);
  Trainer trainer(TinyOptions(), kShape, torch::kCPU);
  trainer.student().Calibrate({sample});
  const KlLoss before = trainer.student().Evaluate(sample, kSlab);
  for (int i = 0; i < 60; ++i) ASSERT_TRUE(trainer.Step(Always(sample)).ok());
  const KlLoss after = trainer.student().Evaluate(sample, kSlab);
  EXPECT_LT(after.vertical, 0.2 * before.vertical);
  EXPECT_LT(after.slash, 0.5 * before.slash);
  EXPECT_GE(after.vertical, 0);
  EXPECT_GE(after.slash, 0);
}

TEST(StudentTest, SlabsDoNotChangeTheLossOrTheGradient) {
  const Sample sample = MakeSample(40, 4);
  std::vector<torch::Tensor> gradients[2];
  KlLoss loss[2];
  for (int i = 0; i < 2; ++i) {
    Student student(kShape, torch::kCPU, /*seed=*/5, /*bf16_hidden=*/false);
    loss[i] = student.Accumulate(sample, 0.5, i == 0 ? 1 : int64_t{1} << 30);
    for (const torch::Tensor& parameter : student.Parameters()) {
      gradients[i].push_back(parameter.grad());
    }
  }
  EXPECT_NEAR(loss[0].total(), loss[1].total(), 1e-6);
  for (size_t p = 0; p < gradients[0].size(); ++p) {
    EXPECT_GT(gradients[0][p].abs().max().item<float>(), 0) << "parameter " << p;
    EXPECT_TRUE(torch::allclose(gradients[0][p], gradients[1][p], 1e-4, 1e-6)) << "parameter " << p;
  }
}

TEST(StudentTest, CalibrationStartsTheSlashPriorAtTheTruth) {
  Sample sample = MakeSample(64, 6);
  sample.diagonals =
      torch::softmax(-torch::arange(64).to(torch::kFloat32) * 0.2, -1).expand({2, 2, 64}).clone();
  Student student(kShape, torch::kCPU, 1, false);
  const double before = student.Evaluate(sample, kSlab).slash;
  student.Calibrate({sample});
  // Offsets from 32 on share buckets, and the random weights add noise: small, not zero.
  EXPECT_LT(student.Evaluate(sample, kSlab).slash, 0.1 * before);
}

TEST(StudentTest, ProxyRecallIsHighForThePerfectStudentAndLowForARandomOne) {
  const Sample sample = MakeSample(512, 8);
  Trainer trainer(TinyOptions(), kShape, torch::kCPU);
  const double before = trainer.student().ProxyRecall(sample, kSlab);
  trainer.student().Calibrate({sample});
  for (int i = 0; i < 60; ++i) ASSERT_TRUE(trainer.Step(Always(sample)).ok());
  const double after = trainer.student().ProxyRecall(sample, kSlab);
  EXPECT_GT(after, before + 0.05);
  EXPECT_LE(after, 1);
}

/// The exported network computed by the kernels equals the student's own logits.
TEST(StudentTest, ExportedWeightsGiveTheKernelsTheSameLogits) {
  constexpr int64_t kTokens = 150;
  torch::manual_seed(11);
  const torch::Tensor keys = torch::randn({2, 2, kTokens, 16}) * 3 + 1;
  const torch::Tensor values = torch::randn({2, 2, kTokens, 16}) * 0.2;
  Sample sample = MakeSample(kTokens, 12);
  sample.features = torch::cat({RmsNormalize(keys), RmsNormalize(values)}, -1);
  Trainer trainer(TinyOptions(), kShape, torch::kCPU);
  trainer.student().Calibrate({sample});
  for (int i = 0; i < 10; ++i) ASSERT_TRUE(trainer.Step(Always(sample)).ok());
  torch::NoGradGuard no_grad;
  const torch::Tensor expected = trainer.student().Logits(sample.features, 0);

  const auto indexer =
      model::VsIndexer::Create(trainer.student().Export(), kernels::DeviceKind::kCpu);
  ASSERT_TRUE(indexer.ok()) << indexer.status();
  struct Implementation {
    const char* name;
    kernels::IndexerFn run;
  };
  for (const Implementation& implementation :
       {Implementation{"ref", kernels::IndexerRef}, Implementation{"cpu", kernels::IndexerCpu}}) {
    for (int layer = 0; layer < 2; ++layer) {
      torch::Tensor logits = torch::zeros({2, 2, kTokens});  // [vertical or slash, group, token]
      const torch::Tensor k = keys[layer].contiguous(), v = values[layer].contiguous();
      kernels::IndexerInput input;
      input.k = k.data_ptr();
      input.v = v.data_ptr();
      input.head_stride = kTokens * 16;
      input.token_stride = 16;
      input.dtype = kernels::DType::kF32;
      input.token_end = kTokens;
      input.vertical_logits = logits[0].data_ptr<float>();
      input.slash_logits = logits[1].data_ptr<float>();
      input.logit_stride = kTokens;
      ASSERT_EQ(implementation.run((*indexer)->layer(layer), input, nullptr),
                kernels::KernelStatus::kOk);
      // w1 is rounded to bfloat16, so the two differ by about 2^-8 of a weighted sum.
      const torch::Tensor difference =
          (logits - expected[layer].transpose(0, 1)).abs().amax({1, 2});
      EXPECT_LT(difference[0].item<float>(), 0.06) << implementation.name << " layer " << layer;
      EXPECT_LT(difference[1].item<float>(), 0.06) << implementation.name << " layer " << layer;
      EXPECT_GT(logits.std().item<float>(), 0.3) << "the logits must vary for this to say anything";
    }
  }
}

TEST(TrainerTest, LearningRateWarmsUpAndFallsToItsShare) {
  TrainOptions options;
  options.steps = 100;
  options.warmup_steps = 10;
  options.learning_rate = 1;
  options.final_rate_share = 0.1;
  EXPECT_NEAR(LearningRate(options, 0, 0), 0.1, 1e-12);
  EXPECT_NEAR(LearningRate(options, 9, 0), 1, 1e-12);
  EXPECT_NEAR(LearningRate(options, 55, 0), 0.55, 1e-12);
  EXPECT_NEAR(LearningRate(options, 100, 0), 0.1, 1e-12);
  EXPECT_NEAR(LearningRate(options, 55, 1e9), 0.55, 1e-12) << "no time limit";
  options.max_seconds = 10;
  EXPECT_NEAR(LearningRate(options, 20, 5), 0.55, 1e-12)
      << "half the time counts as half the steps";
  EXPECT_NEAR(LearningRate(options, 20, 10), 0.1, 1e-12);
  EXPECT_EQ(TrainedShare(options, 20, 11), 1);
}

TEST(TrainerTest, ACheckpointContinuesAsIfNothingHadHappened) {
  const std::string path = ::testing::TempDir() + "distill_test.ckpt";
  const Sample sample = MakeSample(48, 20);
  Trainer straight(TinyOptions(), kShape, torch::kCPU);
  straight.student().Calibrate({sample});
  for (int i = 0; i < 6; ++i) ASSERT_TRUE(straight.Step(Always(sample)).ok());
  ASSERT_TRUE(straight.Save(path, "id").ok());
  Trainer resumed(TinyOptions(), kShape, torch::kCPU);
  ASSERT_TRUE(resumed.Restore(path, "id").ok());
  EXPECT_EQ(resumed.step(), 6);
  for (int i = 0; i < 4; ++i) {
    ASSERT_TRUE(straight.Step(Always(sample)).ok());
    ASSERT_TRUE(resumed.Step(Always(sample)).ok());
  }
  EXPECT_NEAR(resumed.student().Evaluate(sample, kSlab).total(),
              straight.student().Evaluate(sample, kSlab).total(), 1e-6);
  EXPECT_EQ(resumed.Restore(path, "other id").code(), absl::StatusCode::kFailedPrecondition);
  StudentShape wider = kShape;
  wider.hidden = 64;
  Trainer other(TinyOptions(), wider, torch::kCPU);
  EXPECT_EQ(other.Restore(path, "id").code(), absl::StatusCode::kInvalidArgument);
  std::filesystem::resize_file(path, 100);
  EXPECT_EQ(resumed.Restore(path, "id").code(), absl::StatusCode::kInvalidArgument);
  std::filesystem::remove(path);
}

class CorpusTest : public ::testing::Test {
 protected:
  void Write(std::vector<uint16_t> ids, std::vector<int32_t> starts, std::vector<uint8_t> whole) {
    auto view = [](const auto& values, const char* dtype) {
      const int64_t count = values.size();
      return model::TensorView{
          dtype,
          {count},
          count,
          {reinterpret_cast<const uint8_t*>(values.data()), values.size() * sizeof(values[0])}};
    };
    model::TensorMap tensors;
    tensors["ids"] = view(ids, "U16");
    tensors["starts"] = view(starts, "I32");
    tensors["whole"] = view(whole, "U8");
    ASSERT_TRUE(model::WriteSafetensors(path_, tensors).ok());
  }
  ~CorpusTest() override { std::filesystem::remove(path_); }

  const std::string path_ = ::testing::TempDir() + "corpus_" +
                            ::testing::UnitTest::GetInstance()->current_test_info()->name() +
                            ".safetensors";
};

TEST_F(CorpusTest, DocumentsWindowsAndWholePrompts) {
  std::vector<uint16_t> ids(130);
  for (size_t i = 0; i < ids.size(); ++i) ids[i] = i;
  Write(ids, {0, 100, 120}, {0, 0, 1});
  const auto corpus = Corpus::Load(path_, 200);
  ASSERT_TRUE(corpus.ok()) << corpus.status();
  EXPECT_EQ(corpus->num_documents(), 3);
  EXPECT_EQ(corpus->document(1).front(), 100);
  EXPECT_EQ(corpus->document(2).size(), 10u);

  const TextSampler sampler(&*corpus, {8, 32}, 5);
  std::vector<int> seen(3, 0);
  for (int64_t i = 0; i < 30; ++i) {
    const auto text = sampler.Text(i);
    EXPECT_EQ(text, TextSampler(&*corpus, {8, 32}, 5).Text(i))
        << "the order is a function of the seed";
    if (text.front() >= 120) {
      EXPECT_EQ(text.size(), 10u) << "whole prompts are never cut";
      ++seen[2];
    } else {
      ++seen[text.front() >= 100 ? 1 : 0];
      EXPECT_TRUE(text.size() == 8 || text.size() == 20 || text.size() == 32) << text.size();
    }
  }
  EXPECT_THAT(seen, ElementsAre(10, 10, 10)) << "each epoch visits each document once";

  EXPECT_EQ(EvaluationTexts(*corpus, 20, 8).size(), 2u);
  EXPECT_EQ(EvaluationTexts(*corpus, 20, 1).size(), 1u);
  EXPECT_EQ(EvaluationTexts(*corpus, 101, 8).size(), 0u);
}

TEST_F(CorpusTest, BadFilesAreRefused) {
  Write({1, 2, 300}, {0}, {0});
  EXPECT_THAT(std::string(Corpus::Load(path_, 100).status().message()), HasSubstr("token id 300"));
  Write({1, 2, 3}, {0, 3}, {0, 0});
  EXPECT_EQ(Corpus::Load(path_, 100).status().code(), absl::StatusCode::kInvalidArgument);
  Write({1, 2, 3}, {1}, {0});
  EXPECT_EQ(Corpus::Load(path_, 100).status().code(), absl::StatusCode::kInvalidArgument);
  Write({1, 2, 3}, {0, 2}, {0});
  EXPECT_EQ(Corpus::Load(path_, 100).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Corpus::Load(path_ + ".none", 100).status().code(), absl::StatusCode::kNotFound);
}

// Serving skips the rows of the last layer that no logits need; the teacher must not.
TEST(TeacherTest, EveryLayerSumsToOne) {
  const char* fixtures = std::getenv("VSP_FIXTURES");
  model::LoadOptions options;
  options.model_dir = absl::StrCat(fixtures != nullptr ? fixtures : "models/fixtures", "/llama");
  options.dtype = kernels::DType::kF32;
  options.indexer_path = "none";
  absl::StatusOr<std::unique_ptr<Teacher>> teacher = Teacher::Create(options, 64);
  ASSERT_TRUE(teacher.ok()) << teacher.status() << "; fixtures: deploy/local/setup.sh --fixtures";
  std::vector<int32_t> ids(50);
  std::iota(ids.begin(), ids.end(), 1);
  // Twice: a layer that was skipped would show the first text's sums.
  ASSERT_TRUE((*teacher)->Run(absl::MakeSpan(ids).first(20), true).ok());
  const absl::StatusOr<Capture> capture = (*teacher)->Run(ids, true);
  ASSERT_TRUE(capture.ok()) << capture.status();
  for (const torch::Tensor& sums : {capture->columns, capture->diagonals}) {
    ASSERT_EQ(sums.size(0), (*teacher)->model().config().num_layers);
    EXPECT_LT((sums.sum(-1) - 1).abs().max().item<float>(), 1e-3f);
  }
  EXPECT_GT(capture->queries.abs().amax({1, 2, 3}).min().item<float>(), 0.0f);
}

TEST(CoverageTest, TileMassesAndVisiblePairsAgreeWithANaiveSoftmax) {
  constexpr int64_t kTokens = 100, kTile = 21, kHeads = 4, kGroups = 2, kDim = 16;
  torch::manual_seed(2);
  const torch::Tensor q = torch::randn({kTokens, kHeads, kDim});
  const torch::Tensor k = torch::randn({kGroups, kTokens, kDim});
  const TileSet tiles = MakeTiles(kTokens, kTile, 0, torch::kCPU);
  ASSERT_EQ(tiles.num_tiles(), 5);
  EXPECT_EQ(tiles.pairs, kTokens * (kTokens + 1) / 2);
  const torch::Tensor mass = TileColumnMass(tiles, q, k, 0.25);
  torch::Tensor expected = torch::zeros({kHeads, 5, kTokens});
  for (int64_t head = 0; head < kHeads; ++head) {
    for (int64_t i = 0; i < kTokens; ++i) {
      const torch::Tensor scores = torch::mv(k[head / 2].narrow(0, 0, i + 1), q[i][head]) * 0.25;
      expected[head][i / kTile].narrow(0, 0, i + 1) += torch::softmax(scores, 0) / kTokens;
    }
  }
  EXPECT_TRUE(torch::allclose(mass, expected, 1e-4, 1e-7));
  EXPECT_EQ(MakeTiles(kTokens, kTile, 2, torch::kCPU).num_tiles(), 2);
}

TEST(CoverageTest, LastRowsSeeTheTruthWhereAllRowsAreAlike) {
  // Equal scores: row i gives 1 / (i + 1) to each key, so the last rows give 1 / n each.
  constexpr int64_t kTokens = 200;
  const torch::Tensor sums =
      SumsOfLastRows(torch::zeros({kTokens, 2, 16}), torch::zeros({1, kTokens, 16}), 1.0, 8);
  for (int kind = 0; kind < 2; ++kind) {
    EXPECT_NEAR(sums[kind][0][0].item<float>(), 1.0 / kTokens, 2e-4);
    EXPECT_NEAR(sums[kind][0][100].item<float>(), 0.5 / kTokens, 2e-4);
  }
}

TEST(CoverageTest, MeanPoolingFindsTheBlockThatQueriesPointAt) {
  constexpr int64_t kTokens = 128, kBlock = 16;
  torch::Tensor q = torch::zeros({kTokens, 1, 16}), k = torch::zeros({1, kTokens, 16});
  q.select(2, 3).fill_(4);
  k[0].narrow(0, 2 * kBlock, kBlock).select(1, 3).fill_(1);
  const TileSet tiles = MakeTiles(kTokens, 64, 0, torch::kCPU);
  const torch::Tensor scores = MeanPooledScores(tiles, q, k, 1.0, kBlock);
  const torch::Tensor last_tile = scores[0][1];
  EXPECT_EQ(last_tile.narrow(0, 0, 4).argmax().item<int64_t>(), 2);
  EXPECT_NEAR(last_tile[2].item<float>(), 1, 1e-6);
  EXPECT_LT(last_tile[0].item<float>(), 0.05);
  EXPECT_EQ(last_tile[5].item<float>(), 2) << "blocks inside the tile are always kept";
  EXPECT_EQ(scores[0][0][6].item<float>(), -1) << "blocks right of the tile never";
}

/// The llama fixture, an untrained indexer of its shape and two texts.
class ThresholdScaleTest : public ::testing::Test {
 protected:
  static constexpr int64_t kTokens = 1000;
  void SetUp() override {
    const char* fixtures = std::getenv("VSP_TEST_FIXTURES");
    model::LoadOptions options;
    options.model_dir = absl::StrCat(fixtures != nullptr ? fixtures : "models/fixtures", "/llama");
    options.dtype = kernels::DType::kF32;
    options.indexer_path = "none";
    auto teacher = Teacher::Create(options, kTokens);
    ASSERT_TRUE(teacher.ok()) << teacher.status() << "; fixtures: deploy/local/setup.sh --fixtures";
    teacher_ = *std::move(teacher);
    const model::ModelConfig& config = teacher_->model().config();
    layers_ = config.num_layers;
    groups_ = config.num_kv_heads;
    weights_ = Student(teacher_->student_shape(16), torch::kCPU, 3, false).Export();
    for (int text = 0; text < 2; ++text) {
      ids_.emplace_back(kTokens);
      for (int64_t i = 0; i < kTokens; ++i) {
        ids_[text][i] = static_cast<int32_t>((i * i * 7 + i * (text + 3)) % config.vocab_size);
      }
    }
    texts_ = {ids_[0], ids_[1]};
    options_.density = 0.55;
  }
  absl::StatusOr<std::vector<std::vector<float>>> Fit() {
    return FitThresholdScale(*teacher_, weights_, texts_, options_);
  }

  std::unique_ptr<Teacher> teacher_;
  int layers_ = 0, groups_ = 0;
  model::IndexerWeights weights_;
  std::vector<std::vector<int32_t>> ids_;
  std::vector<absl::Span<const int32_t>> texts_;
  ScaleOptions options_;
};

TEST_F(ThresholdScaleTest, TheDefaultThresholdThenGivesTheDensityAndTheWorstHeadsGain) {
  const auto scale = Fit();
  ASSERT_TRUE(scale.ok()) << scale.status();
  ASSERT_EQ(static_cast<int>(scale->size()), layers_);
  torch::Tensor all = torch::empty({layers_, groups_});
  for (int layer = 0; layer < layers_; ++layer) {
    ASSERT_EQ(static_cast<int>((*scale)[layer].size()), groups_);
    for (int group = 0; group < groups_; ++group) all[layer][group] = (*scale)[layer][group];
  }
  EXPECT_GT(all.min().item<float>(), 0.0f);
  EXPECT_GT((all.max() / all.min()).item<float>(), 1.001f) << "a fit that does nothing";

  const auto indexer = model::VsIndexer::Create(weights_, kernels::DeviceKind::kCpu);
  ASSERT_TRUE(indexer.ok());
  double density = 0, worst = 0, worst_before = 0;
  for (const absl::Span<const int32_t> ids : texts_) {
    torch::NoGradGuard no_grad;
    const auto capture = teacher_->Run(ids, true);
    ASSERT_TRUE(capture.ok()) << capture.status();
    const TrueMass text = MeasureTrueMass(*teacher_, *capture, 0);
    const auto logits = IndexerLogits(*teacher_, **indexer, *capture);
    ASSERT_TRUE(logits.ok()) << logits.status();
    IndexMasker masker(&teacher_->model(), &text.tiles);
    const float threshold = attention::DefaultSelection(kTokens).threshold;
    const auto served = Cover(text, VerticalSlash(&masker, *logits, all),
                              torch::full({layers_, groups_}, threshold));
    const auto before =
        Reach(text, VerticalSlash(&masker, *logits), {-12, 16}, groups_, served->density);
    ASSERT_TRUE(served.ok() && before.ok());
    density += served->density / 2;
    worst += served->covered.min().item<double>();
    worst_before += before->covered.min().item<double>();
  }
  EXPECT_NEAR(density, options_.density, 0.03);
  EXPECT_GT(worst, worst_before);
}

TEST_F(ThresholdScaleTest, AnOutputScaleMultipliesAndIsCapped) {
  const auto plain = Fit();
  ASSERT_TRUE(plain.ok()) << plain.status();
  options_.output_scale.assign(layers_, std::vector<float>(groups_, 1.0f));
  options_.output_scale[0][0] = 0.5f;
  options_.output_scale[1][1] = 100.0f;
  options_.output_scale_cap = 2;
  const auto scaled = Fit();
  ASSERT_TRUE(scaled.ok()) << scaled.status();
  const float unit = (*scaled)[0][1] / (*plain)[0][1];
  EXPECT_NEAR((*scaled)[0][0] / (*plain)[0][0] / unit, 0.5f, 1e-3f);
  EXPECT_NEAR((*scaled)[1][1] / (*plain)[1][1] / unit, 2.0f, 1e-3f);
}

TEST_F(ThresholdScaleTest, BadInputIsNamed) {
  options_.output_scale.assign(layers_ + 1, std::vector<float>(groups_, 1.0f));
  EXPECT_THAT(std::string(Fit().status().message()), HasSubstr("layers, the model"));
  options_.output_scale.assign(layers_, std::vector<float>(groups_ + 1, 1.0f));
  EXPECT_THAT(std::string(Fit().status().message()), HasSubstr("groups, the model"));
  options_.output_scale.assign(layers_, std::vector<float>(groups_, 1.0f));
  options_.output_scale[1][0] = 0;
  EXPECT_THAT(std::string(Fit().status().message()), HasSubstr("layer 1, group 0 is 0"));
  texts_.clear();
  EXPECT_EQ(Fit().status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(ReadOutputScale("/nowhere/scale.json").status().code(), absl::StatusCode::kNotFound);
}

TEST(ProgressTest, LineNamesShareAndTimeLeft) {
  const std::string line = ProgressLine(30, 120, 10, absl::Seconds(20), "KL 0.1");
  EXPECT_THAT(line, HasSubstr("[#####...............] 30/120 25 %  KL 0.1"));
  EXPECT_THAT(line, HasSubstr("left 1m30s"));
  EXPECT_THAT(ProgressLine(0, 5, 0, absl::ZeroDuration(), ""), HasSubstr("left ?"));
}

}  // namespace
}  // namespace vsprefill::training
