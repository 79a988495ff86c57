// Attention methods over the reference and the CPU kernels: registry, parameters, execution of each
// method, chunks, batches, pair counts and statistics.
#include "server/attention/attention_method.h"

#include <cmath>
#include <iterator>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "server/attention/crossover.h"
#include "server/attention/presets.h"

namespace vsprefill::attention {
namespace {

using kernels::AttentionSequence;
using kernels::AttentionShape;
using kernels::PairCounts;
using testing::AllOf;
using testing::HasSubstr;

constexpr int kHeadDim = 16;
constexpr int kKvHeads = 2;
constexpr int kGroup = 3;
constexpr int kHeads = kKvHeads * kGroup;
constexpr int kLayers = 4;

AttentionShape MakeShape() {
  AttentionShape shape;
  shape.num_q_heads = kHeads;
  shape.num_kv_heads = kKvHeads;
  shape.head_dim = kHeadDim;
  shape.dtype = kernels::DType::kF32;
  shape.scale = 0.25f;
  return shape;
}

/// A prompt of random q, k, v and logits, run in chunks.
struct Prompt {
  int64_t tokens;
  std::vector<float> q, k, v, out, vertical, slash;

  Prompt(int64_t n, unsigned seed) : tokens(n) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    auto fill = [&](std::vector<float>& x, int64_t size) {
      x.resize(size);
      for (float& value : x) value = normal(rng);
    };
    fill(q, n * kHeads * kHeadDim);
    fill(k, n * kKvHeads * kHeadDim);
    fill(v, n * kKvHeads * kHeadDim);
    fill(vertical, n * kKvHeads);
    fill(slash, n * kKvHeads);
    out.assign(q.size(), NAN);
  }
  SequenceCall Chunk(int64_t begin, int64_t end, PairCounts* counts) {
    SequenceCall call;
    AttentionSequence& a = call.attention;
    a.q = q.data() + begin * kHeads * kHeadDim;
    a.out = out.data() + begin * kHeads * kHeadDim;
    a.q_token_stride = a.out_token_stride = kHeads * kHeadDim;
    a.q_head_stride = a.out_head_stride = kHeadDim;
    a.k = k.data();
    a.v = v.data();
    a.kv_head_stride = tokens * kHeadDim;
    a.kv_token_stride = kHeadDim;
    a.q_tokens = end - begin;
    a.kv_tokens = end;
    call.prompt_tokens = tokens;
    call.vertical_logits = vertical.data();
    call.slash_logits = slash.data();
    call.logit_stride = tokens;
    call.counts = counts;
    return call;
  }
};

/// RoPE tables for prompts of up to 1024 tokens, and a random gate for every layer.
struct Gate {
  static constexpr int64_t kPositions = 1024;
  static constexpr int kGateDim = 32;
  std::vector<float> cos, sin, block_cos, block_sin, wq, wk;

  Gate() {
    const auto rotations = [](int64_t step, int half, std::vector<float>* c,
                              std::vector<float>* s) {
      for (int64_t position = 0; position < kPositions; position += step) {
        for (int i = 0; i < half; ++i) {
          const double angle = static_cast<double>(position) * std::pow(1e4, -1.0 * i / half);
          c->push_back(static_cast<float>(std::cos(angle)));
          s->push_back(static_cast<float>(std::sin(angle)));
        }
      }
    };
    rotations(1, kHeadDim / 2, &cos, &sin);
    rotations(kernels::kSeerBlock, kGateDim / 2, &block_cos, &block_sin);
    std::mt19937 rng(99);
    std::normal_distribution<float> normal;
    wq.resize(kHeads * kGateDim * kHeadDim);
    wk.resize(kKvHeads * kGateDim * 3 * kHeadDim);
    for (auto* weights : {&wq, &wk}) {
      for (float& w : *weights) w = normal(rng);
    }
  }
  kernels::SeerGateLayer layer() const {
    return {kGateDim, wq.data(), wk.data(), block_cos.data(), block_sin.data(), 1.0f};
  }
};

class AttentionMethodTest : public testing::TestWithParam<bool> {
 protected:
  AttentionMethodTest() {
    context_.kernels = GetParam() ? &kernels::CpuKernels() : &kernels::RefKernels();
    context_.allocator = &HostAllocator();
    context_.num_layers = kLayers;
    context_.seer_gate.assign(kLayers, gate_.layer());
  }
  /// A method that runs as it selects: prompts here are so short that dense is often faster.
  std::unique_ptr<AttentionMethod> Make(absl::string_view name,
                                        std::map<std::string, double> parameters = {}) {
    if (name == "vsprefill") parameters.insert({"dense_fallback", 0});
    return MakeServed(name, parameters);
  }
  std::unique_ptr<AttentionMethod> MakeServed(absl::string_view name,
                                              const std::map<std::string, double>& parameters) {
    auto method = CreateMethod(context_, name, parameters);
    EXPECT_TRUE(method.ok()) << method.status();
    return *std::move(method);
  }
  absl::Status Attend(AttentionMethod& method, std::vector<SequenceCall> sequences, int layer = 0) {
    AttentionCall call;
    call.layer = layer;
    call.shape = MakeShape();
    call.sequences = absl::MakeSpan(sequences);
    call.rope_cos = gate_.cos.data();
    call.rope_sin = gate_.sin.data();
    return method.Attend(call);
  }
  /// Output of the whole prompt at once by `method`.
  std::vector<float> Whole(AttentionMethod& method, Prompt& prompt, PairCounts* counts = nullptr,
                           int layer = 0) {
    EXPECT_TRUE(Attend(method, {prompt.Chunk(0, prompt.tokens, counts)}, layer).ok());
    return prompt.out;
  }

