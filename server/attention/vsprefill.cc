// VSPrefill: vertical columns and slash bands chosen from the VSIndexer's logits
// (docs/vsprefill.md).
#include <chrono>
#include <cmath>
#include <utility>

#include "absl/strings/str_format.h"
#include "kernels/selection.h"
#include "server/attention/execute.h"
#include "server/attention/methods.h"
#include "server/base/kernel_status.h"
#include "server/base/status_macros.h"

namespace vsprefill::attention {
namespace {

using kernels::SelectionParams;
using kernels::SelectionRule;
using kernels::SparseIndexView;

constexpr double kMaxTokens = kernels::kMaxSelectionTokens;

/// The kernel's parameters for a prompt of this length, from complete and checked ones. Short
/// prompts spend more of their (small) attention: at one threshold they lose more.
SelectionParams MakeSelection(const std::map<std::string, double>& parameters,
                              int64_t prompt_tokens) {
  auto get = [&](const char* name) { return static_cast<float>(parameters.at(name)); };
  auto get_int = [&](const char* name) { return static_cast<int>(parameters.at(name)); };
  SelectionParams selection;
  selection.rule = static_cast<SelectionRule>(get_int("rule"));
  selection.threshold = get("threshold");
  const double full = parameters.at("full_threshold_tokens");
  const double tokens = static_cast<double>(prompt_tokens);
  if (tokens < full) selection.threshold *= static_cast<float>(std::sqrt(tokens / full));
  selection.tau_vertical = get("tau_vertical");
  selection.tau_slash = get("tau_slash");
  selection.sink_tokens = get_int("sink_tokens");
  selection.local_tokens = get_int("local_tokens");
  selection.last_dense_tokens = get_int("last_dense_tokens");
  selection.min_vertical_ratio = get("min_vertical_ratio");
  selection.min_slash_ratio = get("min_slash_ratio");
  selection.max_density = get("max_density");
  return selection;
}

/// Device memory of one sequence's index; grows, never shrinks.
class IndexBuffers {
 public:
  /// Makes room for `kv_tokens` (sized for `prompt_tokens` at once, so that later chunks fit) and
  /// points `view` into it. The counts are the caller's.
  absl::Status Prepare(Allocator& allocator, int num_groups, int row_tile, int64_t prompt_tokens,
                       SparseIndexView& view) {
    const int64_t words = kernels::BandWords(prompt_tokens, row_tile);
    const int64_t blocks = kernels::BandBlocks(prompt_tokens, row_tile);
    const int64_t bytes = num_groups * (prompt_tokens + words + blocks) * 4;
    if (buffer_.bytes() < bytes) {
      VSP_ASSIGN_OR_RETURN(buffer_, Buffer::Create(allocator, bytes));
    }
    auto* memory = static_cast<int32_t*>(buffer_.data());
    view.num_groups = num_groups;
    view.verticals = memory;
    view.vertical_stride = prompt_tokens;
    view.band_bits = reinterpret_cast<uint32_t*>(memory + num_groups * prompt_tokens);
    view.band_stride = words;
    view.bands = memory + num_groups * (prompt_tokens + words);
    view.band_list_stride = blocks;
    return absl::OkStatus();
  }

 private:
  Buffer buffer_;
};

class VsPrefill : public AttentionMethod {
 public:
  VsPrefill(const MethodContext& context, std::map<std::string, double> parameters)
      : context_(context), parameters_(std::move(parameters)) {
    dense_layers_ = static_cast<int>(parameters_.at("dense_layers"));
    dense_below_ = static_cast<int>(parameters_.at("dense_below"));
  }

  absl::string_view name() const override { return "vsprefill"; }
  const std::map<std::string, double>& parameters() const override { return parameters_; }
  bool needs_indexer_logits() const override { return true; }
  IndexStatistics index_statistics() const override { return statistics_; }

  absl::Status Attend(const AttentionCall& call) override {
    const int num_groups = call.shape.num_kv_heads;
    const size_t num_sequences = call.sequences.size();
    if (buffers_.size() < num_sequences) buffers_.resize(num_sequences);
    views_.assign(num_sequences, SparseIndexView());
    VSP_RETURN_IF_ERROR(PrepareCounts(num_groups, num_sequences));
    for (size_t i = 0; i < num_sequences; ++i) {
      SequenceCall& sequence = call.sequences[i];
      sequence.attention.index = nullptr;
      const bool dense = call.layer < dense_layers_ || sequence.prompt_tokens < dense_below_;
      if (i == 0 && dense) statistics_.num_verticals = statistics_.num_bands = nullptr;
      if (dense) continue;
      VSP_RETURN_IF_ERROR(Select(call, i));
      sequence.attention.index = &views_[i];
    }
    return Execute(context_, call);
  }

 private:
  /// Counts of the first sequence are kept per layer, for the statistics; the others share a row.
  absl::Status PrepareCounts(int num_groups, size_t num_sequences) {
    const int64_t rows = context_.num_layers + static_cast<int64_t>(num_sequences);
    if (counts_.bytes() < 2 * rows * num_groups * 4) {
      VSP_ASSIGN_OR_RETURN(counts_, Buffer::Create(*context_.allocator, 2 * rows * num_groups * 4));
    }
    return absl::OkStatus();
  }

