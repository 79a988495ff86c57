// Reading and writing of safetensors files. A file is mapped, not read; hostile input ends in one
// clear line. Thread-safe after opening.
//
// Format: 8 bytes little-endian header length, a JSON object {name: {dtype, shape, data_offsets}},
// then the data. Names are unique and the tensors cover the data without holes or overlaps.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"
#include "server/base/mapped_file.h"

namespace vsprefill::model {

/// One stored tensor, C-contiguous, little-endian. `data` need not be aligned.
struct TensorView {
  std::string dtype;  // as in the file: "F32", "BF16", "F16", "I32", ...
  std::vector<int64_t> shape;
  int64_t num_elements = 0;
  absl::Span<const uint8_t> data;
};

/// "[2, 3]", for messages.
std::string ShapeString(absl::Span<const int64_t> shape);

/// Bytes of an element of a safetensors dtype; 0 for an unknown one.
int64_t SafetensorsDTypeBytes(absl::string_view dtype);

using TensorMap = std::map<std::string, TensorView, std::less<>>;  // sorted bytewise by name

struct SafetensorsContents {
  TensorMap tensors;
  std::map<std::string, std::string> metadata;
};

/// Parses a whole file in memory; the views point into `file`. INVALID_ARGUMENT, beginning with
/// `source`, for anything that breaks the format.
absl::StatusOr<SafetensorsContents> ParseSafetensors(absl::Span<const uint8_t> file,
                                                     absl::string_view source);

/// The tensors of one file, or of the shards of a directory.
class SafetensorsReader {
 public:
  /// One .safetensors file. NOT_FOUND where there is none.
  static absl::StatusOr<SafetensorsReader> OpenFile(const std::string& path);
  /// model.safetensors of `dir`, or the shards that model.safetensors.index.json lists (each of its
  /// names must be in the shard that it names, and no shard may hold a name twice).
  static absl::StatusOr<SafetensorsReader> OpenDirectory(const std::string& dir);

  const TensorMap& tensors() const { return tensors_; }
  /// Metadata of a single file; empty for shards.
  const std::map<std::string, std::string>& metadata() const { return metadata_; }
  /// Null where there is no such tensor.
  const TensorView* Find(absl::string_view name) const;
  /// A tensor of exactly this shape. INVALID_ARGUMENT names what is missing or differs.
  absl::StatusOr<const TensorView*> Get(absl::string_view name,
                                        absl::Span<const int64_t> shape) const;
  /// Drops the physical pages of a tensor that has been copied.
  void DropPages(const TensorView& tensor) const;
  /// What was opened, for messages.
  const std::string& source() const { return source_; }

 private:
  std::string source_;
  std::vector<MappedFile> files_;
  TensorMap tensors_;
  std::map<std::string, std::string> metadata_;
};

/// Writes a file (first beside it, then renamed over it). Tensors are stored in order of name.
/// INVALID_ARGUMENT where the size of a tensor's data does not fit its dtype and shape.
absl::Status WriteSafetensors(const std::string& path, const TensorMap& tensors,
                              const std::map<std::string, std::string>& metadata = {});

/// Converts a stored F32, BF16 or F16 tensor to float32. INVALID_ARGUMENT for another dtype.
absl::Status ConvertToFloat(const TensorView& tensor, absl::Span<float> out);
/// The same, rounded to nearest even bfloat16 (bits).
absl::Status ConvertToBFloat16(const TensorView& tensor, absl::Span<uint16_t> out);

}  // namespace vsprefill::model
