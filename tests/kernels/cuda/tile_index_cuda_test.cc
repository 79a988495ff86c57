// Block-sparse indexes and indexes per query head on the device, and the selections that CUDA has,
// against the references.
#include <memory>
#include <vector>

#include "kernels/attention.h"
#include "kernels/cuda/attention_kernels.h"
#include "kernels/query_selection.h"
#include "kernels/query_selection_math.h"
#include "kernels/select_seer.h"
#include "tests/kernels/attention_test_util.h"
#include "tests/kernels/cuda/gpu_test_support.h"
#include "tests/kernels/seer_test_gate.h"

namespace vsprefill::kernels {
namespace {

using testing::AttentionCase;
using testing::AttentionProblem;
using testing::DeviceBuffer;
using testing::HostTensor;
using testing::SeerTestGate;
using testing::Selection;
using testing::Tensor;

template <typename T>
DeviceBuffer Copy(const T* host, int64_t count) {
  return DeviceBuffer(std::vector<T>(host, host + count));
}

/// A problem of the CPU suites with copies of all it needs on the device.
class DeviceProblem {
 public:
  DeviceProblem(const AttentionCase& c, DType dtype) : host_(c, dtype), expected_(0, dtype) {
    host = host_.Writing(&expected_);
    const auto bytes = [dtype](int64_t elements) { return elements * SizeOf(dtype); };
    const int64_t kv = c.kv_heads * host.kv_head_stride;
    device = host;
    device.q = Keep(host.q, bytes(c.q_tokens * host.q_token_stride));
    device.k = Keep(host.k, bytes(kv));
    device.v = Keep(host.v, bytes(kv));
    out_ = DeviceBuffer(bytes(c.q_tokens * host.out_token_stride));
    device.out = out_.data();
    if (host.tiles != nullptr) {
      tiles_ = *host.tiles;
      tiles_.blocks =
          Keep(tiles_.blocks, 4 * tiles_.num_groups * tiles_.num_tiles * tiles_.block_words);
      if (tiles_.columns != nullptr) {
        tiles_.columns =
            Keep(tiles_.columns, 4 * tiles_.num_groups * tiles_.num_sets() * tiles_.column_words);
      }
      if (tiles_.k_means != nullptr) {
        const int64_t means = bytes(c.kv_heads * tiles_.means_stride * c.head_dim);
        tiles_.k_means = Keep(tiles_.k_means, means);
        tiles_.v_means = Keep(tiles_.v_means, means);
      }
      device.tiles = &tiles_;
    } else if (host.index != nullptr) {
      index_ = *host.index;
      const int groups = index_.num_groups;
      index_.verticals = Keep(index_.verticals, 4 * groups * index_.vertical_stride);
      index_.num_verticals = Keep(index_.num_verticals, 4 * groups);
      index_.band_bits = Keep(index_.band_bits, 4 * groups * index_.band_stride);
      index_.bands = Keep(index_.bands, 4 * groups * index_.band_list_stride);
      index_.num_bands = Keep(index_.num_bands, 4 * groups);
      device.index = &index_;
    }
  }
  const AttentionShape& shape() const { return host_.shape(); }
  const DeviceBuffer& out() const { return out_; }
  HostTensor Expected() {
    EXPECT_EQ(AttentionRef(shape(), &host, 1, nullptr), KernelStatus::kOk);
    HostTensor tensor(expected_.dtype(), expected_.size());
    std::memcpy(tensor.data(), expected_.data(), tensor.bytes.size());
    return tensor;
  }

  AttentionSequence host, device;

