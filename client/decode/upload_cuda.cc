#include "client/decode/upload.h"
#include "server/base/memory_cuda.h"
#include "server/base/status_macros.h"

namespace vsprefill::decode {

absl::Status Upload(const kv::KvCache& host, int64_t num_tokens, const kv::KvCache& device,
                    kernels::Stream stream) {
  const kv::KvLayout& layout = host.layout();
  const int64_t element_bytes = kernels::SizeOf(layout.dtype);
  const int64_t head_bytes = host.head_stride() * element_bytes;
  const int64_t used_bytes = num_tokens * layout.head_dim * element_bytes;
  for (int l = 0; l < layout.num_layers; ++l) {
    for (int h = 0; h < layout.num_kv_heads; ++h) {
      const auto at = [&](void* base) { return static_cast<char*>(base) + h * head_bytes; };
      VSP_RETURN_IF_ERROR(CopyAsync(at(device.k(l)), at(host.k(l)), used_bytes, stream));
      VSP_RETURN_IF_ERROR(CopyAsync(at(device.v(l)), at(host.v(l)), used_bytes, stream));
    }
  }
  return absl::OkStatus();
}

}  // namespace vsprefill::decode
