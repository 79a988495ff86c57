#include "server/base/allocator.h"

#include <sys/mman.h>

#include <cstdlib>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"

namespace vsprefill {
namespace {

constexpr int64_t kAlignment = 64;
constexpr int64_t kHugePageBytes = int64_t{2} << 20;

class HostMemory final : public Allocator {
 public:
  absl::StatusOr<void*> Allocate(int64_t bytes) override {
    if (bytes < 0 || bytes > INT64_MAX - kHugePageBytes) {
      return absl::InvalidArgumentError(absl::StrCat(
          "cannot allocate ", bytes, " bytes (allowed: 0 to ", INT64_MAX - kHugePageBytes, ")"));
    }
    // Large buffers start on a huge page, so that the kernel can back all of them with huge pages.
    const bool large = bytes >= kHugePageBytes;
    const int64_t alignment = large ? kHugePageBytes : kAlignment;
    const int64_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
    void* data = nullptr;
    if (posix_memalign(&data, alignment, rounded > 0 ? rounded : kAlignment) != 0) {
      return absl::ResourceExhaustedError(absl::StrCat("out of host memory: ", bytes, " bytes"));
    }
    if (large) {
      // Only a hint: without huge pages the memory is as good, but slower.
      (void)madvise(data, rounded, MADV_HUGEPAGE);
    }
    return data;
  }

  void Free(void* data, int64_t bytes) noexcept override { std::free(data); }

  kernels::DeviceKind device() const override { return kernels::DeviceKind::kCpu; }
};

}  // namespace

Allocator& HostAllocator() {
  static HostMemory* const allocator = new HostMemory;
  return *allocator;
}

absl::StatusOr<Buffer> Buffer::Create(Allocator& allocator, int64_t bytes) {
  absl::StatusOr<void*> data = allocator.Allocate(bytes);
  if (!data.ok()) return data.status();
  Buffer buffer;
  buffer.allocator_ = &allocator;
  buffer.data_ = *data;
  buffer.bytes_ = bytes;
  return buffer;
}

}  // namespace vsprefill
