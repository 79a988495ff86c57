// The hand-written bytes of a chunk message are protobuf's own, and the worked example of
// docs/kv_wire_format.md is real.
#include "server/kv/kv_wire.h"

#include <gtest/gtest.h>
#include <xxhash.h>

#include <fstream>
#include <sstream>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "server/kv/kv_layout.h"
#include "vsprefill/v1/kv.pb.h"
#include "vsprefill/v1/prefill.pb.h"

namespace vsprefill::kv {
namespace {

TEST(KvWireTest, EqualsProtobufsSerializer) {
  for (int layer : {0, 1, 127, 128, 300}) {
    for (int64_t begin : {int64_t{0}, int64_t{1}, int64_t{128}, int64_t{1} << 40}) {
      for (uint64_t checksum : {uint64_t{0}, uint64_t{1}, ~uint64_t{0}}) {
        for (int64_t bytes : {0, 1, 127, 128, 70000}) {
          const std::string payload(bytes, 'x');
          const ChunkRange range = {layer, begin, begin + 5};
          const std::string wire = EncodeChunkHeader(range, checksum, bytes) + payload;
          v1::PrefillEvent event;
          v1::KvChunk* chunk = event.mutable_kv();
          chunk->set_layer(layer);
          chunk->set_token_begin(begin);
          chunk->set_token_end(begin + 5);
          chunk->set_checksum(checksum);
          chunk->set_payload(payload);
          EXPECT_EQ(wire, event.SerializeAsString());
          v1::PushRequest push;
          *push.mutable_kv() = *chunk;
          EXPECT_EQ(wire, push.SerializeAsString());
        }
      }
    }
  }
}

TEST(KvWireTest, TheLargestHeaderFitsItsReserve) {
  const ChunkRange range = {INT32_MAX, INT64_MAX - 1, INT64_MAX};
  EXPECT_LE(static_cast<int64_t>(EncodeChunkHeader(range, ~uint64_t{0}, kMaxMessageBytes).size()),
            kMaxChunkHeaderBytes);
}

std::string Hex(const std::string& bytes) {
  std::vector<std::string> parts;
  for (char c : bytes) parts.push_back(absl::BytesToHexString(std::string(1, c)));
  return absl::StrJoin(parts, " ");
}

// One layer's keys and values of two tokens: 1 head, head_dim 2, bfloat16.
TEST(KvWireTest, TheWorkedExampleIsReal) {
  const std::string payload("\x80\x3f\x00\x40\x40\x40\x80\x40\xa0\x40\xc0\x40\xe0\x40\x00\x41", 16);
  const uint64_t checksum = XXH3_64bits(payload.data(), payload.size());
  const std::string header = EncodeChunkHeader({3, 300, 302}, checksum, payload.size());
  std::string record;
  AppendManifestRecord(300, 302, checksum, &record);
  const uint64_t layer_checksum = XXH3_64bits(record.data(), record.size());

  std::ifstream file("docs/kv_wire_format.md");
  ASSERT_TRUE(file) << "run from the source folder";
  std::stringstream text;
  text << file.rdbuf();
  for (const std::string& fact :
       {Hex(header), Hex(payload), Hex(record),
        absl::StrCat("0x", absl::Hex(checksum, absl::kZeroPad16)),
        absl::StrCat("0x", absl::Hex(layer_checksum, absl::kZeroPad16))}) {
    EXPECT_NE(text.str().find(fact), std::string::npos) << fact;
  }
}

}  // namespace
}  // namespace vsprefill::kv
