// The recall probe and the expansion of indexes against a literal recomputation from the
// definitions in kernels/sparse_index.h and kernels/tile_index.h, for every sparse method.
#include "server/attention/recall_probe.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <map>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kernels/scalar.h"
#include "server/attention/attention_method.h"
#include "tests/kernels/seer_test_gate.h"

namespace vsprefill::attention {
namespace {

using kernels::AttentionSequence;
using kernels::AttentionShape;

constexpr int kLayer = 2;

absl::Status HostCopy(const void* device, int64_t bytes, void* host) {
  std::memcpy(host, device, bytes);
  return absl::OkStatus();
}

/// Whether the definitions let the query at `position` read key `c`.
bool Reads(const AttentionShape& shape, const AttentionSequence& s, int head, int64_t position,
           int64_t c) {
  const int groups = kernels::IndexGroups(shape, s);
  const int group = head / (shape.num_q_heads / groups);
  const int64_t m = 128 / (shape.num_q_heads / groups);
  const int64_t tile = position / m, last = tile * m + m - 1;
  if (s.index != nullptr) {
    const kernels::SparseIndexView& index = *s.index;
    if (last >= index.dense_from) return true;
    const int64_t block = (last - c) / kernels::kBandBlock;
    const int32_t* const bands = index.bands + group * index.band_list_stride;
    const int32_t* const columns = index.verticals + group * index.vertical_stride;
    return std::count(bands, bands + index.num_bands[group], block) > 0 ||
           std::count(columns, columns + index.num_verticals[group], c) > 0;
  }
  return kernels::TestBit(s.tiles->BlocksOf(group, tile), c / kernels::kKeyBlock) ||
         (s.tiles->columns != nullptr && kernels::TestBit(s.tiles->ColumnsOf(group, tile), c));
}

struct Case {
  std::string method;
  std::map<std::string, double> parameters;
  kernels::DType dtype = kernels::DType::kF32;
  int q_heads = 6, kv_heads = 2;
  int64_t tokens = 1001, chunk = 1001;
};

/// Runs `test` with a probe and, beside it, recomputes what the probe should find.
class Scene {
 public:
  explicit Scene(const Case& test) : case_(test) {
    shape_.num_q_heads = test.q_heads;
    shape_.num_kv_heads = test.kv_heads;
    shape_.head_dim = 16;
    shape_.dtype = test.dtype;
    shape_.scale = 0.4f;
    context_.kernels = &kernels::CpuKernels();
    context_.allocator = &HostAllocator();
    context_.num_layers = kLayer + 1;
    std::mt19937 rng(7);
    std::normal_distribution<float> normal;
    const int element = kernels::SizeOf(test.dtype);
    const auto fill = [&](std::vector<char>& x, int64_t count) {
      x.resize(count * element);
      for (int64_t i = 0; i < count; ++i) {
        kernels::StoreScalar(x.data(), i, test.dtype, normal(rng));
      }
    };
    fill(q_, test.tokens * test.q_heads * 16);
    fill(k_, test.tokens * test.kv_heads * 16);
    fill(v_, test.tokens * test.kv_heads * 16);
    out_.resize(q_.size());
    logits_.resize(2 * test.tokens * test.kv_heads);
    for (float& x : logits_) x = 2 * normal(rng);
    kernels::QuerySelectionInput text;
    text.shape = shape_;
    text.sequence.kv_tokens = test.tokens;
    gate_.emplace(text, 32, /*ties=*/false);
    context_.seer_gate.assign(context_.num_layers, gate_->Input(text).gate);
  }

  /// Calls `attend` for each chunk with the probe in place.
  void Chunks(RecallProbe* probe, const std::vector<int64_t>& rows, std::vector<double>* expected) {
    auto method = CreateMethod(context_, case_.method, case_.parameters);
    ASSERT_TRUE(method.ok()) << method.status();
    std::vector<double> sum(shape_.num_q_heads);
    int64_t observed = 0;
    for (int64_t begin = 0; begin < case_.tokens; begin += case_.chunk) {
      const int64_t end = std::min(case_.tokens, begin + case_.chunk);
      SequenceCall sequence = Chunk(begin, end);
      AttentionCall call;
      call.layer = kLayer;
      call.shape = shape_;
      call.sequences = absl::MakeSpan(&sequence, 1);
      call.probe = probe;
      call.rope_cos = gate_->cos.data();
      call.rope_sin = gate_->sin.data();
      ASSERT_TRUE((*method)->Attend(call).ok());
      if (sequence.attention.dense()) continue;
      for (const int64_t row : rows) {
        if (row < begin || row >= end) continue;
        ++observed;
        for (int head = 0; head < shape_.num_q_heads; ++head) {
          sum[head] += Recall(sequence.attention, head, row);
        }
      }
    }
    if (observed > 0) {
      for (const double total : sum) expected->push_back(total / observed);
    }
  }

