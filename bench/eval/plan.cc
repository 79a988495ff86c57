#include "bench/eval/plan.h"

#include <cmath>
#include <nlohmann/json.hpp>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "server/base/json.h"
#include "server/base/mapped_file.h"
#include "server/base/status_macros.h"

namespace vsprefill::eval {
namespace {

constexpr int64_t kMaxFileBytes = int64_t{1} << 30;

/// nlohmann's typed access throws; everything of one file is read inside this.
template <class Read>
absl::Status Guarded(const std::string& where, const Read& read) {
  try {
    return read();
  } catch (const nlohmann::json::exception& error) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": ", error.what()));
  }
}

absl::StatusOr<Setting> ReadSetting(const nlohmann::json& json, const std::string& where) {
  Setting setting;
  setting.parameters = json.value("parameters", std::map<std::string, double>());
  const nlohmann::json& knob = json.at("knob");
  setting.knob = knob.at("sets").get<std::map<std::string, double>>();
  setting.range.sparse = knob.at("sparse").get<double>();
  setting.range.dense = knob.at("dense").get<double>();
  setting.range.logarithmic = knob.value("logarithmic", false);
  setting.whole = knob.value("whole", false);
  if (setting.knob.empty() || setting.range.sparse == setting.range.dense ||
      (setting.range.logarithmic && !(setting.range.sparse > 0 && setting.range.dense > 0))) {
    return absl::InvalidArgumentError(absl::StrCat(
        where,
        ": a knob sets at least one parameter and has two different ends, above 0 where "
        "logarithmic; got ",
        ShortJson(knob)));
  }
  return setting;
}

absl::Status ReadMethods(const nlohmann::json& json, const std::string& path, Plan* plan) {
  for (const nlohmann::json& entry : json) {
    MethodPlan method;
    method.name = entry.at("name").get<std::string>();
    method.method = entry.value("method", method.name);
    method.true_sums = entry.value("true_sums", false);
    for (const nlohmann::json& setting : entry.at("settings")) {
      VSP_ASSIGN_OR_RETURN(Setting parsed,
                           ReadSetting(setting, absl::StrCat(path, ", method ", method.name)));
      method.settings.push_back(std::move(parsed));
    }
    if (method.settings.empty()) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": method ", method.name, " has no setting"));
    }
    plan->methods.push_back(std::move(method));
  }
  return absl::OkStatus();
}

absl::Status CheckDensities(const std::vector<double>& densities, const std::string& where) {
  for (const double density : densities) {
    if (!(density > 0 && density <= 1)) {
      return absl::InvalidArgumentError(
          absl::StrCat(where, ": density ", density, " is not in (0, 1]"));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<Item> ReadItem(const nlohmann::json& json, const std::string& where) {
  Item item;
  item.id = json.at("id").get<std::string>();
  const std::string kind = json.at("kind").get<std::string>();
  if (kind == "text") {
    item.kind = ItemKind::kText;
  } else if (kind == "calibration") {
    item.kind = ItemKind::kCalibration;
  } else if (kind == "task") {
    item.kind = ItemKind::kTask;
  } else {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": kind \"", kind, "\" is not text, calibration or task"));
  }
  item.ids = json.at("ids").get<std::vector<int32_t>>();
  item.densities = json.value("densities", std::vector<double>());
  item.knobs = json.value("knobs", std::string());
  item.max_new_tokens = json.value("max_new_tokens", item.max_new_tokens);
  item.stop_ids = json.value("stop_ids", std::vector<int32_t>());
  item.timed = json.value("timed", false);
  item.mass = json.value("mass", true);
  item.logits = json.value("logits", true);
  VSP_RETURN_IF_ERROR(CheckDensities(item.densities, where));
  if (item.ids.size() < 2) {
    return absl::InvalidArgumentError(
        absl::StrCat(where, ": ", item.ids.size(), " token ids, at least 2 are needed"));
  }
  if (item.kind != ItemKind::kText && item.knobs.empty()) {
    return absl::InvalidArgumentError(absl::StrCat(where, ": no \"knobs\" (name of a group)"));
  }
  return item;
}

}  // namespace

std::map<std::string, double> Setting::At(double t) const {
  std::map<std::string, double> all = parameters;
  for (const auto& [name, factor] : knob) {
    const double value = factor * range.At(t);
    all[name] = whole ? std::round(value) : value;
  }
  return all;
}

absl::StatusOr<Plan> ReadPlan(const std::string& path) {
  VSP_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path));
  VSP_ASSIGN_OR_RETURN(const nlohmann::json json, ParseJson(text, path));
  Plan plan;
  VSP_RETURN_IF_ERROR(Guarded(path, [&]() -> absl::Status {
    plan.densities = json.at("densities").get<std::vector<double>>();
    plan.max_forced = json.value("max_forced", plan.max_forced);
    plan.tolerance = json.value("tolerance", plan.tolerance);
    plan.max_measurements = json.value("max_measurements", plan.max_measurements);
    plan.rows = json.value("rows", plan.rows);
    plan.kl_stride = json.value("kl_stride", plan.kl_stride);
    plan.score_from = json.value("score_from", plan.score_from);
    plan.decode_batch = json.value("decode_batch", plan.decode_batch);
    return ReadMethods(json.at("methods"), path, &plan);
  }));
  VSP_RETURN_IF_ERROR(CheckDensities(plan.densities, path));
  if (plan.rows < 1 || plan.kl_stride < 1 || plan.decode_batch < 1 ||
      !(plan.score_from >= 0 && plan.score_from < 1)) {
    return absl::InvalidArgumentError(absl::StrCat(
        path,
        ": rows, kl_stride and decode_batch must be at least 1 and score_from in [0, 1); got ",
        plan.rows, ", ", plan.kl_stride, ", ", plan.decode_batch, ", ", plan.score_from));
  }
  return plan;
}

absl::StatusOr<std::vector<Item>> ReadItems(const std::string& path) {
  VSP_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path, kMaxFileBytes));
  std::vector<Item> items;
  int line_number = 0;
  for (const absl::string_view line : absl::StrSplit(text, '\n')) {
    ++line_number;
    if (line.empty()) continue;
    const std::string where = absl::StrCat(path, ":", line_number);
    VSP_ASSIGN_OR_RETURN(const nlohmann::json json, ParseJson(line, where));
    VSP_RETURN_IF_ERROR(Guarded(where, [&]() -> absl::Status {
      VSP_ASSIGN_OR_RETURN(Item item, ReadItem(json, where));
      items.push_back(std::move(item));
      return absl::OkStatus();
    }));
  }
  return items;
}

}  // namespace vsprefill::eval
