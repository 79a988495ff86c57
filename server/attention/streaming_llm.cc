// StreamingLLM: the first tokens and a sliding window, whatever the tokens are.
#include "server/attention/methods.h"
#include "server/attention/sparse_method.h"
#include "server/base/status_macros.h"

namespace vsprefill::attention {
namespace {

class StreamingLlm : public SparseMethod {
 public:
  StreamingLlm(const MethodContext& context, const std::map<std::string, double>& parameters)
      : SparseMethod("streaming_llm", context, parameters) {}

 protected:
  absl::Status Select(const AttentionCall& call, size_t i) override {
    VSP_ASSIGN_OR_RETURN(const auto input, QueryInput(call, i));
    VSP_ASSIGN_OR_RETURN(auto* index, NewVerticalSlash(call, i, call.shape.num_kv_heads));
    return Checked(kernels().select_window(input, {whole("sink_tokens"), whole("window_tokens")},
                                           index, call.stream),
                   call, i);
  }
};

}  // namespace

MethodSpec StreamingLlmSpec() {
  MethodSpec spec;
  spec.name = "streaming_llm";
  spec.help = "the first tokens and a sliding window (StreamingLLM)";
  spec.parameters = {
      {"sink_tokens", 1024, 0, kMaxTokens, "first tokens that every row reads", true},
      {"window_tokens", 8192, 1, kMaxTokens, "nearest tokens that every row reads", true},
  };
  AddDenseParameters(spec, 0);
  spec.runs_on = [](const kernels::KernelSet& k) { return k.select_window != nullptr; };
  spec.create = Create<StreamingLlm>;
  return spec;
}

}  // namespace vsprefill::attention
