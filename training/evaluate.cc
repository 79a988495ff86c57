#include "training/evaluate.h"

#include <torch/utils.h>

#include <algorithm>
#include <cmath>
#include <nlohmann/json.hpp>
#include <utility>

#include "absl/strings/str_format.h"
#include "server/attention/methods.h"
#include "server/base/status_macros.h"
#include "training/covered_mass.h"
#include "training/progress.h"

namespace vsprefill::training {
namespace {

/// What the other methods always read: the same sinks as StreamingLLM's paper, one block and the
/// local band.
constexpr int64_t kStreamingSinks = 4;
constexpr int64_t kLocalTokens = 128;
constexpr int64_t kMethodRows = 64;  // query rows that MInference's estimate looks at

/// One text with everything that methods choose from.
struct Text : TrueMass {
  torch::Tensor indexer, truth;  // logits, [2, layers, groups, tokens]
  torch::Tensor last_rows;
  torch::Tensor pooled64, pooled128;  // [layers, groups, tiles, blocks]
};

struct Method {
  std::string name;
  MaskFn mask;
  KnobRange range;
};

absl::StatusOr<Text> Prepare(Teacher& teacher, const model::VsIndexer& indexer,
                             absl::Span<const int32_t> ids, int64_t max_tiles) {
  VSP_ASSIGN_OR_RETURN(const Capture capture, teacher.Run(ids, /*with_queries=*/true));
  const model::ModelConfig& config = teacher.model().config();
  const double scale = 1 / std::sqrt(config.head_dim);
  Text text{MeasureTrueMass(teacher, capture, max_tiles)};
  std::vector<torch::Tensor> last_rows, pooled64, pooled128;
  for (int layer = 0; layer < config.num_layers; ++layer) {
    const torch::Tensor &queries = capture.queries[layer], &keys = capture.keys[layer];
    last_rows.push_back(SumsOfLastRows(queries, keys, scale, kMethodRows));
    pooled64.push_back(MeanPooledScores(text.tiles, queries, keys, scale, 64));
    pooled128.push_back(MeanPooledScores(text.tiles, queries, keys, scale, 128));
  }
  text.last_rows = (torch::stack(last_rows, 1) + 1e-12).log();
  text.pooled64 = torch::stack(pooled64);
  text.pooled128 = torch::stack(pooled128);
  text.truth = (torch::stack({capture.columns, capture.diagonals}) + 1e-12).log();
  VSP_ASSIGN_OR_RETURN(text.indexer, IndexerLogits(teacher, indexer, capture));
  return text;
}

/// The paper's rule: verticals and slashes up to a share tau = 1 - knob of their predicted mass.
MaskFn Cumulative(IndexMasker* masker, const torch::Tensor& logits) {
  return [masker, logits](int layer, const torch::Tensor& knobs) {
    kernels::SelectionParams params = attention::DefaultSelection(logits.size(3));
    params.rule = kernels::SelectionRule::kCumulative;
    params.tau_vertical = params.tau_slash = 1 - knobs[layer][0].item<float>();
    return masker->Mask(logits[0][layer], logits[1][layer], params,
                        std::vector<float>(logits.size(2), 1.0f));
  };
}

/// What the server selects by default (no knob), prefilling in chunks of `chunk` tokens; 0: whole.
/// A tile that two chunks share counts with the chunk of its first row.
MaskFn ServedDefault(IndexMasker* masker, const Text& text, const torch::Tensor& scale,
                     int64_t chunk) {
  return [masker, &text, scale, chunk](int layer,
                                       const torch::Tensor&) -> absl::StatusOr<torch::Tensor> {
    const int64_t tokens = text.tiles.tokens;
    const kernels::SelectionParams params = attention::DefaultSelection(tokens);
    std::vector<float> scales(text.indexer.size(2), 1.0f);
    if (scale.defined()) {
      const torch::Tensor row = scale[layer].contiguous();
      scales.assign(row.data_ptr<float>(), row.data_ptr<float>() + row.numel());
    }
    const torch::Tensor begins = torch::tensor(text.tiles.begins, text.tiles.last.options());
    torch::Tensor mask;
    const int64_t step = chunk > 0 ? chunk : tokens;
    for (int64_t begin = 0; begin < tokens; begin += step) {
      const int64_t end = std::min(tokens, begin + step);
      VSP_ASSIGN_OR_RETURN(
          const torch::Tensor part,
          masker->Mask(text.indexer[0][layer], text.indexer[1][layer], params, scales, end));
      const torch::Tensor own = begins.ge(begin).logical_and(begins.lt(end)).view({1, -1, 1});
      mask = mask.defined() ? torch::where(own, part, mask) : part;
    }
    return mask;
  };
}

MaskFn MeanPooled(const Text* text, const torch::Tensor& scores, int64_t block) {
  return [text, scores, block](int layer,
                               const torch::Tensor& knobs) -> absl::StatusOr<torch::Tensor> {
    const TileSet& tiles = text->tiles;
    torch::Tensor keep = scores[layer] >= knobs[layer].view({-1, 1, 1});
    keep.select(2, 0).fill_(true);  // sinks
    const torch::Tensor begin =
        torch::arange(scores.size(3), tiles.last.options()) * block + block - 1;
    keep.logical_or_(tiles.last.unsqueeze(1) - begin.unsqueeze(0) < kLocalTokens);
    return keep.repeat_interleave(block, 2).narrow(2, 0, tiles.tokens);
  };
}

/// Statistics over (layer, head) pairs.
void Summarise(const torch::Tensor& covered, CoverageResult* result) {
  result->mean = covered.mean().item<double>();
  const torch::Tensor sorted = std::get<0>(covered.flatten().sort());
  const int64_t tenth = std::max<int64_t>(1, sorted.size(0) / 10);
  result->lowest_tenth = sorted.narrow(0, 0, tenth).mean().item<double>();
  result->minimum = sorted[0].item<double>();
  const torch::Tensor by_layer = covered.mean(1).contiguous();
  result->by_layer.assign(by_layer.data_ptr<double>(),
                          by_layer.data_ptr<double>() + by_layer.numel());
}

}  // namespace

MaskFn SinksAndWindow(const TileSet* measured) {
  return [measured](int layer, const torch::Tensor& knobs) -> absl::StatusOr<torch::Tensor> {
    const TileSet& tiles = *measured;
    const torch::Tensor column = torch::arange(tiles.tokens, tiles.last.options());
    const torch::Tensor distance = tiles.last.unsqueeze(1) - column.unsqueeze(0);
    // Knob x: a window of tokens / x.
    const torch::Tensor window =
        (tiles.tokens / knobs[layer]).clamp_min(tiles.row_tile).view({-1, 1, 1});
    return (distance.unsqueeze(0) < window).logical_or(column < kStreamingSinks);
  };
}

ReportBuilder::ReportBuilder(absl::Span<const absl::Span<const int32_t>> texts) {
  report_.length = texts[0].size();
  report_.texts = texts.size();
}

void ReportBuilder::BeginText(int64_t tiles) {
  report_.tiles = tiles;
  slot_ = 0;
}

void ReportBuilder::Add(const std::string& method, double wanted, const Coverage& outcome) {
  if (slot_ == report_.results.size()) {
    CoverageResult& result = report_.results.emplace_back();
    result.method = method;
    result.wanted_density = wanted;
    covered_.push_back(torch::zeros_like(outcome.covered));
  }
  covered_[slot_] += outcome.covered / static_cast<double>(report_.texts);
  report_.results[slot_].density += outcome.density / static_cast<double>(report_.texts);
  ++slot_;
}

LengthReport ReportBuilder::Finish() {
  for (size_t slot = 0; slot < covered_.size(); ++slot) {
    Summarise(covered_[slot], &report_.results[slot]);
  }
  return report_;
}

absl::StatusOr<LengthReport> Evaluate(Teacher& teacher, const model::IndexerWeights& weights,
                                      absl::Span<const absl::Span<const int32_t>> texts,
                                      const EvaluateOptions& options) {
  if (texts.empty()) return absl::InvalidArgumentError("no held-out text is long enough");
  torch::NoGradGuard no_grad;
  VSP_ASSIGN_OR_RETURN(const std::unique_ptr<model::VsIndexer> indexer,
                       model::VsIndexer::Create(weights, teacher.model().device()));
  torch::Tensor scale;
  for (const std::vector<float>& layer : weights.threshold_scale) {
    const torch::Tensor row = torch::tensor(layer).unsqueeze(0);
    scale = scale.defined() ? torch::cat({scale, row}) : row;
  }
  ReportBuilder builder(texts);
  const int64_t length = texts[0].size();
  Progress progress(texts.size(), 0);
  for (size_t i = 0; i < texts.size(); ++i) {
    VSP_ASSIGN_OR_RETURN(const Text text, Prepare(teacher, *indexer, texts[i], options.max_tiles));
    builder.BeginText(text.tiles.num_tiles());
    IndexMasker masker(&teacher.model(), &text.tiles);
    const double longest = std::log2(length);
    const KnobRange threshold = {-8, 16};
    std::vector<Method> methods = {
        {"vsprefill", VerticalSlash(&masker, text.indexer, scale), threshold},
        {"vsprefill, one threshold (no scale)", VerticalSlash(&masker, text.indexer), threshold},
        {"vsprefill, same density in every group",
         VerticalSlash(&masker, text.indexer),
         {threshold.low, threshold.high, true}},
        {"vsprefill, cumulative thresholds", Cumulative(&masker, text.indexer), {-7, -0.01}},
        {"oracle (true sums)", VerticalSlash(&masker, text.truth, scale), threshold},
        {"oracle, one threshold (no scale)", VerticalSlash(&masker, text.truth), threshold},
        {"last 64 queries", VerticalSlash(&masker, text.last_rows), threshold},
        {"last 64 queries, with the scale", VerticalSlash(&masker, text.last_rows, scale),
         threshold},
        {"sinks + window", SinksAndWindow(&text.tiles), {0, longest}},
        {"mean-pooled blocks of 64", MeanPooled(&text, text.pooled64, 64), {-40, 0.5}},
        {"mean-pooled blocks of 128", MeanPooled(&text, text.pooled128, 128), {-40, 0.5}},
    };
    for (const Method& method : methods) {
      for (double density : options.densities) {
        VSP_ASSIGN_OR_RETURN(const Coverage outcome,
                             Reach(text, method.mask, method.range, text.indexer.size(2), density));
        builder.Add(method.name, density, outcome);
      }
    }
    // The served default, whatever density it has; a text is prefilled whole or in chunks.
    for (int64_t chunk : {int64_t{0}, int64_t{2048}, int64_t{1024}}) {
      VSP_ASSIGN_OR_RETURN(const Coverage outcome,
                           Cover(text, ServedDefault(&masker, text, scale, chunk), {}));
      builder.Add(chunk == 0 ? "the served default, whole prompt"
                             : absl::StrFormat("the served default, chunks of %d", chunk),
                  0, outcome);
    }
    progress.Update(i + 1, absl::StrFormat("evaluating %d tokens", length));
  }
  return builder.Finish();
}

std::string FormatTable(const LengthReport& report) {
  std::string table = absl::StrFormat(
      "Attention mass covered at equal density: %d held-out texts of %d tokens, %d row tiles each\n"
      "%-48s %8s %8s %8s %8s %8s\n",
      report.texts, report.length, report.tiles, "method", "wanted", "density", "mean", "low 10%",
      "min");
  for (const CoverageResult& r : report.results) {
    absl::StrAppendFormat(&table, "%-48s %8.2f %8.3f %8.3f %8.3f %8.3f\n", r.method,
                          r.wanted_density, r.density, r.mean, r.lowest_tenth, r.minimum);
  }
  return table;
}

std::string FormatJson(const std::vector<LengthReport>& reports, const std::string& weights_id,
                       const std::string& size_name, int size,
                       const std::map<std::string, std::string>& facts) {
  nlohmann::json json = {{"weights_id", weights_id}, {size_name, size}, {"facts", facts}};
  json["reports"] = nlohmann::json::array();
  for (const LengthReport& report : reports) {
    nlohmann::json results = nlohmann::json::array();
    for (const CoverageResult& r : report.results) {
      results.push_back({{"method", r.method},
                         {"wanted_density", r.wanted_density},
                         {"density", r.density},
                         {"mean", r.mean},
                         {"lowest_tenth", r.lowest_tenth},
                         {"minimum", r.minimum},
                         {"by_layer", r.by_layer}});
    }
    json["reports"].push_back({{"length", report.length},
                               {"texts", report.texts},
                               {"tiles", report.tiles},
                               {"results", results}});
  }
  return json.dump(1) + "\n";
}

}  // namespace vsprefill::training