 private:
  template <typename T>
  T* Keep(T* from, int64_t bytes) {
    buffers_.push_back(Copy(static_cast<const char*>(static_cast<const void*>(from)), bytes));
    return static_cast<T*>(buffers_.back().data());
  }
  AttentionProblem host_;
  Tensor expected_;
  std::vector<DeviceBuffer> buffers_;
  DeviceBuffer out_;
  TileIndexView tiles_;
  SparseIndexView index_;
};

std::vector<AttentionCase> Cases() {
  std::vector<AttentionCase> cases;
  for (const Selection selection :
       {Selection::kBlocks, Selection::kAllBlocks, Selection::kColumns, Selection::kMeans,
        Selection::kMixed, Selection::kMixedDenseTail}) {
    for (const bool per_head : {false, true}) {
      if (selection >= Selection::kMixed && selection <= Selection::kMixedDenseTail && !per_head) {
        continue;  // attention_cuda_test.cc
      }
      for (const int g : {1, 2, 3, 4, 8}) {
        cases.push_back({2 * g, 2, 64, 433, 433, selection, 0, 1, per_head});
        cases.push_back({2 * g, 2, 64, 70, 517, selection, 0, 2, per_head});
      }
      cases.push_back({4, 2, 128, 1, 2700, selection, 0, 3, per_head});
      cases.push_back({4, 2, 128, 901, 901, selection, 0, 4, per_head});
      cases.push_back({5, 1, 80, 1, 1, selection, 0, 5, per_head});
    }
  }
  return cases;
}

/// The output of one kernel; twice, for the same bits.
HostTensor RunKernel(const DeviceProblem& p, cuda::KernelChoice kernel, DType dtype,
                     const std::string& what) {
  std::vector<char> first;
  for (int run = 0; run < 2; ++run) {
    EXPECT_EQ(cudaMemset(p.out().data(), 0xff, p.out().Download<char>().size()), cudaSuccess);
    EXPECT_EQ(cuda::AttentionWith(kernel, p.shape(), &p.device, 1, nullptr), KernelStatus::kOk);
    EXPECT_TRUE(testing::Synchronize()) << what;
    if (run == 0) first = p.out().Download<char>();
  }
  EXPECT_EQ(p.out().Download<char>(), first) << what << ": two runs differ";
  return DownloadTensor(p.out(), dtype);
}

void ExpectReference(const AttentionCase& c, DType dtype) {
  DeviceProblem p(c, dtype);
  const HostTensor expected = p.Expected();
  const bool bf16 = dtype == DType::kBF16;
  for (const auto kernel : {cuda::KernelChoice::kFastest, cuda::KernelChoice::kGeneric}) {
    const bool generic = kernel == cuda::KernelChoice::kGeneric;
    if (generic && !(bf16 && cuda::DeviceIsSm90())) continue;  // one kernel only
    const std::string what = c.ToString() + (generic ? ", generic kernel" : "");
    testing::ExpectClose(RunKernel(p, kernel, dtype, what), expected, bf16 ? 6e-3 : 1e-5,
                         bf16 ? 4e-2 : 1e-4, what);
  }
}

TEST(TileIndexCuda, AttentionEqualsReference) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const AttentionCase& c : Cases()) ExpectReference(c, dtype);
  }
}

TEST(TileIndexCuda, SmallAttentionEqualsReference) {
  for (const Selection selection :
       {Selection::kBlocks, Selection::kColumns, Selection::kMeans, Selection::kMixed}) {
    for (const bool per_head : {false, true}) {
      ExpectReference({6, 2, 64, 70, 330, selection, 0, 1, per_head}, DType::kBF16);
      ExpectReference({2, 1, 128, 300, 300, selection, 0, 2, per_head}, DType::kBF16);
    }
  }
}

// Every group size of the Hopper kernel: where row tiles end inside of key blocks.
TEST(TileIndexCuda, EveryGroupSizeEqualsReference) {
  for (int g = 1; g <= 16; ++g) {
    for (const Selection selection : {Selection::kBlocks, Selection::kColumns}) {
      ExpectReference({2 * g, 2, 128, 95, 403, selection, 0, 1}, DType::kBF16);
    }
  }
}

// Many work items for each multiprocessor, and more key blocks than a warp reads at once.
TEST(TileIndexCuda, LongSequencesAgreeWithTheGenericKernel) {
  if (!cuda::DeviceIsSm90()) GTEST_SKIP() << "one bf16 kernel on this device";
  for (const AttentionCase& c :
       {AttentionCase{8, 2, 128, 6000, 6007, Selection::kBlocks, 0, 1},
        AttentionCase{9, 3, 64, 5000, 9000, Selection::kColumns, 0, 2, true},
        AttentionCase{2, 1, 64, 400, 135000, Selection::kBlocks, 0, 3}}) {
    const DeviceProblem p(c, DType::kBF16);
    const HostTensor generic =
        RunKernel(p, cuda::KernelChoice::kGeneric, DType::kBF16, c.ToString() + ", generic kernel");
    testing::ExpectClose(RunKernel(p, cuda::KernelChoice::kFastest, DType::kBF16, c.ToString()),
                         generic, 6e-3, 4e-2, c.ToString());
  }
}

TEST(TileIndexCuda, PairCountsEqualTheCpu) {
  for (const AttentionCase& c : Cases()) {
    DeviceProblem p(c, DType::kBF16);
    PairCounts expected;
    ASSERT_EQ(CountPairsCpu(p.shape(), p.host, &expected, nullptr), KernelStatus::kOk);
    DeviceBuffer counts(std::vector<PairCounts>(1));
    ASSERT_EQ(CountPairsCuda(p.shape(), p.device, counts.as<PairCounts>(), nullptr),
              KernelStatus::kOk);
    ASSERT_TRUE(testing::Synchronize());
    const PairCounts actual = counts.Download<PairCounts>()[0];
    EXPECT_EQ(actual.unmasked, expected.unmasked) << c.ToString();
    EXPECT_EQ(actual.dense, expected.dense) << c.ToString();
    EXPECT_GE(actual.multiplied, actual.unmasked) << c.ToString();
  }
}

