// vsprefill-eval: what a sparse method costs in fidelity, measured with the code that serves. Reads
// a plan and work items (bench/eval/fidelity.py writes both and reads the results), appends one
// JSON line per item, method and density. Runs on the CPU and on CUDA, without Python.
#include <algorithm>
#include <cstdio>
#include <map>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "bench/eval/answers.h"
#include "bench/eval/captured_text.h"
#include "bench/eval/density_search.h"
#include "bench/eval/lab.h"
#include "bench/eval/plan.h"
#include "bench/eval/results.h"
#include "bench/eval/scorer.h"
#include "bench/load_options.h"
#include "server/base/status_macros.h"

ABSL_FLAG(std::string, model, "models/SmolLM2-135M-Instruct", "Hugging Face model directory");
ABSL_FLAG(std::string, indexer, "", "indexer file; empty: the model directory's; none: without");
ABSL_FLAG(std::string, device, "cpu", "cpu or cuda");
ABSL_FLAG(std::string, dtype, "bfloat16", "bfloat16 or float32");
ABSL_FLAG(int, threads, 0, "CPU threads; 0: all cores");
ABSL_FLAG(std::string, plan, "", "plan (JSON)");
ABSL_FLAG(std::string, items, "", "work items (JSON lines)");
ABSL_FLAG(std::string, results, "", "results (JSON lines); what it holds already is not repeated");
ABSL_FLAG(
    std::string, shard, "0/1",
    "K/N: only the K-th of N parts; texts are dealt out one by one, tasks with their calibration");
ABSL_FLAG(double, max_seconds, 0, "begins no item after so many seconds; 0: no limit");

namespace vsprefill::eval {
namespace {

using nlohmann::json;

class Evaluation {
 public:
  Evaluation(Lab& lab, const Plan& plan, Results& results)
      : lab_(lab), plan_(plan), results_(results) {
    for (const MethodPlan& method : plan.methods) {
      std::string why_not;
      if (lab.Has(method, &why_not)) {
        methods_.push_back(&method);
      } else {
        std::fprintf(stderr, "left out: %s: %s\n", method.name.c_str(), why_not.c_str());
      }
    }
  }

  absl::Status Run(const Item& item) {
    switch (item.kind) {
      case ItemKind::kText:
        return RunText(item);
      case ItemKind::kCalibration:
        return RunCalibration(item);
      case ItemKind::kTask:
        return RunTask(item);
    }
    return absl::InternalError("unknown kind of item");
  }

 private:
  /// Methods and densities of the item that have no result yet.
  std::vector<Selection> Pending(const Item& item) const {
    std::vector<Selection> pending;
    for (const MethodPlan* method : methods_) {
      // What only dense activations allow has no place in a prompt that is served.
      if (method->true_sums && item.kind != ItemKind::kText) continue;
      for (const double density : item.densities.empty() ? plan_.densities : item.densities) {
        if (!results_.Has(item.id, method->name, density)) {
          pending.push_back({method, density});
        }
      }
    }
    return pending;
  }

  /// Sets setting and t of each selection so that it has its density on `text`.
  absl::Status Calibrate(CapturedText& text, std::vector<Selection>& selections) {
    std::map<std::pair<const MethodPlan*, size_t>, DensityCurve> curves;
    for (Selection& selection : selections) {
      for (size_t s = 0; s < selection.plan->settings.size(); ++s) {
        const std::pair<const MethodPlan*, size_t> key = {selection.plan, s};
        const auto measure = [this, &text, key](double t) -> absl::StatusOr<double> {
          const Selection at = {key.first, 0, key.second, t};
          VSP_ASSIGN_OR_RETURN(const Shares shares, text.Count(at));
          return shares.density;
        };
        DensityCurve& curve = curves.try_emplace(key, measure).first->second;
        VSP_ASSIGN_OR_RETURN(const double forced, curve.At(0));
        if (forced > plan_.max_forced * selection.wanted &&
            s + 1 < selection.plan->settings.size()) {
          continue;
        }
        double& guess = guesses_.try_emplace({key, selection.wanted}, 0.5).first->second;
        VSP_ASSIGN_OR_RETURN(selection.t, curve.Reach(selection.wanted, guess, plan_.tolerance,
                                                      plan_.max_measurements));
        selection.setting = s;
        guess = selection.t;
        break;
      }
    }
    return absl::OkStatus();
  }

