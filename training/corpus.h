// Token files of training/corpus/make_corpus.py and the seeded order in which texts are drawn from
// them.
//
// File (safetensors): ids U16 or I32 [tokens], starts I32 or I64 [documents] (ascending, first 0),
// optional whole U8 [documents]: 1 marks a prompt that is used at its own length and never cut.
#pragma once

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/types/span.h"

namespace vsprefill::training {

class Corpus {
 public:
  /// INVALID_ARGUMENT: not such a file, or an id that is not in [0, vocab_size). NOT_FOUND: no
  /// file.
  static absl::StatusOr<Corpus> Load(const std::string& path, int vocab_size);

  int num_documents() const { return static_cast<int>(starts_.size()); }
  int64_t num_tokens() const { return static_cast<int64_t>(ids_.size()); }
  absl::Span<const int32_t> document(int index) const;
  bool is_whole(int index) const { return whole_[index]; }

 private:
  std::vector<int32_t> ids_;
  std::vector<int64_t> starts_;
  std::vector<bool> whole_;
};

/// Draws texts: each epoch visits every document once in shuffled order; a document longer than the
/// drawn length gives a window of it (half of the time its beginning). Text i is a function of
/// (corpus, lengths, seed, i), so a resumed run continues the same order.
class TextSampler {
 public:
  /// `corpus` outlives the sampler; `lengths` in tokens, not empty.
  TextSampler(const Corpus* corpus, std::vector<int64_t> lengths, uint64_t seed);

  absl::Span<const int32_t> Text(int64_t index) const;

 private:
  const Corpus* corpus_;
  std::vector<int64_t> lengths_;
  uint64_t seed_;
};

/// Held-out windows of exactly `length` tokens: the beginnings of up to `count` long enough
/// documents, spread evenly over the corpus. Fewer where there are fewer.
std::vector<absl::Span<const int32_t>> EvaluationTexts(const Corpus& corpus, int64_t length,
                                                       int count);

}  // namespace vsprefill::training
