#include "bench/eval/answers.h"

#include <algorithm>
#include <memory>

#include "server/base/status_macros.h"

namespace vsprefill::eval {
namespace {

struct Sequence {
  std::shared_ptr<kv::KvCache> cache;
  int32_t next = 0;  // token that was chosen last
  Answer* answer = nullptr;
};

int32_t ArgMax(const std::vector<float>& logits) {
  return static_cast<int32_t>(std::max_element(logits.begin(), logits.end()) - logits.begin());
}

absl::StatusOr<Sequence> Prefill(Lab& lab, const Item& item, const Selection& selection,
                                 Answer* answer) {
  const auto tokens = static_cast<int64_t>(item.ids.size());
  Sequence sequence;
  sequence.answer = answer;
  VSP_ASSIGN_OR_RETURN(sequence.cache, lab.MakeCache(tokens + item.max_new_tokens));
  VSP_ASSIGN_OR_RETURN(const Buffer counts, lab.MakeCounts());
  VSP_ASSIGN_OR_RETURN(const auto method, selection.plan == nullptr
                                              ? lab.MakeDense()
                                              : lab.Make(selection, /*select_only=*/false));
  model::SequenceChunk chunk;
  chunk.ids = item.ids;
  chunk.prompt_tokens = tokens;
  chunk.cache = sequence.cache.get();
  chunk.counts = static_cast<kernels::PairCounts*>(counts.data());
  model::ForwardOptions options;
  options.method = method.get();
  options.logits = model::LogitsMode::kLast;
  const double begin = Seconds();
  VSP_ASSIGN_OR_RETURN(const model::ForwardResult forward,
                       lab.model().Forward({&chunk, 1}, options));
  answer->seconds = Seconds() - begin;
  VSP_ASSIGN_OR_RETURN(answer->shares, lab.ReadCounts(counts));
  sequence.next = ArgMax(forward.logits.at(0));
  return sequence;
}

/// Decodes all sequences to their end.
absl::Status Decode(Lab& lab, const Item& item, std::vector<Sequence> sequences) {
  const std::vector<int32_t>& eos = lab.model().config().eos_token_ids;
  VSP_ASSIGN_OR_RETURN(const auto dense, lab.MakeDense());
  model::ForwardOptions options;
  options.method = dense.get();
  options.logits = model::LogitsMode::kLast;
  while (true) {
    std::vector<Sequence> going;
    for (Sequence& sequence : sequences) {
      const bool stops = std::find(eos.begin(), eos.end(), sequence.next) != eos.end() ||
                         std::find(item.stop_ids.begin(), item.stop_ids.end(), sequence.next) !=
                             item.stop_ids.end();
      if (stops) continue;
      sequence.answer->tokens.push_back(sequence.next);
      if (static_cast<int64_t>(sequence.answer->tokens.size()) < item.max_new_tokens) {
        going.push_back(std::move(sequence));
      }
    }
    sequences = std::move(going);
    if (sequences.empty()) return absl::OkStatus();
    std::vector<model::SequenceChunk> chunks;
    for (const Sequence& sequence : sequences) {
      model::SequenceChunk& chunk = chunks.emplace_back();
      chunk.ids = absl::MakeConstSpan(&sequence.next, 1);
      chunk.position_begin = sequence.cache->num_tokens();
      chunk.prompt_tokens = chunk.position_begin + 1;
      chunk.cache = sequence.cache.get();
    }
    VSP_ASSIGN_OR_RETURN(const model::ForwardResult forward, lab.model().Forward(chunks, options));
    for (size_t i = 0; i < sequences.size(); ++i) sequences[i].next = ArgMax(forward.logits.at(i));
  }
}

}  // namespace

absl::StatusOr<std::vector<Answer>> AnswerPrompt(Lab& lab, const Item& item,
                                                 const std::vector<Selection>& selections,
                                                 int decode_batch) {
  std::vector<Answer> answers(selections.size());
  std::vector<Sequence> batch;
  for (size_t i = 0; i < selections.size(); ++i) {
    VSP_ASSIGN_OR_RETURN(Sequence sequence, Prefill(lab, item, selections[i], &answers[i]));
    batch.push_back(std::move(sequence));
    if (static_cast<int>(batch.size()) == decode_batch || i + 1 == selections.size()) {
      VSP_RETURN_IF_ERROR(Decode(lab, item, std::move(batch)));
      batch.clear();
    }
  }
  return answers;
}

}  // namespace vsprefill::eval
