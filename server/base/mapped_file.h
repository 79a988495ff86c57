// A read-only memory mapping of a whole file; move-only.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/types/span.h"

namespace vsprefill {

class MappedFile {
 public:
  /// NOT_FOUND where there is no such file; INVALID_ARGUMENT where `path` is no regular file.
  /// The file must not shrink while it is mapped.
  static absl::StatusOr<MappedFile> Open(const std::string& path);

  MappedFile() = default;
  MappedFile(MappedFile&& other) noexcept { *this = std::move(other); }
  MappedFile& operator=(MappedFile&& other) noexcept;
  ~MappedFile() { Reset(); }

  absl::Span<const uint8_t> bytes() const { return {static_cast<const uint8_t*>(data_), size_}; }
  const std::string& path() const { return path_; }

  /// Gives the physical pages of a range back to the system; they are read again when touched.
  /// Keeps the resident size of a process that copies a file at one copy.
  void DropPages(absl::Span<const uint8_t> range) const;

 private:
  void Reset() noexcept;

  std::string path_;
  void* data_ = nullptr;
  size_t size_ = 0;
};

/// The contents of a (small) text file. RESOURCE_EXHAUSTED where it is larger than `max_bytes`.
absl::StatusOr<std::string> ReadTextFile(const std::string& path, int64_t max_bytes = 64 << 20);

/// Whether a regular file of this name exists.
bool FileExists(const std::string& path);

}  // namespace vsprefill