  static json Line(const Item& item, const Selection& selection) {
    return {{"item", item.id},
            {"method", selection.plan->name},
            {"wanted", selection.wanted},
            {"setting", selection.setting},
            {"t", selection.t},
            {"parameters", selection.parameters()}};
  }

  static json Dense(const Item& item) {
    return {{"item", item.id}, {"method", "dense"}, {"wanted", 0.0}};
  }

  static json ToJson(const Fidelity& f) {
    return {{"mass_mean", f.mass_mean},
            {"mass_lowest_tenth", f.mass_lowest_tenth},
            {"mass_minimum", f.mass_minimum},
            {"row_lowest_tenth", f.row_lowest_tenth},
            {"row_minimum", f.row_minimum},
            {"error", f.error},
            {"density", f.shares.density},
            {"cost_ratio", f.shares.cost_ratio},
            {"density_by_layer", f.shares.density_by_layer},
            {"mass_by_layer", f.mass_by_layer},
            {"lowest_by_layer", f.lowest_by_layer},
            {"error_by_layer", f.error_by_layer}};
  }

  static json ToJson(const Score& score) {
    return {{"nll", score.nll},
            {"kl", score.kl},
            {"same_top", score.same_top},
            {"seconds", score.seconds},
            {"density", score.shares.density},
            {"cost_ratio", score.shares.cost_ratio}};
  }

  absl::Status RunText(const Item& item) {
    std::vector<Selection> pending = Pending(item);
    if (pending.empty()) return absl::OkStatus();
    VSP_ASSIGN_OR_RETURN(const std::unique_ptr<CapturedText> text,
                         CapturedText::Create(lab_, item.ids));
    VSP_RETURN_IF_ERROR(Calibrate(*text, pending));
    std::vector<Fidelity> fidelity;
    if (item.mass) {
      VSP_ASSIGN_OR_RETURN(fidelity, text->Measure(pending, plan_.rows));
    }
    std::unique_ptr<Scorer> scorer;
    if (item.logits) {
      VSP_ASSIGN_OR_RETURN(scorer,
                           Scorer::Create(lab_, item.ids, plan_.score_from, plan_.kl_stride));
    }
    if (!results_.Has(item.id, "dense", 0)) {
      json line = Dense(item);
      if (scorer != nullptr) line["logits"] = ToJson(scorer->dense());
      if (item.timed) {
        VSP_ASSIGN_OR_RETURN(const OpTimes times, text->TimeDense());
        line["op_seconds"] = times.op;
      }
      VSP_RETURN_IF_ERROR(results_.Append(line));
    }
    for (size_t i = 0; i < pending.size(); ++i) {
      json line = Line(item, pending[i]);
      if (item.mass) line["mass"] = ToJson(fidelity[i]);
      if (scorer != nullptr && !pending[i].plan->true_sums) {
        VSP_ASSIGN_OR_RETURN(const Score score, scorer->Run(pending[i]));
        line["logits"] = ToJson(score);
      }
      if (item.timed && !pending[i].plan->true_sums) {
        VSP_ASSIGN_OR_RETURN(const OpTimes times, text->Time(pending[i]));
        line["select_seconds"] = times.select;
        line["op_seconds"] = times.op;
      }
      VSP_RETURN_IF_ERROR(results_.Append(line));
    }
    return absl::OkStatus();
  }

  absl::Status RunCalibration(const Item& item) {
    std::vector<Selection> pending = Pending(item);
    if (pending.empty()) return absl::OkStatus();
    VSP_ASSIGN_OR_RETURN(const std::unique_ptr<CapturedText> text,
                         CapturedText::Create(lab_, item.ids));
    VSP_RETURN_IF_ERROR(Calibrate(*text, pending));
    for (const Selection& selection : pending) {
      json line = Line(item, selection);
      line["group"] = item.knobs;
      VSP_RETURN_IF_ERROR(results_.Append(line));
    }
    return absl::OkStatus();
  }

  absl::Status RunTask(const Item& item) {
    std::vector<Selection> pending = Pending(item);
    for (Selection& selection : pending) {
      VSP_RETURN_IF_ERROR(results_.knobs().Find(item.knobs, &selection));
    }
    const bool with_dense = !results_.Has(item.id, "dense", 0);
    if (with_dense) pending.insert(pending.begin(), Selection());
    if (pending.empty()) return absl::OkStatus();
    VSP_ASSIGN_OR_RETURN(const std::vector<Answer> answers,
                         AnswerPrompt(lab_, item, pending, plan_.decode_batch));
    for (size_t i = 0; i < pending.size(); ++i) {
      json line = pending[i].plan == nullptr ? Dense(item) : Line(item, pending[i]);
      line["answer"] = answers[i].tokens;
      line["seconds"] = answers[i].seconds;
      line["density"] = answers[i].shares.density;
      line["cost_ratio"] = answers[i].shares.cost_ratio;
      VSP_RETURN_IF_ERROR(results_.Append(line));
    }
    return absl::OkStatus();
  }