  const Gate gate_;
  MethodContext context_;
};

double MaxDifference(const std::vector<float>& a, const std::vector<float>& b) {
  double worst = 0;
  for (size_t i = 0; i < a.size(); ++i) {
    const double difference = std::abs(double{a[i]} - double{b[i]});
    worst = difference <= worst ? worst : difference;  // NaN is kept
  }
  return worst;
}

std::string MessageFor(const MethodContext& context, absl::string_view name,
                       const std::map<std::string, double>& parameters) {
  auto method = CreateMethod(context, name, parameters);
  EXPECT_EQ(method.status().code(), absl::StatusCode::kInvalidArgument);
  return std::string(method.status().message());
}

TEST_P(AttentionMethodTest, RefusesUnknownNamesAndValuesOutOfRange) {
  EXPECT_THAT(MessageFor(context_, "flash", {}),
              AllOf(HasSubstr("\"flash\""), HasSubstr("dense, vsprefill")));
  EXPECT_THAT(MessageFor(context_, "dense", {{"threshold", 1}}),
              AllOf(HasSubstr("\"threshold\""), HasSubstr("known: none")));
  EXPECT_THAT(MessageFor(context_, "vsprefill", {{"treshold", 1}}),
              AllOf(HasSubstr("\"treshold\""), HasSubstr("rule, threshold, ")));
  EXPECT_THAT(MessageFor(context_, "vsprefill", {{"local_tokens", 64}}),
              AllOf(HasSubstr("local_tokens = 64"), HasSubstr("[128, ")));
  EXPECT_THAT(MessageFor(context_, "vsprefill", {{"sink_tokens", 1.5}}), HasSubstr("whole number"));
  EXPECT_THAT(MessageFor(context_, "vsprefill", {{"tau_slash", NAN}}), HasSubstr("[0, 1]"));
  EXPECT_THAT(MessageFor(context_, "vsprefill", {{"max_density", 1.01}}), HasSubstr("1.01"));
}

TEST_P(AttentionMethodTest, OverridesAreResolvedOnTopOfDefaults) {
  auto method = MakeServed("vsprefill", {{"threshold", 7.5}});
  EXPECT_EQ(method->name(), "vsprefill");
  EXPECT_TRUE(method->needs_indexer_logits());
  for (const MethodSpec& spec : MethodSpecs()) {
    if (spec.name != "vsprefill") continue;
    EXPECT_TRUE(spec.needs_indexer);
    ASSERT_EQ(method->parameters().size(), spec.parameters.size());
    for (const ParameterSpec& parameter : spec.parameters) {
      EXPECT_LE(parameter.min, parameter.default_value) << parameter.name;
      EXPECT_GE(parameter.max, parameter.default_value) << parameter.name;
      EXPECT_EQ(method->parameters().at(parameter.name),
                parameter.name == "threshold" ? 7.5 : parameter.default_value);
    }
  }
  EXPECT_FALSE(Make("dense")->needs_indexer_logits());
}

TEST_P(AttentionMethodTest, KeepingEverythingEqualsDense) {
  Prompt prompt(500, 1);
  PairCounts dense_counts, counts;
  const auto dense = Whole(*Make("dense"), prompt, &dense_counts);
  auto method = Make("vsprefill", {{"threshold", 0}, {"dense_below", 0}, {"dense_layers", 0}});
  EXPECT_LT(MaxDifference(dense, Whole(*method, prompt, &counts)), 1e-5);
  EXPECT_EQ(dense_counts.dense, kHeads * 500 * 501 / 2);
  EXPECT_EQ(dense_counts.unmasked, dense_counts.dense);
  EXPECT_EQ(counts.unmasked, counts.dense);
}

TEST_P(AttentionMethodTest, SparseReadsFewerPairsAndReportsThem) {
  Prompt prompt(900, 2);
  PairCounts counts;
  auto method = Make(
      "vsprefill",
      {{"threshold", 5}, {"full_threshold_tokens", 0}, {"dense_below", 0}, {"dense_layers", 1}});
  const auto dense = Whole(*Make("dense"), prompt);
  EXPECT_EQ(MaxDifference(dense, Whole(*method, prompt, nullptr, 0)), 0) << "a dense layer";
  EXPECT_EQ(method->index_statistics().num_verticals, nullptr);
  EXPECT_GT(MaxDifference(dense, Whole(*method, prompt, &counts, 2)), 1e-3);
  EXPECT_LT(counts.unmasked, 0.7 * counts.dense);
  EXPECT_GE(counts.multiplied, counts.unmasked);

  const IndexStatistics statistics = method->index_statistics();
  ASSERT_NE(statistics.num_verticals, nullptr);
  EXPECT_EQ(statistics.num_layers, kLayers);
  EXPECT_EQ(statistics.num_groups, kKvHeads);
  EXPECT_EQ(statistics.first_layer, 1);
  EXPECT_GT(statistics.select_seconds, 0);
  for (int group = 0; group < kKvHeads; ++group) {
    EXPECT_GE(statistics.num_verticals[2 * kKvHeads + group], 64);
    EXPECT_LT(statistics.num_verticals[2 * kKvHeads + group], 900);
    EXPECT_GE(statistics.num_bands[2 * kKvHeads + group], 2);
  }
}

TEST_P(AttentionMethodTest, LastRowsAreDense) {
  Prompt prompt(900, 3);
  const auto dense = Whole(*Make("dense"), prompt);
  const std::map<std::string, double> parameters = {
      {"threshold", 1e6}, {"dense_below", 0}, {"dense_layers", 0}, {"last_dense_tokens", 64}};
  const auto whole = Whole(*Make("vsprefill", parameters), prompt);
  // The same rows are dense when they arrive as a chunk of their own.
  auto chunked = Make("vsprefill", parameters);
  prompt.out.assign(prompt.out.size(), NAN);
  ASSERT_TRUE(Attend(*chunked, {prompt.Chunk(0, 800, nullptr)}).ok());
  ASSERT_TRUE(Attend(*chunked, {prompt.Chunk(800, 900, nullptr)}).ok());
  const int64_t row = kHeads * kHeadDim;
  for (const auto& out : {whole, prompt.out}) {
    const std::vector<float> a(out.end() - 64 * row, out.end());
    const std::vector<float> b(dense.end() - 64 * row, dense.end());
    EXPECT_LT(MaxDifference(a, b), 1e-5);
    EXPECT_GT(MaxDifference(out, dense), 1e-3);
  }
}

TEST_P(AttentionMethodTest, BatchGivesWhatSingleCallsGive) {
  Prompt a(700, 4), b(300, 5), c(450, 6);
  const std::map<std::string, double> parameters = {
      {"threshold", 4}, {"full_threshold_tokens", 0}, {"dense_below", 400}};
  std::vector<std::vector<float>> single;
  for (Prompt* prompt : {&a, &b, &c}) {
    single.push_back(Whole(*Make("vsprefill", parameters), *prompt));
    prompt->out.assign(prompt->out.size(), NAN);
  }
  PairCounts counts[3];
  auto method = Make("vsprefill", parameters);
  ASSERT_TRUE(Attend(*method, {c.Chunk(0, 450, nullptr)}).ok());  // buffers of another shape
  ASSERT_TRUE(Attend(*method, {a.Chunk(0, 700, &counts[0]), b.Chunk(0, 300, &counts[1]),
                               c.Chunk(0, 450, &counts[2])})
                  .ok());
  EXPECT_LT(MaxDifference(a.out, single[0]), 1e-6);
  EXPECT_LT(MaxDifference(b.out, single[1]), 1e-6);
  EXPECT_LT(MaxDifference(c.out, single[2]), 1e-6);
  EXPECT_LT(counts[0].unmasked, counts[0].dense);
  EXPECT_EQ(counts[1].unmasked, counts[1].dense) << "shorter than dense_below";
  EXPECT_LT(counts[2].unmasked, counts[2].dense);
}

TEST_P(AttentionMethodTest, ThresholdScaleOfTheLayerIsUsed) {
  Prompt prompt(900, 7);
  context_.threshold_scale.assign(kLayers, std::vector<float>(kKvHeads, 1.0f));
  context_.threshold_scale[3].assign(kKvHeads, 0.0f);  // keeps everything
  auto method = Make(
      "vsprefill",
      {{"threshold", 5}, {"full_threshold_tokens", 0}, {"dense_below", 0}, {"dense_layers", 0}});
  PairCounts plain, scaled;
  Whole(*method, prompt, &plain, 2);
  Whole(*method, prompt, &scaled, 3);
  EXPECT_LT(plain.unmasked, plain.dense);
  EXPECT_EQ(scaled.unmasked, scaled.dense);
}

TEST_P(AttentionMethodTest, ShortPromptsUseALowerThreshold) {
  Prompt prompt(900, 11);
  const auto pairs = [&](double threshold, double full_threshold_tokens) {
    PairCounts counts;
    auto method = Make("vsprefill", {{"threshold", threshold},
                                     {"full_threshold_tokens", full_threshold_tokens},
                                     {"dense_below", 0}});
    Whole(*method, prompt, &counts);
    return counts.unmasked;
  };
  EXPECT_EQ(pairs(4, 900), pairs(4, 0));
  EXPECT_GT(pairs(4, 3600), pairs(4, 0));
  EXPECT_EQ(pairs(4, 3600), pairs(2, 0));  // sqrt(900 / 3600)
}

TEST_P(AttentionMethodTest, NeedsLogits) {
  Prompt prompt(300, 8);
  SequenceCall sequence = prompt.Chunk(0, 300, nullptr);
  sequence.slash_logits = nullptr;
  auto method = Make("vsprefill", {{"dense_below", 0}});
  EXPECT_EQ(Attend(*method, {sequence}).code(), absl::StatusCode::kFailedPrecondition);
}

TEST_P(AttentionMethodTest, LibraryAttentionServesDenseCallsOnly) {
  int calls = 0;
  context_.library_attention = [&calls](const AttentionShape&,
                                        absl::Span<const AttentionSequence> sequences,
                                        kernels::Stream) {
    calls += static_cast<int>(sequences.size());
    return absl::OkStatus();
  };
  Prompt prompt(300, 9);
  PairCounts counts;
  Whole(*Make("dense"), prompt, &counts);
  EXPECT_EQ(calls, 1);
  EXPECT_EQ(counts.unmasked, counts.dense);
  Whole(*Make("vsprefill", {{"dense_below", 0}, {"dense_layers", 0}}), prompt);
  EXPECT_EQ(calls, 1);
  Whole(*Make("vsprefill", {{"dense_below", 1000}}), prompt);
  EXPECT_EQ(calls, 2);
}

// An index that reads everything costs more than dense attention, a sparse one less.
TEST_P(AttentionMethodTest, FallsBackToDenseWhereTheIndexIsSlower) {
  Prompt prompt(900, 31);
  PairCounts dense_counts;
  const auto dense = Whole(*Make("dense"), prompt, &dense_counts);
  const std::map<std::string, double> everything = {{"threshold", 0}, {"dense_below", 0}};
  auto method = MakeServed("vsprefill", everything);
  EXPECT_EQ(method->parameters().at("dense_fallback"), 1);
  EXPECT_EQ(method->dense_fallback_layers(), 0);
  PairCounts counts;
  EXPECT_EQ(MaxDifference(dense, Whole(*method, prompt, &counts, 2)), 0);
  EXPECT_EQ(counts.multiplied, dense_counts.multiplied);
  EXPECT_EQ(counts.indexes, 0);  // what ran is counted
  EXPECT_EQ(method->index_statistics().num_verticals, nullptr);
  EXPECT_EQ(method->dense_fallback_layers(), 1);
  Whole(*method, prompt, nullptr, 2);
  EXPECT_EQ(method->dense_fallback_layers(), 1) << "layers, not calls";
  Whole(*method, prompt, nullptr, 3);
  EXPECT_EQ(method->dense_fallback_layers(), 2);

  const std::map<std::string, double> sparse = {
      {"threshold", 6}, {"full_threshold_tokens", 0}, {"dense_below", 0}};
  auto pays = MakeServed("vsprefill", sparse);
  PairCounts pure, served;
  const auto out = Whole(*Make("vsprefill", sparse), prompt, &pure);
  EXPECT_EQ(MaxDifference(out, Whole(*pays, prompt, &served)), 0);
  EXPECT_EQ(served.multiplied, pure.multiplied);
  EXPECT_EQ(pays->dense_fallback_layers(), 0);
}

TEST_P(AttentionMethodTest, DenseRowsAndDenseLayersAreNoFallback) {
  Prompt prompt(900, 32);
  auto method =
      MakeServed("vsprefill", {{"threshold", 0}, {"dense_below", 0}, {"dense_layers", 1}});
  Whole(*method, prompt, nullptr, 0);
  ASSERT_TRUE(Attend(*method, {prompt.Chunk(899, 900, nullptr)}, 2).ok());
  EXPECT_EQ(method->dense_fallback_layers(), 0);
  auto shorter = MakeServed("vsprefill", {{"threshold", 0}, {"dense_below", 901}});
  Whole(*shorter, prompt, nullptr, 2);
  EXPECT_EQ(shorter->dense_fallback_layers(), 0);
  EXPECT_FALSE(shorter->IsSparse(900));
  EXPECT_TRUE(shorter->IsSparse(901));
}

// Block-sparse and per-head indexes, too, where it is asked for.
TEST_P(AttentionMethodTest, OtherMethodsFallBackOnDemand) {
  Prompt prompt(900, 33);
  const auto dense = Whole(*Make("dense"), prompt);
  for (const auto& [name, everything] :
       {std::pair<const char*, std::map<std::string, double>>{"flashprefill", {{"alpha", 0}}},
        {"flashprefill_v2", {{"alpha", 0}, {"dense_below", 0}}},
        {"minference", {{"vertical_size", 0}, {"slash_size", 900}}}}) {
    SCOPED_TRACE(name);
    auto parameters = everything;
    auto method = MakeServed(name, parameters);
    EXPECT_EQ(method->parameters().at("dense_fallback"), 0);
    Whole(*method, prompt);
    EXPECT_EQ(method->dense_fallback_layers(), 0);
    parameters["dense_fallback"] = 1;
    method = MakeServed(name, parameters);
    EXPECT_EQ(MaxDifference(dense, Whole(*method, prompt)), 0);
    EXPECT_EQ(method->dense_fallback_layers(), 1);
  }
}

/// Host memory that says it were a GPU's.
class NominallyCuda : public Allocator {
 public:
  absl::StatusOr<void*> Allocate(int64_t bytes) override { return HostAllocator().Allocate(bytes); }
  void Free(void* data, int64_t bytes) noexcept override { HostAllocator().Free(data, bytes); }
  kernels::DeviceKind device() const override { return kernels::DeviceKind::kCuda; }
};

TEST_P(AttentionMethodTest, OnCudaTheLengthDecidesBeforeAnythingIsSelected) {
  NominallyCuda allocator;
  context_.allocator = &allocator;
  EXPECT_TRUE(MakeServed("vsprefill", {{"dense_below", 0}})->IsSparse(1)) << "width not known";
  context_.num_q_heads = kHeads;
  context_.head_dim = kHeadDim;
  Prompt prompt(900, 34);
  for (int64_t position = 0; position < 900; ++position) prompt.slash[position] = NAN;
  const auto dense = Whole(*Make("dense"), prompt);
  auto method = MakeServed("vsprefill", {{"threshold", 6}, {"dense_below", 0}});
  EXPECT_FALSE(method->IsSparse(CudaMinTokens(kHeads, kHeadDim) - 1));
  EXPECT_TRUE(method->IsSparse(CudaMinTokens(kHeads, kHeadDim)));
  EXPECT_EQ(MaxDifference(dense, Whole(*method, prompt, nullptr, 1)), 0);
  EXPECT_EQ(method->dense_fallback_layers(), 1);
  EXPECT_TRUE(Make("vsprefill", {{"dense_below", 0}})->IsSparse(900));
  EXPECT_TRUE(Make("streaming_llm")->IsSparse(900));
}

/// What a kernel was called with, and what it answers.
struct FakeAttention {
  static inline std::vector<AttentionSequence> sequences;
  static inline kernels::KernelStatus status;

