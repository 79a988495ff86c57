#include "training/corpus.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <random>
#include <utility>

#include "absl/strings/str_format.h"
#include "server/base/status_macros.h"
#include "server/model/safetensors.h"

namespace vsprefill::training {
namespace {

template <typename Stored, typename T>
void Widen(const model::TensorView& tensor, std::vector<T>* out) {
  out->resize(tensor.num_elements);
  for (int64_t i = 0; i < tensor.num_elements; ++i) {
    Stored value;
    std::memcpy(&value, tensor.data.data() + i * sizeof(Stored), sizeof(Stored));
    (*out)[i] = static_cast<T>(value);
  }
}

absl::StatusOr<const model::TensorView*> Vector(const model::SafetensorsReader& reader,
                                                absl::string_view name) {
  const model::TensorView* tensor = reader.Find(name);
  if (tensor == nullptr || tensor->shape.size() != 1 || tensor->num_elements == 0) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "%s: no corpus file: tensor '%s' is missing, empty or not one-dimensional (make one with "
        "training/corpus/make_corpus.py)",
        reader.source(), name));
  }
  return tensor;
}

/// A generator for item `index` of a stream; splitmix64 keeps neighbouring seeds apart.
std::mt19937_64 Generator(uint64_t seed, uint64_t stream, uint64_t index) {
  uint64_t x = seed * 0x9e3779b97f4a7c15u + stream * 0xbf58476d1ce4e5b9u + index;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return std::mt19937_64(x ^ (x >> 31));
}

}  // namespace

absl::StatusOr<Corpus> Corpus::Load(const std::string& path, int vocab_size) {
  VSP_ASSIGN_OR_RETURN(const model::SafetensorsReader reader,
                       model::SafetensorsReader::OpenFile(path));
  VSP_ASSIGN_OR_RETURN(const model::TensorView* ids, Vector(reader, "ids"));
  VSP_ASSIGN_OR_RETURN(const model::TensorView* starts, Vector(reader, "starts"));
  Corpus corpus;
  if (ids->dtype == "U16") {
    Widen<uint16_t>(*ids, &corpus.ids_);
  } else if (ids->dtype == "I32") {
    Widen<int32_t>(*ids, &corpus.ids_);
  } else {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: ids has dtype %s, expected U16 or I32", path, ids->dtype));
  }
  if (starts->dtype == "I32") {
    Widen<int32_t>(*starts, &corpus.starts_);
  } else if (starts->dtype == "I64") {
    Widen<int64_t>(*starts, &corpus.starts_);
  } else {
    return absl::InvalidArgumentError(
        absl::StrFormat("%s: starts has dtype %s, expected I32 or I64", path, starts->dtype));
  }
  for (int32_t id : corpus.ids_) {
    if (id < 0 || id >= vocab_size) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "%s: token id %d is not in [0, %d): made with another tokenizer?", path, id, vocab_size));
    }
  }
  for (size_t i = 0; i < corpus.starts_.size(); ++i) {
    const int64_t start = corpus.starts_[i];
    const bool ascending = i == 0 ? start == 0 : start > corpus.starts_[i - 1];
    if (!ascending || start >= corpus.num_tokens()) {
      return absl::InvalidArgumentError(absl::StrFormat(
          "%s: starts[%d] is %d: document starts must begin at 0 and ascend below %d", path, i,
          start, corpus.num_tokens()));
    }
  }
  corpus.whole_.assign(corpus.starts_.size(), false);
  if (const model::TensorView* whole = reader.Find("whole"); whole != nullptr) {
    if (whole->dtype != "U8" || whole->num_elements != starts->num_elements) {
      return absl::InvalidArgumentError(
          absl::StrFormat("%s: whole is %s %s, expected U8 [%d]", path, whole->dtype,
                          model::ShapeString(whole->shape), starts->num_elements));
    }
    for (int64_t i = 0; i < whole->num_elements; ++i) corpus.whole_[i] = whole->data[i] != 0;
  }
  return corpus;
}

absl::Span<const int32_t> Corpus::document(int index) const {
  const int64_t begin = starts_[index];
  const int64_t end = index + 1 < num_documents() ? starts_[index + 1] : num_tokens();
  return absl::MakeConstSpan(ids_).subspan(begin, end - begin);
}

TextSampler::TextSampler(const Corpus* corpus, std::vector<int64_t> lengths, uint64_t seed)
    : corpus_(corpus), lengths_(std::move(lengths)), seed_(seed) {}

absl::Span<const int32_t> TextSampler::Text(int64_t index) const {
  const int64_t epoch = index / corpus_->num_documents();
  std::vector<int> order(corpus_->num_documents());
  std::iota(order.begin(), order.end(), 0);
  std::mt19937_64 shuffle = Generator(seed_, 1, epoch);
  for (size_t i = order.size() - 1; i > 0; --i) std::swap(order[i], order[shuffle() % (i + 1)]);
  const int document = order[index % corpus_->num_documents()];
  const absl::Span<const int32_t> ids = corpus_->document(document);

  std::mt19937_64 draw = Generator(seed_, 2, index);
  const int64_t longest = *std::max_element(lengths_.begin(), lengths_.end());
  const int64_t drawn = corpus_->is_whole(document) ? longest : lengths_[draw() % lengths_.size()];
  const int64_t length = std::min<int64_t>(drawn, ids.size());
  const bool from_start = corpus_->is_whole(document) || draw() % 2 == 0;
  const int64_t begin = from_start ? 0 : draw() % (ids.size() - length + 1);
  return ids.subspan(begin, length);
}

std::vector<absl::Span<const int32_t>> EvaluationTexts(const Corpus& corpus, int64_t length,
                                                       int count) {
  std::vector<absl::Span<const int32_t>> fitting;
  for (int i = 0; i < corpus.num_documents(); ++i) {
    const absl::Span<const int32_t> ids = corpus.document(i);
    if (static_cast<int64_t>(ids.size()) >= length) fitting.push_back(ids.subspan(0, length));
  }
  const int64_t available = fitting.size();
  if (available <= count) return fitting;
  std::vector<absl::Span<const int32_t>> chosen;
  for (int64_t i = 0; i < count; ++i) chosen.push_back(fitting[i * available / count]);
  return chosen;
}

}  // namespace vsprefill::training
