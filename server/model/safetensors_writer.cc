#include <cstdio>
#include <string>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "server/base/json.h"
#include "server/model/safetensors.h"

namespace vsprefill::model {

absl::Status WriteSafetensors(const std::string& path, const TensorMap& tensors,
                              const std::map<std::string, std::string>& metadata) {
  nlohmann::json header = nlohmann::json::object();
  if (!metadata.empty()) header["__metadata__"] = metadata;
  int64_t offset = 0;
  for (const auto& [name, tensor] : tensors) {
    int64_t bytes = SafetensorsDTypeBytes(tensor.dtype);
    for (const int64_t size : tensor.shape) bytes *= size;
    if (SafetensorsDTypeBytes(tensor.dtype) == 0 ||
        bytes != static_cast<int64_t>(tensor.data.size())) {
      return absl::InvalidArgumentError(
          absl::StrCat(path, ": tensor \"", name, "\": ", tensor.data.size(), " bytes given, ",
                       tensor.dtype, " ", ShapeString(tensor.shape), " takes ", bytes));
    }
    header[name] = {{"dtype", tensor.dtype},
                    {"shape", tensor.shape},
                    {"data_offsets", {offset, offset + bytes}}};
    offset += bytes;
  }
  std::string text = header.dump(-1, ' ', false, nlohmann::json::error_handler_t::replace);
  // Spaces up to a multiple of 8 keep the data aligned.
  text.append((8 - text.size() % 8) % 8, ' ');
  std::string length(8, '\0');
  for (int i = 0; i < 8; ++i) length[i] = static_cast<char>(uint64_t{text.size()} >> (8 * i));

  const std::string temporary = absl::StrCat(path, ".tmp");
  std::FILE* file = std::fopen(temporary.c_str(), "wb");
  if (file == nullptr) return absl::PermissionDeniedError(absl::StrCat(path, ": cannot write"));
  const auto write = [&](const void* data, size_t bytes) {
    return bytes == 0 || std::fwrite(data, 1, bytes, file) == bytes;
  };
  bool written = write(length.data(), length.size()) && write(text.data(), text.size());
  for (const auto& [name, tensor] : tensors) {
    written = written && write(tensor.data.data(), tensor.data.size());
  }
  written = std::fclose(file) == 0 && written;
  if (!written || std::rename(temporary.c_str(), path.c_str()) != 0) {
    (void)std::remove(temporary.c_str());
    return absl::ResourceExhaustedError(
        absl::StrCat(path, ": writing ", offset, " bytes failed (is the disk full?)"));
  }
  return absl::OkStatus();
}

}  // namespace vsprefill::model