  static kernels::KernelStatus Run(const AttentionShape& /*shape*/, const AttentionSequence* first,
                                   int count, kernels::Stream /*stream*/) {
    sequences.insert(sequences.end(), first, first + count);
    return status;
  }
  /// `base` with this instead of its attention.
  static kernels::KernelSet In(kernels::KernelSet base) {
    sequences.clear();
    status = kernels::KernelStatus::kOk;
    base.attention = Run;
    return base;
  }
};

// The row tile that reaches dense_from (2,236) begins at 2,226: an earlier chunk may end inside it,
// and must compute its rows as the whole prompt does.
TEST_P(AttentionMethodTest, OnCudaEveryChunkMaySpreadDenseRows) {
  NominallyCuda allocator;
  context_.allocator = &allocator;
  const kernels::KernelSet set = FakeAttention::In(*context_.kernels);
  context_.kernels = &set;
  Prompt prompt(2300, 41);
  auto method = Make("vsprefill", {{"dense_below", 0}});
  AttentionCall call;
  call.shape = MakeShape();
  for (const bool known_to_the_kernel : {true, false}) {
    call.shape.dtype = kernels::DType::kBF16;
    call.shape.head_dim = known_to_the_kernel ? 64 : 80;
    FakeAttention::sequences.clear();
    for (const auto& [begin, end] : {std::pair{0, 1000}, {1000, 2235}, {2235, 2300}}) {
      std::vector<SequenceCall> sequences = {prompt.Chunk(begin, end, nullptr)};
      call.sequences = absl::MakeSpan(sequences);
      ASSERT_TRUE(method->Attend(call).ok());
    }
    ASSERT_EQ(FakeAttention::sequences.size(), 3);
    for (const AttentionSequence& sequence : FakeAttention::sequences) {
      EXPECT_EQ(sequence.workspace != nullptr, known_to_the_kernel) << sequence.kv_tokens;
    }
  }
}

TEST_P(AttentionMethodTest, ADecodingBatchIsOneLaunchWhereTheKernelKnowsTheShape) {
  int library_calls = 0;
  context_.library_attention = [&](const AttentionShape&, absl::Span<const AttentionSequence>,
                                   kernels::Stream) {
    ++library_calls;
    return absl::OkStatus();
  };
  const kernels::KernelSet set = FakeAttention::In(*context_.kernels);
  context_.kernels = &set;
  Prompt prompt(50, 42);
  auto method = Make("dense");
  const SequenceCall row = prompt.Chunk(49, 50, nullptr);
  EXPECT_TRUE(Attend(*method, {row}).ok()) << "one sequence: the library's";
  EXPECT_EQ(FakeAttention::sequences.size(), 0);
  EXPECT_EQ(library_calls, 1);
  EXPECT_TRUE(Attend(*method, {row, row}).ok());
  EXPECT_EQ(FakeAttention::sequences.size(), 2);
  EXPECT_EQ(library_calls, 1);
  FakeAttention::status = kernels::KernelStatus::kUnsupportedShape;
  EXPECT_TRUE(Attend(*method, {row, row}).ok());
  EXPECT_EQ(library_calls, 2);
  FakeAttention::status = kernels::KernelStatus::kDeviceError;
  EXPECT_FALSE(Attend(*method, {row, row}).ok());
  EXPECT_EQ(library_calls, 2);
}

TEST(CrossoverTest, WideModelsPaySoonerOnCuda) {
  // As measured (docs/results/crossover.md): where half of the pairs take 3 % longer than dense
  // attention, and where they are faster.
  EXPECT_GT(CudaMinTokens(9, 64), 4750);
  EXPECT_LT(CudaMinTokens(9, 64), 8192);
  EXPECT_GT(CudaMinTokens(32, 128), 2111);
  EXPECT_LT(CudaMinTokens(32, 128), 4096);
  EXPECT_LT(CudaMinTokens(32, 128), CudaMinTokens(9, 64));
  EXPECT_EQ(CudaMinTokens(0, 0), 0);
}

TEST(CrossoverTest, AnIndexPaysWhereItsPairsTakeLessTime) {
  PairCounts index, dense;
  dense.multiplied = 1000000;
  index.multiplied = static_cast<int64_t>(1000000 / kCpuPairCost) - 1;
  EXPECT_TRUE(IndexPaysOnCpu(index, dense));
  index.multiplied = static_cast<int64_t>(1000000 / kCpuPairCost) + 1;
  EXPECT_FALSE(IndexPaysOnCpu(index, dense));
  index.multiplied = 2000000;
  EXPECT_FALSE(IndexPaysOnCpu(index, dense));
}

TEST(PresetsTest, SetWhatTheRequestLeavesOpen) {
  for (const PresetEntry& preset : kPresets) {
    std::string method;
    std::map<std::string, double> parameters = {{"sink_tokens", 3}};
    ASSERT_TRUE(ResolvePreset(preset.name, &method, &parameters).ok());
    EXPECT_EQ(method, "vsprefill");
    EXPECT_THAT(parameters,
                testing::UnorderedElementsAre(testing::Pair("sink_tokens", 3),
                                              testing::Pair("threshold", preset.threshold)));
    parameters["threshold"] = 9;
    ASSERT_TRUE(ResolvePreset(preset.name, &method, &parameters).ok());
    EXPECT_EQ(parameters["threshold"], 9);
  }
}

TEST(PresetsTest, AreOrderedAndBalancedIsTheDefault) {
  for (size_t i = 1; i < std::size(kPresets); ++i) {
    EXPECT_GT(kPresets[i].threshold, kPresets[i - 1].threshold);
    EXPECT_LT(kPresets[i].density, kPresets[i - 1].density);
    EXPECT_GT(kPresets[i].loss_mean, kPresets[i - 1].loss_mean);
    EXPECT_GT(kPresets[i].loss_median, kPresets[i - 1].loss_median);
    EXPECT_GT(kPresets[i].loss_worst, kPresets[i - 1].loss_worst);
  }
  std::string method;
  std::map<std::string, double> parameters;
  ASSERT_TRUE(ResolvePreset("balanced", &method, &parameters).ok());
  for (const MethodSpec& spec : MethodSpecs()) {
    if (spec.name != method) continue;
    for (const ParameterSpec& parameter : spec.parameters) {
      if (parameters.contains(parameter.name)) {
        EXPECT_EQ(parameters[parameter.name], parameter.default_value) << parameter.name;
      }
    }
  }
}

TEST(PresetsTest, RefuseOtherNamesAndOtherMethods) {
  std::string method;
  std::map<std::string, double> parameters;
  const absl::Status unknown = ResolvePreset("turbo", &method, &parameters);
  EXPECT_EQ(unknown.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(unknown.message()),
              AllOf(HasSubstr("\"turbo\""), HasSubstr("safe, balanced, fast")));
  method = "minference";
  const absl::Status other = ResolvePreset("fast", &method, &parameters);
  EXPECT_EQ(other.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(other.message()),
              AllOf(HasSubstr("\"minference\""), HasSubstr("\"vsprefill\" or none")));
  EXPECT_TRUE(parameters.empty());
  method = "vsprefill";
  EXPECT_TRUE(ResolvePreset("fast", &method, &parameters).ok());
}

TEST_P(AttentionMethodTest, KernelErrorsNameTheOperation) {
  Prompt prompt(300, 10);
  std::vector<SequenceCall> sequences = {prompt.Chunk(0, 300, nullptr)};
  sequences[0].prompt_tokens = 200;  // shorter than what is there
  auto method = Make("vsprefill", {{"dense_below", 0}});
  EXPECT_THAT(std::string(Attend(*method, sequences).message()), HasSubstr("selection"));
}

/// Every sparse method, with parameters that keep everything and ones that leave something out of
/// a prompt of 900 tokens.
struct Rival {
  std::string name;
  std::map<std::string, double> everything, sparse;
};
const std::vector<Rival>& Rivals() {
  static const auto* rivals = new std::vector<Rival>{
      {"streaming_llm", {{"window_tokens", 900}}, {{"sink_tokens", 4}, {"window_tokens", 200}}},
      {"flashprefill", {{"alpha", 0}}, {{"alpha", 1}, {"window_tokens", 128}}},
      {"flashprefill_v2",
       {{"alpha", 0}, {"dense_below", 0}},
       {{"alpha", 1}, {"window_tokens", 128}, {"last_tiles", 0}, {"dense_below", 0}}},
      {"minference",
       {{"vertical_size", 0}, {"slash_size", 900}},
       {{"vertical_size", 100}, {"slash_size", 50}}},
      {"flexprefill", {{"gamma", 1}, {"min_budget", 1}}, {{"gamma", 0.3}, {"min_budget", 1}}},
      {"xattention", {{"threshold", 1}}, {{"threshold", 0.5}}},
      {"anchor_attention", {{"theta", 1e6}, {"step", 2}}, {{"theta", 1}, {"step", 1}}},
      {"seer_attention", {{"threshold", 0}}, {{"threshold", 0.2}, {"last_dense_blocks", 0}}},
  };
  return *rivals;
}

TEST_P(AttentionMethodTest, EveryMethodIsTested) {
  std::vector<std::string> names = {"dense", "vsprefill"}, listed;
  for (const Rival& rival : Rivals()) names.push_back(rival.name);
  for (const MethodSpec& spec : MethodSpecs()) listed.push_back(spec.name);
  EXPECT_THAT(listed, testing::UnorderedElementsAreArray(names));
}

TEST_P(AttentionMethodTest, EveryMethodEqualsDenseWhereItKeepsEverything) {
  Prompt prompt(900, 21);
  const auto dense = Whole(*Make("dense"), prompt);
  for (const Rival& rival : Rivals()) {
    SCOPED_TRACE(rival.name);
    PairCounts counts;
    auto method = Make(rival.name, rival.everything);
    EXPECT_FALSE(method->needs_indexer_logits());
    EXPECT_LT(MaxDifference(dense, Whole(*method, prompt, &counts)), 1e-5);
    EXPECT_EQ(counts.unmasked, counts.dense);
    // In chunks, too.
    prompt.out.assign(prompt.out.size(), NAN);
    PairCounts chunked;
    for (const auto& [begin, end] : {std::pair{0, 333}, {333, 334}, {334, 900}}) {
      ASSERT_TRUE(Attend(*method, {prompt.Chunk(begin, end, &chunked)}).ok());
    }
    EXPECT_LT(MaxDifference(dense, prompt.out), 1e-5);
    EXPECT_EQ(chunked.unmasked, counts.unmasked);
  }
}

TEST_P(AttentionMethodTest, EveryMethodReadsFewerPairsAndReportsThem) {
  Prompt prompt(900, 22);
  const auto dense = Whole(*Make("dense"), prompt);
  for (const Rival& rival : Rivals()) {
    SCOPED_TRACE(rival.name);
    PairCounts counts;
    auto method = Make(rival.name, rival.sparse);
    const auto out = Whole(*method, prompt, &counts);
    EXPECT_GT(MaxDifference(dense, out), 1e-3);
    EXPECT_LT(counts.unmasked, 0.95 * counts.dense);
    EXPECT_GT(counts.unmasked, 0.1 * counts.dense);
    EXPECT_GE(counts.multiplied, counts.unmasked);
    EXPECT_EQ(counts.dense, kHeads * 900 * 901 / 2);
    EXPECT_GT(method->index_statistics().select_seconds, 0);
    // Short prompts and first layers stay dense on demand.
    for (const auto& stays : {std::pair{"dense_below", 901.0}, {"dense_layers", 1.0}}) {
      auto parameters = rival.sparse;
      parameters[stays.first] = stays.second;
      PairCounts all;
      EXPECT_EQ(MaxDifference(dense, Whole(*Make(rival.name, parameters), prompt, &all)), 0);
      EXPECT_EQ(all.unmasked, all.dense);
    }
  }
}

// A batch gives each sequence what it gets alone; a method is used again for other shapes.
TEST_P(AttentionMethodTest, EveryMethodInABatch) {
  Prompt a(700, 23), b(300, 24), c(450, 25);
  for (const Rival& rival : Rivals()) {
    SCOPED_TRACE(rival.name);
    std::vector<std::vector<float>> single;
    for (Prompt* prompt : {&a, &b, &c}) {
      single.push_back(Whole(*Make(rival.name, rival.sparse), *prompt));
      prompt->out.assign(prompt->out.size(), NAN);
    }
    auto method = Make(rival.name, rival.sparse);
    ASSERT_TRUE(Attend(*method, {c.Chunk(0, 450, nullptr)}).ok());
    ASSERT_TRUE(Attend(*method, {a.Chunk(0, 700, nullptr), b.Chunk(0, 300, nullptr),
                                 c.Chunk(0, 450, nullptr)})
                    .ok());
    EXPECT_LT(MaxDifference(a.out, single[0]), 1e-6);
    EXPECT_LT(MaxDifference(b.out, single[1]), 1e-6);
    EXPECT_LT(MaxDifference(c.out, single[2]), 1e-6);
  }
}

TEST_P(AttentionMethodTest, MeanCorrectionOnlyAddsPseudoKeys) {
  Prompt prompt(900, 26);
  auto parameters = Rivals()[2].sparse;
  PairCounts with, without;
  const auto corrected = Whole(*Make("flashprefill_v2", parameters), prompt, &with);
  parameters["mean_correction"] = 0;
  const auto plain = Whole(*Make("flashprefill_v2", parameters), prompt, &without);
  EXPECT_GT(MaxDifference(corrected, plain), 1e-3);
  EXPECT_EQ(with.unmasked, without.unmasked);
  EXPECT_GT(with.multiplied, without.multiplied);
  // Closer to dense: what is left out here is spread evenly.
  const auto dense = Whole(*Make("dense"), prompt);
  double error_with = 0, error_without = 0;
  for (size_t i = 0; i < dense.size(); ++i) {
    error_with += std::pow(corrected[i] - dense[i], 2);
    error_without += std::pow(plain[i] - dense[i], 2);
  }
  EXPECT_LT(error_with, 0.8 * error_without);
}

TEST_P(AttentionMethodTest, SeerAttentionNeedsAGate) {
  Prompt prompt(300, 29);
  context_.seer_gate.clear();
  const absl::Status status =
      Attend(*Make("seer_attention"), {prompt.Chunk(0, prompt.tokens, nullptr)});
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(status.message()), HasSubstr("gate"));
  for (const MethodSpec& spec : MethodSpecs()) {
    EXPECT_EQ(spec.needs_seer_gate, spec.name == "seer_attention") << spec.name;
  }
}

