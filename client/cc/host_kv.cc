#include "client/cc/host_kv.h"

#include <new>

#include "absl/strings/str_format.h"

namespace vsprefill::client {

absl::StatusOr<std::shared_ptr<HostKv>> HostKv::Create(const KvShape& shape) {
  std::shared_ptr<HostKv> kv(new HostKv);
  kv->shape_ = shape;
  kv->data_.reset(new (std::nothrow) uint8_t[shape.bytes()]);
  if (kv->data_ == nullptr) {
    return absl::ResourceExhaustedError(
        absl::StrFormat("no memory for a KV cache of %d bytes", shape.bytes()));
  }
  return kv;
}

int64_t HostKv::part_bytes() const {
  return shape_.sent_tokens() * shape_.layout.layer_token_bytes() / 2;
}

KvDestination HostKv::destination() const {
  KvDestination d;
  d.rows = shape_.sent_tokens();
  d.row0_token = shape_.start_token;
  for (int l = 0; l < shape_.layout.num_layers; ++l) {
    uint8_t* k = data_.get() + int64_t{2} * l * part_bytes();
    d.layers.push_back({k, k + part_bytes()});
  }
  return d;
}

absl::Span<const uint8_t> HostKv::k(int layer) const {
  return {data_.get() + int64_t{2} * layer * part_bytes(), static_cast<size_t>(part_bytes())};
}

absl::Span<const uint8_t> HostKv::v(int layer) const {
  return {data_.get() + (int64_t{2} * layer + 1) * part_bytes(), static_cast<size_t>(part_bytes())};
}

}  // namespace vsprefill::client
