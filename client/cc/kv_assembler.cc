#include "client/cc/kv_assembler.h"

#include <algorithm>
#include <cstring>
#include <iterator>
#include <utility>

#define XXH_STATIC_LINKING_ONLY  // XXH3_state_t on the stack
#include <xxhash.h>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"

namespace vsprefill::client {
namespace {

void PutLittleEndian(uint64_t value, uint8_t* out) {
  for (int i = 0; i < 8; ++i) out[i] = static_cast<uint8_t>(value >> (8 * i));
}

class ChunkRecordHash {
 public:
  ChunkRecordHash() { XXH3_64bits_reset(&state_); }
  void Add(int64_t token_begin, int64_t token_end, uint64_t checksum) {
    uint8_t record[24];
    PutLittleEndian(static_cast<uint64_t>(token_begin), record);
    PutLittleEndian(static_cast<uint64_t>(token_end), record + 8);
    PutLittleEndian(checksum, record + 16);
    XXH3_64bits_update(&state_, record, sizeof(record));
  }
  uint64_t Digest() const { return XXH3_64bits_digest(&state_); }

 private:
  XXH3_state_t state_;
};

}  // namespace

uint64_t Checksum(PayloadPieces pieces) {
  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  for (const auto& piece : pieces) XXH3_64bits_update(&state, piece.data(), piece.size());
  return XXH3_64bits_digest(&state);
}

uint64_t ManifestChecksum(absl::Span<const ChunkHeader> chunks) {
  ChunkRecordHash hash;
  for (const ChunkHeader& c : chunks) hash.Add(c.token_begin, c.token_end, c.checksum);
  return hash.Digest();
}

KvAssembler::KvAssembler(const KvShape& shape, KvDestination destination)
    : shape_(shape), destination_(std::move(destination)), layers_(shape.layout.num_layers) {}

absl::StatusOr<std::unique_ptr<KvAssembler>> KvAssembler::Create(const KvShape& shape,
                                                                 KvDestination destination) {
  if (shape.layout.num_layers < 1 || shape.layout.layer_token_bytes() < 1) {
    return absl::InvalidArgumentError("the KV layout has no layers, heads or dimensions");
  }
  if (shape.start_token < 0 || shape.start_token >= shape.prompt_tokens) {
    return absl::InvalidArgumentError(
        absl::StrFormat("start_token %d not in [0, %d)", shape.start_token, shape.prompt_tokens));
  }
  if (static_cast<int>(destination.layers.size()) != shape.layout.num_layers) {
    return absl::InvalidArgumentError(absl::StrFormat("the destination has %d layers, the cache %d",
                                                      destination.layers.size(),
                                                      shape.layout.num_layers));
  }
  if (destination.row0_token > shape.start_token ||
      destination.row0_token + destination.rows < shape.prompt_tokens) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "the destination holds tokens [%d, %d), the cache [%d, %d)", destination.row0_token,
        destination.row0_token + destination.rows, shape.start_token, shape.prompt_tokens));
  }
  return std::unique_ptr<KvAssembler>(new KvAssembler(shape, std::move(destination)));
}

absl::Status KvAssembler::Fail(absl::Status status) {
  if (failure_.ok()) failure_ = status;
  return status;
}

absl::Status KvAssembler::Reserve(const ChunkHeader& h, int64_t payload_bytes) {
  if (h.layer < 0 || h.layer >= shape_.layout.num_layers) {
    return absl::DataLossError(absl::StrFormat("KV chunk of layer %d; layers are [0, %d)", h.layer,
                                               shape_.layout.num_layers));
  }
  if (h.token_begin < shape_.start_token || h.token_end > shape_.prompt_tokens ||
      h.token_begin >= h.token_end) {
    return absl::DataLossError(
        absl::StrFormat("layer %d: KV chunk of tokens [%d, %d); tokens are [%d, %d)", h.layer,
                        h.token_begin, h.token_end, shape_.start_token, shape_.prompt_tokens));
  }
  const int64_t want = (h.token_end - h.token_begin) * shape_.layout.layer_token_bytes();
  if (payload_bytes != want) {
    return absl::DataLossError(
        absl::StrFormat("layer %d: payload of tokens [%d, %d) has %d bytes instead of %d", h.layer,
                        h.token_begin, h.token_end, payload_bytes, want));
  }
  auto& chunks = layers_[h.layer].chunks;
  auto next = chunks.lower_bound(h.token_begin);
  const bool hits_next = next != chunks.end() && next->first < h.token_end;
  const bool hits_previous =
      next != chunks.begin() && std::prev(next)->second.token_end > h.token_begin;
  if (hits_next || hits_previous) {
    return absl::DataLossError(absl::StrFormat("layer %d: tokens in [%d, %d) came twice", h.layer,
                                               h.token_begin, h.token_end));
  }
  chunks.emplace_hint(next, h.token_begin, Record{h.token_end, h.checksum});
  return absl::OkStatus();
}