TEST_P(AttentionMethodTest, SeerAttentionByDensityOrByTheLayersGate) {
  Prompt prompt(900, 30);
  PairCounts half, all;
  Whole(*Make("seer_attention", {{"density", 0.1}, {"last_dense_blocks", 0}}), prompt, &half);
  Whole(*Make("seer_attention", {{"density", 1}, {"last_dense_blocks", 0}}), prompt, &all);
  EXPECT_LT(half.unmasked, 0.7 * half.dense);
  EXPECT_EQ(all.unmasked, all.dense);
  // A layer whose gate finds all blocks equal keeps them all.
  const std::vector<float> nothing(gate_.wk.size(), 0.0f);
  context_.seer_gate[2].wk = nothing.data();
  auto method = Make("seer_attention", {{"threshold", 0.05}, {"last_dense_blocks", 0}});
  PairCounts equal, scored;
  Whole(*method, prompt, &equal, 2);
  Whole(*method, prompt, &scored, 3);
  EXPECT_EQ(equal.unmasked, equal.dense);
  EXPECT_LT(scored.unmasked, scored.dense);
}

TEST_P(AttentionMethodTest, FlexPrefillIsDenseUpToItsBudget) {
  Prompt prompt(256, 27), longer(520, 28);
  PairCounts counts;
  Whole(*Make("flexprefill", {{"gamma", 0.1}, {"min_budget", 1}}), prompt, &counts);
  EXPECT_EQ(counts.unmasked, counts.dense);
  counts = {};
  Whole(*Make("flexprefill", {{"gamma", 0.1}, {"min_budget", 513}}), longer, &counts);
  EXPECT_EQ(counts.unmasked, counts.dense);
  counts = {};
  Whole(*Make("flexprefill", {{"gamma", 0.1}, {"min_budget", 1}}), longer, &counts);
  EXPECT_LT(counts.unmasked, counts.dense);
}