// Sequences with an index per KV group, per query head and without one in one call.
TEST(TileIndexCuda, MixedBatchEqualsSingleSequences) {
  const std::vector<AttentionCase> cases = {{9, 3, 64, 200, 300, Selection::kBlocks, 0, 1},
                                            {9, 3, 64, 300, 300, Selection::kDense, 0, 2},
                                            {9, 3, 64, 77, 411, Selection::kMixed, 0, 3, true},
                                            {9, 3, 64, 300, 300, Selection::kMeans, 0, 4},
                                            {9, 3, 64, 150, 400, Selection::kColumns, 0, 5, true}};
  std::vector<std::unique_ptr<DeviceProblem>> problems;
  std::vector<AttentionSequence> batch;
  for (const AttentionCase& c : cases) {
    problems.push_back(std::make_unique<DeviceProblem>(c, DType::kBF16));
    batch.push_back(problems.back()->device);
  }
  ASSERT_EQ(
      AttentionCuda(problems[0]->shape(), batch.data(), static_cast<int>(batch.size()), nullptr),
      KernelStatus::kOk);
  ASSERT_TRUE(testing::Synchronize());
  for (size_t i = 0; i < problems.size(); ++i) {
    DeviceProblem& p = *problems[i];
    const auto together = p.out().Download<char>();
    ASSERT_EQ(AttentionCuda(p.shape(), &p.device, 1, nullptr), KernelStatus::kOk);
    ASSERT_TRUE(testing::Synchronize());
    EXPECT_EQ(p.out().Download<char>(), together) << cases[i].ToString();
  }
}

QuerySelectionInput Input(const AttentionShape& shape, const AttentionSequence& s) {
  return {shape, s, s.kv_tokens + 100};
}

std::vector<AttentionCase> SelectionCases() {
  std::vector<AttentionCase> cases;
  for (const int g : {1, 2, 3, 5, 8}) {
    cases.push_back({2 * g, 2, 64, 700, 700});
    cases.push_back({g, 1, 128, 70, 517});
  }
  cases.push_back({3, 1, 16, 1, 1});
  return cases;
}

/// A vertical-slash index on the host and on the device, garbage before they are filled.
class Lists {
 public:
  Lists(int groups, int row_tile, int64_t kv_tokens) {
    host.vertical_stride = kv_tokens + 3;
    host.band_stride = BandWords(kv_tokens, row_tile) + 1;
    host.band_list_stride = BandBlocks(kv_tokens, row_tile) + 2;
    device = host;
    Both(groups * host.vertical_stride, &host.verticals, &device.verticals);
    Both(groups, &host.num_verticals, &device.num_verticals);
    Both(groups * host.band_stride, &host.band_bits, &device.band_bits);
    Both(groups * host.band_list_stride, &host.bands, &device.bands);
    Both(groups, &host.num_bands, &device.num_bands);
  }
  void ExpectEqual(const std::string& what) const {
    for (size_t i = 0; i < host_.size(); ++i) {
      EXPECT_EQ(device_[i].Download<int32_t>(), host_[i]) << what << ", list " << i;
    }
    EXPECT_EQ(device.num_groups, host.num_groups) << what;
  }
  SparseIndexView host, device;

 private:
  template <typename T>
  void Both(int64_t count, T** on_host, T** on_device) {
    host_.emplace_back(count, -7);
    device_.emplace_back(host_.back());
    *on_host = reinterpret_cast<T*>(host_.back().data());
    *on_device = device_.back().template as<T>();
  }
  std::vector<std::vector<int32_t>> host_;
  std::vector<DeviceBuffer> device_;
};

TEST(TileIndexCuda, WindowEqualsTheCpu) {
  for (const AttentionCase& c : SelectionCases()) {
    const DeviceProblem p(c, DType::kF32);
    Lists lists(c.kv_heads, RowTilePositions(p.shape().group_size()), c.kv_tokens);
    ASSERT_EQ(SelectWindowCpu(Input(p.shape(), p.host), {5, 200}, &lists.host, nullptr),
              KernelStatus::kOk);
    ASSERT_EQ(SelectWindowCuda(Input(p.shape(), p.device), {5, 200}, &lists.device, nullptr),
              KernelStatus::kOk);
    ASSERT_TRUE(testing::Synchronize());
    lists.ExpectEqual(c.ToString());
  }
}

