// A stream of KV messages from a hostile sender: the hand-written reader against protobuf's, and
// the assembler, whose destination is exactly as large as it says (so that ASan sees one byte too
// many). Input: messages, each behind its length in two bytes, little-endian.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <vector>

#include "client/cc/host_kv.h"
#include "client/cc/kv_assembler.h"
#include "client/cc/wire.h"
#include "tests/fuzz/fuzz_check.h"
#include "vsprefill/v1/prefill.pb.h"

namespace {

using vsprefill::client::ChunkHeader;
using vsprefill::client::KvAssembler;
using vsprefill::client::WireChunk;

constexpr size_t kPieceBytes = 7;

void Require(bool condition) {
  if (!condition) std::abort();
}

/// protobuf must be able to read what our reader reads, and read the same.
void CompareWithProtobuf(const uint8_t* data, size_t size, const WireChunk& chunk) {
  vsprefill::v1::PrefillEvent event;
  Require(event.ParseFromArray(data, static_cast<int>(size)) && event.has_kv());
  const auto& kv = event.kv();
  // protobuf cuts a layer of more than 32 bits; the assembler refuses it.
  Require(chunk.header.layer > UINT32_MAX || chunk.header.layer == kv.layer());
  Require(static_cast<uint64_t>(chunk.header.token_begin) == kv.token_begin());
  Require(static_cast<uint64_t>(chunk.header.token_end) == kv.token_end());
  Require(chunk.header.checksum == kv.checksum());
  size_t bytes = 0;
  for (const auto& piece : chunk.payload) {
    Require(std::equal(piece.begin(), piece.end(), kv.payload().begin() + bytes,
                       [](uint8_t a, char b) { return a == static_cast<uint8_t>(b); }));
    bytes += piece.size();
  }
  Require(bytes == kv.payload().size());
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  vsprefill::client::KvShape shape;
  shape.layout.num_layers = 2;
  shape.layout.num_kv_heads = 1;
  shape.layout.head_dim = 2;
  shape.layout.dtype = vsprefill::kernels::DType::kBF16;
  shape.prompt_tokens = 6;
  shape.start_token = 1;
  const auto kv = *vsprefill::client::HostKv::Create(shape);
  const auto assembler = *KvAssembler::Create(shape, kv->destination());
  while (size >= 2) {
    const size_t length = std::min<size_t>(data[0] | data[1] << 8, size - 2);
    const uint8_t* message = data + 2;
    std::vector<absl::Span<const uint8_t>> pieces;
    for (size_t i = 0; i < length; i += kPieceBytes) {
      pieces.emplace_back(message + i, std::min(kPieceBytes, length - i));
    }
    const auto chunk = vsprefill::client::ParseChunk(pieces);
    vsprefill::CheckOneClearLine(chunk.status());
    if (chunk.ok() && chunk->has_value()) {
      CompareWithProtobuf(message, length, **chunk);
      const int64_t before = assembler->bytes();
      const absl::Status added = assembler->Add((*chunk)->header, (*chunk)->payload);
      vsprefill::CheckOneClearLine(added);
      Require(added.ok() || assembler->bytes() == before);
    }
    data += 2 + length;
    size -= 2 + length;
  }
  Require(assembler->bytes() <= shape.bytes());
  // No manifest fits a cache that is not whole.
  const absl::Status finished = assembler->Finish({});
  Require(!finished.ok());
  vsprefill::CheckOneClearLine(finished);
  return 0;
}
