// The list of attention methods and the checks on a request's parameters.
#include <algorithm>
#include <cmath>

#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "server/attention/methods.h"

namespace vsprefill::attention {
namespace {

struct NameOf {
  template <typename T>
  void operator()(std::string* out, const T& spec) const {
    out->append(spec.name);
  }
};

template <typename T>
const T* Find(const std::vector<T>& specs, absl::string_view name) {
  for (const T& spec : specs) {
    if (spec.name == name) return &spec;
  }
  return nullptr;
}

}  // namespace

const std::vector<MethodSpec>& MethodSpecs() {
  static const auto* specs = new std::vector<MethodSpec>{
#define VSP_METHOD(function) function(),
#include "server/attention/methods.inc"
#undef VSP_METHOD
  };
  return *specs;
}

bool RunsOn(const MethodSpec& spec, const kernels::KernelSet& kernels) {
  return spec.runs_on == nullptr || spec.runs_on(kernels);
}

absl::StatusOr<std::unique_ptr<AttentionMethod>> CreateMethod(
    const MethodContext& context, absl::string_view name,
    const std::map<std::string, double>& overrides) {
  const MethodSpec* spec = Find(MethodSpecs(), name);
  if (spec == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrFormat("unknown attention method \"%s\"; known: %s", name,
                        absl::StrJoin(MethodSpecs(), ", ", NameOf())));
  }
  if (!RunsOn(*spec, *context.kernels)) {
    const bool cuda = context.allocator->device() == kernels::DeviceKind::kCuda;
    return absl::UnimplementedError(absl::StrFormat("method \"%s\" does not run on %s, only on %s",
                                                    name, cuda ? "CUDA devices" : "the CPU",
                                                    cuda ? "the CPU" : "CUDA devices"));
  }
  std::map<std::string, double> parameters;
  for (const ParameterSpec& parameter : spec->parameters) {
    parameters[parameter.name] = parameter.default_value;
  }
  for (const auto& [key, value] : overrides) {
    const ParameterSpec* parameter = Find(spec->parameters, key);
    if (parameter == nullptr) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "method \"%s\" has no parameter \"%s\"; known: %s", name, key,
          spec->parameters.empty() ? "none" : absl::StrJoin(spec->parameters, ", ", NameOf())));
    }
    const auto& allowed = parameter->allowed;
    if (!allowed.empty() && std::find(allowed.begin(), allowed.end(), value) == allowed.end()) {
      return absl::InvalidArgumentError(
          absl::StrFormat("%s = %g: must be one of %s", key, value, absl::StrJoin(allowed, ", ")));
    }
    // Written so that NaN fails.
    const bool in_range = value >= parameter->min && value <= parameter->max;
    if (!in_range || (parameter->whole && value != std::floor(value))) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "%s = %g: must be %s in [%g, %g]", key, value,
          parameter->whole ? "a whole number" : "a number", parameter->min, parameter->max));
    }
    parameters[key] = value;
  }
  return spec->create(context, parameters);
}

}  // namespace vsprefill::attention
