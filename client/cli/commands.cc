#include "client/cli/commands.h"

#include "client/cc/prefill_client.h"
#include "client/cli/args.h"
#include "client/cli/exit_code.h"
#include "client/cli/report.h"

namespace vsprefill::cli {
namespace {

constexpr char kUsage[] =
    R"(Usage: vsprefill COMMAND [flags]

Talks to a vsprefill-server.

  prefill   send a prompt, receive and verify its KV cache, print first token and timings
  info      print the server's model, KV layout and attention methods with their parameters
  load      print how busy the server is

vsprefill COMMAND --help explains each.
)";

constexpr char kInfoUsage[] =
    R"(Usage: vsprefill info --server ADDR [--json]

Prints the model that a prefill server has loaded, its identities (a decoder's kv_id must be the
same), the shape of its KV cache, and its attention methods with the names, defaults and ranges that
"vsprefill prefill --set" takes.

)";

constexpr char kLoadUsage[] =
    R"(Usage: vsprefill load --server ADDR [--json]

Prints what a router wants to know of a prefill server: requests and tokens that wait, memory in use,
recent speed, and whether it is draining.

)";

const std::vector<FlagSpec>& QueryFlags() {
  static const auto* const flags = new std::vector<FlagSpec>{
      {.name = "server", .value = "ADDR", .help = "the server, host:port", .required = true},
      {.name = "deadline",
       .value = "SECONDS",
       .help = "give up after so long",
       .default_value = "10"},
      {.name = "json", .value = "", .help = "print one JSON object"},
  };
  return *flags;
}

/// The frame of both queries: flags, help, errors. `query` calls the server and prints.
template <typename Query>
int RunQuery(const std::vector<std::string>& args, const Console& console, const char* name,
             const char* usage, Query query) {
  if (WantsHelp(args)) {
    console.out << usage << FlagHelp(QueryFlags());
    return kExitOk;
  }
  absl::StatusOr<Args> parsed = Args::Parse(args, QueryFlags());
  const absl::StatusOr<absl::Duration> deadline =
      parsed.ok() ? parsed->GetSeconds("deadline", absl::Seconds(10)) : parsed.status();
  if (!deadline.ok()) {
    console.err << "vsprefill " << name << ": " << deadline.status().message() << " (vsprefill "
                << name << " --help)\n";
    return kExitUsage;
  }
  client::PrefillClient client(parsed->Get("server"));
  const absl::Status s = query(client, *deadline, parsed->Has("json"));
  if (!s.ok()) console.err << "vsprefill: " << StatusLine(s) << "\n";
  return ExitCodeFor(s);
}

}  // namespace

int RunInfo(const std::vector<std::string>& args, const Console& console) {
  return RunQuery(args, console, "info", kInfoUsage,
                  [&](client::PrefillClient& client, absl::Duration deadline, bool json) {
                    absl::StatusOr<client::ModelInfo> info = client.GetModelInfo(deadline);
                    if (info.ok()) console.out << (json ? InfoJson(*info) : InfoText(*info));
                    return info.status();
                  });
}

int RunLoad(const std::vector<std::string>& args, const Console& console) {
  return RunQuery(args, console, "load", kLoadUsage,
                  [&](client::PrefillClient& client, absl::Duration deadline, bool json) {
                    absl::StatusOr<client::ServerLoad> load = client.GetLoad(deadline);
                    if (load.ok()) console.out << (json ? LoadJson(*load) : LoadText(*load));
                    return load.status();
                  });
}

int RunCli(const std::vector<std::string>& args, const Console& console) {
  if (args.empty()) {
    console.err << kUsage;
    return kExitUsage;
  }
  const std::vector<std::string> rest(args.begin() + 1, args.end());
  if (args[0] == "prefill") return RunPrefill(rest, console);
  if (args[0] == "info") return RunInfo(rest, console);
  if (args[0] == "load") return RunLoad(rest, console);
  if (args[0] == "--help" || args[0] == "-h" || args[0] == "help") {
    console.out << kUsage;
    return kExitOk;
  }
  console.err << "vsprefill: unknown command \"" << args[0] << "\" (vsprefill --help)\n";
  return kExitUsage;
}

}  // namespace vsprefill::cli
