// Staging from a GPU. The sender thread waits for the layer's event on a copy stream, copies the
// chunk into a slot of pinned memory, and hashes it there; the slot is free again when gRPC has let
// go of every slice. Copies run beside the compute of later layers.
#include <xxhash.h>

#include <algorithm>
#include <utility>

#include "absl/base/thread_annotations.h"
#include "absl/strings/str_cat.h"
#include "absl/synchronization/mutex.h"
#include "server/base/memory_cuda.h"
#include "server/base/status_macros.h"
#include "server/base/stream_cuda.h"
#include "server/kv/kv_stager_device.h"

namespace vsprefill::kv {
namespace {

constexpr int64_t kSlotBytes = kMaxMessageBytes;

/// The pinned memory; kept alive by every slot that is lent out.
class Ring {
 public:
  static absl::StatusOr<std::shared_ptr<Ring>> Create(int64_t bytes) {
    auto ring = std::make_shared<Ring>();
    const int64_t slots = std::max<int64_t>(bytes / kSlotBytes, 2);
    VSP_ASSIGN_OR_RETURN(ring->memory_, PinnedBuffer::Create(slots * kSlotBytes));
    absl::MutexLock lock(&ring->mu_);
    for (int64_t i = 0; i < slots; ++i) {
      ring->free_.push_back(static_cast<char*>(ring->memory_.data()) + i * kSlotBytes);
    }
    return ring;
  }

  char* Take(int64_t bytes) {
    absl::MutexLock lock(&mu_);
    if (free_.empty()) return nullptr;
    char* const slot = free_.back();
    free_.pop_back();
    used_bytes_ += bytes;
    return slot;
  }
  void Give(char* slot, int64_t bytes) {
    absl::MutexLock lock(&mu_);
    free_.push_back(slot);
    used_bytes_ -= bytes;
  }
  int64_t capacity_bytes() const { return memory_.bytes(); }
  int64_t used_bytes() const {
    absl::MutexLock lock(&mu_);
    return used_bytes_;
  }

 private:
  PinnedBuffer memory_;
  mutable absl::Mutex mu_;
  std::vector<char*> free_ ABSL_GUARDED_BY(mu_);
  int64_t used_bytes_ ABSL_GUARDED_BY(mu_) = 0;
};

class CudaKvStager final : public KvStager {
 public:
  CudaKvStager(std::shared_ptr<Ring> ring, CudaStream stream)
      : ring_(std::move(ring)), stream_(std::move(stream)) {}

  absl::StatusOr<LayerMark> MarkLayer(kernels::Stream stream) override {
    VSP_ASSIGN_OR_RETURN(CudaEvent event, CudaEvent::Create(/*timing=*/true));
    VSP_RETURN_IF_ERROR(event.Record(stream));
    return LayerMark(std::make_shared<CudaEvent>(std::move(event)));
  }

  std::optional<absl::Duration> Elapsed(const LayerMark& begin, const LayerMark& end) override {
    const auto milliseconds = static_cast<CudaEvent*>(end.get())->ElapsedMilliseconds(
        *static_cast<CudaEvent*>(begin.get()));
    if (!milliseconds.ok()) return std::nullopt;
    return absl::Milliseconds(*milliseconds);
  }

  absl::StatusOr<std::shared_ptr<StagedChunk>> Stage(std::shared_ptr<KvCache> cache,
                                                     const LayerMark& mark, const ChunkRange& range,
                                                     std::optional<uint64_t> checksum) override {
    const KvLayout& layout = cache->layout();
    const int64_t bytes = range.num_tokens() * layout.layer_token_bytes();
    if (bytes > kSlotBytes) {
      return absl::InternalError(
          absl::StrCat("a chunk of ", bytes, " bytes in slots of ", kSlotBytes));
    }
    char* const slot = ring_->Take(bytes);
    if (slot == nullptr) return nullptr;
    auto chunk = std::make_shared<StagedChunk>();
    chunk->memory = std::shared_ptr<void>(slot, [ring = ring_, bytes](void* memory) {
      ring->Give(static_cast<char*>(memory), bytes);
    });
    chunk->range = range;
    chunk->bytes = bytes;
    chunk->segments.push_back({slot, bytes});

    VSP_RETURN_IF_ERROR(static_cast<const CudaEvent*>(mark.get())->MakeWait(stream_.get()));
    const int64_t element = kernels::SizeOf(layout.dtype);
    const int64_t head_bytes = range.num_tokens() * layout.head_dim * element;
    char* to = slot;
    for (const void* tensor : {cache->k(range.layer), cache->v(range.layer)}) {
      for (int head = 0; head < layout.num_kv_heads; ++head) {
        const int64_t offset =
            (head * cache->head_stride() + range.token_begin * layout.head_dim) * element;
        const absl::Status status =
            CopyAsync(to, static_cast<const char*>(tensor) + offset, head_bytes, stream_.get());
        if (!status.ok()) {
          stream_.Synchronize().IgnoreError();  // earlier copies still write into the slot
          return status;
        }
        to += head_bytes;
      }
    }
    VSP_RETURN_IF_ERROR(stream_.Synchronize());
    chunk->checksum = checksum.has_value() ? *checksum : XXH3_64bits(slot, bytes);
    return chunk;
  }

  int64_t capacity_bytes() const override { return ring_->capacity_bytes(); }
  int64_t used_bytes() const override { return ring_->used_bytes(); }

 private:
  const std::shared_ptr<Ring> ring_;
  const CudaStream stream_;
};

}  // namespace

absl::StatusOr<std::unique_ptr<KvStager>> CreateCudaKvStager(int64_t staging_bytes) {
  VSP_ASSIGN_OR_RETURN(std::shared_ptr<Ring> ring, Ring::Create(staging_bytes));
  VSP_ASSIGN_OR_RETURN(CudaStream stream, CudaStream::Create(0));
  return std::make_unique<CudaKvStager>(std::move(ring), std::move(stream));
}

}  // namespace vsprefill::kv
