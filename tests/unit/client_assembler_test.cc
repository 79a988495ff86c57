// KvAssembler: a cache comes through whole, in any order, or not at all.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <random>
#include <thread>

#include "client/cc/convert.h"
#include "client/cc/host_kv.h"
#include "client/cc/kv_assembler.h"
#include "tests/support/fake_kv.h"

namespace vsprefill::client {
namespace {

using testing::AllKvFaults;
using testing::FakeKv;
using testing::FakeKvByte;
using ::testing::HasSubstr;
using testing::KvFault;
using testing::MakeFakeKv;
using testing::SmallShape;

ChunkHeader HeaderOf(const v1::KvChunk& c) {
  return {c.layer(), static_cast<int64_t>(c.token_begin()), static_cast<int64_t>(c.token_end()),
          c.checksum()};
}

/// The payload in pieces of `piece` bytes, as gRPC's slices may cut it.
absl::Status Add(KvAssembler& assembler, const v1::KvChunk& c, size_t piece = 1 << 20) {
  std::vector<absl::Span<const uint8_t>> pieces;
  const auto* data = reinterpret_cast<const uint8_t*>(c.payload().data());
  for (size_t i = 0; i < c.payload().size(); i += piece) {
    pieces.emplace_back(data + i, std::min(piece, c.payload().size() - i));
  }
  return assembler.Add(HeaderOf(c), pieces);
}

absl::Status AddAll(KvAssembler& assembler, const FakeKv& kv) {
  for (const v1::KvChunk& c : kv.chunks) {
    if (absl::Status s = Add(assembler, c); !s.ok()) return s;
  }
  return absl::OkStatus();
}

/// Counts bytes that are not as the formula says.
int64_t WrongBytes(const KvShape& shape, const KvDestination& d) {
  int64_t wrong = 0;
  const int64_t row_bytes = shape.layout.head_dim * kernels::SizeOf(shape.layout.dtype);
  for (int l = 0; l < shape.layout.num_layers; ++l) {
    for (bool is_v : {false, true}) {
      const uint8_t* base = is_v ? d.layers[l].v : d.layers[l].k;
      for (int h = 0; h < shape.layout.num_kv_heads; ++h) {
        for (int64_t t = shape.start_token; t < shape.prompt_tokens; ++t) {
          const uint8_t* row = base + (h * d.rows + t - d.row0_token) * row_bytes;
          for (int64_t i = 0; i < row_bytes; ++i) wrong += row[i] != FakeKvByte(l, is_v, h, t, i);
        }
      }
    }
  }
  return wrong;
}

struct Receiving {
  explicit Receiving(const KvShape& shape)
      : kv(*HostKv::Create(shape)), assembler(*KvAssembler::Create(shape, kv->destination())) {}
  std::shared_ptr<HostKv> kv;
  std::unique_ptr<KvAssembler> assembler;
};

TEST(KvAssembler, WholeCacheInOrder) {
  Receiving s(SmallShape());
  const FakeKv fake = MakeFakeKv(SmallShape());
  ASSERT_TRUE(AddAll(*s.assembler, fake).ok());
  EXPECT_EQ(s.assembler->complete_layers(), 3);
  EXPECT_EQ(s.assembler->bytes(), SmallShape().bytes());
  EXPECT_EQ(s.assembler->Finish(FromProto(fake.manifest)), absl::OkStatus());
  EXPECT_EQ(WrongBytes(SmallShape(), s.kv->destination()), 0);
}

TEST(KvAssembler, AnyOrderAndAnyPieces) {
  std::mt19937 random(7);
  for (size_t piece : {1, 3, 16, 17, 100}) {
    Receiving s(SmallShape());
    FakeKv fake = MakeFakeKv(SmallShape());
    std::shuffle(fake.chunks.begin(), fake.chunks.end(), random);
    for (const v1::KvChunk& c : fake.chunks) ASSERT_TRUE(Add(*s.assembler, c, piece).ok());
    EXPECT_EQ(s.assembler->Finish(FromProto(fake.manifest)), absl::OkStatus());
    EXPECT_EQ(WrongBytes(SmallShape(), s.kv->destination()), 0) << "pieces of " << piece;
  }
}

TEST(KvAssembler, ManyThreads) {
  KvShape shape = SmallShape();
  shape.layout.num_layers = 8;
  shape.prompt_tokens = 501;
  shape.chunk_tokens = 3;
  Receiving s(shape);
  const FakeKv fake = MakeFakeKv(shape);
  std::vector<std::thread> threads;
  for (size_t n = 0; n < 4; ++n) {
    threads.emplace_back([&, n] {
      for (size_t i = n; i < fake.chunks.size(); i += 4) {
        EXPECT_TRUE(Add(*s.assembler, fake.chunks[i]).ok());
      }
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(s.assembler->Finish(FromProto(fake.manifest)), absl::OkStatus());
  EXPECT_EQ(WrongBytes(shape, s.kv->destination()), 0);
}

TEST(KvAssembler, StartTokenIntoALargerCache) {
  KvShape shape = SmallShape();
  shape.start_token = 13;
  // The decoder's own cache: rows for all tokens and some more, row 0 is token 0.
  constexpr int64_t kRows = 64;
  const int64_t part_bytes = kRows * shape.layout.layer_token_bytes() / 2;
  std::vector<uint8_t> memory(2 * shape.layout.num_layers * part_bytes, 0xee);
  KvDestination d;
  d.rows = kRows;
  for (int l = 0; l < shape.layout.num_layers; ++l) {
    uint8_t* k = memory.data() + 2 * l * part_bytes;
    d.layers.push_back({k, k + part_bytes});
  }
  auto assembler = *KvAssembler::Create(shape, d);
  const FakeKv fake = MakeFakeKv(shape);
  ASSERT_TRUE(AddAll(*assembler, fake).ok());
  EXPECT_EQ(assembler->Finish(FromProto(fake.manifest)), absl::OkStatus());
  EXPECT_EQ(WrongBytes(shape, d), 0);
  // Nothing else was touched: rows before start_token and behind the prompt.
  const int64_t untouched = std::count(memory.begin(), memory.end(), 0xee);
  EXPECT_EQ(untouched, static_cast<int64_t>(memory.size()) - shape.bytes());
}

TEST(KvAssembler, EveryFaultIsDataLossAndSticks) {
  for (KvFault fault : AllKvFaults()) {
    SCOPED_TRACE(testing::Name(fault));
    Receiving s(SmallShape());
    const FakeKv fake = MakeFakeKv(SmallShape(), fault);
    const absl::Status added = AddAll(*s.assembler, fake);
    const absl::Status finished = s.assembler->Finish(FromProto(fake.manifest));
    EXPECT_EQ(finished.code(), absl::StatusCode::kDataLoss) << finished;
    if (!added.ok()) {
      EXPECT_EQ(finished, added);
    }
    // The right manifest and the right chunks do not mend it.
    const FakeKv good = MakeFakeKv(SmallShape());
    EXPECT_FALSE(Add(*s.assembler, good.chunks[0]).ok());
    EXPECT_FALSE(s.assembler->Finish(FromProto(good.manifest)).ok());
  }
}

TEST(KvAssembler, ErrorsNameWhatIsWrong) {
  const auto error = [](KvFault fault) {
    Receiving s(SmallShape());
    const FakeKv fake = MakeFakeKv(SmallShape(), fault);
    absl::Status status = AddAll(*s.assembler, fake);
    if (status.ok()) status = s.assembler->Finish(FromProto(fake.manifest));
    return std::string(status.message());
  };
  EXPECT_EQ(error(KvFault::kMissingChunk), "layer 2: tokens [0, 10) never came");
  EXPECT_EQ(error(KvFault::kShortLayer), "layer 2: tokens [30, 37) never came");
  EXPECT_EQ(error(KvFault::kMissingLayer), "layer 2: tokens [0, 37) never came");
  EXPECT_EQ(error(KvFault::kOverlap), "layer 2: tokens in [29, 37) came twice");
  EXPECT_THAT(error(KvFault::kWrongChecksum), HasSubstr("checksum of tokens [0, 10) is "));
  EXPECT_EQ(error(KvFault::kShortPayload),
            "layer 2: payload of tokens [0, 10) has 638 bytes instead of 640");
  EXPECT_EQ(error(KvFault::kLayerOutOfRange), "KV chunk of layer 50; layers are [0, 3)");
  EXPECT_EQ(error(KvFault::kTokensOutOfRange),
            "layer 2: KV chunk of tokens [30, 38); tokens are [0, 37)");
  EXPECT_EQ(error(KvFault::kManifestLayers), "the manifest names 2 layers instead of 3");
}

TEST(KvAssembler, RefusesADestinationThatIsTooSmall) {
  const KvShape shape = SmallShape();
  auto kv = *HostKv::Create(shape);
  KvDestination d = kv->destination();
  d.rows = 36;
  EXPECT_EQ(KvAssembler::Create(shape, d).status().code(), absl::StatusCode::kInvalidArgument);
  d = kv->destination();
  d.layers.pop_back();
  EXPECT_EQ(KvAssembler::Create(shape, d).status().code(), absl::StatusCode::kInvalidArgument);
  d = kv->destination();
  d.row0_token = 1;
  EXPECT_EQ(KvAssembler::Create(shape, d).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(KvAssembler, ChecksumIsXxh3) {
  // XXH3-64 with seed 0 of the empty input and of "a", as xxHash publishes them.
  EXPECT_EQ(Checksum({}), 0x2d06800538d394c2u);
  const uint8_t a = 'a';
  const absl::Span<const uint8_t> piece(&a, 1);
  EXPECT_EQ(Checksum({piece}), 0xe6c632b61e964e1fu);
}

}  // namespace
}  // namespace vsprefill::client
