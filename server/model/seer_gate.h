// A model's SeerAttention gate (kernels/select_seer.h) and its file seer_gate.safetensors.
//
// File: tensors layers.{i}.wq BF16 [num_q_heads, gate_dim, head_dim] and .wk BF16 [num_kv_heads,
// gate_dim, 3 * head_dim] (maximum, minimum, mean). Metadata: format "vsprefill-seer-gate-1",
// weights_id of the backbone it was trained for, gate_dim, and facts of the training. A gate works
// for one set of weights only, so loading compares the weights_id.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/select_seer.h"
#include "server/model/model_config.h"

namespace vsprefill::model {

inline constexpr absl::string_view kSeerGateFormat = "vsprefill-seer-gate-1";

/// Weights in host memory, as stored: bfloat16 bits, shapes as in the file, C-contiguous.
struct SeerGateWeights {
  struct Layer {
    std::vector<uint16_t> wq, wk;
  };
  int num_q_heads = 0, num_kv_heads = 0, head_dim = 0, gate_dim = 0;
  std::string weights_id;
  std::vector<Layer> layers;
  std::map<std::string, std::string> facts;  // further metadata

  int num_layers() const { return static_cast<int>(layers.size()); }
};

/// What the backbone needs; weights_id empty: any.
struct SeerGateExpectation {
  std::string weights_id;
  int num_layers = 0, num_q_heads = 0, num_kv_heads = 0, head_dim = 0;
};

/// Reads and checks a file. NOT_FOUND: no such file; INVALID_ARGUMENT: not a gate, a wrong shape or
/// dtype, a value that is not finite; FAILED_PRECONDITION: trained for other weights (the message
/// names both ids).
absl::StatusOr<SeerGateWeights> ReadSeerGate(const std::string& path,
                                             const SeerGateExpectation& expectation);

/// Writes a file that ReadSeerGate accepts. INVALID_ARGUMENT where the sizes do not fit each other.
absl::Status WriteSeerGate(const std::string& path, const SeerGateWeights& weights);

/// The weights, widened to float32, and the rotations of the block positions in memory of a device.
/// Immutable, so any thread may read it.
class SeerGate {
 public:
  /// For a model with this RoPE and so many positions at most. RESOURCE_EXHAUSTED or INTERNAL where
  /// the device refuses.
  static absl::StatusOr<std::unique_ptr<SeerGate>> Create(const SeerGateWeights& weights,
                                                          const RopeConfig& rope,
                                                          int64_t max_positions,
                                                          kernels::DeviceKind device);
  virtual ~SeerGate() = default;
  /// One per layer; pointers are valid as long as this object.
  virtual const std::vector<kernels::SeerGateLayer>& layers() const = 0;
};

}  // namespace vsprefill::model
