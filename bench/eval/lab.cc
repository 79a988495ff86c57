#include "bench/eval/lab.h"

#include <algorithm>
#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"
#include "server/base/mapped_file.h"
#include "server/base/status_macros.h"
#include "server/model/rope.h"
#include "training/teacher.h"

namespace vsprefill::eval {
namespace {

using attention::AttentionMethod;
using kernels::PairCounts;

kernels::KernelStatus NoAttention(const kernels::AttentionShape&, const kernels::AttentionSequence*,
                                  int, kernels::Stream) {
  return kernels::KernelStatus::kOk;
}

}  // namespace

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

Lab::Lab() = default;
Lab::~Lab() = default;

absl::StatusOr<std::unique_ptr<Lab>> Lab::Create(const model::LoadOptions& options,
                                                 int64_t max_tokens) {
  std::unique_ptr<Lab> lab(new Lab());
  lab->max_tokens_ = max_tokens;
  VSP_ASSIGN_OR_RETURN(lab->teacher_, training::Teacher::Create(options, max_tokens));
  lab->model_ = &lab->teacher_->model();
  model::Transformer& model = lab->model();
  if (model.has_indexer()) {
    const std::string path = options.indexer_path.empty()
                                 ? absl::StrCat(options.model_dir, "/indexer.safetensors")
                                 : options.indexer_path;
    const model::ModelConfig& config = model.config();
    VSP_ASSIGN_OR_RETURN(const model::IndexerWeights weights,
                         model::ReadIndexer(path, {model.weights_id(), config.num_layers,
                                                   config.num_kv_heads, config.head_dim}));
    VSP_ASSIGN_OR_RETURN(lab->indexer_, model::VsIndexer::Create(weights, options.device));
  }
  model::RopeTable rope(model.config().rope, model.config().head_dim);
  rope.Grow(max_tokens);
  const int64_t bytes = max_tokens * model.config().head_dim / 2 * int64_t{sizeof(float)};
  for (auto [buffer, table] :
       {std::pair{&lab->rope_cos_, rope.cos()}, {&lab->rope_sin_, rope.sin()}}) {
    VSP_ASSIGN_OR_RETURN(*buffer, Buffer::Create(model.allocator(), bytes));
    VSP_RETURN_IF_ERROR(model.CopyToDevice(table, bytes, buffer->data()));
  }
  lab->select_only_kernels_ = model.kernels();
  lab->select_only_kernels_.attention = NoAttention;
  lab->select_only_ = model.method_context();
  lab->select_only_.kernels = &lab->select_only_kernels_;
  lab->select_only_.library_attention = nullptr;
  lab->pool_ = std::make_unique<kv::KvPool>(INT64_MAX);
  return lab;
}

bool Lab::Has(const MethodPlan& plan, std::string* why_not) {
  for (const attention::MethodSpec& spec : attention::MethodSpecs()) {
    if (spec.name != plan.method) continue;
    if (!attention::RunsOn(spec, model().kernels())) {
      *why_not = "it has no kernels for this device";
    } else if (spec.needs_indexer && indexer_ == nullptr) {
      *why_not = "the model has no indexer";
    } else if (spec.needs_seer_gate && model().method_context().seer_gate.empty()) {
      *why_not = "the model has no gate";
    }
    return why_not->empty();
  }
  *why_not = "this binary does not know it";
  return false;
}

absl::StatusOr<std::unique_ptr<AttentionMethod>> Lab::Make(const Selection& selection,
                                                           bool select_only) {
  return attention::CreateMethod(select_only ? select_only_ : model().method_context(),
                                 selection.plan->method, selection.parameters());
}

absl::StatusOr<std::unique_ptr<AttentionMethod>> Lab::MakeDense() {
  return attention::CreateMethod(model().method_context(), "dense", {});
}

absl::StatusOr<std::shared_ptr<kv::KvCache>> Lab::MakeCache(int64_t tokens) {
  const bool with_logits = indexer_ != nullptr;
  VSP_ASSIGN_OR_RETURN(
      kv::KvPool::Reservation reservation,
      pool_->Reserve(kv::KvCache::BytesFor(model().kv_layout(), tokens, with_logits)));
  return kv::KvCache::Create(model().allocator(), std::move(reservation), model().kv_layout(),
                             tokens, with_logits);
}

absl::StatusOr<Buffer> Lab::MakeCounts() {
  const std::vector<PairCounts> zero(model().config().num_layers);
  const int64_t bytes = static_cast<int64_t>(zero.size() * sizeof(PairCounts));
  VSP_ASSIGN_OR_RETURN(Buffer counts, Buffer::Create(model().allocator(), bytes));
  VSP_RETURN_IF_ERROR(model().CopyToDevice(zero.data(), bytes, counts.data()));
  return counts;
}

absl::StatusOr<Shares> Lab::ReadCounts(const Buffer& counts) {
  std::vector<PairCounts> layers(model().config().num_layers);
  VSP_RETURN_IF_ERROR(model().CopyToHost(
      counts.data(), static_cast<int64_t>(layers.size() * sizeof(PairCounts)), layers.data()));
  Shares shares;
  PairCounts sum;
  for (const PairCounts& layer : layers) {
    sum.unmasked += layer.unmasked;
    sum.multiplied += layer.multiplied;
    sum.dense += layer.dense;
    shares.density_by_layer.push_back(static_cast<double>(layer.unmasked) /
                                      static_cast<double>(std::max<int64_t>(1, layer.dense)));
  }
  if (sum.dense == 0) return absl::InternalError("no attention was counted");
  shares.density = static_cast<double>(sum.unmasked) / static_cast<double>(sum.dense);
  shares.cost_ratio = static_cast<double>(sum.multiplied) / static_cast<double>(sum.dense);
  return shares;
}

}  // namespace vsprefill::eval