 private:
  SequenceCall Chunk(int64_t begin, int64_t end) {
    const int64_t width = int64_t{shape_.num_q_heads} * 16, element = kernels::SizeOf(case_.dtype);
    SequenceCall call;
    AttentionSequence& a = call.attention;
    a.q = q_.data() + begin * width * element;
    a.out = out_.data() + begin * width * element;
    a.q_token_stride = a.out_token_stride = width;
    a.q_head_stride = a.out_head_stride = 16;
    a.k = k_.data();
    a.v = v_.data();
    a.kv_head_stride = case_.tokens * 16;
    a.kv_token_stride = 16;
    a.q_tokens = end - begin;
    a.kv_tokens = end;
    call.prompt_tokens = case_.tokens;
    call.vertical_logits = logits_.data();
    call.slash_logits = logits_.data() + case_.tokens * shape_.num_kv_heads;
    call.logit_stride = case_.tokens;
    return call;
  }
  double Recall(const AttentionSequence& s, int head, int64_t row) const {
    std::vector<double> weight;
    for (int64_t c = 0; c <= row; ++c) {
      double dot = 0;
      for (int e = 0; e < 16; ++e) {
        const int64_t kv = head / shape_.group_size();
        dot += double{kernels::LoadScalar(q_.data(), (row * shape_.num_q_heads + head) * 16 + e,
                                          case_.dtype)} *
               kernels::LoadScalar(k_.data(), (kv * case_.tokens + c) * 16 + e, case_.dtype);
      }
      weight.push_back(std::exp(dot * double{shape_.scale}));
    }
    double total = 0, read = 0;
    for (int64_t c = 0; c <= row; ++c) {
      total += weight[c];
      if (Reads(shape_, s, head, row, c)) read += weight[c];
    }
    return read / total;
  }

