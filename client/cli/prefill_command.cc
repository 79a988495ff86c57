#include <memory>
#include <optional>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "client/cc/host_kv.h"
#include "client/cc/prefill_client.h"
#include "client/cli/args.h"
#include "client/cli/commands.h"
#include "client/cli/exit_code.h"
#include "client/cli/ids_file.h"
#include "client/cli/kv_dump.h"
#include "client/cli/report.h"
#include "server/attention/preset_table.h"

namespace vsprefill::cli {
namespace {

constexpr char kUsage[] =
    R"(Usage: vsprefill prefill --server ADDR --ids FILE [flags]

Sends a prompt to a prefill server, receives its KV cache, verifies every checksum and the manifest,
and prints the first token and where the time went. With --push the cache goes to the decode workers
named, and only the first token and the figures come here.

)";

constexpr char kExamples[] = R"(
Examples:
  vsprefill prefill --server 127.0.0.1:8470 --ids prompt.json
  vsprefill prefill --server 127.0.0.1:8470 --ids prompt.json --method dense --dump kv.safetensors
  vsprefill prefill --server 127.0.0.1:8470 --ids prompt.json --set threshold=3 --stripes 4 --json
  vsprefill prefill --server 127.0.0.1:8470 --ids prompt.json --push 127.0.0.1:9000

Methods, presets and the names for --set: vsprefill info --server ADDR.
Exit codes: 0 done, 1 failed, 2 usage or ids file, 3 refused, 4 try again, 5 deadline or cancelled,
6 the cache did not come through intact.
)";

std::string PresetHelp() {
  std::string help = absl::StrCat("measured settings of method ", attention::kPresetMethod, ":");
  for (const attention::PresetEntry& preset : attention::kPresets) {
    absl::StrAppend(&help, " ", preset.name, " (", attention::ExpectedLoss(preset), "),");
  }
  return absl::StrCat(help, " on ", attention::kPresetsMeasuredOn);
}

const std::vector<FlagSpec>& Flags() {
  static const auto* const flags = new std::vector<FlagSpec>{
      {.name = "server", .value = "ADDR", .help = "the server, host:port", .required = true},
      {.name = "ids",
       .value = "FILE",
       .help = "the prompt: a JSON array of token ids; - reads standard input",
       .required = true},
      {.name = "method",
       .value = "NAME",
       .help = "attention method; without it the server's default"},
      {.name = "preset", .value = "NAME", .help = PresetHelp()},
      {.name = "set",
       .value = "NAME=VALUE",
       .help = "a parameter of the method; the others keep the preset's or the server's default",
       .repeated = true},
      {.name = "stripes",
       .value = "N",
       .help = "connections that carry the cache, layers dealt out in turn",
       .default_value = "1"},
      {.name = "push",
       .value = "ADDR",
       .help = "a decode worker that shall get the cache; the server must allow it",
       .repeated = true},
      {.name = "start_token",
       .value = "T",
       .help = "do not send the KV of the tokens before T",
       .default_value = "0"},
      {.name = "deadline", .value = "SECONDS", .help = "give up after so long; without it never"},
      {.name = "request_id",
       .value = "ID",
       .help = "name of the request in logs and metrics; without it a random one"},
      {.name = "attempt",
       .value = "N",
       .help = "counts tries of one request id; a higher one cancels a lower one",
       .default_value = "0"},
      {.name = "dump",
       .value = "FILE",
       .help = "write the cache as safetensors: layers.{i}.k and layers.{i}.v, [kv_heads, "
               "tokens, head_dim]"},
      {.name = "json", .value = "", .help = "print one JSON object"},
  };
  return *flags;
}

struct Options {
  std::string server;
  std::vector<int32_t> ids;
  std::string dump;
  bool json = false;
  client::PrefillRequest request;
};

