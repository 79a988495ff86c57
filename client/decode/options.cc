#include "client/decode/options.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cc/prefill_client.h"
#include "client/cli/args.h"
#include "client/cli/ids_file.h"
#include "server/base/status_macros.h"

namespace vsprefill::decode {
namespace {

constexpr int64_t kMaxPoolBytes = int64_t{1} << 44;

constexpr char kUsage[] =
    R"(Usage: vsprefill-decode --model DIR --prefill ADDR --ids FILE --max_new_tokens N [flags]
       vsprefill-decode --model DIR --listen ADDR --max_new_tokens N [flags]

A decode worker. It computes no prompt: it takes the KV cache that a prefill server sends, verifies
checksums and manifest, and decodes greedily from it with the server's own transformer code and dense
attention. --prefill asks a server for one prompt's cache and prints the tokens. --listen waits for
caches that servers push (vsprefill prefill --push ADDR), prints "listening on ADDR" when ready and
then one JSON line {"request_id": ..., "tokens": [...]} per request, until SIGTERM or SIGINT.

)";

constexpr char kExamples[] = R"(
Examples:
  vsprefill-decode --model models/SmolLM2-135M-Instruct --prefill 127.0.0.1:50051 \
      --ids prompt.json --max_new_tokens 64
  vsprefill-decode --model models/SmolLM2-135M-Instruct --listen 127.0.0.1:9000 --max_new_tokens 64

Tokens are printed only where the whole cache came through.
Exit codes: 0 done, 1 failed, 2 usage or ids file, 3 refused, 4 try again, 5 deadline or cancelled,
6 the cache did not come through intact.
)";

const std::vector<cli::FlagSpec>& Flags() {
  static const auto* const flags = new std::vector<cli::FlagSpec>{
      {.name = "model",
       .value = "DIR",
       .help = "Hugging Face directory of the model; its kv_id must be the server's",
       .required = true},
      {.name = "max_new_tokens",
       .value = "N",
       .help = "decode at most so many tokens, the first one included; EOS ends earlier",
       .required = true},
      {.name = "prefill", .value = "ADDR", .help = "the prefill server to ask, host:port"},
      {.name = "ids",
       .value = "FILE",
       .help = "with --prefill: the prompt, a JSON array of token ids; - reads standard input"},
      {.name = "listen",
       .value = "ADDR",
       .help = "wait here for pushed caches instead; port 0 picks one"},
      {.name = "device",
       .value = "D",
       .help = "auto, cpu or cuda; auto takes a usable GPU, else the CPU",
       .default_value = "auto"},
      {.name = "dtype",
       .value = "T",
       .help = "bf16 or fp32; must be the server's, as it is part of the kv_id",
       .default_value = "bf16"},
      {.name = "threads",
       .value = "N",
       .help = "CPU threads; 0 takes all cores",
       .default_value = "0"},
      {.name = "kv_pool_bytes",
       .value = "N",
       .help = "memory for KV caches; one that does not fit is refused",
       .default_value = "4294967296"},
      {.name = "max_caches",
       .value = "N",
       .help = "with --listen: caches that may be on their way or wait to be decoded",
       .default_value = "8"},
      {.name = "method",
       .value = "NAME",
       .help = "attention method of the prefill; without it the server's default"},
      {.name = "preset",
       .value = "NAME",
       .help = "measured setting in place of a method: safe, balanced or fast (vsprefill info)"},
      {.name = "set",
       .value = "NAME=VALUE",
       .help = "a parameter of that method or preset",
       .repeated = true},
      {.name = "stripes",
       .value = "N",
       .help = "connections that carry the cache, layers dealt out in turn",
       .default_value = "1"},
      {.name = "deadline",
       .value = "SECONDS",
       .help = "give up the prefill after so long; without it never"},
      {.name = "request_id",
       .value = "ID",
       .help = "name of the request in logs and metrics; without it a random one"},
      {.name = "json", .value = "", .help = "with --prefill: print one JSON object"},
  };
  return *flags;
}

absl::StatusOr<kernels::DType> ParseDtype(const std::string& text) {
  if (text == "bf16") return kernels::DType::kBF16;
  if (text == "fp32") return kernels::DType::kF32;
  return absl::InvalidArgumentError(absl::StrCat("--dtype=", text, " is not bf16 or fp32"));
}

/// Flags that mean something only with --prefill are refused with --listen.
absl::Status CheckMode(const cli::Args& args) {
  if (args.Has("prefill") == args.Has("listen")) {
    return absl::InvalidArgumentError("give either --prefill or --listen");
  }
  if (args.Has("prefill")) {
    if (!args.Has("ids")) return absl::InvalidArgumentError("--prefill needs --ids");
    return args.Has("max_caches") ? absl::InvalidArgumentError("--max_caches needs --listen")
                                  : absl::OkStatus();
  }
  for (const char* flag :
       {"ids", "method", "preset", "set", "stripes", "deadline", "request_id", "json"}) {
    if (args.Has(flag)) {
      return absl::InvalidArgumentError(absl::StrCat("--", flag, " needs --prefill"));
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<Options> ParseOptions(const std::vector<std::string>& argv) {
  VSP_ASSIGN_OR_RETURN(const cli::Args args, cli::Args::Parse(argv, Flags()));
  VSP_RETURN_IF_ERROR(CheckMode(args));
  Options o;
  o.model_dir = args.Get("model");
  o.prefill = args.Get("prefill");
  o.listen = args.Get("listen");
  o.device = args.Get("device", "auto");
  o.json = args.Has("json");
  VSP_ASSIGN_OR_RETURN(o.dtype, ParseDtype(args.Get("dtype", "bf16")));
  VSP_ASSIGN_OR_RETURN(o.max_new_tokens, args.GetInt("max_new_tokens", 0, 1, int64_t{1} << 24));
  VSP_ASSIGN_OR_RETURN(const int64_t threads, args.GetInt("threads", 0, 0, 1024));
  o.threads = static_cast<int>(threads);
  VSP_ASSIGN_OR_RETURN(o.kv_pool_bytes,
                       args.GetInt("kv_pool_bytes", int64_t{4} << 30, 1, kMaxPoolBytes));
  VSP_ASSIGN_OR_RETURN(const int64_t max_caches, args.GetInt("max_caches", 8, 1, 1024));
  o.max_caches = static_cast<int>(max_caches);
  if (o.prefill.empty()) return o;

  client::PrefillRequest& r = o.request;
  r.method = args.Get("method");
  r.preset = args.Get("preset");
  r.request_id = args.Has("request_id") ? args.Get("request_id") : client::RandomRequestId();
  r.kv_dtype = o.dtype;
  VSP_ASSIGN_OR_RETURN(r.parameters, args.GetNumbers("set"));
  VSP_ASSIGN_OR_RETURN(const int64_t stripes, args.GetInt("stripes", 1, 1, 64));
  r.stripes = static_cast<int>(stripes);
  VSP_ASSIGN_OR_RETURN(r.timeout, args.GetSeconds("deadline", absl::InfiniteDuration()));
  VSP_ASSIGN_OR_RETURN(o.ids, cli::ReadIdsFile(args.Get("ids")));
  return o;
}

std::string HelpText() { return absl::StrCat(kUsage, cli::FlagHelp(Flags()), kExamples); }

}  // namespace vsprefill::decode
