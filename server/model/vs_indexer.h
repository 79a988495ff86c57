// A model's VSIndexer: the small network per layer and KV group that predicts which columns and
// diagonals attention will visit (kernels/indexer.h), and its file indexer.safetensors.
//
// File: tensors layers.{i}.w1 BF16 [groups, hidden, 2 * head_dim], .b1 F32 [groups, hidden], .w2
// F32 [groups, 2, hidden], .b2 F32 [groups, 2], .slash_prior F32 [groups, 128]; optional
// threshold_scale F32 [layers, groups]. Metadata: format "vsprefill-indexer-1", weights_id of the
// backbone it was distilled from, hidden, and facts of the training. An indexer works for one set
// of weights only, so loading compares the weights_id.
#pragma once

#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/indexer.h"
#include "kernels/tensor_view.h"

namespace vsprefill::model {

inline constexpr absl::string_view kIndexerFormat = "vsprefill-indexer-1";

/// Weights in host memory, as stored. Shapes as in the file, C-contiguous.
struct IndexerWeights {
  struct Layer {
    std::vector<uint16_t> w1;  // bfloat16 bits
    std::vector<float> b1, w2, b2, slash_prior;
  };
  int num_groups = 0, head_dim = 0, hidden = 0;
  std::string weights_id;
  std::vector<Layer> layers;
  /// Factors on the selection threshold, [layers][groups]; empty: all 1.
  std::vector<std::vector<float>> threshold_scale;
  /// Further metadata (training facts).
  std::map<std::string, std::string> facts;

  int num_layers() const { return static_cast<int>(layers.size()); }
};

/// What the backbone needs; weights_id empty: any.
struct IndexerExpectation {
  std::string weights_id;
  int num_layers = 0, num_groups = 0, head_dim = 0;
};

/// Reads and checks a file. NOT_FOUND: no such file; INVALID_ARGUMENT: not an indexer, a wrong
/// shape or dtype, a value that is not finite; FAILED_PRECONDITION: distilled for other weights
/// (the message names both ids).
absl::StatusOr<IndexerWeights> ReadIndexer(const std::string& path,
                                           const IndexerExpectation& expectation);

/// Writes a file that ReadIndexer accepts. INVALID_ARGUMENT where the sizes do not fit each other.
absl::Status WriteIndexer(const std::string& path, const IndexerWeights& weights);

/// The weights in memory of a device, ready for the kernels. Immutable, so any thread may read it.
class VsIndexer {
 public:
  /// Copies to `device`. RESOURCE_EXHAUSTED or INTERNAL where the device refuses.
  static absl::StatusOr<std::unique_ptr<VsIndexer>> Create(const IndexerWeights& weights,
                                                           kernels::DeviceKind device);
  virtual ~VsIndexer() = default;
  /// Pointers are valid as long as this object.
  virtual const kernels::IndexerLayer& layer(int index) const = 0;
  virtual int num_layers() const = 0;
  virtual int hidden() const = 0;
  virtual const std::vector<std::vector<float>>& threshold_scale() const = 0;
};

}  // namespace vsprefill::model
