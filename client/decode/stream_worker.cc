#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "client/cc/prefill_client.h"
#include "client/cli/report.h"
#include "client/decode/cache_memory.h"
#include "client/decode/greedy.h"
#include "client/decode/room.h"
#include "client/decode/worker.h"
#include "server/base/status_macros.h"

namespace vsprefill::decode {
namespace {

struct Intervals {
  double mean = 0, median = 0, worst = 0;  // seconds
};

Intervals Summarize(const std::vector<absl::Duration>& intervals) {
  Intervals result;
  if (intervals.empty()) return result;
  std::vector<absl::Duration> sorted = intervals;
  std::sort(sorted.begin(), sorted.end());
  absl::Duration sum;
  for (absl::Duration d : sorted) sum += d;
  result.mean = absl::ToDoubleSeconds(sum) / static_cast<double>(sorted.size());
  result.median = absl::ToDoubleSeconds(sorted[sorted.size() / 2]);
  result.worst = absl::ToDoubleSeconds(sorted.back());
  return result;
}

std::string Json(const client::PrefillRequest& request, const client::PrefillResult& prefill,
                 const GreedyResult& greedy) {
  nlohmann::ordered_json json = nlohmann::ordered_json::parse(cli::PrefillJson(request, prefill));
  const Intervals times = Summarize(greedy.intervals);
  json["tokens"] = greedy.tokens;
  json["stop"] = greedy.stop;
  json["inter_token_seconds"] = times.mean;
  json["inter_token_median_seconds"] = times.median;
  json["inter_token_worst_seconds"] = times.worst;
  return json.dump() + "\n";
}

std::string Text(const client::PrefillRequest& request, const client::PrefillResult& prefill,
                 const GreedyResult& greedy) {
  const Intervals times = Summarize(greedy.intervals);
  return absl::StrFormat(
      "%s%-22smean %.1f ms, median %.1f ms, worst %.1f ms\n%-22s%d, stopped by %s\ntokens [%s]\n",
      cli::PrefillText(request, prefill), "between tokens", times.mean * 1e3, times.median * 1e3,
      times.worst * 1e3, "decoded", greedy.tokens.size(), greedy.stop,
      absl::StrJoin(greedy.tokens, ", "));
}

/// A refusal because of the kv_id has most often this reason, which the id does not show.
absl::Status ExplainRefusal(absl::Status status, client::PrefillClient& client,
                            const kv::KvLayout& own) {
  if (!absl::IsFailedPrecondition(status)) return status;
  const absl::StatusOr<client::ModelInfo> info = client.GetModelInfo();
  if (!info.ok() || info->layout.dtype == own.dtype) return status;
  return absl::Status(status.code(),
                      absl::StrCat(status.message(), "; the server's KV cache is ",
                                   kernels::Name(info->layout.dtype), ", this decoder's ",
                                   kernels::Name(own.dtype), " (--dtype)"));
}

}  // namespace

absl::Status RunStream(const Options& options, model::Transformer& transformer, std::ostream& out) {
  client::PrefillRequest request = options.request;
  request.token_ids = options.ids;
  request.expected_kv_id = transformer.kv_layout().kv_id;
  kv::KvPool pool(options.kv_pool_bytes);
  std::shared_ptr<CacheMemory> memory;
  client::PrefillHandlers handlers;
  handlers.destination =
      [&](const client::Accepted& accepted) -> absl::StatusOr<client::KvDestination> {
    VSP_ASSIGN_OR_RETURN(memory, CacheMemory::Create(transformer, pool, accepted.shape,
                                                     RoomForNewTokens(transformer, accepted.shape,
                                                                      options.max_new_tokens)));
    return memory->destination();
  };
  client::PrefillClient client(options.prefill);
  const absl::StatusOr<client::PrefillResult> prefill = client.Prefill(request, handlers);
  if (!prefill.ok()) return ExplainRefusal(prefill.status(), client, transformer.kv_layout());
  VSP_ASSIGN_OR_RETURN(kv::KvCache * cache, memory->Commit(transformer));
  VSP_ASSIGN_OR_RETURN(
      const GreedyResult greedy,
      DecodeGreedily(transformer, *cache, prefill->first_token.token_id, options.max_new_tokens));
  out << (options.json ? Json(request, *prefill, greedy) : Text(request, *prefill, greedy))
      << std::flush;
  return absl::OkStatus();
}

}  // namespace vsprefill::decode