TEST(TileIndexCuda, MInferenceEqualsTheCpu) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const AttentionCase& c : SelectionCases()) {
      for (const MInferenceParams& params : {MInferenceParams{}, MInferenceParams{40, 60},
                                             MInferenceParams{0, 150, 128, 5, 50, 0, 50}}) {
        const DeviceProblem p(c, dtype);
        Lists lists(c.q_heads, RowTilePositions(1), c.kv_tokens);
        QuerySelectionInput input = Input(p.shape(), p.device);
        const DeviceBuffer workspace(MInferenceWorkspaceBytes(input));
        input.workspace = workspace.data();
        ASSERT_EQ(SelectMInferenceCpu(Input(p.shape(), p.host), params, &lists.host, nullptr),
                  KernelStatus::kOk);
        ASSERT_EQ(SelectMInferenceCuda(input, params, &lists.device, nullptr), KernelStatus::kOk);
        ASSERT_TRUE(testing::Synchronize());
        lists.ExpectEqual(c.ToString());
      }
    }
  }
}

/// Runs a selection that fills a per-head block-sparse index on both sides and compares.
template <typename HostFn, typename DeviceFn, typename Params>
void ExpectSameBlocks(const HostFn& on_host, const DeviceFn& on_device,
                      int64_t (*workspace_bytes)(const QuerySelectionInput&), const Params& params,
                      int64_t tiles_per_set = 1) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const AttentionCase& c : SelectionCases()) {
      const DeviceProblem p(c, dtype);
      const selection::ChunkTiles tiles = selection::TilesOf(p.host, 1);
      TileIndexView view;
      view.num_groups = c.q_heads;
      view.first_tile = tiles.first;
      view.num_tiles = tiles.count;
      view.block_words = KeyBlockWords(c.kv_tokens) + 1;
      view.column_words = (c.kv_tokens + 31) / 32 + 1;
      view.tiles_per_set = tiles_per_set;
      std::vector<uint32_t> blocks(c.q_heads * tiles.count * view.block_words, 7);
      std::vector<uint32_t> columns(c.q_heads * view.num_sets() * view.column_words, 7);
      const DeviceBuffer blocks_device(blocks), columns_device(columns);
      TileIndexView device = view;
      view.blocks = blocks.data();
      view.columns = columns.data();
      device.blocks = blocks_device.as<uint32_t>();
      device.columns = columns_device.as<uint32_t>();
      QuerySelectionInput input = Input(p.shape(), p.device);
      const DeviceBuffer workspace(workspace_bytes == nullptr ? 0 : workspace_bytes(input));
      input.workspace = workspace.data();
      ASSERT_EQ(on_host(Input(p.shape(), p.host), params, &view, nullptr), KernelStatus::kOk);
      ASSERT_EQ(on_device(input, params, &device, nullptr), KernelStatus::kOk);
      ASSERT_TRUE(testing::Synchronize());
      EXPECT_EQ(blocks_device.Download<uint32_t>(), blocks) << c.ToString();
      EXPECT_EQ(columns_device.Download<uint32_t>(), columns) << c.ToString();
    }
  }
}

TEST(TileIndexCuda, FlexEqualsTheCpu) {
  for (const FlexParams& params : {FlexParams{0.9, 0.1, 128}, FlexParams{0.5, 1.0, 1},
                                   FlexParams{0.7, 0, 1, 256}, FlexParams{1, 0.3, 1}}) {
    ExpectSameBlocks(SelectFlexCpu, SelectFlexCuda, FlexWorkspaceBytes, params);
  }
}

TEST(TileIndexCuda, XAttentionEqualsTheCpu) {
  for (const XAttentionParams& params : {XAttentionParams{}, XAttentionParams{4, 0.5},
                                         XAttentionParams{64, 0.7}, XAttentionParams{16, 1}}) {
    ExpectSameBlocks(SelectXAttentionCpu, SelectXAttentionCuda, nullptr, params);
  }
}

TEST(TileIndexCuda, AnchorEqualsTheCpu) {
  ExpectSameBlocks(SelectAnchorCpu, SelectAnchorCuda, AnchorWorkspaceBytes, AnchorParams{6, 1, 0});
  ExpectSameBlocks(SelectAnchorCpu, SelectAnchorCuda, AnchorWorkspaceBytes, AnchorParams{9, 1, 1},
                   2);
  ExpectSameBlocks(SelectAnchorCpu, SelectAnchorCuda, AnchorWorkspaceBytes, AnchorParams{}, 16);
}

