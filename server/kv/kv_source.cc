#include "server/kv/kv_source.h"

#include <xxhash.h>

#include <utility>

#include "server/kv/kv_wire.h"

namespace vsprefill::kv {

KvSource::KvSource(ChunkPlan plan)
    : plan_(std::move(plan)), checksums_(plan_.pieces().size() * plan_.layout().num_layers) {
  marks_.reserve(plan_.num_steps() * plan_.layout().num_layers);
}

void KvSource::SetCache(std::shared_ptr<KvCache> cache) {
  absl::MutexLock lock(&mu_);
  cache_ = std::move(cache);
}

void KvSource::DropCache() {
  std::shared_ptr<KvCache> cache;  // freed outside of the lock
  std::vector<LayerMark> marks;
  absl::MutexLock lock(&mu_);
  cache.swap(cache_);
  marks.swap(marks_);
  ready_units_ = 0;
}

std::shared_ptr<KvCache> KvSource::cache() const {
  absl::MutexLock lock(&mu_);
  return cache_;
}

void KvSource::MarkReady(int64_t step, int layer, LayerMark mark) {
  absl::MutexLock lock(&mu_);
  // After DropCache the request has failed and nobody reads any more.
  if (step * plan_.layout().num_layers + layer != ready_units_) return;
  marks_.push_back(std::move(mark));
  ++ready_units_;
}

std::optional<LayerMark> KvSource::ReadyMark(int64_t step, int layer) const {
  const int64_t unit = step * plan_.layout().num_layers + layer;
  absl::MutexLock lock(&mu_);
  if (unit >= ready_units_) return std::nullopt;
  return marks_[unit];
}

std::optional<uint64_t> KvSource::Checksum(size_t piece, int layer) const {
  absl::MutexLock lock(&mu_);
  return checksums_[layer * plan_.pieces().size() + piece];
}

void KvSource::RecordChecksum(size_t piece, int layer, uint64_t checksum) {
  absl::MutexLock lock(&mu_);
  checksums_[layer * plan_.pieces().size() + piece] = checksum;
}

std::optional<std::vector<LayerManifest>> KvSource::Manifest() const {
  const auto& pieces = plan_.pieces();
  const int64_t tokens = plan_.prompt_tokens() - plan_.start_token();
  absl::MutexLock lock(&mu_);
  std::vector<LayerManifest> manifest;
  for (int layer = 0; layer < plan_.layout().num_layers; ++layer) {
    std::string records;
    for (size_t piece = 0; piece < pieces.size(); ++piece) {
      const auto& checksum = checksums_[layer * pieces.size() + piece];
      if (!checksum.has_value()) return std::nullopt;
      AppendManifestRecord(pieces[piece].token_begin, pieces[piece].token_end, *checksum, &records);
    }
    manifest.push_back({layer, tokens, static_cast<int64_t>(pieces.size()),
                        tokens * plan_.layout().layer_token_bytes(),
                        XXH3_64bits(records.data(), records.size())});
  }
  return manifest;
}

}  // namespace vsprefill::kv