TEST_P(AttentionMethodTest, EveryMethodRefusesBadParameters) {
  for (const Rival& rival : Rivals()) {
    SCOPED_TRACE(rival.name);
    for (const MethodSpec& spec : MethodSpecs()) {
      if (spec.name != rival.name) continue;
      for (const ParameterSpec& parameter : spec.parameters) {
        SCOPED_TRACE(parameter.name);
        EXPECT_FALSE(parameter.help.empty());
        for (const double value : {parameter.min - 1, parameter.max + 1, double{NAN}}) {
          EXPECT_THAT(MessageFor(context_, rival.name, {{parameter.name, value}}),
                      HasSubstr(parameter.name + " = "));
        }
        if (parameter.whole) {
          MessageFor(context_, rival.name, {{parameter.name, parameter.min + 0.5}});
        }
        Make(rival.name, {{parameter.name, parameter.min}});
        Make(rival.name, {{parameter.name, parameter.max}});
      }
    }
  }
  EXPECT_THAT(MessageFor(context_, "xattention", {{"stride", 12}}),
              AllOf(HasSubstr("stride = 12"), HasSubstr("4, 8, 16, 32, 64")));
}

TEST_P(AttentionMethodTest, MethodsThatADeviceHasNotAreRefused) {
  kernels::KernelSet set = kernels::CpuKernels();
  set.select_flex = nullptr;
  context_.kernels = &set;
  const auto method = CreateMethod(context_, "flexprefill", {});
  EXPECT_EQ(method.status().code(), absl::StatusCode::kUnimplemented);
  EXPECT_THAT(std::string(method.status().message()), HasSubstr("\"flexprefill\" does not run on"));
  EXPECT_TRUE(CreateMethod(context_, "xattention", {}).ok());
}

INSTANTIATE_TEST_SUITE_P(Kernels, AttentionMethodTest, testing::Bool(),
                         [](const auto& info) { return info.param ? "cpu" : "ref"; });

}  // namespace
}  // namespace vsprefill::attention