absl::StatusOr<Options> ParseOptions(const std::vector<std::string>& args) {
  absl::StatusOr<Args> parsed = Args::Parse(args, Flags());
  if (!parsed.ok()) return parsed.status();
  Options o;
  o.server = parsed->Get("server");
  o.dump = parsed->Get("dump");
  o.json = parsed->Has("json");
  client::PrefillRequest& r = o.request;
  r.method = parsed->Get("method");
  r.preset = parsed->Get("preset");
  r.push_targets = parsed->GetAll("push");
  r.request_id = parsed->Has("request_id") ? parsed->Get("request_id") : client::RandomRequestId();
  absl::StatusOr<std::map<std::string, double>> set = parsed->GetNumbers("set");
  absl::StatusOr<int64_t> stripes = parsed->GetInt("stripes", 1, 1, 64);
  absl::StatusOr<int64_t> start = parsed->GetInt("start_token", 0, 0, int64_t{1} << 31);
  absl::StatusOr<int64_t> attempt = parsed->GetInt("attempt", 0, 0, UINT32_MAX);
  absl::StatusOr<absl::Duration> deadline =
      parsed->GetSeconds("deadline", absl::InfiniteDuration());
  for (const absl::Status& s :
       {set.status(), stripes.status(), start.status(), attempt.status(), deadline.status()}) {
    if (!s.ok()) return s;
  }
  r.parameters = *std::move(set);
  r.stripes = static_cast<int>(*stripes);
  r.start_token = *start;
  r.attempt = static_cast<uint32_t>(*attempt);
  r.timeout = *deadline;
  if (!r.push_targets.empty() && (!o.dump.empty() || r.stripes > 1)) {
    return absl::InvalidArgumentError("--push excludes --dump and --stripes: no KV comes here");
  }
  absl::StatusOr<std::vector<int32_t>> ids = ReadIdsFile(parsed->Get("ids"));
  if (!ids.ok()) return ids.status();
  o.ids = *std::move(ids);
  return o;
}

/// One line on the terminal that is written over as layers come in.
class ProgressLine {
 public:
  explicit ProgressLine(const Console& console) : console_(console) {}
  ~ProgressLine() { Clear(); }
  void Show(int layers, int num_layers, int64_t bytes) {
    if (!console_.progress || layers == shown_) return;
    shown_ = layers;
    console_.err << absl::StrFormat("\r%d of %d layers, %s\x1b[K", layers, num_layers,
                                    BytesText(bytes))
                 << std::flush;
  }
  void Clear() {
    if (shown_ >= 0) console_.err << "\r\x1b[K" << std::flush;
    shown_ = -1;
  }

 private:
  const Console& console_;
  int shown_ = -1;
};

}  // namespace

int RunPrefill(const std::vector<std::string>& args, const Console& console) {
  if (WantsHelp(args)) {
    console.out << kUsage << FlagHelp(Flags()) << kExamples;
    return kExitOk;
  }
  absl::StatusOr<Options> options = ParseOptions(args);
  if (!options.ok()) {
    console.err << "vsprefill prefill: " << options.status().message()
                << " (vsprefill prefill --help)\n";
    return kExitUsage;
  }
  client::PrefillRequest& request = options->request;
  request.token_ids = options->ids;

  ProgressLine progress(console);
  std::shared_ptr<client::HostKv> kv;
  client::PrefillHandlers handlers;
  handlers.destination =
      [&](const client::Accepted& accepted) -> absl::StatusOr<client::KvDestination> {
    absl::StatusOr<std::shared_ptr<client::HostKv>> memory = client::HostKv::Create(accepted.shape);
    if (!memory.ok()) return memory.status();
    kv = *std::move(memory);
    return kv->destination();
  };
  handlers.on_progress = [&](int layers, int64_t bytes) {
    progress.Show(layers, kv->shape().layout.num_layers, bytes);
  };
  std::vector<client::TargetStatus> targets;
  handlers.on_targets = [&](const std::vector<client::TargetStatus>& t) { targets = t; };

  client::PrefillClient client(options->server);
  absl::StatusOr<client::PrefillResult> result = client.Prefill(request, handlers);
  progress.Clear();
  if (!result.ok()) {
    for (const client::TargetStatus& t : targets) {
      console.err << "vsprefill: target " << TargetText(t) << "\n";
    }
    console.err << "vsprefill: " << StatusLine(result.status()) << "\n";
    return ExitCodeFor(result.status());
  }
  if (!options->dump.empty()) {
    const absl::Status s =
        WriteKvDump(options->dump, *kv,
                    {{"kv_id", kv->shape().layout.kv_id},
                     {"request_id", request.request_id},
                     {"method", result->accepted.method},
                     {"prompt_tokens", absl::StrCat(kv->shape().prompt_tokens)},
                     {"start_token", absl::StrCat(kv->shape().start_token)},
                     {"first_token", absl::StrCat(result->first_token.token_id)}});
    if (!s.ok()) {
      console.err << "vsprefill: " << StatusLine(s) << "\n";
      return kExitFailed;
    }
  }
  console.out << (options->json ? PrefillJson(request, *result) : PrefillText(request, *result));
  return kExitOk;
}

}  // namespace vsprefill::cli
