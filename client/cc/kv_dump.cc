#include "client/cc/kv_dump.h"

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <nlohmann/json.hpp>

#include "absl/cleanup/cleanup.h"
#include "absl/strings/str_cat.h"

namespace vsprefill::client {
namespace {

absl::Status FileError(const std::string& path) {
  return absl::UnknownError(absl::StrCat(path, ": ", std::strerror(errno)));
}

/// The file's first part: length of the JSON header, then the header, padded to 8 bytes.
std::string Header(const HostKv& kv, const std::map<std::string, std::string>& metadata) {
  const KvShape& shape = kv.shape();
  nlohmann::json header = nlohmann::json::object();
  header["__metadata__"] = metadata;
  int64_t offset = 0;
  for (int l = 0; l < shape.layout.num_layers; ++l) {
    for (const char* part : {"k", "v"}) {
      const int64_t bytes = static_cast<int64_t>(kv.k(l).size());
      header[absl::StrCat("layers.", l, ".", part)] = {
          {"dtype", shape.layout.dtype == kernels::DType::kF32 ? "F32" : "BF16"},
          {"shape", {shape.layout.num_kv_heads, shape.sent_tokens(), shape.layout.head_dim}},
          {"data_offsets", {offset, offset + bytes}}};
      offset += bytes;
    }
  }
  // Metadata comes from a peer and may not be UTF-8.
  std::string json = header.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  json.append((8 - json.size() % 8) % 8, ' ');
  std::string result;
  for (int i = 0; i < 8; ++i) result.push_back(static_cast<char>(json.size() >> (8 * i) & 0xff));
  return result + json;
}

}  // namespace

absl::Status WriteKvDump(const std::string& path, const HostKv& kv,
                         const std::map<std::string, std::string>& metadata) {
  const std::string partial = path + ".partial";
  FILE* file = std::fopen(partial.c_str(), "wb");
  if (file == nullptr) return FileError(partial);
  absl::Cleanup remove = [&partial] { std::remove(partial.c_str()); };
  const std::string header = Header(kv, metadata);
  bool ok = std::fwrite(header.data(), 1, header.size(), file) == header.size();
  for (int l = 0; ok && l < kv.shape().layout.num_layers; ++l) {
    for (absl::Span<const uint8_t> part : {kv.k(l), kv.v(l)}) {
      ok = ok && std::fwrite(part.data(), 1, part.size(), file) == part.size();
    }
  }
  const absl::Status written = ok ? absl::OkStatus() : FileError(partial);
  if (std::fclose(file) != 0 && ok) return FileError(partial);
  if (!ok) return written;
  if (std::rename(partial.c_str(), path.c_str()) != 0) return FileError(path);
  std::move(remove).Cancel();
  return absl::OkStatus();
}

}  // namespace vsprefill::client