  Lab& lab_;
  const Plan& plan_;
  Results& results_;
  std::vector<const MethodPlan*> methods_;
  /// The t of the text before, by method, setting and density: where the search begins.
  std::map<std::pair<std::pair<const MethodPlan*, size_t>, double>, double> guesses_;
};

absl::Status Main() {
  for (const auto& [name, value] : {std::pair{"--plan", absl::GetFlag(FLAGS_plan)},
                                    std::pair{"--items", absl::GetFlag(FLAGS_items)},
                                    std::pair{"--results", absl::GetFlag(FLAGS_results)}}) {
    if (value.empty()) return absl::InvalidArgumentError(absl::StrCat(name, " is needed"));
  }
  size_t shard = 0, shards = 0;
  const std::string shard_text = absl::GetFlag(FLAGS_shard);
  if (std::sscanf(shard_text.c_str(), "%zu/%zu", &shard, &shards) != 2 || shard >= shards) {
    return absl::InvalidArgumentError(
        absl::StrCat("--shard \"", shard_text, "\" is not K/N with 0 <= K < N"));
  }
  VSP_ASSIGN_OR_RETURN(const Plan plan, ReadPlan(absl::GetFlag(FLAGS_plan)));
  VSP_ASSIGN_OR_RETURN(const std::vector<Item> items, ReadItems(absl::GetFlag(FLAGS_items)));
  int64_t longest = 0;
  for (const Item& item : items) {
    const int64_t answer = item.kind == ItemKind::kTask ? item.max_new_tokens : 0;
    longest = std::max(longest, static_cast<int64_t>(item.ids.size()) + answer);
  }
  VSP_ASSIGN_OR_RETURN(const model::LoadOptions options,
                       MakeLoadOptions(absl::GetFlag(FLAGS_model), absl::GetFlag(FLAGS_indexer),
                                       absl::GetFlag(FLAGS_device), absl::GetFlag(FLAGS_dtype),
                                       absl::GetFlag(FLAGS_threads)));
  VSP_ASSIGN_OR_RETURN(const std::unique_ptr<Lab> lab, Lab::Create(options, longest));
  VSP_ASSIGN_OR_RETURN(const std::unique_ptr<Results> results,
                       Results::Open(absl::GetFlag(FLAGS_results)));
  if (!results->Has("", "device", 0)) {
    VSP_RETURN_IF_ERROR(results->Append({{"item", ""},
                                         {"method", "device"},
                                         {"wanted", 0.0},
                                         {"device", lab->model().device_description()},
                                         {"dtype", kernels::Name(options.dtype)},
                                         {"weights_id", lab->model().weights_id()}}));
  }
  Evaluation evaluation(*lab, plan, *results);
  std::map<std::string, size_t> parts;  // text or group of knobs -> number
  const double begin = Seconds(), limit = absl::GetFlag(FLAGS_max_seconds);
  for (size_t i = 0; i < items.size(); ++i) {
    const std::string& dealt = items[i].knobs.empty() ? items[i].id : items[i].knobs;
    if (parts.try_emplace(dealt, parts.size()).first->second % shards != shard) continue;
    if (limit > 0 && Seconds() - begin > limit) {
      std::fprintf(stderr, "stopped after %.0f s at item %zu of %zu\n", limit, i, items.size());
      break;
    }
    if (absl::Status status = evaluation.Run(items[i]); !status.ok()) {
      return absl::Status(status.code(),
                          absl::StrCat("item ", items[i].id, ": ", status.message()));
    }
    std::fprintf(stderr, "%zu/%zu %s\n", i + 1, items.size(), items[i].id.c_str());
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace vsprefill::eval

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage(
      "Measures attention methods against dense attention: mass covered, output error, KL,\n"
      "perplexity, answers, time.\n"
      "vsprefill-eval --model DIR --plan plan.json --items items.jsonl --results results.jsonl");
  absl::ParseCommandLine(argc, argv);
  const absl::Status status = vsprefill::eval::Main();
  if (status.ok()) return 0;
  std::fprintf(stderr, "error: %s\n", std::string(status.message()).c_str());
  return 1;
}