uint64_t KvAssembler::CopyAndHash(const ChunkHeader& h, PayloadPieces payload) const {
  const KvDestination::Layer& layer = destination_.layers[h.layer];
  const int64_t row_bytes = int64_t{shape_.layout.head_dim} * kernels::SizeOf(shape_.layout.dtype);
  // The payload is 2 * heads runs, each of consecutive rows in the destination.
  const int64_t run_bytes = (h.token_end - h.token_begin) * row_bytes;
  const int64_t first_byte = (h.token_begin - destination_.row0_token) * row_bytes;
  const int64_t head_bytes = destination_.rows * row_bytes;
  const int64_t num_heads = shape_.layout.num_kv_heads;

  XXH3_state_t state;
  XXH3_64bits_reset(&state);
  int64_t run = 0, done_in_run = 0;
  for (const auto& piece : payload) {
    // Hash and copy piece by piece: a piece is small enough to stay in the cache between the two.
    XXH3_64bits_update(&state, piece.data(), piece.size());
    const uint8_t* from = piece.data();
    int64_t left = static_cast<int64_t>(piece.size());
    while (left > 0) {
      uint8_t* base =
          run < num_heads ? layer.k + run * head_bytes : layer.v + (run - num_heads) * head_bytes;
      const int64_t n = std::min(left, run_bytes - done_in_run);
      std::memcpy(base + first_byte + done_in_run, from, n);
      from += n;
      left -= n;
      done_in_run += n;
      if (done_in_run == run_bytes) {
        ++run;
        done_in_run = 0;
      }
    }
  }
  return XXH3_64bits_digest(&state);
}

absl::Status KvAssembler::Add(const ChunkHeader& h, PayloadPieces payload) {
  int64_t payload_bytes = 0;
  for (const auto& piece : payload) payload_bytes += static_cast<int64_t>(piece.size());
  {
    absl::MutexLock lock(&mu_);
    if (!failure_.ok()) return failure_;
    if (absl::Status s = Reserve(h, payload_bytes); !s.ok()) return Fail(std::move(s));
    ++adds_running_;
  }
  // The range is this call's alone, so the copy needs no lock.
  const uint64_t checksum = CopyAndHash(h, payload);
  absl::MutexLock lock(&mu_);
  --adds_running_;
  if (checksum != h.checksum) {
    return Fail(absl::DataLossError(
        absl::StrFormat("layer %d: checksum of tokens [%d, %d) is %016x, the sender says %016x",
                        h.layer, h.token_begin, h.token_end, checksum, h.checksum)));
  }
  LayerState& layer = layers_[h.layer];
  layer.verified_tokens += h.token_end - h.token_begin;
  bytes_ += payload_bytes;
  if (layer.verified_tokens == shape_.sent_tokens()) ++complete_layers_;
  return absl::OkStatus();
}

absl::Status KvAssembler::CheckLayer(int64_t l, const LayerManifest& m) const {
  const LayerState& layer = layers_[l];
  int64_t next_token = shape_.start_token;
  ChunkRecordHash hash;
  for (const auto& [begin, record] : layer.chunks) {
    if (begin != next_token) break;
    hash.Add(begin, record.token_end, record.checksum);
    next_token = record.token_end;
  }
  if (next_token != shape_.prompt_tokens) {
    const auto after = layer.chunks.lower_bound(next_token);
    const int64_t end = after == layer.chunks.end() ? shape_.prompt_tokens : after->first;
    return absl::DataLossError(
        absl::StrFormat("layer %d: tokens [%d, %d) never came", l, next_token, end));
  }
  const int64_t bytes = shape_.sent_tokens() * shape_.layout.layer_token_bytes();
  if (m.layer != l) {
    return absl::DataLossError(
        absl::StrFormat("the manifest names layer %d where layer %d belongs", m.layer, l));
  }
  if (m.tokens != shape_.sent_tokens() || m.bytes != bytes ||
      m.chunks != static_cast<int64_t>(layer.chunks.size())) {
    return absl::DataLossError(absl::StrFormat(
        "layer %d: the manifest says %d tokens, %d chunks, %d bytes; %d, %d, %d came", l, m.tokens,
        m.chunks, m.bytes, shape_.sent_tokens(), layer.chunks.size(), bytes));
  }
  if (m.checksum != hash.Digest()) {
    return absl::DataLossError(absl::StrFormat(
        "layer %d: the manifest's checksum is %016x, that of the chunks that came %016x", l,
        m.checksum, hash.Digest()));
  }
  return absl::OkStatus();
}

absl::Status KvAssembler::Finish(const KvManifest& manifest) {
  absl::MutexLock lock(&mu_);
  if (!failure_.ok()) return failure_;
  if (adds_running_ != 0) {
    return Fail(absl::InternalError("Finish while a chunk is still being added"));
  }
  for (int l = 0; l < shape_.layout.num_layers; ++l) {
    if (layers_[l].chunks.empty()) {
      return Fail(absl::DataLossError(absl::StrFormat("layer %d: tokens [%d, %d) never came", l,
                                                      shape_.start_token, shape_.prompt_tokens)));
    }
  }
  if (static_cast<int>(manifest.layers.size()) != shape_.layout.num_layers) {
    return Fail(
        absl::DataLossError(absl::StrFormat("the manifest names %d layers instead of %d",
                                            manifest.layers.size(), shape_.layout.num_layers)));
  }
  for (int l = 0; l < shape_.layout.num_layers; ++l) {
    if (absl::Status s = CheckLayer(l, manifest.layers[l]); !s.ok()) return Fail(std::move(s));
  }
  if (manifest.bytes != bytes_) {
    return Fail(absl::DataLossError(
        absl::StrFormat("the manifest says %d bytes, %d came", manifest.bytes, bytes_)));
  }
  return absl::OkStatus();
}

int64_t KvAssembler::bytes() const {
  absl::MutexLock lock(&mu_);
  return bytes_;
}

int KvAssembler::complete_layers() const {
  absl::MutexLock lock(&mu_);
  return complete_layers_;
}

}  // namespace vsprefill::client
