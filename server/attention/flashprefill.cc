// FlashPrefill: blocks of keys whose mean scores near the best one's. v1 selects per query head,
// V2 per KV group, and reads the blocks it leaves out through their means.
#include "server/attention/methods.h"
#include "server/attention/sparse_method.h"
#include "server/base/status_macros.h"

namespace vsprefill::attention {
namespace {

int32_t Blocks(int32_t tokens) {
  return static_cast<int32_t>(kernels::KeyBlocks(tokens));  // rounded up
}

class FlashPrefill : public SparseMethod {
 public:
  FlashPrefill(absl::string_view name, bool per_head, const MethodContext& context,
               const std::map<std::string, double>& parameters)
      : SparseMethod(name, context, parameters), per_head_(per_head) {
    params_.alpha = number("alpha");
    params_.whole_blocks = per_head;
    params_.sink_blocks = Blocks(whole("sink_tokens"));
    params_.window_blocks = Blocks(whole("window_tokens"));
    params_.last_tiles = whole("last_tiles");
    if (per_head) params_.min_blocks = Blocks(whole("min_tokens"));
    mean_correction_ = !per_head && whole("mean_correction") != 0;
  }

 protected:
  absl::Status Select(const AttentionCall& call, size_t i) override {
    const int groups = per_head_ ? call.shape.num_q_heads : call.shape.num_kv_heads;
    VSP_ASSIGN_OR_RETURN(auto* index, NewTiles(call, i, groups, {.means = true}));
    VSP_ASSIGN_OR_RETURN(const auto input, QueryInput(call, i));
    // The index's memory is this method's.
    VSP_RETURN_IF_ERROR(Checked(
        kernels().pool_blocks(input, const_cast<void*>(index->k_means),
                              mean_correction_ ? const_cast<void*>(index->v_means) : nullptr,
                              index->means_stride, call.stream),
        call, i));
    VSP_RETURN_IF_ERROR(
        Checked(kernels().select_flash(input, params_, index, call.stream), call, i));
    if (!mean_correction_) index->k_means = index->v_means = nullptr;
    return absl::OkStatus();
  }

 private:
  const bool per_head_;
  bool mean_correction_ = false;
  kernels::FlashParams params_;
};

class FlashPrefillV1 : public FlashPrefill {
 public:
  FlashPrefillV1(const MethodContext& context, const std::map<std::string, double>& parameters)
      : FlashPrefill("flashprefill", true, context, parameters) {}
};
class FlashPrefillV2 : public FlashPrefill {
 public:
  FlashPrefillV2(const MethodContext& context, const std::map<std::string, double>& parameters)
      : FlashPrefill("flashprefill_v2", false, context, parameters) {}
};

MethodSpec CommonSpec(double alpha, double last_tiles) {
  MethodSpec spec;
  spec.parameters = {
      {"alpha", alpha, 0, 1, "least score of a block relative to the best; 0 reads everything"},
      {"sink_tokens", 256, 0, kMaxTokens, "first tokens that every row reads, in blocks of 128",
       true},
      {"window_tokens", 512, 1, kMaxTokens, "nearest tokens that every row reads, in blocks of 128",
       true},
      {"last_tiles", last_tiles, 0, kMaxTokens, "last row tiles of the prompt that read everything",
       true},
  };
  spec.runs_on = [](const kernels::KernelSet& k) {
    return k.pool_blocks != nullptr && k.select_flash != nullptr;
  };
  return spec;
}

}  // namespace

MethodSpec FlashPrefillSpec() {
  MethodSpec spec = CommonSpec(0.18, 2);
  spec.name = "flashprefill";
  spec.help = "blocks of 128 keys by the score of their mean, per query head (FlashPrefill v1)";
  spec.parameters.push_back(
      {"min_tokens", 0, 0, kMaxTokens, "least tokens kept by score, in blocks of 128", true});
  AddDenseParameters(spec, 0);
  spec.create = Create<FlashPrefillV1>;
  return spec;
}

MethodSpec FlashPrefillV2Spec() {
  MethodSpec spec = CommonSpec(0.1, 8);
  spec.name = "flashprefill_v2";
  spec.help =
      "blocks of 128 keys by the score of their mean, per KV group, the others through their means "
      "(FlashPrefill V2)";
  spec.parameters.push_back({"mean_correction", 1, 0, 1,
                             "1: blocks left out are read through their means; 0: not at all",
                             true});
  AddDenseParameters(spec, 4097);
  spec.create = Create<FlashPrefillV2>;
  return spec;
}

}  // namespace vsprefill::attention
