// Times prefill without the service: one model, several lengths, methods and chunk sizes, in one
// process. Prints a table; with --json also one JSON object. See docs/results for its use.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <fstream>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_split.h"
#include "bench/load_options.h"
#include "server/base/json.h"
#include "server/base/mapped_file.h"
#include "server/base/status_macros.h"
#include "server/kv/kv_pool.h"
#include "server/model/transformer.h"

ABSL_FLAG(std::string, model, "models/SmolLM2-135M-Instruct", "Hugging Face model directory");
ABSL_FLAG(std::string, indexer, "", "indexer file; empty: the model directory's; none: without");
ABSL_FLAG(std::string, device, "cpu", "cpu or cuda");
ABSL_FLAG(std::string, dtype, "bfloat16", "bfloat16 or float32");
ABSL_FLAG(int, threads, 0, "CPU threads; 0: all cores");
ABSL_FLAG(std::string, ids, "", "JSON array of token ids; empty: pseudo-random ids");
ABSL_FLAG(std::vector<std::string>, lengths,
          (std::vector<std::string>{"1024", "2048", "4096", "8000"}), "prompt lengths in tokens");
ABSL_FLAG(std::vector<std::string>, methods, (std::vector<std::string>{"dense"}),
          "attention methods, each with parameters: name or name:param=value:param=value");
ABSL_FLAG(std::vector<std::string>, chunks, (std::vector<std::string>{"2048"}),
          "chunk sizes in tokens; 0: the whole prompt");
ABSL_FLAG(int, repeats, 3, "timed runs of each; the median is reported");
ABSL_FLAG(bool, scores, false, "also compute the perplexity (an extra, untimed run)");
ABSL_FLAG(std::string, json, "", "file for the results as JSON");

