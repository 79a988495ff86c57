// VSPrefill: vertical columns and slash bands chosen from the VSIndexer's logits
// (docs/vsprefill.md).
#include <cmath>
#include <vector>

#include "kernels/selection.h"
#include "server/attention/methods.h"
#include "server/attention/sparse_method.h"
#include "server/base/status_macros.h"

namespace vsprefill::attention {
namespace {

using kernels::SelectionParams;
using kernels::SelectionRule;
using kernels::SparseIndexView;

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

class VsPrefill : public SparseMethod {
 public:
  VsPrefill(const MethodContext& context, const std::map<std::string, double>& parameters)
      : SparseMethod("vsprefill", context, parameters) {}
  bool needs_indexer_logits() const override { return true; }

 protected:
  absl::Status Select(const AttentionCall& call, size_t i) override {
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
    if (!context().threshold_scale.empty()) {
      input.threshold_scale = context().threshold_scale[call.layer].data();
    }
    VSP_ASSIGN_OR_RETURN(SparseIndexView * view, NewVerticalSlash(call, i, num_groups));
    if (i == 0) VSP_RETURN_IF_ERROR(KeepCounts(call.layer, *view));
    const int64_t bytes = kernels::SelectionWorkspaceBytes(num_groups, input.kv_tokens);
    if (workspace_.bytes() < bytes) {
      VSP_ASSIGN_OR_RETURN(
          workspace_, Buffer::Create(*context().allocator, kernels::SelectionWorkspaceBytes(
                                                               num_groups, input.prompt_tokens)));
    }
    VSP_RETURN_IF_ERROR(
        Checked(kernels().select(input, MakeSelection(parameters(), input.prompt_tokens),
                                 workspace_.data(), view, call.stream),
                call, i));
    return on_cpu() ? absl::OkStatus() : SpreadDenseRows(call, i, view->dense_from);
  }

 private:
  /// Gives sequence i memory with which the device may spread the prompt's dense last rows: every
  /// chunk, for a row tile that reaches dense_from may begin in an earlier one.
  absl::Status SpreadDenseRows(const AttentionCall& call, size_t i, int64_t dense_from) {
    SequenceCall& sequence = call.sequences[i];
    const int64_t bytes = kernels::AttentionWorkspaceBytes(call.shape, call.shape.num_kv_heads,
                                                           dense_from, sequence.prompt_tokens);
    sequence.attention.workspace = nullptr;
    if (bytes == 0) return absl::OkStatus();
    while (dense_rows_.size() <= i) dense_rows_.emplace_back();
    if (dense_rows_[i].bytes() < bytes) {
      VSP_ASSIGN_OR_RETURN(dense_rows_[i], Buffer::Create(*context().allocator, bytes));
    }
    sequence.attention.workspace = dense_rows_[i].data();
    return absl::OkStatus();
  }

  /// Lets the first sequence's counts lie where they stay, per layer, for the statistics.
  absl::Status KeepCounts(int layer, SparseIndexView& view) {
    const int64_t half = int64_t{context().num_layers} * view.num_groups;
    if (counts_.bytes() < 2 * half * 4) {
      VSP_ASSIGN_OR_RETURN(counts_, Buffer::Create(*context().allocator, 2 * half * 4));
    }
    view.num_verticals = static_cast<int32_t*>(counts_.data()) + layer * view.num_groups;
    view.num_bands = view.num_verticals + half;
    statistics_.num_verticals = static_cast<const int32_t*>(counts_.data());
    statistics_.num_bands = statistics_.num_verticals + half;
    statistics_.first_layer = dense_layers();
    statistics_.num_layers = context().num_layers;
    statistics_.num_groups = view.num_groups;
    return absl::OkStatus();
  }

  Buffer counts_, workspace_;
  std::vector<Buffer> dense_rows_;  // per sequence of a batch
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
  };
  AddDenseParameters(spec, 2048, /*dense_fallback=*/true);
  spec.create = Create<VsPrefill>;
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
