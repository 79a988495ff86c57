#include "server/config/server_config.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/strings/str_split.h"
#include "server/attention/attention_method.h"
#include "server/attention/presets.h"
#include "server/base/status_macros.h"

namespace vsprefill::config {
namespace {

struct Flag {
  std::string name;
  std::string value;  // how --help names it
  std::string help;   // lines are broken by hand
  std::function<absl::Status(absl::string_view text, ServerConfig* config)> set;
};

absl::Status NotAllowed(absl::string_view value, absl::string_view allowed) {
  return absl::InvalidArgumentError(
      absl::StrCat("\"", value, "\" is not allowed; allowed: ", allowed));
}

std::function<absl::Status(absl::string_view, ServerConfig*)> Text(
    std::string ServerConfig::*member) {
  return [member](absl::string_view text, ServerConfig* config) {
    if (text.empty()) return absl::InvalidArgumentError("the value is empty");
    config->*member = std::string(text);
    return absl::OkStatus();
  };
}

std::function<absl::Status(absl::string_view, ServerConfig*)> OneOf(
    std::string ServerConfig::*member, std::vector<std::string> words) {
  return [member, words](absl::string_view text, ServerConfig* config) {
    if (std::find(words.begin(), words.end(), text) == words.end()) {
      return NotAllowed(text, absl::StrJoin(words, ", "));
    }
    config->*member = std::string(text);
    return absl::OkStatus();
  };
}

template <typename Int>
std::function<absl::Status(absl::string_view, ServerConfig*)> Integer(Int ServerConfig::*member,
                                                                      int64_t min, int64_t max) {
  return [=](absl::string_view text, ServerConfig* config) {
    int64_t value;
    if (!absl::SimpleAtoi(text, &value) || value < min || value > max) {
      return NotAllowed(text, absl::StrCat("an integer in [", min, ", ", max, "]"));
    }
    config->*member = static_cast<Int>(value);
    return absl::OkStatus();
  };
}

std::function<absl::Status(absl::string_view, ServerConfig*)> Bytes(int64_t ServerConfig::*member,
                                                                    int64_t min) {
  return [=](absl::string_view text, ServerConfig* config) -> absl::Status {
    VSP_ASSIGN_OR_RETURN(const int64_t value, ParseBytes(text));
    if (value < min) return NotAllowed(text, absl::StrCat("at least ", min, " bytes"));
    config->*member = value;
    return absl::OkStatus();
  };
}

std::function<absl::Status(absl::string_view, ServerConfig*)> Time(
    absl::Duration ServerConfig::*member, absl::Duration min) {
  return [=](absl::string_view text, ServerConfig* config) {
    absl::Duration value;
    double seconds;
    if (absl::SimpleAtod(text, &seconds)) {
      value = absl::Seconds(seconds);
    } else if (!absl::ParseDuration(text, &value)) {
      value = -absl::InfiniteDuration();
    }
    if (!(value >= min && value <= absl::Hours(24))) {
      return NotAllowed(text, absl::StrCat("a time such as 30s or 500ms in [",
                                           absl::FormatDuration(min), ", 24h]"));
    }
    config->*member = value;
    return absl::OkStatus();
  };
}

absl::Status SetDtype(absl::string_view text, ServerConfig* config) {
  if (text == "bf16") {
    config->dtype = kernels::DType::kBF16;
  } else if (text == "fp32") {
    config->dtype = kernels::DType::kF32;
  } else {
    return NotAllowed(text, "bf16, fp32");
  }
  return absl::OkStatus();
}

absl::Status AddParameter(absl::string_view text, ServerConfig* config) {
  const std::pair<absl::string_view, absl::string_view> parts =
      absl::StrSplit(text, absl::MaxSplits('=', 1));
  double value;
  if (parts.first.empty() || !absl::SimpleAtod(parts.second, &value) || !std::isfinite(value)) {
    return NotAllowed(text, "NAME=NUMBER");
  }
  config->method_parameters[std::string(parts.first)] = value;
  return absl::OkStatus();
}

absl::Status AddPushTargets(absl::string_view text, ServerConfig* config) {
  for (absl::string_view entry : absl::StrSplit(text, ',')) {
    if (entry.empty()) return NotAllowed(text, "HOST:PORT or HOST, separated by commas");
    config->push_allow.emplace_back(entry);
  }
  return absl::OkStatus();
}

std::string MethodNames() {
  return absl::StrJoin(attention::MethodSpecs(), ", ",
                       [](std::string* out, const auto& spec) { out->append(spec.name); });
}

std::string PresetLines() {
  std::string lines;
  for (const attention::PresetEntry& preset : attention::kPresets) {
    absl::StrAppend(&lines, "  ", preset.name, ": ", attention::ExpectedLoss(preset), "\n");
  }
  return lines;
}

const std::vector<Flag>& Flags() {
  using C = ServerConfig;
  constexpr int64_t kMost = int64_t{1} << 40;
  static const auto* const flags = new std::vector<Flag>{
      {"model", "DIR",
       "Hugging Face model directory (config.json, safetensors): Llama, Qwen2 or Qwen3.\n"
       "Required.",
       Text(&C::model_dir)},
      {"model_name", "NAME", "model_name label of the metrics (default: name of the directory)",
       Text(&C::model_name)},
      {"listen", "ADDR", "gRPC address; port 0 picks one (default 127.0.0.1:8470)",
       Text(&C::listen)},
      {"metrics_listen", "ADDR",
       "HTTP address of /metrics, /livez and /readyz; port 0 picks one\n(default 127.0.0.1:8471)",
       Text(&C::metrics_listen)},
      {"device", "D", "auto, cpu or cuda; auto takes a usable GPU, else the CPU (default auto)",
       OneOf(&C::device, {"auto", "cpu", "cuda"})},
      {"dtype", "T", "bf16 or fp32: weights, activations and KV cache (default bf16)", SetDtype},
      {"method", "M",
       absl::StrCat(
           "attention method of requests that name none; docs/methods.md describes them:\n",
           MethodNames(), "\n(default: vsprefill where there is an indexer, else dense)"),
       Text(&C::method)},
      {"preset", "P",
       absl::StrCat("settings of requests that name neither method nor preset; takes method ",
                    attention::kPresetMethod,
                    ",\n--set and the request's own parameters go before:\n", PresetLines(),
                    "Measured on ", attention::kPresetsMeasuredOn),
       Text(&C::preset)},
      {"set", "NAME=NUMBER",
       "default of a parameter of that method; repeat for more (\"vsprefill info\" lists them)",
       AddParameter},
      {"indexer", "PATH",
       "VSIndexer file, or none (default: indexer.safetensors in the model directory,\n"
       "where it exists)",
       Text(&C::indexer)},
      {"seer_gate", "PATH",
       "SeerAttention's gate, or none (default: seer_gate.safetensors in the model directory,\n"
       "where it exists)",
       Text(&C::seer_gate)},
      {"kv_pool_bytes", "BYTES",
       "memory for the KV of all requests, reserved at admission: more lets more requests wait\n"
       "or be slow to read (default 4GiB)",
       Bytes(&C::kv_pool_bytes, 1)},
      {"staging_bytes", "BYTES",
       "bound of KV on its way to gRPC; pinned host memory on CUDA (default 256MiB)",
       Bytes(&C::staging_bytes, 8 << 20)},
      {"chunk_tokens", "N",
       "prompt tokens per forward pass: fewer send the first KV earlier, more compute faster\n"
       "(default 2048)",
       Integer(&C::chunk_tokens, 16, 1 << 20)},
      {"max_prompt_tokens", "N", "longest prompt (default: the model's positions)",
       Integer(&C::max_prompt_tokens, 1, kMost)},
      {"max_waiting_requests", "N", "requests in the queue; more are refused (default 64)",
       Integer(&C::max_waiting_requests, 1, 1 << 20)},
      {"max_waiting_tokens", "N", "prompt tokens in the queue; more are refused (default 1048576)",
       Integer(&C::max_waiting_tokens, 1, kMost)},
      {"recall_probe_every", "N",
       "after every N-th sparse request measure how much attention mass one layer read, for\n"
       "/metrics (docs/metrics.md says what it costs); 0: never (default 0)",
       Integer(&C::recall_probe_every, 0, kMost)},
      {"send_stall_timeout", "TIME",
       "a stream that takes nothing for so long, or is not attached, fails (default 30s)",
       Time(&C::send_stall_timeout, absl::Milliseconds(10))},
      {"drain_timeout", "TIME",
       "after SIGTERM running requests may finish for so long (default 60s)",
       Time(&C::drain_timeout, absl::ZeroDuration())},
      {"push_allow", "LIST",
       "push targets that requests may name: HOST:PORT or HOST, by commas or repeated\n"
       "(default: none)",
       AddPushTargets},
      {"cpu_threads", "N", "threads of CPU compute; 0: all cores (default 0)",
       Integer(&C::cpu_threads, 0, 1024)},
      {"cpu_isa", "I",
       "auto, avx2, avx512 or avx512_bf16: instruction set of the CPU kernels (default auto)",
       OneOf(&C::cpu_isa, {"auto", "avx2", "avx512", "avx512_bf16"})},
  };
  return *flags;
}

}  // namespace

absl::StatusOr<int64_t> ParseBytes(absl::string_view text) {
  absl::string_view number = text;
  int64_t unit = 1;
  for (const auto& [suffix, factor] : {std::pair<absl::string_view, int64_t>{"KiB", 1 << 10},
                                       {"MiB", 1 << 20},
                                       {"GiB", 1 << 30}}) {
    if (absl::EndsWith(text, suffix)) {
      number = text.substr(0, text.size() - suffix.size());
      unit = factor;
    }
  }
  int64_t value;
  if (!absl::SimpleAtoi(number, &value) || value < 0 ||
      value > std::numeric_limits<int64_t>::max() / unit) {
    return NotAllowed(text, "bytes as an integer, or with KiB, MiB or GiB");
  }
  return value * unit;
}

absl::StatusOr<ServerConfig> ParseServerConfig(const std::vector<std::string>& arguments) {
  ServerConfig config;
  for (size_t i = 0; i < arguments.size(); ++i) {
    absl::string_view argument = arguments[i];
    if (argument == "--help" || argument == "-h") {
      config.help = true;
      return config;
    }
    if (!absl::ConsumePrefix(&argument, "--")) {
      return absl::InvalidArgumentError(
          absl::StrCat("unexpected argument \"", argument, "\"; see --help"));
    }
    const size_t equals = argument.find('=');
    const absl::string_view name = argument.substr(0, equals);
    const auto flag =
        std::find_if(Flags().begin(), Flags().end(), [&](const Flag& f) { return f.name == name; });
    if (flag == Flags().end()) {
      return absl::InvalidArgumentError(absl::StrCat("unknown flag --", name, "; see --help"));
    }
    absl::string_view value;
    if (equals != absl::string_view::npos) {
      value = argument.substr(equals + 1);
    } else if (i + 1 < arguments.size()) {
      value = arguments[++i];
    } else {
      return absl::InvalidArgumentError(absl::StrCat("--", name, " needs a value: ", flag->value));
    }
    if (absl::Status status = flag->set(value, &config); !status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("--", name, ": ", status.message()));
    }
  }
  if (config.model_dir.empty()) {
    return absl::InvalidArgumentError("--model DIR is required; see --help");
  }
  if (!config.preset.empty()) {
    const absl::Status status =
        attention::ResolvePreset(config.preset, &config.method, &config.method_parameters);
    if (!status.ok()) {
      return absl::InvalidArgumentError(absl::StrCat("--preset: ", status.message()));
    }
  }
  if (config.model_name.empty()) {
    absl::string_view directory = config.model_dir;
    while (directory.size() > 1 && absl::ConsumeSuffix(&directory, "/")) {
    }
    config.model_name = std::string(directory.substr(directory.rfind('/') + 1));
  }
  return config;
}

std::string ServerUsage() {
  std::string usage =
      R"(Usage: vsprefill-server --model DIR [flags]

Computes the KV cache of prompts with VSPrefill vertical-slash sparse attention (or densely) and
streams it layer by layer to decode workers over gRPC. Prints "listening on ADDR" and
"metrics on ADDR" when it is ready. SIGTERM or SIGINT: takes no new requests, lets running ones
finish, exits with 0. Exit code 2: a flag, the model or an address is wrong.

Example:
  vsprefill-server --model models/SmolLM2-135M-Instruct --listen 127.0.0.1:0

)";
  constexpr size_t kColumn = 30;
  for (const Flag& flag : Flags()) {
    std::string line = absl::StrCat("  --", flag.name, " ", flag.value);
    for (absl::string_view part : absl::StrSplit(flag.help, '\n')) {
      line.resize(std::max(line.size() + 1, kColumn), ' ');
      absl::StrAppend(&usage, line, part, "\n");
      line.clear();
      line.resize(kColumn - 1, ' ');
    }
  }
  absl::StrAppend(&usage, "  --help\n");
  return usage;
}

}  // namespace vsprefill::config