namespace vsprefill {
namespace {

using attention::AttentionMethod;
using kernels::PairCounts;

struct Case {
  std::string method;  // as given on the command line
  int64_t tokens = 0, chunk_tokens = 0;
};

struct Result {
  double ttft_seconds = 0, linear_seconds = 0, attention_seconds = 0, indexer_seconds = 0;
  double density = 0, cost_ratio = 0;
  double perplexity = 0;  // 0: not computed
};

double Seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

absl::StatusOr<std::unique_ptr<AttentionMethod>> MakeMethod(const model::Transformer& model,
                                                            const std::string& text) {
  const std::vector<std::string> parts = absl::StrSplit(text, ':');
  std::map<std::string, double> parameters;
  for (size_t i = 1; i < parts.size(); ++i) {
    const std::pair<std::string, std::string> pair =
        absl::StrSplit(parts[i], absl::MaxSplits('=', 1));
    double value = 0;
    if (!absl::SimpleAtod(pair.second, &value)) {
      return absl::InvalidArgumentError(absl::StrCat("not name=number: ", parts[i]));
    }
    parameters[pair.first] = value;
  }
  // What is measured runs as it selects, also where dense would be faster.
  if (parts[0] != "dense") parameters.insert({"dense_fallback", 0});
  return attention::CreateMethod(model.method_context(), parts[0], parameters);
}

// One prefill from an empty cache. With `scores` the log-probabilities are summed up.
absl::StatusOr<Result> RunOnce(model::Transformer& model, const Case& test,
                               absl::Span<const int32_t> ids, bool scores) {
  VSP_ASSIGN_OR_RETURN(const std::unique_ptr<AttentionMethod> method,
                       MakeMethod(model, test.method));
  const bool with_logits = method->needs_indexer_logits();
  kv::KvPool pool(INT64_MAX);
  VSP_ASSIGN_OR_RETURN(
      kv::KvPool::Reservation reservation,
      pool.Reserve(kv::KvCache::BytesFor(model.kv_layout(), test.tokens, with_logits)));
  VSP_ASSIGN_OR_RETURN(const std::shared_ptr<kv::KvCache> cache,
                       kv::KvCache::Create(model.allocator(), std::move(reservation),
                                           model.kv_layout(), test.tokens, with_logits));
  std::vector<PairCounts> counts(model.config().num_layers);
  const int64_t count_bytes = static_cast<int64_t>(counts.size() * sizeof(PairCounts));
  VSP_ASSIGN_OR_RETURN(const Buffer device_counts, Buffer::Create(model.allocator(), count_bytes));
  VSP_RETURN_IF_ERROR(model.CopyToDevice(counts.data(), count_bytes, device_counts.data()));
  VSP_RETURN_IF_ERROR(model.Synchronize());

  Result result;
  double log_prob = 0;
  int64_t scored = 0;
  const double begin = Seconds();
  const int64_t chunk_tokens = test.chunk_tokens > 0 ? test.chunk_tokens : test.tokens;
  for (int64_t position = 0; position < test.tokens; position += chunk_tokens) {
    model::SequenceChunk chunk;
    chunk.ids = ids.subspan(position, std::min(chunk_tokens, test.tokens - position));
    chunk.position_begin = position;
    chunk.prompt_tokens = test.tokens;
    chunk.cache = cache.get();
    chunk.counts = static_cast<PairCounts*>(device_counts.data());
    model::ForwardOptions options;
    options.method = method.get();
    if (scores) {
      options.logits = model::LogitsMode::kScores;
    } else if (position + chunk_tokens >= test.tokens) {
      options.logits = model::LogitsMode::kLast;
    }
    VSP_ASSIGN_OR_RETURN(const model::ForwardResult forward,
                         model.Forward(absl::MakeConstSpan(&chunk, 1), options));
    result.linear_seconds += forward.linear_seconds;
    result.attention_seconds += forward.attention_seconds;
    result.indexer_seconds += forward.indexer_seconds;
    for (const std::vector<float>& sequence : forward.log_probs) {
      for (const float value : sequence) log_prob += value;
      scored += static_cast<int64_t>(sequence.size());
    }
  }
  VSP_RETURN_IF_ERROR(model.Synchronize());
  result.ttft_seconds = Seconds() - begin;
  if (scored > 0) result.perplexity = std::exp(-log_prob / static_cast<double>(scored));

  VSP_RETURN_IF_ERROR(model.CopyToHost(device_counts.data(), count_bytes, counts.data()));
  PairCounts sum;
  for (const PairCounts& layer : counts) {
    sum.unmasked += layer.unmasked;
    sum.multiplied += layer.multiplied;
    sum.dense += layer.dense;
  }
  if (sum.dense > 0) {
    result.density = static_cast<double>(sum.unmasked) / static_cast<double>(sum.dense);
    result.cost_ratio = static_cast<double>(sum.multiplied) / static_cast<double>(sum.dense);
  }
  return result;
}

absl::StatusOr<Result> RunCase(model::Transformer& model, const Case& test,
                               absl::Span<const int32_t> ids) {
  std::vector<Result> runs;
  for (int i = 0; i < std::max(1, absl::GetFlag(FLAGS_repeats)); ++i) {
    VSP_ASSIGN_OR_RETURN(const Result run, RunOnce(model, test, ids, /*scores=*/false));
    runs.push_back(run);
  }
  std::sort(runs.begin(), runs.end(),
            [](const Result& a, const Result& b) { return a.ttft_seconds < b.ttft_seconds; });
  Result median = runs[runs.size() / 2];
  if (absl::GetFlag(FLAGS_scores)) {
    VSP_ASSIGN_OR_RETURN(const Result scored, RunOnce(model, test, ids, /*scores=*/true));
    median.perplexity = scored.perplexity;
  }
  return median;
}

absl::StatusOr<std::vector<int32_t>> ReadIds(int vocab_size, int64_t tokens) {
  std::vector<int32_t> ids;
  const std::string path = absl::GetFlag(FLAGS_ids);
  if (path.empty()) {
    uint64_t state = 1;
    for (int64_t i = 0; i < tokens; ++i) {
      state = state * 6364136223846793005u + 1442695040888963407u;
      ids.push_back(static_cast<int32_t>((state >> 33) % static_cast<uint64_t>(vocab_size)));
    }
    return ids;
  }
  VSP_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(path));
  VSP_ASSIGN_OR_RETURN(const nlohmann::json list, ParseJson(text, path));
  if (!list.is_array()) return absl::InvalidArgumentError(absl::StrCat(path, ": no JSON array"));
  for (const nlohmann::json& id : list) {
    if (!id.is_number_unsigned()) {
      return absl::InvalidArgumentError(absl::StrCat(path, ": no token id: ", ShortJson(id)));
    }
    ids.push_back(id.get<int32_t>());
  }
  if (static_cast<int64_t>(ids.size()) < tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat(path, ": ", ids.size(), " ids, ", tokens, " are needed"));
  }
  return ids;
}