TEST(TileIndexCuda, SeerEqualsTheCpu) {
  for (const int gate_dim : {2, 24, 128, 256}) {
    const auto on_host = [gate_dim](const QuerySelectionInput& in, const SeerParams& params,
                                    TileIndexView* index, Stream stream) {
      return SelectSeerCpu(SeerTestGate(in, gate_dim, false).Input(in), params, index, stream);
    };
    const auto on_device = [gate_dim](const QuerySelectionInput& in, const SeerParams& params,
                                      TileIndexView* index, Stream stream) {
      const SeerTestGate gate(in, gate_dim, false);
      SeerInput input = gate.Input(in);
      std::vector<DeviceBuffer> buffers;
      const auto keep = [&buffers](const std::vector<float>& values) {
        return buffers.emplace_back(values).as<float>();
      };
      input.gate.wq = keep(gate.wq);
      input.gate.wk = keep(gate.wk);
      input.gate.block_cos = keep(gate.block_cos);
      input.gate.block_sin = keep(gate.block_sin);
      input.rope_cos = keep(gate.cos);
      input.rope_sin = keep(gate.sin);
      const KernelStatus status = SelectSeerCuda(input, params, index, stream);
      testing::Synchronize();  // before the buffers go
      return status;
    };
    for (const SeerParams& params : {SeerParams{}, SeerParams{0.15, 0, 0}, SeerParams{0.3, 0, 3},
                                     SeerParams{0.9, 0.4, 0}, SeerParams{0, 0, 0}}) {
      ExpectSameBlocks(on_host, on_device, SeerWorkspaceBytes, params);
    }
  }
}

TEST(TileIndexCuda, FlashEqualsTheCpu) {
  for (const DType dtype : {DType::kBF16, DType::kF32}) {
    for (const AttentionCase& c : SelectionCases()) {
      for (const bool per_head : {false, true}) {
        const DeviceProblem p(c, dtype);
        const QuerySelectionInput on_host = Input(p.shape(), p.host);
        const QuerySelectionInput on_device = Input(p.shape(), p.device);
        TileIndexView view;
        view.num_groups = per_head ? c.q_heads : c.kv_heads;
        const selection::ChunkTiles tiles = selection::TilesOf(p.host, c.q_heads / view.num_groups);
        view.block_words = KeyBlockWords(c.kv_tokens) + 1;
        view.means_stride = KeyBlocks(c.kv_tokens) + 1;
        std::vector<uint32_t> blocks(view.num_groups * tiles.count * view.block_words, 7);
        Tensor k_means(c.kv_heads * view.means_stride * c.head_dim, dtype), v_means = k_means;
        DeviceBuffer blocks_device(blocks);
        DeviceBuffer k_device =
            Copy(static_cast<const char*>(k_means.data()), k_means.size() * SizeOf(dtype));
        DeviceBuffer v_device =
            Copy(static_cast<const char*>(v_means.data()), v_means.size() * SizeOf(dtype));
        TileIndexView device = view;
        view.blocks = blocks.data();
        view.k_means = k_means.data();
        device.blocks = blocks_device.as<uint32_t>();
        device.k_means = k_device.data();

        ASSERT_EQ(
            PoolBlocksCpu(on_host, k_means.data(), v_means.data(), view.means_stride, nullptr),
            KernelStatus::kOk);
        ASSERT_EQ(
            PoolBlocksCuda(on_device, k_device.data(), v_device.data(), view.means_stride, nullptr),
            KernelStatus::kOk);
        FlashParams params;
        params.alpha = 0.6;
        params.whole_blocks = per_head;
        params.sink_blocks = params.window_blocks = 1;
        params.last_tiles = 1;
        params.min_blocks = per_head ? 2 : 0;
        ASSERT_EQ(SelectFlashCpu(on_host, params, &view, nullptr), KernelStatus::kOk);
        ASSERT_EQ(SelectFlashCuda(on_device, params, &device, nullptr), KernelStatus::kOk);
        ASSERT_TRUE(testing::Synchronize());
        const auto expect_means = [&](const DeviceBuffer& actual, const Tensor& expected) {
          const auto* bytes = static_cast<const char*>(expected.data());
          EXPECT_EQ(actual.Download<char>(),
                    std::vector<char>(bytes, bytes + expected.size() * SizeOf(dtype)))
              << c.ToString();
        };
        expect_means(k_device, k_means);
        expect_means(v_device, v_means);
        EXPECT_EQ(blocks_device.Download<uint32_t>(), blocks) << c.ToString();
      }
    }
  }
}

}  // namespace
}  // namespace vsprefill::kernels
