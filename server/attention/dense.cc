// Dense causal attention: the library's where the model brings one, else our kernel.
#include <utility>

#include "server/attention/execute.h"
#include "server/attention/methods.h"

namespace vsprefill::attention {
namespace {

class Dense : public AttentionMethod {
 public:
  Dense(const MethodContext& context, std::map<std::string, double> parameters)
      : context_(context), parameters_(std::move(parameters)) {}

  absl::string_view name() const override { return "dense"; }
  const std::map<std::string, double>& parameters() const override { return parameters_; }
  absl::Status Attend(const AttentionCall& call) override {
    for (SequenceCall& sequence : call.sequences) {
      sequence.attention.index = nullptr;
      sequence.attention.tiles = nullptr;
    }
    return Execute(context_, call);
  }

 private:
  const MethodContext& context_;
  const std::map<std::string, double> parameters_;
};

}  // namespace

MethodSpec DenseSpec() {
  MethodSpec spec;
  spec.name = "dense";
  spec.help = "every token attends to all tokens before it";
  spec.needs_indexer = false;
  spec.create = [](const MethodContext& context, const std::map<std::string, double>& parameters) {
    return std::make_unique<Dense>(context, parameters);
  };
  return spec;
}

}  // namespace vsprefill::attention
