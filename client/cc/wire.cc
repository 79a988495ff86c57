#include "client/cc/wire.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"

namespace vsprefill::client {
namespace {

constexpr uint32_t kVarint = 0, kFixed64 = 1, kLengthDelimited = 2, kFixed32 = 5;
constexpr uint32_t kKvField = 2;         // of PrefillEvent and of PushRequest
constexpr uint32_t kLastKnownField = 4;  // of both oneofs

/// Walks over bytes that lie in pieces. Every read says whether there were enough bytes.
class Cursor {
 public:
  explicit Cursor(absl::Span<const absl::Span<const uint8_t>> pieces) : pieces_(pieces) {
    for (const auto& p : pieces_) left_ += p.size();
    SkipEmpty();
  }
  uint64_t left() const { return left_; }

  bool ReadVarint(uint64_t* value) {
    uint64_t result = 0;
    for (int shift = 0; shift < 70; shift += 7) {
      uint8_t byte;
      if (!ReadByte(&byte)) return false;
      // The tenth byte holds the last bit; more would not fit 64 bits.
      if (shift == 63 && byte > 1) return false;
      result |= uint64_t{byte & 0x7fu} << shift;
      if ((byte & 0x80) == 0) {
        *value = result;
        return true;
      }
    }
    return false;
  }

  bool ReadFixed64(uint64_t* value) {
    uint64_t result = 0;
    for (int i = 0; i < 8; ++i) {
      uint8_t byte;
      if (!ReadByte(&byte)) return false;
      result |= uint64_t{byte} << (8 * i);
    }
    *value = result;
    return true;
  }

  /// Steps over `n` bytes, appending where they lie to `taken` unless it is null.
  bool Take(uint64_t n, std::vector<absl::Span<const uint8_t>>* taken) {
    if (n > left_) return false;
    left_ -= n;
    while (n > 0) {
      const auto rest = pieces_[piece_].subspan(offset_);
      const size_t step = std::min<uint64_t>(n, rest.size());
      if (taken != nullptr) taken->push_back(rest.first(step));
      offset_ += step;
      n -= step;
      SkipEmpty();
    }
    return true;
  }

 private:
  bool ReadByte(uint8_t* byte) {
    if (left_ == 0) return false;
    *byte = pieces_[piece_][offset_++];
    --left_;
    SkipEmpty();
    return true;
  }
  void SkipEmpty() {
    while (piece_ < pieces_.size() && offset_ == pieces_[piece_].size()) {
      ++piece_;
      offset_ = 0;
    }
  }

  absl::Span<const absl::Span<const uint8_t>> pieces_;
  size_t piece_ = 0, offset_ = 0;
  uint64_t left_ = 0;
};

bool ReadTag(Cursor& in, uint32_t* field, uint32_t* type) {
  uint64_t tag;
  if (!in.ReadVarint(&tag) || tag > std::numeric_limits<uint32_t>::max() || (tag >> 3) == 0) {
    return false;
  }
  *field = static_cast<uint32_t>(tag >> 3);
  *type = static_cast<uint32_t>(tag & 7);
  return true;
}

bool SkipField(Cursor& in, uint32_t type) {
  uint64_t n;
  switch (type) {
    case kVarint:
      return in.ReadVarint(&n);
    case kFixed64:
      return in.Take(8, nullptr);
    case kFixed32:
      return in.Take(4, nullptr);
    case kLengthDelimited:
      return in.ReadVarint(&n) && in.Take(n, nullptr);
    default:
      return false;  // groups: not in proto3
  }
}

absl::Status Malformed(absl::string_view what) {
  return absl::DataLossError(absl::StrCat("malformed KV message: ", what));
}

bool ReadPosition(Cursor& in, uint32_t type, int64_t* value) {
  uint64_t v;
  if (type != kVarint || !in.ReadVarint(&v) || v > std::numeric_limits<int64_t>::max()) {
    return false;
  }
  *value = static_cast<int64_t>(v);
  return true;
}

absl::Status ParseChunkBody(Cursor& in, uint64_t length, WireChunk* chunk) {
  if (length > in.left()) return Malformed("the chunk is longer than its message");
  const uint64_t end = in.left() - length;  // of `left`
  bool has_payload = false;
  while (in.left() > end) {
    uint32_t field, type;
    if (!ReadTag(in, &field, &type)) return Malformed("bad tag in the chunk");
    bool ok = true;
    switch (field) {
      case 1:
        ok = ReadPosition(in, type, &chunk->header.layer);
        break;
      case 2:
        ok = ReadPosition(in, type, &chunk->header.token_begin);
        break;
      case 3:
        ok = ReadPosition(in, type, &chunk->header.token_end);
        break;
      case 4:
        ok = type == kFixed64 && in.ReadFixed64(&chunk->header.checksum);
        break;
      case 15: {
        uint64_t n = 0;
        if (has_payload) return Malformed("two payloads in one chunk");
        has_payload = true;
        ok = type == kLengthDelimited && in.ReadVarint(&n) && in.left() >= end &&
             n <= in.left() - end && in.Take(n, &chunk->payload);
        break;
      }
      default:
        ok = SkipField(in, type);
    }
    if (!ok) return Malformed(absl::StrCat("bad field ", field, " in the chunk"));
  }
  if (in.left() != end) return Malformed("a field runs over the end of the chunk");
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<MessageSlices> MessageSlices::Create(const grpc::ByteBuffer& message) {
  MessageSlices result;
  if (message.Valid()) {
    grpc::Slice single;
    if (message.TrySingleSlice(&single).ok()) {
      result.slices_.push_back(std::move(single));
    } else if (!message.Dump(&result.slices_).ok()) {
      return absl::InternalError("gRPC could not hand out a message's slices");
    }
  }
  result.pieces_.reserve(result.slices_.size());
  for (const grpc::Slice& s : result.slices_) result.pieces_.emplace_back(s.begin(), s.size());
  return result;
}

absl::StatusOr<std::optional<WireChunk>> ParseChunk(
    absl::Span<const absl::Span<const uint8_t>> pieces) {
  Cursor in(pieces);
  std::optional<WireChunk> chunk;
  bool other_event = false;
  while (in.left() > 0) {
    uint32_t field, type;
    if (!ReadTag(in, &field, &type)) return Malformed("bad tag");
    if (field == kKvField) {
      uint64_t length;
      if (chunk.has_value()) return Malformed("two chunks in one message");
      if (type != kLengthDelimited || !in.ReadVarint(&length)) return Malformed("bad chunk length");
      chunk.emplace();
      if (absl::Status s = ParseChunkBody(in, length, &*chunk); !s.ok()) return s;
    } else {
      if (field <= kLastKnownField) other_event = true;
      if (!SkipField(in, type)) return Malformed(absl::StrCat("bad field ", field));
    }
  }
  if (chunk.has_value() && other_event)
    return Malformed("a chunk and another event in one message");
  return chunk;
}

}  // namespace vsprefill::client
