#include "server/model/safetensors.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/escaping.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/base/json.h"
#include "server/base/status_macros.h"

namespace vsprefill::model {
namespace {

using nlohmann::json;

constexpr uint64_t kLengthBytes = 8;
// The limit of the reference implementation.
constexpr uint64_t kMaxHeaderBytes = 100'000'000;
constexpr int kMaxRank = 8;
// {name: {"shape": [..]}} nests three levels.
constexpr int kMaxHeaderDepth = 4;

struct DTypeBytes {
  absl::string_view name;
  int64_t bytes;
};
constexpr DTypeBytes kDTypes[] = {{"BOOL", 1},    {"U8", 1},  {"I8", 1},  {"F8_E4M3", 1},
                                  {"F8_E5M2", 1}, {"U16", 2}, {"I16", 2}, {"F16", 2},
                                  {"BF16", 2},    {"U32", 4}, {"I32", 4}, {"F32", 4},
                                  {"U64", 8},     {"I64", 8}, {"F64", 8}};

absl::Status Bad(absl::string_view source, absl::string_view problem) {
  return absl::InvalidArgumentError(absl::StrCat(source, ": ", problem));
}

// A tensor's name as it may appear in a message.
std::string Quoted(absl::string_view name) {
  return absl::StrCat("tensor \"", absl::CHexEscape(name.substr(0, 200)), "\"");
}

// Parses one header entry into `view`, whose data range is returned as [*begin, *end) of the data.
absl::Status ParseEntry(absl::string_view source, const std::string& name, const json& entry,
                        uint64_t data_bytes, TensorView* view, uint64_t* begin, uint64_t* end) {
  const auto bad = [&](const std::string& problem) {
    return Bad(source, absl::StrCat(Quoted(name), ": ", problem));
  };
  if (!entry.is_object()) return bad(absl::StrCat("not an object but ", ShortJson(entry)));
  for (const char* key : {"dtype", "shape", "data_offsets"}) {
    if (!entry.contains(key)) return bad(absl::StrCat("has no \"", key, "\""));
  }
  const json& dtype = entry["dtype"];
  if (!dtype.is_string() || SafetensorsDTypeBytes(dtype.get_ref<const std::string&>()) == 0) {
    return bad(absl::StrCat("unknown dtype ", ShortJson(dtype)));
  }
  view->dtype = dtype.get<std::string>();

  const json& shape = entry["shape"];
  if (!shape.is_array() || shape.size() > kMaxRank) {
    return bad(
        absl::StrCat("shape ", ShortJson(shape), " is no list of at most ", kMaxRank, " sizes"));
  }
  const int64_t element_bytes = SafetensorsDTypeBytes(view->dtype);
  const int64_t max_elements = INT64_MAX / element_bytes;
  int64_t elements = 1;
  for (const json& size : shape) {
    if (!size.is_number_unsigned() || size.get<uint64_t>() > static_cast<uint64_t>(max_elements)) {
      return bad(absl::StrCat("size ", ShortJson(size), " in shape ", ShortJson(shape),
                              " is not in 0 to ", max_elements));
    }
    const int64_t value = size.get<int64_t>();
    view->shape.push_back(value);
    if (value != 0 && elements > max_elements / value) {
      return bad(absl::StrCat("shape ", ShortJson(shape), " has too many elements"));
    }
    elements *= value;
  }
  view->num_elements = elements;

  const json& offsets = entry["data_offsets"];
  if (!offsets.is_array() || offsets.size() != 2 || !offsets[0].is_number_unsigned() ||
      !offsets[1].is_number_unsigned()) {
    return bad(absl::StrCat("data_offsets ", ShortJson(offsets), " are no two offsets"));
  }
  *begin = offsets[0].get<uint64_t>();
  *end = offsets[1].get<uint64_t>();
  if (*begin > *end || *end > data_bytes) {
    return bad(absl::StrCat("data_offsets ", ShortJson(offsets), " lie outside the ", data_bytes,
                            " bytes of data (is the file truncated?)"));
  }
  if (*end - *begin != static_cast<uint64_t>(elements * element_bytes)) {
    return bad(absl::StrCat("data_offsets ", ShortJson(offsets), " hold ", *end - *begin,
                            " bytes, but ", view->dtype, " ", ShapeString(view->shape), " takes ",
                            elements * element_bytes));
  }
  return absl::OkStatus();
}

// The tensors must cover the data exactly: no overlap, no hole, nothing behind the last.
absl::Status CheckCoverage(absl::string_view source, const SafetensorsContents& contents,
                           absl::Span<const uint8_t> data) {
  std::vector<std::pair<const std::string*, absl::Span<const uint8_t>>> ranges;
  for (const auto& [name, view] : contents.tensors) ranges.emplace_back(&name, view.data);
  std::sort(ranges.begin(), ranges.end(), [](const auto& a, const auto& b) {
    return std::make_pair(a.second.data(), a.second.size()) <
           std::make_pair(b.second.data(), b.second.size());
  });
  const uint8_t* next = data.data();
  for (const auto& [name, range] : ranges) {
    if (range.data() < next) {
      return Bad(source,
                 absl::StrCat(Quoted(*name), " at offset ", range.data() - data.data(),
                              " overlaps another tensor, which ends at ", next - data.data()));
    }
    if (range.data() > next) {
      return Bad(source,
                 absl::StrCat("bytes ", next - data.data(), " to ", range.data() - data.data(),
                              " of the data before ", Quoted(*name), " belong to no tensor"));
    }
    next = range.data() + range.size();
  }
  if (next != data.data() + data.size()) {
    return Bad(source, absl::StrCat("the tensors end at byte ", next - data.data(), " of ",
                                    data.size(), " bytes of data"));
  }
  return absl::OkStatus();
}

}  // namespace

std::string ShapeString(absl::Span<const int64_t> shape) {
  return absl::StrCat("[", absl::StrJoin(shape, ", "), "]");
}

int64_t SafetensorsDTypeBytes(absl::string_view dtype) {
  for (const DTypeBytes& known : kDTypes) {
    if (known.name == dtype) return known.bytes;
  }
  return 0;
}

absl::StatusOr<SafetensorsContents> ParseSafetensors(absl::Span<const uint8_t> file,
                                                     absl::string_view source) {
  if (file.size() < kLengthBytes) {
    return Bad(source, absl::StrCat("only ", file.size(),
                                    " bytes, a safetensors file has at least ", kLengthBytes));
  }
  uint64_t header_bytes = 0;
  for (uint64_t i = 0; i < kLengthBytes; ++i) header_bytes |= uint64_t{file[i]} << (8 * i);
  if (header_bytes > kMaxHeaderBytes) {
    return Bad(source, absl::StrCat("header length ", header_bytes, " (at most ", kMaxHeaderBytes,
                                    "): not a safetensors file?"));
  }
  if (header_bytes > file.size() - kLengthBytes) {
    return Bad(source, absl::StrCat("header length ", header_bytes, ", but only ",
                                    file.size() - kLengthBytes, " bytes follow: truncated?"));
  }
  const absl::string_view header(reinterpret_cast<const char*>(file.data()) + kLengthBytes,
                                 header_bytes);
  const absl::Span<const uint8_t> data = file.subspan(kLengthBytes + header_bytes);
  VSP_ASSIGN_OR_RETURN(const json root,
                       ParseJson(header, absl::StrCat(source, " (header)"), kMaxHeaderDepth));
  if (!root.is_object()) return Bad(source, "the header is no JSON object");

  SafetensorsContents contents;
  for (const auto& [name, entry] : root.items()) {
    if (name == "__metadata__") {
      if (!entry.is_object()) return Bad(source, "__metadata__ is no JSON object");
      for (const auto& [key, value] : entry.items()) {
        if (!value.is_string()) {
          return Bad(source, absl::StrCat("__metadata__ of \"", absl::CHexEscape(key),
                                          "\" is no string but ", ShortJson(value)));
        }
        contents.metadata[key] = value.get<std::string>();
      }
      continue;
    }
    TensorView view;
    uint64_t begin = 0;
    uint64_t end = 0;
    VSP_RETURN_IF_ERROR(ParseEntry(source, name, entry, data.size(), &view, &begin, &end));
    view.data = data.subspan(begin, end - begin);
    contents.tensors.emplace(name, std::move(view));
  }
  VSP_RETURN_IF_ERROR(CheckCoverage(source, contents, data));
  return contents;
}

absl::StatusOr<SafetensorsReader> SafetensorsReader::OpenFile(const std::string& path) {
  SafetensorsReader reader;
  reader.source_ = path;
  VSP_ASSIGN_OR_RETURN(MappedFile file, MappedFile::Open(path));
  VSP_ASSIGN_OR_RETURN(SafetensorsContents contents, ParseSafetensors(file.bytes(), path));
  reader.files_.push_back(std::move(file));
  reader.tensors_ = std::move(contents.tensors);
  reader.metadata_ = std::move(contents.metadata);
  return reader;
}

absl::StatusOr<SafetensorsReader> SafetensorsReader::OpenDirectory(const std::string& dir) {
  const std::string single = absl::StrCat(dir, "/model.safetensors");
  const std::string index_path = absl::StrCat(dir, "/model.safetensors.index.json");
  if (FileExists(single)) return OpenFile(single);
  if (!FileExists(index_path)) {
    return absl::NotFoundError(absl::StrCat(dir,
                                            ": neither model.safetensors nor "
                                            "model.safetensors.index.json is there"));
  }
  VSP_ASSIGN_OR_RETURN(const std::string text, ReadTextFile(index_path));
  VSP_ASSIGN_OR_RETURN(const json index, ParseJson(text, index_path));
  const auto bad = [&](const std::string& problem) { return Bad(index_path, problem); };
  if (!index.is_object() || !index.contains("weight_map") || !index["weight_map"].is_object()) {
    return bad("has no \"weight_map\" object");
  }
  SafetensorsReader reader;
  reader.source_ = dir;
  std::set<std::string> shards;
  for (const auto& [name, shard] : index["weight_map"].items()) {
    if (!shard.is_string()) {
      return bad(absl::StrCat(Quoted(name), ": shard ", ShortJson(shard), " is no file name"));
    }
    const std::string& file = shard.get_ref<const std::string&>();
    // A shard lies beside its index: an index file cannot make the server read elsewhere.
    if (file.empty() || absl::StrContains(file, '/') || absl::StrContains(file, '\0') ||
        file == "." || file == "..") {
      return bad(
          absl::StrCat(Quoted(name), ": shard ", ShortJson(shard), " is no plain file name"));
    }
    shards.insert(file);
  }
  std::map<std::string, std::string> shard_of;
  for (const std::string& shard : shards) {
    const std::string path = absl::StrCat(dir, "/", shard);
    VSP_ASSIGN_OR_RETURN(MappedFile file, MappedFile::Open(path));
    VSP_ASSIGN_OR_RETURN(SafetensorsContents contents, ParseSafetensors(file.bytes(), path));
    reader.files_.push_back(std::move(file));
    for (auto& [name, view] : contents.tensors) {
      const auto [other, inserted] = shard_of.emplace(name, shard);
      if (!inserted) {
        return bad(absl::StrCat(Quoted(name), " is in both ", other->second, " and ", shard));
      }
      reader.tensors_.emplace(name, std::move(view));
    }
  }
  for (const auto& [name, shard] : index["weight_map"].items()) {
    const auto found = shard_of.find(name);
    if (found == shard_of.end() || found->second != shard.get_ref<const std::string&>()) {
      return bad(absl::StrCat(Quoted(name), " is not in its shard ", ShortJson(shard)));
    }
  }
  return reader;
}

const TensorView* SafetensorsReader::Find(absl::string_view name) const {
  const auto found = tensors_.find(std::string(name));
  return found == tensors_.end() ? nullptr : &found->second;
}

absl::StatusOr<const TensorView*> SafetensorsReader::Get(absl::string_view name,
                                                         absl::Span<const int64_t> shape) const {
  const TensorView* view = Find(name);
  if (view == nullptr) {
    return Bad(source_,
               absl::StrCat(Quoted(name), " is missing (expected shape ", ShapeString(shape), ")"));
  }
  if (absl::MakeConstSpan(view->shape) != shape) {
    return Bad(source_, absl::StrCat(Quoted(name), " has shape ", ShapeString(view->shape),
                                     ", expected ", ShapeString(shape)));
  }
  return view;
}

void SafetensorsReader::DropPages(const TensorView& tensor) const {
  if (!files_.empty()) files_.front().DropPages(tensor.data);
}

}  // namespace vsprefill::model
