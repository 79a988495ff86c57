// SeerAttention: per query head, blocks that a trained gate on pooled queries and keys predicts.
#include "kernels/select_seer.h"
#include "server/attention/methods.h"
#include "server/attention/sparse_method.h"
#include "server/base/status_macros.h"

namespace vsprefill::attention {
namespace {

class SeerAttention : public SparseMethod {
 public:
  SeerAttention(const MethodContext& context, const std::map<std::string, double>& parameters)
      : SparseMethod("seer_attention", context, parameters) {
    params_.threshold = number("threshold");
    params_.density = number("density");
    params_.last_dense_blocks = whole("last_dense_blocks");
  }

 protected:
  absl::Status Select(const AttentionCall& call, size_t i) override {
    if (context().seer_gate.empty()) {
      return absl::FailedPreconditionError(
          "method seer_attention needs a SeerAttention gate, none is loaded");
    }
    kernels::SeerInput input;
    VSP_ASSIGN_OR_RETURN(input.base, QueryInput(call, i, kernels::SeerWorkspaceBytes));
    input.gate = context().seer_gate[call.layer];
    input.rope_cos = call.rope_cos;
    input.rope_sin = call.rope_sin;
    VSP_ASSIGN_OR_RETURN(auto* index, NewTiles(call, i, call.shape.num_q_heads, {}));
    return Checked(kernels().select_seer(input, params_, index, call.stream), call, i);
  }

 private:
  kernels::SeerParams params_;
};

}  // namespace

MethodSpec SeerAttentionSpec() {
  MethodSpec spec;
  spec.name = "seer_attention";
  spec.help = "blocks that a trained gate on pooled queries and keys predicts (SeerAttention)";
  spec.needs_seer_gate = true;
  spec.parameters = {
      {"threshold", 2e-3, 0, 1, "least share of the gate's softmax over blocks; more is sparser"},
      {"density", 0, 0, 1,
       "share of its visible blocks that each row of blocks reads, instead of the threshold; 0: "
       "threshold"},
      {"last_dense_blocks", 2, 0, kMaxTokens / kernels::kSeerBlock,
       "last rows of blocks (64 tokens) of the prompt that read everything", true},
  };
  AddDenseParameters(spec, 0);
  spec.runs_on = [](const kernels::KernelSet& k) { return k.select_seer != nullptr; };
  spec.create = Create<SeerAttention>;
  return spec;
}

}  // namespace vsprefill::attention
