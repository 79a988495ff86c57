#include "server/kv/kv_wire.h"

namespace vsprefill::kv {
namespace {

constexpr char kVarint = 0, kFixed64 = 1, kLengthDelimited = 2;
constexpr int kEnvelopeField = 2;  // PrefillEvent.kv and PushRequest.kv

void AppendVarint(uint64_t value, std::string* out) {
  while (value >= 0x80) {
    out->push_back(static_cast<char>(value | 0x80));
    value >>= 7;
  }
  out->push_back(static_cast<char>(value));
}

void AppendFixed64(uint64_t value, std::string* out) {
  for (int i = 0; i < 8; ++i) out->push_back(static_cast<char>(value >> (8 * i)));
}

char Tag(int field, char wire_type) { return static_cast<char>(field << 3 | wire_type); }

// proto3 leaves out fields that hold their default.
void AppendUintField(int field, uint64_t value, std::string* out) {
  if (value == 0) return;
  out->push_back(Tag(field, kVarint));
  AppendVarint(value, out);
}

}  // namespace

std::string EncodeChunkHeader(const ChunkRange& range, uint64_t checksum, int64_t payload_bytes) {
  std::string chunk;
  AppendUintField(1, range.layer, &chunk);
  AppendUintField(2, range.token_begin, &chunk);
  AppendUintField(3, range.token_end, &chunk);
  if (checksum != 0) {
    chunk.push_back(Tag(4, kFixed64));
    AppendFixed64(checksum, &chunk);
  }
  if (payload_bytes != 0) {
    chunk.push_back(Tag(15, kLengthDelimited));
    AppendVarint(payload_bytes, &chunk);
  }
  std::string header;
  header.push_back(Tag(kEnvelopeField, kLengthDelimited));
  AppendVarint(chunk.size() + payload_bytes, &header);
  return header + chunk;
}

void AppendManifestRecord(int64_t token_begin, int64_t token_end, uint64_t checksum,
                          std::string* records) {
  AppendFixed64(token_begin, records);
  AppendFixed64(token_end, records);
  AppendFixed64(checksum, records);
}

}  // namespace vsprefill::kv
