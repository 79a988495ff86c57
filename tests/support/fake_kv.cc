#include "tests/support/fake_kv.h"

#include <algorithm>
#include <utility>

#include "client/cc/kv_assembler.h"

namespace vsprefill::testing {
namespace {

const std::vector<std::pair<KvFault, std::string>>& FaultNames() {
  static const auto* names = new std::vector<std::pair<KvFault, std::string>>{
      {KvFault::kMissingChunk, "MissingChunk"},
      {KvFault::kMissingLayer, "MissingLayer"},
      {KvFault::kShortLayer, "ShortLayer"},
      {KvFault::kWrongChecksum, "WrongChecksum"},
      {KvFault::kShortPayload, "ShortPayload"},
      {KvFault::kLongPayload, "LongPayload"},
      {KvFault::kOverlap, "Overlap"},
      {KvFault::kDuplicate, "Duplicate"},
      {KvFault::kLayerOutOfRange, "LayerOutOfRange"},
      {KvFault::kTokensOutOfRange, "TokensOutOfRange"},
      {KvFault::kEmptyRange, "EmptyRange"},
      {KvFault::kManifestChecksum, "ManifestChecksum"},
      {KvFault::kManifestChunks, "ManifestChunks"},
      {KvFault::kManifestTokens, "ManifestTokens"},
      {KvFault::kManifestBytes, "ManifestBytes"},
      {KvFault::kManifestLayers, "ManifestLayers"},
  };
  return *names;
}

uint64_t Sum(const std::string& payload) {
  const absl::Span<const uint8_t> piece(reinterpret_cast<const uint8_t*>(payload.data()),
                                        payload.size());
  return client::Checksum({piece});
}

v1::KvChunk MakeChunk(const client::KvShape& shape, const RowFn& row, int layer, int64_t begin,
                      int64_t end) {
  v1::KvChunk c;
  c.set_layer(static_cast<uint32_t>(layer));
  c.set_token_begin(static_cast<uint64_t>(begin));
  c.set_token_end(static_cast<uint64_t>(end));
  std::string payload;
  for (bool is_v : {false, true}) {
    for (int h = 0; h < shape.layout.num_kv_heads; ++h) {
      for (int64_t t = begin; t < end; ++t) {
        const absl::Span<const uint8_t> bytes = row(layer, is_v, h, t);
        payload.append(reinterpret_cast<const char*>(bytes.data()), bytes.size());
      }
    }
  }
  c.set_checksum(Sum(payload));
  c.set_payload(std::move(payload));
  return c;
}

v1::LayerManifest ManifestOf(const std::vector<v1::KvChunk>& chunks, int layer) {
  std::vector<client::ChunkHeader> headers;
  v1::LayerManifest m;
  m.set_layer(static_cast<uint32_t>(layer));
  for (const v1::KvChunk& c : chunks) {
    if (static_cast<int>(c.layer()) != layer) continue;
    headers.push_back({layer, static_cast<int64_t>(c.token_begin()),
                       static_cast<int64_t>(c.token_end()), c.checksum()});
    m.set_chunks(m.chunks() + 1);
    m.set_tokens(m.tokens() + c.token_end() - c.token_begin());
    m.set_bytes(m.bytes() + c.payload().size());
  }
  m.set_checksum(client::ManifestChecksum(headers));
  return m;
}

void MakeManifest(const client::KvShape& shape, FakeKv& kv) {
  kv.manifest.Clear();
  for (int l = 0; l < shape.layout.num_layers; ++l) {
    *kv.manifest.add_layers() = ManifestOf(kv.chunks, l);
    kv.manifest.set_bytes(kv.manifest.bytes() + kv.manifest.layers(l).bytes());
  }
}

}  // namespace

std::vector<KvFault> AllKvFaults() {
  std::vector<KvFault> faults;
  for (const auto& [fault, name] : FaultNames()) faults.push_back(fault);
  return faults;
}

std::string Name(KvFault fault) {
  for (const auto& [f, name] : FaultNames()) {
    if (f == fault) return name;
  }
  return "None";
}

uint8_t FakeKvByte(int layer, bool is_v, int head, int64_t token, int64_t offset) {
  const uint64_t x =
      static_cast<uint64_t>(((layer * 2 + is_v) * 131 + head) * 100003 + token) * 257 +
      static_cast<uint64_t>(offset);
  // Keep bfloat16 and float32 readings finite: no byte is 0x7f or 0xff.
  return static_cast<uint8_t>((x * 0x9e3779b97f4a7c15ull >> 40) & 0x3f);
}

client::KvShape SmallShape() {
  client::KvShape shape;
  shape.layout.num_layers = 3;
  shape.layout.num_kv_heads = 2;
  shape.layout.head_dim = 8;
  shape.layout.dtype = kernels::DType::kBF16;
  shape.layout.kv_id = "fake-kv-id";
  shape.prompt_tokens = 37;
  shape.chunk_tokens = 10;
  return shape;
}

v1::KvLayout ToProto(const client::KvShape& shape) {
  v1::KvLayout p;
  p.set_num_layers(static_cast<uint32_t>(shape.layout.num_layers));
  p.set_num_kv_heads(static_cast<uint32_t>(shape.layout.num_kv_heads));
  p.set_head_dim(static_cast<uint32_t>(shape.layout.head_dim));
  p.set_dtype(shape.layout.dtype == kernels::DType::kF32 ? v1::KV_DTYPE_FLOAT32
                                                         : v1::KV_DTYPE_BFLOAT16);
  p.set_kv_id(shape.layout.kv_id);
  p.set_prompt_tokens(static_cast<uint64_t>(shape.prompt_tokens));
  p.set_start_token(static_cast<uint64_t>(shape.start_token));
  p.set_chunk_tokens(static_cast<uint32_t>(shape.chunk_tokens));
  return p;
}

FakeKv MakeFakeKv(const client::KvShape& shape, KvFault fault) {
  std::vector<uint8_t> bytes(shape.layout.head_dim * kernels::SizeOf(shape.layout.dtype));
  const auto row = [&](int layer, bool is_v, int head, int64_t token) {
    for (size_t i = 0; i < bytes.size(); ++i) {
      bytes[i] = FakeKvByte(layer, is_v, head, token, static_cast<int64_t>(i));
    }
    return absl::Span<const uint8_t>(bytes);
  };
  return MakeKvFrom(shape, row, fault);
}

FakeKv MakeKvFrom(const client::KvShape& shape, const RowFn& row, KvFault fault) {
  FakeKv kv;
  for (int64_t begin = shape.start_token; begin < shape.prompt_tokens;
       begin += shape.chunk_tokens) {
    const int64_t end = std::min(begin + shape.chunk_tokens, shape.prompt_tokens);
    for (int l = 0; l < shape.layout.num_layers; ++l) {
      kv.chunks.push_back(MakeChunk(shape, row, l, begin, end));
    }
  }
  MakeManifest(shape, kv);
  // The chunk that is damaged: the last layer's first one, or, where it must have a predecessor,
  // the last layer's last one.
  const int last_layer = shape.layout.num_layers - 1;
  v1::KvChunk& victim = kv.chunks[last_layer];
  v1::KvChunk& last = kv.chunks.back();
  switch (fault) {
    case KvFault::kNone:
      break;
    case KvFault::kMissingChunk:
      kv.chunks.erase(kv.chunks.begin() + last_layer);
      break;
    case KvFault::kMissingLayer:
      std::erase_if(kv.chunks, [&](const v1::KvChunk& c) {
        return static_cast<int>(c.layer()) == last_layer;
      });
      break;
    case KvFault::kShortLayer:
      kv.chunks.pop_back();
      MakeManifest(shape, kv);
      break;
    case KvFault::kWrongChecksum:
      (*victim.mutable_payload())[7] ^= 0x10;
      break;
    case KvFault::kShortPayload:
      victim.mutable_payload()->resize(victim.payload().size() - 2);
      victim.set_checksum(Sum(victim.payload()));
      break;
    case KvFault::kLongPayload:
      victim.mutable_payload()->append(2, '\0');
      victim.set_checksum(Sum(victim.payload()));
      break;
    case KvFault::kOverlap:
      last = MakeChunk(shape, row, last_layer, static_cast<int64_t>(last.token_begin()) - 1,
                       static_cast<int64_t>(last.token_end()));
      break;
    case KvFault::kDuplicate:
      kv.chunks.push_back(victim);
      break;
    case KvFault::kLayerOutOfRange:
      // A multiple of common stripe counts, so that it stands on its own stripe.
      victim.set_layer(static_cast<uint32_t>(last_layer + 4 * 12));
      break;
    case KvFault::kTokensOutOfRange:
      last = MakeChunk(shape, row, last_layer, static_cast<int64_t>(last.token_begin()),
                       shape.prompt_tokens + 1);
      break;
    case KvFault::kEmptyRange:
      victim.set_token_end(victim.token_begin());
      victim.clear_payload();
      victim.set_checksum(Sum(""));
      break;
    case KvFault::kManifestChecksum:
      kv.manifest.mutable_layers(1)->set_checksum(kv.manifest.layers(1).checksum() + 1);
      break;
    case KvFault::kManifestChunks:
      kv.manifest.mutable_layers(1)->set_chunks(kv.manifest.layers(1).chunks() + 1);
      break;
    case KvFault::kManifestTokens:
      kv.manifest.mutable_layers(1)->set_tokens(kv.manifest.layers(1).tokens() + 1);
      break;
    case KvFault::kManifestBytes:
      kv.manifest.set_bytes(kv.manifest.bytes() + 1);
      break;
    case KvFault::kManifestLayers:
      kv.manifest.mutable_layers()->RemoveLast();
      break;
  }
  return kv;
}

}  // namespace vsprefill::testing
