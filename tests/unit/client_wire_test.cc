// The hand-written reader of chunk messages against protobuf's: never more lenient, and where both
// read a message they read the same.
#include <gtest/gtest.h>

#include <random>
#include <string>

#include "client/cc/wire.h"
#include "vsprefill/v1/kv.pb.h"
#include "vsprefill/v1/prefill.pb.h"

namespace vsprefill::client {
namespace {

v1::PrefillEvent ChunkEvent(size_t payload_bytes) {
  v1::PrefillEvent event;
  v1::KvChunk& c = *event.mutable_kv();
  c.set_layer(29);
  c.set_token_begin(4096);
  c.set_token_end(4352);
  c.set_checksum(0x0123456789abcdef);
  for (size_t i = 0; i < payload_bytes; ++i) c.mutable_payload()->push_back(static_cast<char>(i));
  return event;
}

absl::StatusOr<std::optional<WireChunk>> Parse(const std::string& bytes, size_t piece = 1 << 30) {
  std::vector<absl::Span<const uint8_t>> pieces;
  for (size_t i = 0; i < bytes.size(); i += piece) {
    pieces.emplace_back(reinterpret_cast<const uint8_t*>(bytes.data()) + i,
                        std::min(piece, bytes.size() - i));
  }
  return ParseChunk(pieces);
}

std::string PayloadOf(const WireChunk& chunk) {
  std::string payload;
  for (const auto& p : chunk.payload) {
    payload.append(reinterpret_cast<const char*>(p.data()), p.size());
  }
  return payload;
}

void ExpectSame(const WireChunk& wire, const v1::KvChunk& proto) {
  EXPECT_EQ(wire.header.layer, proto.layer());
  EXPECT_EQ(wire.header.token_begin, static_cast<int64_t>(proto.token_begin()));
  EXPECT_EQ(wire.header.token_end, static_cast<int64_t>(proto.token_end()));
  EXPECT_EQ(wire.header.checksum, proto.checksum());
  EXPECT_EQ(PayloadOf(wire), proto.payload());
}

TEST(Wire, ReadsWhatProtobufWrites) {
  const v1::PrefillEvent event = ChunkEvent(1000);
  const std::string bytes = event.SerializeAsString();
  for (size_t piece : {1, 2, 7, 64, 5000}) {
    const auto chunk = Parse(bytes, piece);
    ASSERT_TRUE(chunk.ok()) << chunk.status();
    ASSERT_TRUE(chunk->has_value());
    ExpectSame(**chunk, event.kv());
  }
}

TEST(Wire, ReadsSlicesOfAByteBuffer) {
  const std::string bytes = ChunkEvent(1000).SerializeAsString();
  grpc::Slice slices[2] = {grpc::Slice(bytes.substr(0, 11)), grpc::Slice(bytes.substr(11))};
  for (size_t count : {1, 2}) {
    const grpc::Slice whole(bytes);
    const grpc::ByteBuffer buffer(count == 1 ? &whole : slices, count);
    const auto message = MessageSlices::Create(buffer);
    ASSERT_TRUE(message.ok());
    const auto chunk = ParseChunk(message->pieces());
    ASSERT_TRUE(chunk.ok());
    ExpectSame(**chunk, ChunkEvent(1000).kv());
  }
}

TEST(Wire, OtherEventsHaveNoChunk) {
  v1::PrefillEvent event;
  event.mutable_first_token()->set_token_id(3);
  EXPECT_FALSE(Parse(event.SerializeAsString())->has_value());
  v1::PushRequest push;
  push.mutable_finish()->set_prompt_tokens(3);
  EXPECT_FALSE(Parse(push.SerializeAsString())->has_value());
  EXPECT_FALSE(Parse("")->has_value());
}

TEST(Wire, SkipsUnknownFields) {
  v1::PrefillEvent event = ChunkEvent(10);
  const std::string body = event.kv().SerializeAsString() + std::string("\xa0\x06\x05", 3);
  std::string bytes = "\x12";  // field 2, length-delimited
  bytes.push_back(static_cast<char>(body.size()));
  bytes += body + std::string("\xa2\x06\x01x", 4);  // unknown field 100 of the event
  const auto chunk = Parse(bytes);
  ASSERT_TRUE(chunk.ok()) << chunk.status();
  ExpectSame(**chunk, event.kv());
}

TEST(Wire, RefusesAChunkBesideAnotherEvent) {
  v1::PrefillEvent first_token;
  first_token.mutable_first_token()->set_token_id(3);
  const std::string chunk = ChunkEvent(10).SerializeAsString();
  for (const std::string& bytes : {chunk + first_token.SerializeAsString(),
                                   first_token.SerializeAsString() + chunk, chunk + chunk}) {
    EXPECT_EQ(Parse(bytes).status().code(), absl::StatusCode::kDataLoss);
  }
}

TEST(Wire, EveryTruncationIsRefused) {
  const std::string bytes = ChunkEvent(300).SerializeAsString();
  for (size_t n = 1; n < bytes.size(); ++n) {
    EXPECT_EQ(Parse(bytes.substr(0, n)).status().code(), absl::StatusCode::kDataLoss) << n;
  }
}

TEST(Wire, AgreesWithProtobufOnDamagedMessages) {
  std::mt19937 random(20261123);
  const std::string good = ChunkEvent(40).SerializeAsString();
  int both_read = 0, refused = 0;
  for (int i = 0; i < 200000; ++i) {
    std::string bytes = good;
    const int edits = 1 + static_cast<int>(random() % 3);
    for (int e = 0; e < edits; ++e) {
      const size_t at = random() % std::min<size_t>(bytes.size(), 30);
      switch (random() % 3) {
        case 0:
          bytes[at] = static_cast<char>(random());
          break;
        case 1:
          bytes.erase(at, 1);
          break;
        default:
          bytes.insert(at, 1, static_cast<char>(random()));
      }
    }
    v1::PrefillEvent event;
    const bool proto_reads = event.ParseFromString(bytes);
    const auto chunk = Parse(bytes, 1 + random() % 50);
    if (!chunk.ok()) {
      ++refused;
      continue;
    }
    if (!chunk->has_value()) {
      // What has no chunk here has none there, or is left to protobuf to refuse.
      EXPECT_TRUE(!proto_reads || !event.has_kv());
      continue;
    }
    ASSERT_TRUE(proto_reads) << i;
    ++both_read;
    // protobuf cuts a layer of more than 32 bits; the assembler refuses it.
    if ((*chunk)->header.layer <= UINT32_MAX) ExpectSame(**chunk, event.kv());
    if (HasFailure()) FAIL() << "message " << i;
  }
  EXPECT_GT(both_read, 1000);
  EXPECT_GT(refused, 1000);
}

}  // namespace
}  // namespace vsprefill::client
