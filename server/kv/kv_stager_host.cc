#include <xxhash.h>

#include <utility>

#include "server/kv/kv_stager.h"

namespace vsprefill::kv {
namespace {

class HostKvStager final : public KvStager {
 public:
  explicit HostKvStager(int64_t capacity_bytes)
      : capacity_bytes_(capacity_bytes), used_(std::make_shared<std::atomic<int64_t>>(0)) {}

  absl::StatusOr<LayerMark> MarkLayer(kernels::Stream) override { return LayerMark(); }

  absl::StatusOr<std::shared_ptr<StagedChunk>> Stage(std::shared_ptr<KvCache> cache,
                                                     const LayerMark&, const ChunkRange& range,
                                                     std::optional<uint64_t> checksum) override {
    const KvLayout& layout = cache->layout();
    const int64_t bytes = range.num_tokens() * layout.layer_token_bytes();
    const int64_t used = used_->load();
    if (used > 0 && used + bytes > capacity_bytes_) return nullptr;

    auto chunk = std::make_shared<StagedChunk>();
    chunk->range = range;
    chunk->bytes = bytes;
    const int64_t element = kernels::SizeOf(layout.dtype);
    const int64_t segment_bytes = range.num_tokens() * layout.head_dim * element;
    for (const void* tensor : {cache->k(range.layer), cache->v(range.layer)}) {
      for (int head = 0; head < layout.num_kv_heads; ++head) {
        const int64_t offset =
            (head * cache->head_stride() + range.token_begin * layout.head_dim) * element;
        chunk->segments.push_back({static_cast<const char*>(tensor) + offset, segment_bytes});
      }
    }
    chunk->checksum = checksum.has_value() ? *checksum : Hash(chunk->segments);
    used_->fetch_add(bytes);
    // Counts down with the memory; owns the counter, so that a chunk may outlive its stager.
    chunk->memory = std::shared_ptr<void>(cache.get(), [cache, used = used_, bytes](void*) mutable {
      cache.reset();
      used->fetch_sub(bytes);
    });
    return chunk;
  }

  int64_t capacity_bytes() const override { return capacity_bytes_; }
  int64_t used_bytes() const override { return used_->load(); }

 private:
  static uint64_t Hash(const std::vector<Segment>& segments) {
    XXH3_state_t* state = XXH3_createState();
    XXH3_64bits_reset(state);
    for (const Segment& segment : segments) {
      XXH3_64bits_update(state, segment.data, segment.bytes);
    }
    const uint64_t hash = XXH3_64bits_digest(state);
    XXH3_freeState(state);
    return hash;
  }

  const int64_t capacity_bytes_;
  const std::shared_ptr<std::atomic<int64_t>> used_;
};

}  // namespace

StagedChunk::~StagedChunk() {
  memory.reset();
  if (on_released) on_released();
}

std::unique_ptr<KvStager> CreateHostKvStager(int64_t capacity_bytes) {
  return std::make_unique<HostKvStager>(capacity_bytes);
}

}  // namespace vsprefill::kv