  const Case case_;
  AttentionShape shape_;
  MethodContext context_;
  std::vector<char> q_, k_, v_, out_;
  std::vector<float> logits_;
  std::optional<kernels::testing::SeerTestGate> gate_;
};

/// Rows that a probe of this phase looks at where the bound of its work does not bind.
std::vector<int64_t> Rows(int64_t tokens, double phase) {
  const int64_t count = std::min(RecallProbe::kMaxRows, tokens);
  std::vector<int64_t> rows;
  for (int64_t i = 0; i < count; ++i) {
    rows.push_back(static_cast<int64_t>((i + phase) * tokens / count));
  }
  return rows;
}

class RecallProbeTest : public testing::TestWithParam<Case> {};

TEST_P(RecallProbeTest, FindsWhatALiteralRecomputationFinds) {
  Scene run(GetParam());
  RecallProbe probe(kLayer, GetParam().tokens, 0.3, HostCopy);
  std::vector<double> expected;
  run.Chunks(&probe, Rows(GetParam().tokens, 0.3), &expected);
  const auto recall = probe.Finish();
  ASSERT_TRUE(recall.ok()) << recall.status();
  ASSERT_EQ(recall->size(), GetParam().q_heads);
  ASSERT_EQ(expected.size(), recall->size());
  for (size_t head = 0; head < expected.size(); ++head) {
    EXPECT_NEAR((*recall)[head], expected[head], 1e-6) << "head " << head;
    // Else the case would show nothing.
    EXPECT_LT(expected[head], 0.98);
    EXPECT_GT(expected[head], 0.05);
  }
}

std::vector<Case> Cases() {
  const std::map<std::string, double> vs = {
      {"threshold", 6}, {"full_threshold_tokens", 0}, {"dense_below", 0}, {"dense_fallback", 0}};
  std::vector<Case> cases = {
      {"vsprefill", vs},
      {"vsprefill", vs, kernels::DType::kBF16, 9, 3, 777, 250},
      {"vsprefill", vs, kernels::DType::kF32, 4, 4, 1001, 333},
      {"vsprefill", vs, kernels::DType::kF32, 8, 1, 901, 64},
      {"streaming_llm", {{"sink_tokens", 64}, {"window_tokens", 128}}},
      {"minference", {{"vertical_size", 40}, {"slash_size", 50}, {"forced_slashes", 50}}},
      {"flashprefill",
       {{"alpha", 1}, {"sink_tokens", 0}, {"window_tokens", 128}, {"last_tiles", 0}}},
      {"flashprefill_v2",
       {{"alpha", 1},
        {"sink_tokens", 0},
        {"window_tokens", 128},
        {"last_tiles", 0},
        {"dense_below", 0}}},
      {"flexprefill", {{"gamma", 0.5}, {"min_budget", 128}}},
      {"xattention", {{"threshold", 0.4}}},
      {"anchor_attention", {{"theta", 0}, {"step", 2}}},
      {"seer_attention", {{"threshold", 0.3}, {"last_dense_blocks", 0}}},
  };
  for (size_t i = 4, end = cases.size(); i < end; ++i) {
    Case chunked = cases[i];
    chunked.chunk = 300;
    chunked.dtype = kernels::DType::kBF16;
    cases.push_back(chunked);
  }
  return cases;
}

std::string NameOf(const testing::TestParamInfo<Case>& info) {
  return info.param.method + "_" + std::to_string(info.index);
}
INSTANTIATE_TEST_SUITE_P(AllMethods, RecallProbeTest, testing::ValuesIn(Cases()), NameOf);

TEST(RecallProbeTest, EverySparseMethodIsCovered) {
  for (const MethodSpec& spec : MethodSpecs()) {
    if (spec.name == "dense") continue;
    const std::vector<Case> cases = Cases();
    EXPECT_TRUE(std::any_of(cases.begin(), cases.end(), [&](const Case& c) {
      return c.method == spec.name;
    })) << spec.name;
  }
}

TEST(RecallProbeTest, WhatReadsEverythingHasAllTheMass) {
  Scene run({"vsprefill", {{"threshold", 0}, {"dense_below", 0}, {"dense_fallback", 0}}});
  RecallProbe probe(kLayer, 1001, 0, HostCopy);
  std::vector<double> expected;
  run.Chunks(&probe, Rows(1001, 0), &expected);
  const auto recall = probe.Finish();
  ASSERT_TRUE(recall.ok()) << recall.status();
  EXPECT_THAT(*recall, testing::SizeIs(6));
  EXPECT_THAT(*recall, testing::Each(1.0));
}

TEST(RecallProbeTest, DenseCallsAreNotObserved) {
  for (const std::string method : {"dense", "vsprefill"}) {
    Scene run({method, {}});  // vsprefill is dense below 2,048 tokens
    RecallProbe probe(kLayer, 1001, 0, HostCopy);
    std::vector<double> expected;
    run.Chunks(&probe, Rows(1001, 0), &expected);
    EXPECT_TRUE(expected.empty());
    ASSERT_TRUE(probe.Finish().ok());
    EXPECT_TRUE(probe.Finish()->empty());
  }
}

TEST(RecallProbeTest, AFailedCopyFailsTheProbeAndNotTheAttention) {
  for (int failing : {0, 3, 70}) {
    Scene run({"vsprefill",
               {{"threshold", 6}, {"dense_below", 0}, {"dense_fallback", 0}},
               kernels::DType::kF32,
               6,
               2,
               1001,
               400});
    int calls = 0;
    RecallProbe probe(kLayer, 1001, 0, [&](const void* device, int64_t bytes, void* host) {
      return calls++ == failing ? absl::InternalError("lost") : HostCopy(device, bytes, host);
    });
    std::vector<double> expected;
    run.Chunks(&probe, {}, &expected);  // asserts that each call succeeds
    EXPECT_EQ(probe.Finish().status().message(), "lost") << failing;
  }
}

TEST(RecallProbeTest, LongPromptsProbeFewerRows) {
  // One chunk of the end of a prompt so long that 8 rows are all that the bound leaves: the last of
  // them is the only one inside it.
  const int64_t tokens = RecallProbe::kMaxProducts / 6 / 8;
  int64_t rows = 0;
  RecallProbe probe(kLayer, tokens, 0.999, [&](const void*, int64_t, void* host) {
    std::memset(host, 0, 4);
    ++rows;
    return absl::OkStatus();
  });
  kernels::AttentionShape shape;
  shape.num_q_heads = 6;
  shape.num_kv_heads = 6;
  shape.head_dim = 1;
  shape.dtype = kernels::DType::kF32;
  AttentionSequence s;
  s.q_token_stride = 6;
  s.q_head_stride = 1;
  s.kv_tokens = tokens;
  s.q_tokens = tokens;
  kernels::TileIndexView empty;
  empty.num_groups = 5;  // neither head count: ends the probe after the queries were copied
  s.tiles = &empty;
  probe.Observe(shape, s);
  EXPECT_EQ(rows, 8);
  EXPECT_EQ(probe.Finish().status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(ForEachRowTest, RefusesPositionsOutsideTheQueries) {
  kernels::AttentionShape shape;
  shape.num_q_heads = 2;
  shape.num_kv_heads = 1;
  AttentionSequence s;
  s.kv_tokens = 100;
  s.q_tokens = 40;
  const auto ignore = [](int, int64_t, absl::Span<const int32_t>) {};
  for (const int64_t position : {59, 100}) {
    const absl::Status status = ForEachRow(shape, s, {position}, HostCopy, ignore);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(status.message()), testing::HasSubstr("[60, 100)"));
  }
  // Without an index: everything up to the position.
  std::vector<size_t> sizes;
  ASSERT_TRUE(ForEachRow(shape, s, {60, 99}, HostCopy,
                         [&](int, int64_t, absl::Span<const int32_t> columns) {
                           sizes.push_back(columns.size());
                         })
                  .ok());
  EXPECT_THAT(sizes, testing::ElementsAre(61, 100));
}

}  // namespace
}  // namespace vsprefill::attention
