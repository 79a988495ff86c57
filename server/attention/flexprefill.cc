// FlexPrefill: per query head either vertical-slash blocks or query-aware blocks, as many as cover
// a share of the attention.
#include "server/attention/methods.h"
#include "server/attention/sparse_method.h"
#include "server/base/status_macros.h"

namespace vsprefill::attention {
namespace {

constexpr int64_t kAlwaysDense = 256;  // prompts up to here, and up to the minimum budget

class FlexPrefill : public SparseMethod {
 public:
  FlexPrefill(const MethodContext& context, const std::map<std::string, double>& parameters)
      : SparseMethod("flexprefill", context, parameters) {
    params_.gamma = number("gamma");
    params_.tau = number("tau");
    params_.min_budget = whole("min_budget");
    params_.max_budget = whole("max_budget");
    const int64_t budget = kernels::KeyBlocks(params_.min_budget) * kernels::kKeyBlock;
    KeepDenseBelow(std::max(kAlwaysDense, budget) + 1);
  }

 protected:
  absl::Status Select(const AttentionCall& call, size_t i) override {
    VSP_ASSIGN_OR_RETURN(const auto input, QueryInput(call, i, kernels::FlexWorkspaceBytes));
    VSP_ASSIGN_OR_RETURN(auto* index, NewTiles(call, i, call.shape.num_q_heads, {}));
    return Checked(kernels().select_flex(input, params_, index, call.stream), call, i);
  }

 private:
  kernels::FlexParams params_;
};

}  // namespace

MethodSpec FlexPrefillSpec() {
  MethodSpec spec;
  spec.name = "flexprefill";
  spec.help = "blocks that cover a share of the estimated attention, per query head (FlexPrefill)";
  spec.parameters = {
      {"gamma", 0.9, 0, 1, "share of the attention to cover"},
      {"tau", 0.1, 0, 1, "heads whose estimate diverges less are query-aware; 0: none"},
      {"min_budget", 512, 1, kMaxTokens, "least columns and diagonals, in blocks of 128", true},
      {"max_budget", kMaxTokens, 1, kMaxTokens, "most columns and diagonals, in blocks of 128",
       true},
  };
  AddDenseParameters(spec, 0);
  spec.runs_on = [](const kernels::KernelSet& k) { return k.select_flex != nullptr; };
  spec.create = Create<FlexPrefill>;
  return spec;
}

}  // namespace vsprefill::attention
