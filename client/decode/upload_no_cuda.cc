#include "client/decode/upload.h"

namespace vsprefill::decode {

absl::Status Upload(const kv::KvCache&, int64_t, const kv::KvCache&, kernels::Stream) {
  return absl::UnimplementedError("this build has no CUDA");
}

}  // namespace vsprefill::decode
