// What all sparse methods share: which layers and prompts stay dense, when dense is faster
// (crossover.h), memory of the indexes, the time that selection takes, and the call of the kernel.
// A method overrides Select alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "kernels/query_selection.h"
#include "server/attention/attention_method.h"

namespace vsprefill::attention {

class SparseMethod : public AttentionMethod {
 public:
  SparseMethod(absl::string_view name, const MethodContext& context,
               const std::map<std::string, double>& parameters);

  absl::string_view name() const override { return name_; }
  const std::map<std::string, double>& parameters() const override { return parameters_; }
  IndexStatistics index_statistics() const override;
  int dense_fallback_layers() const override;
  bool IsSparse(int64_t prompt_tokens) const override {
    return prompt_tokens >= dense_below_ && !TooShortToPay(prompt_tokens);
  }
  /// Dense for the first `dense_layers` layers, for prompts of fewer than `dense_below` tokens and,
  /// where `dense_fallback` is 1, where that is faster; else with what Select chose.
  absl::Status Attend(const AttentionCall& call) final;

 protected:
  /// Chooses what sequence i of the call reads: takes an index from NewVerticalSlash or NewTiles
  /// and lets a kernel fill it.
  virtual absl::Status Select(const AttentionCall& call, size_t i) = 0;

  double number(const char* parameter) const { return parameters_.at(parameter); }
  int32_t whole(const char* parameter) const { return static_cast<int32_t>(number(parameter)); }
  const MethodContext& context() const { return context_; }
  const kernels::KernelSet& kernels() const { return *context_.kernels; }
  int dense_layers() const { return dense_layers_; }
  bool on_cpu() const { return context_.allocator->device() == kernels::DeviceKind::kCpu; }
  void KeepDenseBelow(int64_t tokens) { dense_below_ = std::max(dense_below_, tokens); }

  /// What selections that look at queries and keys need; `workspace_bytes` is the kernel's function
  /// for those that want a workspace.
  absl::StatusOr<kernels::QuerySelectionInput> QueryInput(
      const AttentionCall& call, size_t i,
      int64_t (*workspace_bytes)(const kernels::QuerySelectionInput&) = nullptr);
  /// Turns a selection kernel's outcome into a Status that names this method and the shapes.
  absl::Status Checked(kernels::KernelStatus status, const AttentionCall& call, size_t i) const;

  /// An index for sequence i, `num_groups` of them per KV or query head, with memory for the whole
  /// prompt, to be filled; sequence i reads by it. Valid during the call.
  absl::StatusOr<kernels::SparseIndexView*> NewVerticalSlash(const AttentionCall& call, size_t i,
                                                             int num_groups);
  struct TileOptions {
    int64_t tiles_per_set = 0;  // single columns, shared by that many row tiles; 0: none
    bool means = false;         // of keys and values
  };
  absl::StatusOr<kernels::TileIndexView*> NewTiles(const AttentionCall& call, size_t i,
                                                   int num_groups, const TileOptions& options);

  /// Set by a method whose indexes are to be seen from outside.
  IndexStatistics statistics_;

 private:
  /// An index's view and memory, which grows and never shrinks.
  struct Index {
    kernels::SparseIndexView vertical_slash;
    kernels::TileIndexView tiles;
    Buffer memory;
  };
  absl::StatusOr<char*> Memory(Index& index, int64_t bytes);
  /// CUDA: the fall-back by length.
  bool TooShortToPay(int64_t prompt_tokens) const;
  /// CPU: whether the index just selected would take longer than dense attention.
  absl::StatusOr<bool> DenseIsFaster(const kernels::AttentionShape& shape,
                                     const kernels::AttentionSequence& sequence) const;

  const std::string name_;
  const MethodContext& context_;
  const std::map<std::string, double> parameters_;
  int dense_layers_ = 0;
  int64_t dense_below_ = 0;
  bool dense_fallback_ = false;
  std::vector<bool> fell_back_;                  // per layer
  std::vector<std::unique_ptr<Index>> indexes_;  // per sequence of a batch
  Buffer workspace_;
};

/// Largest value of a parameter that counts tokens.
inline constexpr double kMaxTokens = kernels::kMaxSelectionTokens;

/// Adds the parameters that SparseMethod itself reads. The fall-back is off by default: what is
/// compared with VSPrefill shall run as it selects.
void AddDenseParameters(MethodSpec& spec, double dense_below, bool dense_fallback = false);

/// MethodSpec::create of a class with a constructor (context, parameters).
template <class Method>
std::unique_ptr<AttentionMethod> Create(const MethodContext& context,
                                        const std::map<std::string, double>& parameters) {
  return std::make_unique<Method>(context, parameters);
}

}  // namespace vsprefill::attention