absl::StatusOr<std::vector<int64_t>> Numbers(const std::vector<std::string>& texts) {
  std::vector<int64_t> numbers;
  for (const std::string& text : texts) {
    int64_t number = 0;
    if (!absl::SimpleAtoi(text, &number) || number < 0) {
      return absl::InvalidArgumentError(absl::StrCat("not a number of tokens: ", text));
    }
    numbers.push_back(number);
  }
  return numbers;
}

absl::Status Main() {
  VSP_ASSIGN_OR_RETURN(const std::vector<int64_t> lengths, Numbers(absl::GetFlag(FLAGS_lengths)));
  VSP_ASSIGN_OR_RETURN(const std::vector<int64_t> chunks, Numbers(absl::GetFlag(FLAGS_chunks)));
  VSP_ASSIGN_OR_RETURN(const model::LoadOptions options,
                       MakeLoadOptions(absl::GetFlag(FLAGS_model), absl::GetFlag(FLAGS_indexer),
                                       absl::GetFlag(FLAGS_device), absl::GetFlag(FLAGS_dtype),
                                       absl::GetFlag(FLAGS_threads)));
  VSP_ASSIGN_OR_RETURN(const std::unique_ptr<model::Transformer> model,
                       model::Transformer::Load(options));
  const int64_t longest = *std::max_element(lengths.begin(), lengths.end());
  VSP_ASSIGN_OR_RETURN(const std::vector<int32_t> ids,
                       ReadIds(model->config().vocab_size, longest));
  std::printf("%s, %s, %s\n", options.model_dir.c_str(), kernels::Name(options.dtype),
              model->device_description().c_str());
  // Warm-up: threads, code paths and buffers of the longest case.
  VSP_RETURN_IF_ERROR(
      RunOnce(*model, {absl::GetFlag(FLAGS_methods)[0], std::min<int64_t>(longest, 512), 0}, ids,
              /*scores=*/false)
          .status());
  std::printf("%7s %7s  %8s %8s %8s %8s %8s  %8s %8s %9s  %s\n", "tokens", "chunk", "ttft s",
              "linear", "attn", "indexer", "other", "density", "cost", "ppl", "method");
  nlohmann::json rows = nlohmann::json::array();
  for (const int64_t tokens : lengths) {
    for (const std::string& method : absl::GetFlag(FLAGS_methods)) {
      for (const int64_t chunk : chunks) {
        VSP_ASSIGN_OR_RETURN(const Result r, RunCase(*model, {method, tokens, chunk}, ids));
        const double other =
            r.ttft_seconds - r.linear_seconds - r.attention_seconds - r.indexer_seconds;
        std::printf("%7d %7d  %8.3f %8.3f %8.3f %8.3f %8.3f  %8.4f %8.4f %9.4f  %s\n",
                    static_cast<int>(tokens), static_cast<int>(chunk), r.ttft_seconds,
                    r.linear_seconds, r.attention_seconds, r.indexer_seconds, other, r.density,
                    r.cost_ratio, r.perplexity, method.c_str());
        std::fflush(stdout);
        rows.push_back({{"tokens", tokens},
                        {"chunk_tokens", chunk},
                        {"method", method},
                        {"ttft_seconds", r.ttft_seconds},
                        {"linear_seconds", r.linear_seconds},
                        {"attention_seconds", r.attention_seconds},
                        {"indexer_seconds", r.indexer_seconds},
                        {"density", r.density},
                        {"cost_ratio", r.cost_ratio},
                        {"perplexity", r.perplexity}});
      }
    }
  }
  if (const std::string path = absl::GetFlag(FLAGS_json); !path.empty()) {
    const nlohmann::json all = {{"model", options.model_dir},
                                {"dtype", kernels::Name(options.dtype)},
                                {"device", model->device_description()},
                                {"runs", rows}};
    std::ofstream(path) << all.dump(2) << "\n";
  }
  return absl::OkStatus();
}

}  // namespace
}  // namespace vsprefill

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage(
      "Times prefill of one model without the service.\n"
      "prefill_bench --model DIR --ids FILE --lengths 1024,8000 --methods "
      "dense,vsprefill:threshold=3 --chunks 2048,0");
  absl::ParseCommandLine(argc, argv);
  const absl::Status status = vsprefill::Main();
  if (status.ok()) return 0;
  std::fprintf(stderr, "%s\n", std::string(status.message()).c_str());
  return 1;
}
