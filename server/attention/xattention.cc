// XAttention: per query head, blocks by the sums of their antidiagonals.
#include "server/attention/methods.h"
#include "server/attention/sparse_method.h"
#include "server/base/status_macros.h"

namespace vsprefill::attention {
namespace {

class XAttention : public SparseMethod {
 public:
  XAttention(const MethodContext& context, const std::map<std::string, double>& parameters)
      : SparseMethod("xattention", context, parameters) {}

 protected:
  absl::Status Select(const AttentionCall& call, size_t i) override {
    VSP_ASSIGN_OR_RETURN(const auto input, QueryInput(call, i));
    VSP_ASSIGN_OR_RETURN(auto* index, NewTiles(call, i, call.shape.num_q_heads, {}));
    return Checked(kernels().select_xattention(input, {whole("stride"), number("threshold")}, index,
                                               call.stream),
                   call, i);
  }
};

}  // namespace

MethodSpec XAttentionSpec() {
  MethodSpec spec;
  spec.name = "xattention";
  spec.help = "blocks by sums of their antidiagonals, per query head (XAttention)";
  spec.parameters = {
      {"stride",
       8,
       4,
       64,
       "4, 8, 16, 32 or 64, width of the summed tiles: less is more exact and slower",
       true,
       {4, 8, 16, 32, 64}},
      {"threshold", 0.9, 0, 1, "share of the estimated attention to cover in each row of blocks"},
  };
  AddDenseParameters(spec, 0);
  spec.runs_on = [](const kernels::KernelSet& k) { return k.select_xattention != nullptr; };
  spec.create = Create<XAttention>;
  return spec;
}

}  // namespace vsprefill::attention