  absl::Status Select(const AttentionCall& call, size_t i) {
    const SequenceCall& sequence = call.sequences[i];
    if (sequence.vertical_logits == nullptr || sequence.slash_logits == nullptr) {
      return absl::FailedPreconditionError("method vsprefill: the model has no VSIndexer");
    }
    const int num_groups = call.shape.num_kv_heads;
    kernels::SelectionInput input;
    input.vertical_logits = sequence.vertical_logits;
    input.slash_logits = sequence.slash_logits;
    input.logit_stride = sequence.logit_stride;
    input.num_groups = num_groups;
    input.group_size = call.shape.group_size();
    input.kv_tokens = sequence.attention.kv_tokens;
    input.q_start = sequence.attention.kv_tokens - sequence.attention.q_tokens;
    input.prompt_tokens = sequence.prompt_tokens;
    if (!context_.threshold_scale.empty()) {
      input.threshold_scale = context_.threshold_scale[call.layer].data();
    }

    SparseIndexView& view = views_[i];
    VSP_RETURN_IF_ERROR(buffers_[i].Prepare(*context_.allocator, num_groups,
                                            kernels::RowTilePositions(input.group_size),
                                            sequence.prompt_tokens, view));
    const int64_t row = i == 0 ? call.layer : context_.num_layers + static_cast<int64_t>(i);
    const int64_t half = counts_.bytes() / 8;
    view.num_verticals = static_cast<int32_t*>(counts_.data()) + row * num_groups;
    view.num_bands = view.num_verticals + half;
    const int64_t bytes = kernels::SelectionWorkspaceBytes(num_groups, input.kv_tokens);
    if (workspace_.bytes() < bytes) {
      VSP_ASSIGN_OR_RETURN(
          workspace_, Buffer::Create(*context_.allocator, kernels::SelectionWorkspaceBytes(
                                                              num_groups, sequence.prompt_tokens)));
    }

    const SelectionParams selection = MakeSelection(parameters_, sequence.prompt_tokens);
    const auto start = std::chrono::steady_clock::now();
    VSP_RETURN_IF_ERROR(FromKernelStatus(
        context_.kernels->select(input, selection, workspace_.data(), &view, call.stream),
        absl::StrFormat("selection (%d groups of %d heads, rows %d to %d of %d)", num_groups,
                        input.group_size, input.q_start, input.kv_tokens, input.prompt_tokens)));
    if (context_.allocator->device() == kernels::DeviceKind::kCpu) {
      statistics_.select_seconds +=
          std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    }
    if (i == 0) {
      statistics_.num_verticals = static_cast<const int32_t*>(counts_.data());
      statistics_.num_bands = statistics_.num_verticals + half;
      statistics_.first_layer = dense_layers_;
      statistics_.num_layers = context_.num_layers;
      statistics_.num_groups = num_groups;
    }
    return absl::OkStatus();
  }

  const MethodContext& context_;
  const std::map<std::string, double> parameters_;
  int dense_layers_ = 0;
  int64_t dense_below_ = 0;
  std::vector<IndexBuffers> buffers_;   // per sequence of a batch
  std::vector<SparseIndexView> views_;  // likewise; valid during one call
  Buffer counts_, workspace_;
  IndexStatistics statistics_;
};

}  // namespace

MethodSpec VsPrefillSpec() {
  MethodSpec spec;
  spec.name = "vsprefill";
  spec.help = "vertical columns and slash bands predicted per layer and KV group by a VSIndexer";
  spec.needs_indexer = true;
  spec.parameters = {
      {"rule", 0, 0, 1, "0: mass per unit of cost above threshold; 1: cumulative mass tau", true},
      {"threshold", 2.8, 0, 1e6, "rule 0: least mass per pair, in units of 1/n; more is sparser"},
      {"full_threshold_tokens", 8192, 0, kMaxTokens,
       "rule 0: prompts of n tokens below this use threshold * sqrt(n / this); 0: never", true},
      {"tau_vertical", 0.9, 0, 1, "rule 1: share of the vertical mass to keep"},
      {"tau_slash", 0.9, 0, 1, "rule 1: share of the slash mass to keep"},
      {"sink_tokens", 16, 0, kMaxTokens, "first tokens that every row reads", true},
      {"local_tokens", 128, 128, kMaxTokens, "nearest tokens that every row reads", true},
      {"last_dense_tokens", 64, 0, kMaxTokens, "last rows of the prompt that read everything",
       true},
      {"min_vertical_ratio", 0, 0, 1, "least share of the tokens kept as columns"},
      {"min_slash_ratio", 0, 0, 1, "least share of the blocks of distances kept as bands"},
      {"max_density", 1, 0, 1, "cap on the estimated density of each layer and group in a chunk"},
      {"dense_layers", 0, 0, 1e4, "first layers that stay dense", true},
      {"dense_below", 2048, 0, kMaxTokens, "prompts with fewer tokens are computed densely", true},
  };
  spec.create = [](const MethodContext& context, const std::map<std::string, double>& parameters) {
    return std::make_unique<VsPrefill>(context, parameters);
  };
  return spec;
}

kernels::SelectionParams DefaultSelection(int64_t prompt_tokens) {
  std::map<std::string, double> parameters;
  for (const ParameterSpec& spec : VsPrefillSpec().parameters) {
    parameters[spec.name] = spec.default_value;
  }
  return MakeSelection(parameters, prompt_tokens);
}

}  // namespace vsprefill::attention
