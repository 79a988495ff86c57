#include "client/cli/ids_file.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <limits>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"

namespace vsprefill::cli {
namespace {

class IdsParser {
 public:
  IdsParser(absl::string_view text, absl::string_view source) : text_(text), source_(source) {}

  absl::StatusOr<std::vector<int32_t>> Parse() {
    std::vector<int32_t> ids;
    SkipSpace();
    if (!Eat('[')) return Error("expected '['");
    SkipSpace();
    if (Peek() == ']') return Error("the list of ids is empty");
    while (true) {
      SkipSpace();
      int32_t id = 0;
      if (absl::Status s = ReadId(&id); !s.ok()) return s;
      ids.push_back(id);
      SkipSpace();
      if (Eat(']')) break;
      if (!Eat(',')) return Error("expected ',' or ']'");
    }
    SkipSpace();
    if (pos_ != text_.size()) return Error("expected the end of the file");
    return ids;
  }

 private:
  static constexpr int kEnd = -1;

  int Peek() const { return pos_ < text_.size() ? static_cast<unsigned char>(text_[pos_]) : kEnd; }
  bool Eat(char c) {
    if (Peek() != c) return false;
    ++pos_;
    return true;
  }
  void SkipSpace() {
    while (Peek() == ' ' || Peek() == '\t' || Peek() == '\n' || Peek() == '\r') ++pos_;
  }

  absl::Status ReadId(int32_t* id) {
    const size_t begin = pos_;
    const bool negative = Eat('-');
    int64_t value = 0;
    const size_t digits = pos_;
    while (Peek() >= '0' && Peek() <= '9' && value <= std::numeric_limits<int32_t>::max()) {
      value = value * 10 + (Peek() - '0');
      ++pos_;
    }
    const bool none = pos_ == digits;
    const bool leading_zero = pos_ > digits + 1 && text_[digits] == '0';
    const bool fraction = Peek() == '.' || Peek() == 'e' || Peek() == 'E';
    if (none || leading_zero || fraction) {
      pos_ = begin;
      return Error("expected an integer");
    }
    if ((negative && value != 0) || value > std::numeric_limits<int32_t>::max()) {
      pos_ = begin;
      return Error("the id is not in [0, 2147483647]");
    }
    *id = static_cast<int32_t>(value);
    return absl::OkStatus();
  }

  absl::Status Error(absl::string_view what) const {
    size_t line = 1, column = 1;
    for (size_t i = 0; i < pos_; ++i) {
      ++column;
      if (text_[i] == '\n') {
        ++line;
        column = 1;
      }
    }
    const std::string found =
        Peek() == kEnd ? "the end of the file"
                       : absl::StrCat("\"", absl::CHexEscape(text_.substr(pos_, kShown)), "\"");
    return absl::InvalidArgumentError(
        absl::StrCat(source_, ":", line, ":", column, ": ", what, ", found ", found));
  }
  static constexpr size_t kShown = 12;  // characters of the file in a message

  const absl::string_view text_;
  const absl::string_view source_;
  size_t pos_ = 0;
};

}  // namespace

absl::StatusOr<std::vector<int32_t>> ParseIds(absl::string_view text, absl::string_view source) {
  return IdsParser(text, source).Parse();
}

absl::StatusOr<std::vector<int32_t>> ReadIdsFile(const std::string& path) {
  const bool standard_input = path == "-";
  std::FILE* file = standard_input ? stdin : std::fopen(path.c_str(), "rb");
  const auto error = [&] {
    return absl::NotFoundError(absl::StrCat(path, ": ", std::strerror(errno)));
  };
  if (file == nullptr) return error();
  const absl::Cleanup close = [&] {
    if (!standard_input) std::fclose(file);
  };
  std::string text;
  char buffer[1 << 16];
  size_t n;
  while ((n = std::fread(buffer, 1, sizeof(buffer), file)) > 0) text.append(buffer, n);
  if (std::ferror(file) != 0) return error();
  return ParseIds(text, path);
}

}  // namespace vsprefill::cli
