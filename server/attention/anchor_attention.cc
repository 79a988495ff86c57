// AnchorAttention: per query head, columns whose logit comes near the largest one among the first
// and the nearest tokens.
#include "server/attention/methods.h"
#include "server/attention/sparse_method.h"
#include "server/base/status_macros.h"

namespace vsprefill::attention {
namespace {

class AnchorAttention : public SparseMethod {
 public:
  AnchorAttention(const MethodContext& context, const std::map<std::string, double>& parameters)
      : SparseMethod("anchor_attention", context, parameters) {
    params_.theta = number("theta");
    params_.sink_blocks = static_cast<int32_t>(kernels::KeyBlocks(whole("sink_tokens")));
    params_.window_blocks = static_cast<int32_t>(kernels::KeyBlocks(whole("window_tokens")));
  }

 protected:
  absl::Status Select(const AttentionCall& call, size_t i) override {
    VSP_ASSIGN_OR_RETURN(const auto input, QueryInput(call, i, kernels::AnchorWorkspaceBytes));
    VSP_ASSIGN_OR_RETURN(
        auto* index, NewTiles(call, i, call.shape.num_q_heads, {.tiles_per_set = whole("step")}));
    return Checked(kernels().select_anchor(input, params_, index, call.stream), call, i);
  }

 private:
  kernels::AnchorParams params_;
};

}  // namespace

MethodSpec AnchorAttentionSpec() {
  MethodSpec spec;
  spec.name = "anchor_attention";
  spec.help =
      "columns whose logit comes near the largest of the first and nearest tokens, per query head "
      "(AnchorAttention)";
  spec.parameters = {
      {"theta", 12, -1e6, 1e6, "how far below the anchor a logit may lie; more reads more"},
      {"step", 16, 1, 128, "row tiles of 128 that share their columns and their window's start",
       true},
      {"sink_tokens", 128, 0, kMaxTokens, "first tokens that every row reads, in blocks of 128",
       true},
      {"window_tokens", 128, 0, kMaxTokens,
       "where the window begins before the set's first row, in blocks of 128", true},
  };
  AddDenseParameters(spec, 0);
  spec.runs_on = [](const kernels::KernelSet& k) { return k.select_anchor != nullptr; };
  spec.create = Create<AnchorAttention>;
  return spec;
}

}  // namespace vsprefill::attention
