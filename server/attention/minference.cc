// MInference, vertical-slash pattern: per query head, the columns and diagonals that the last
// queries look at most.
#include "server/attention/methods.h"
#include "server/attention/sparse_method.h"
#include "server/base/status_macros.h"

namespace vsprefill::attention {
namespace {

class MInference : public SparseMethod {
 public:
  MInference(const MethodContext& context, const std::map<std::string, double>& parameters)
      : SparseMethod("minference", context, parameters) {
    params_.vertical_size = whole("vertical_size");
    params_.slash_size = whole("slash_size");
    params_.last_queries = whole("last_queries");
    params_.forced_verticals = whole("forced_verticals");
    params_.forced_slashes = whole("forced_slashes");
    params_.min_vertical = whole("min_vertical");
    params_.min_slash = whole("min_slash");
  }

 protected:
  absl::Status Select(const AttentionCall& call, size_t i) override {
    VSP_ASSIGN_OR_RETURN(const auto input, QueryInput(call, i, kernels::MInferenceWorkspaceBytes));
    VSP_ASSIGN_OR_RETURN(auto* index, NewVerticalSlash(call, i, call.shape.num_q_heads));
    return Checked(kernels().select_minference(input, params_, index, call.stream), call, i);
  }

 private:
  kernels::MInferenceParams params_;
};

}  // namespace

MethodSpec MInferenceSpec() {
  MethodSpec spec;
  spec.name = "minference";
  spec.help =
      "columns and diagonals of the last queries' attention, per query head (MInference "
      "vertical-slash)";
  spec.parameters = {
      {"vertical_size", 1000, 0, kMaxTokens, "columns per query head", true},
      {"slash_size", 6096, 0, kMaxTokens, "diagonals per query head", true},
      {"last_queries", 64, 1, 128, "rows of the chunk that are looked at, the last ones", true},
      {"forced_verticals", 30, 0, kMaxTokens, "first columns that come before all others", true},
      {"forced_slashes", 100, 50, kMaxTokens, "nearest diagonals that come before all others",
       true},
      {"min_vertical", 30, 0, kMaxTokens, "least vertical_size", true},
      {"min_slash", 50, 50, kMaxTokens, "least slash_size", true},
  };
  AddDenseParameters(spec, 0);
  spec.runs_on = [](const kernels::KernelSet& k) { return k.select_minference != nullptr; };
  spec.create = Create<MInference>;
  return spec;
}

}  // namespace vsprefill::attention
