// How much of a text's true attention mass a selection reads, and the selection's knob at a given
// density.
#pragma once

#include <torch/types.h>

#include <cstdint>
#include <functional>

#include "absl/status/statusor.h"
#include "absl/types/span.h"
#include "kernels/selection.h"
#include "server/model/vs_indexer.h"
#include "training/coverage.h"
#include "training/index_mask.h"
#include "training/teacher.h"

namespace vsprefill::training {

/// What the heads of a text truly attend to, on its measured row tiles.
struct TrueMass {
  TileSet tiles;
  torch::Tensor mass;  // float32 [layers, q heads, tiles, tokens]; 1 in sum per layer and head
};
/// `capture` holds queries. Tiles: `max_tiles` evenly spread ones, 0: all; of `row_tile` positions,
/// 0: of those that a KV group's packed rows have.
TrueMass MeasureTrueMass(Teacher& teacher, const Capture& capture, int64_t max_tiles,
                         int row_tile = 0);

/// The indexer's logits of all layers from the kernel that serves, float32 [2 (vertical, slash),
/// layers, groups, tokens].
absl::StatusOr<torch::Tensor> IndexerLogits(Teacher& teacher, const model::VsIndexer& indexer,
                                            const Capture& capture);

/// A selection with one knob per layer and group, float32 [layers, groups], larger = sparser: the
/// mask of a layer, bool [groups, tiles, tokens].
using MaskFn = std::function<absl::StatusOr<torch::Tensor>(int layer, const torch::Tensor& knobs)>;

/// VSPrefill's rule mass per cost on `logits` [2, layers, groups, tokens]; the knob is the
/// threshold, times `scale` [layers, groups] on the host where it is defined. What is forced is
/// what the served default forces, less its dense last rows. `masker` outlives the result.
MaskFn VerticalSlash(IndexMasker* masker, const torch::Tensor& logits,
                     const torch::Tensor& scale = {});

struct Coverage {
  double density = 0;
  torch::Tensor covered;  // share of the mass, float64 [layers, q heads], host
  torch::Tensor knobs;    // [layers, groups]
};

/// Density and mass of the masks at these knobs.
absl::StatusOr<Coverage> Cover(const TrueMass& text, const MaskFn& masks,
                               const torch::Tensor& knobs);

struct KnobRange {
  double low, high;        // of log2(knob)
  bool per_group = false;  // each layer and group reaches the density by a knob of its own
};
/// Bisects the knobs until the density is reached from below as nearly as it can be; `groups` is
/// the number of groups in the masks.
absl::StatusOr<Coverage> Reach(const TrueMass& text, const MaskFn& masks, const KnobRange& range,
                               int64_t groups, double density);

}  // namespace vsprefill::training
