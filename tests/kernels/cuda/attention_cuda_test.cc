// AttentionCuda and CountPairsCuda against the references, over shapes, indexes, chunks and
// batches. In bf16 both kernels are tested: the fastest one for the device and the generic one.
#include <memory>

#include "kernels/attention.h"
#include "kernels/cuda/attention_kernels.h"
#include "tests/kernels/cuda/gpu_test_support.h"

namespace vsprefill::kernels {
namespace {

using testing::DeviceBuffer;
using testing::HostIndex;
using testing::HostTensor;

struct Case {
  const char* name;
  int q_heads, kv_heads, head_dim;
  int64_t q_tokens, kv_tokens;
  double vertical, band;  // share of columns and blocks selected; vertical < 0: dense
  int64_t dense_from = INT64_MAX;
};

constexpr double kDense = -1;

const Case kCases[] = {
    {"SmallOneToken", 9, 3, 64, 1, 1, kDense, 0},
    {"SmallDenseG3", 9, 3, 64, 100, 100, kDense, 0},
    {"SmallSparseG3", 9, 3, 64, 300, 300, 0.2, 0.3},
    {"SmallSparseG4D128", 8, 2, 128, 260, 260, 0.1, 0.2},
    {"SmallChunk", 9, 3, 64, 77, 300, 0.2, 0.2, 290},
    {"DenseExactTiles", 4, 1, 128, 256, 256, kDense, 0},
    {"DenseG1", 2, 2, 64, 511, 511, kDense, 0},
    {"DenseG2D96", 4, 2, 96, 333, 333, kDense, 0},
    {"DenseG5D80", 5, 1, 80, 201, 201, kDense, 0},
    {"DenseG7D16", 7, 1, 16, 190, 190, kDense, 0},
    {"DenseG16D32", 16, 1, 32, 130, 130, kDense, 0},
    {"DenseG6", 12, 2, 128, 257, 257, kDense, 0},
    {"DenseChunk", 9, 3, 64, 123, 500, kDense, 0},
    {"DenseOneQuery", 8, 2, 128, 1, 777, kDense, 0},
    {"LocalOnly", 9, 3, 64, 700, 700, 0.0, 0.0},
    {"VerticalsOnly", 9, 3, 64, 600, 600, 1.0, 0.0},
    {"BandsOnly", 9, 3, 64, 600, 600, 0.0, 0.5},
    {"Everything", 9, 3, 64, 600, 600, 1.0, 1.0},
    {"SparseG1", 2, 2, 64, 600, 600, 0.1, 0.2},
    {"SparseG2D128", 4, 2, 128, 555, 555, 0.15, 0.15, 512},
    {"SparseG8D128", 8, 1, 128, 700, 700, 0.1, 0.2},
    {"SparseG16D32", 16, 1, 32, 400, 400, 0.3, 0.1},
    {"SparseG15D64", 15, 1, 64, 300, 300, 0.3, 0.1},
    {"SparseManyVerticals", 3, 1, 64, 1500, 1500, 0.7, 0.7},
    {"SparseFewSurvive", 3, 1, 64, 1500, 1500, 0.5, 0.97},
    {"SparseDenseTail", 9, 3, 64, 600, 600, 0.05, 0.1, 536},
    {"SparseAllDenseTail", 9, 3, 64, 300, 300, 0.05, 0.1, 0},
    {"SparseChunk", 9, 3, 64, 200, 1000, 0.1, 0.1},
    {"SparseChunkUnaligned", 8, 2, 128, 129, 641, 0.2, 0.1, 600},
    {"SparseOneQuery", 8, 2, 64, 1, 800, 0.2, 0.1},
    // Odd and even numbers of whole blocks and of surviving verticals.
    {"SmallSparseG1D128", 2, 2, 128, 200, 260, 0.2, 0.3},
    {"SmallSparseG16D128", 16, 1, 128, 70, 290, 0.4, 0.3},
    {"SmallNoLocalVerticalsG4D128", 4, 1, 128, 140, 340, 0.01, 0.0},
    {"BandsOnlyD128", 8, 2, 128, 700, 1500, 0.0, 0.4},
    {"VerticalsOnlyD128", 8, 2, 128, 700, 900, 1.0, 0.0},
    {"ManyVerticalsG1D128", 1, 1, 128, 300, 3000, 0.6, 0.3},
    {"LastRowTilesDenseG16D128", 16, 1, 128, 333, 1111, 0.1, 0.1, 1000},
    {"LongChunkFarAway", 8, 2, 128, 40, 6000, 0.05, 0.05},
    // Dense last rows that are spread: an odd number of blocks, a chunk that begins inside of them,
    // one that ends inside of a row tile, a single dense row.
    {"SpreadTailOdd", 9, 3, 64, 70, 2200, 0.05, 0.05, 2140},
    {"SpreadTailD128", 4, 1, 128, 40, 2100, 0.1, 0.05, 2080},
    {"SpreadTail", 9, 3, 64, 300, 8300, 0.05, 0.05, 8236},
    {"SpreadTailG1D128", 2, 2, 128, 200, 9001, 0.02, 0.02, 9000},
    {"SpreadTailG16D128", 16, 1, 128, 50, 5003, 0.05, 0.05, 4940},
    {"SpreadTailChunkInside", 8, 2, 64, 9, 4111, 0.05, 0.05, 4060},
};

/// Inputs of one sequence on host and device; q and out as in a packed [q | k | v] row.
struct Problem {
  AttentionShape shape;
  HostTensor q, k, v;
  DeviceBuffer q_device, k_device, v_device, out_device, workspace;
  std::unique_ptr<HostIndex> index;
  AttentionSequence host, device;
  HostTensor out;

  Problem(const Case& c, DType dtype, unsigned seed) {
    std::mt19937 rng(seed);
    shape = {c.q_heads, c.kv_heads, c.head_dim, dtype, 1.0f / std::sqrt(float(c.head_dim))};
    const int64_t q_stride = (c.q_heads + 2 * c.kv_heads) * c.head_dim;
    const int64_t capacity = c.kv_tokens + 13;
    q = testing::RandomTensor(dtype, c.q_tokens * q_stride, rng);
    k = testing::RandomTensor(dtype, c.kv_heads * capacity * c.head_dim, rng);
    v = testing::RandomTensor(dtype, c.kv_heads * capacity * c.head_dim, rng);
    // Rows past the end must not be read: a NaN there would show.
    for (int h = 0; h < c.kv_heads; ++h) {
      for (int64_t i = c.kv_tokens * c.head_dim; i < capacity * c.head_dim; ++i) {
        k.Set(h * capacity * c.head_dim + i, NAN);
        v.Set(h * capacity * c.head_dim + i, NAN);
      }
    }
    out = HostTensor(dtype, c.q_tokens * c.q_heads * c.head_dim);
    q_device = DeviceBuffer(q.bytes);
    k_device = DeviceBuffer(k.bytes);
    v_device = DeviceBuffer(v.bytes);
    out_device = DeviceBuffer(static_cast<int64_t>(out.bytes.size()));
    if (c.vertical >= 0) {
      index =
          std::make_unique<HostIndex>(c.kv_heads, c.kv_tokens, RowTilePositions(shape.group_size()),
                                      c.vertical, c.band, c.dense_from, rng);
    }
    host.q = q.data();
    host.q_token_stride = q_stride;
    host.q_head_stride = c.head_dim;
    host.k = k.data();
    host.v = v.data();
    host.kv_head_stride = capacity * c.head_dim;
    host.kv_token_stride = c.head_dim;
    host.out = out.data();
    host.out_token_stride = c.q_heads * c.head_dim;
    host.out_head_stride = c.head_dim;
    host.q_tokens = c.q_tokens;
    host.kv_tokens = c.kv_tokens;
    device = host;
    device.q = q_device.data();
    device.k = k_device.data();
    device.v = v_device.data();
    device.out = out_device.data();
    if (index != nullptr) {
      host.index = &index->host;
      device.index = &index->device;
      workspace =
          DeviceBuffer(AttentionWorkspaceBytes(shape, c.kv_heads, c.dense_from, c.kv_tokens));
      device.workspace = workspace.data();
    }
  }
};

/// Runs the case with one kernel against the reference, and again for the same bits.
void ExpectReference(Problem& p, cuda::KernelChoice kernel, const std::string& what) {
  const DType dtype = p.shape.dtype;
  ASSERT_EQ(cudaMemset(p.out_device.data(), 0xff, p.out.bytes.size()), cudaSuccess);
  ASSERT_EQ(cuda::AttentionWith(kernel, p.shape, &p.device, 1, nullptr), KernelStatus::kOk);
  ASSERT_TRUE(testing::Synchronize());
  const HostTensor actual = DownloadTensor(p.out_device, dtype);
  const bool bf16 = dtype == DType::kBF16;
  testing::ExpectClose(actual, p.out, bf16 ? 6e-3 : 1e-5, bf16 ? 4e-2 : 1e-4, what);
  ASSERT_EQ(cudaMemset(p.out_device.data(), 0xff, actual.bytes.size()), cudaSuccess);
  ASSERT_EQ(cuda::AttentionWith(kernel, p.shape, &p.device, 1, nullptr), KernelStatus::kOk);
  ASSERT_TRUE(testing::Synchronize());
  EXPECT_EQ(p.out_device.Download<char>(), actual.bytes) << what << ": two runs differ";
}

class AttentionCudaTest : public ::testing::TestWithParam<std::tuple<Case, DType>> {};

TEST_P(AttentionCudaTest, EqualsReference) {
  const auto& [c, dtype] = GetParam();
  Problem p(c, dtype, 1);
  ASSERT_EQ(AttentionRef(p.shape, &p.host, 1, nullptr), KernelStatus::kOk);
  ExpectReference(p, cuda::KernelChoice::kFastest, c.name);
  if (dtype == DType::kBF16 && cuda::DeviceIsSm90()) {
    ExpectReference(p, cuda::KernelChoice::kGeneric, std::string(c.name) + ", generic kernel");
  }
}

TEST_P(AttentionCudaTest, PairCountsEqualTheCpu) {
  const auto& [c, dtype] = GetParam();
  if (dtype == DType::kF32) return;  // sizes only
  Problem p(c, dtype, 1);
  PairCounts expected;
  ASSERT_EQ(CountPairsCpu(p.shape, p.host, &expected, nullptr), KernelStatus::kOk);
  DeviceBuffer counts(std::vector<PairCounts>(1));
  // Twice: counts are added to.
  for (int i = 0; i < 2; ++i) {
    ASSERT_EQ(CountPairsCuda(p.shape, p.device, counts.as<PairCounts>(), nullptr),
              KernelStatus::kOk);
  }
  ASSERT_TRUE(testing::Synchronize());
  const PairCounts actual = counts.Download<PairCounts>()[0];
  EXPECT_EQ(actual.unmasked, 2 * expected.unmasked) << c.name;
  EXPECT_EQ(actual.dense, 2 * expected.dense) << c.name;
  EXPECT_GE(actual.multiplied, actual.unmasked) << c.name;
  EXPECT_EQ(actual.multiplied % (2 * kPackedRows * kBandBlock), 0) << c.name;
}

std::string CaseName(const ::testing::TestParamInfo<std::tuple<Case, DType>>& info) {
  return std::string(std::get<0>(info.param).name) + "_" + Name(std::get<1>(info.param));
}

INSTANTIATE_TEST_SUITE_P(Shapes, AttentionCudaTest,
                         ::testing::Combine(::testing::ValuesIn(kCases),
                                            ::testing::Values(DType::kBF16, DType::kF32)),
                         CaseName);

// Every group size up to 16 and both head sizes of the Hopper kernel, in a chunk that starts and
// ends inside row tiles.
TEST(AttentionCuda, EveryGroupSizeEqualsReference) {
  for (int group_size = 1; group_size <= 16; ++group_size) {
    for (int head_dim : {64, 128}) {
      Problem p({"", 2 * group_size, 2, head_dim, 95, 403, 0.15, 0.2, 390}, DType::kBF16,
                10 * group_size + head_dim);
      ASSERT_EQ(AttentionRef(p.shape, &p.host, 1, nullptr), KernelStatus::kOk);
      ExpectReference(p, cuda::KernelChoice::kFastest,
                      "g " + std::to_string(group_size) + ", d " + std::to_string(head_dim));
    }
  }
}

// Many work items for each multiprocessor, which the small shapes do not have.
TEST(AttentionCuda, LongSequencesAgreeWithTheGenericKernel) {
  if (!cuda::DeviceIsSm90()) GTEST_SKIP() << "one bf16 kernel on this device";
  for (const Case& c : {Case{"8B", 32, 8, 128, 6000, 6007, 0.03, 0.05, 5990},
                        Case{"135M", 9, 3, 64, 9000, 9000, 0.1, 0.05},
                        Case{"8B dense", 32, 8, 128, 3001, 3001, kDense, 0}}) {
    Problem p(c, DType::kBF16, 3);
    ASSERT_EQ(cuda::AttentionWith(cuda::KernelChoice::kGeneric, p.shape, &p.device, 1, nullptr),
              KernelStatus::kOk);
    ASSERT_TRUE(testing::Synchronize());
    p.out = DownloadTensor(p.out_device, DType::kBF16);
    for (int run = 0; run < 3; ++run) ExpectReference(p, cuda::KernelChoice::kFastest, c.name);
  }
}

TEST(AttentionCuda, SelectingEverythingEqualsDense) {
  for (const auto& [vertical, band] : {std::pair{0.0, 1.0}, std::pair{1.0, 1.0}}) {
    Problem p({"", 9, 3, 64, 500, 500, vertical, band}, DType::kBF16, 5);
    ASSERT_EQ(AttentionCuda(p.shape, &p.device, 1, nullptr), KernelStatus::kOk);
    ASSERT_TRUE(testing::Synchronize());
    const auto sparse = p.out_device.Download<char>();
    p.device.index = nullptr;
    ASSERT_EQ(AttentionCuda(p.shape, &p.device, 1, nullptr), KernelStatus::kOk);
    ASSERT_TRUE(testing::Synchronize());
    EXPECT_EQ(p.out_device.Download<char>(), sparse);
  }
}

/// Runs the problem whole, then in chunks that end at `ends`, one after the other in one workspace.
/// Row tiles are aligned to position 0, so chunks give the bits of the whole.
void ExpectChunksEqualTheWhole(Problem& p, const std::vector<int64_t>& ends) {
  ASSERT_EQ(AttentionCuda(p.shape, &p.device, 1, nullptr), KernelStatus::kOk);
  ASSERT_TRUE(testing::Synchronize());
  const auto whole = p.out_device.Download<char>();
  ASSERT_EQ(cudaMemset(p.out_device.data(), 0xff, whole.size()), cudaSuccess);
  int64_t begin = 0;
  for (const int64_t end : ends) {
    AttentionSequence chunk = p.device;
    chunk.q = p.q_device.as<uint16_t>() + begin * chunk.q_token_stride;
    chunk.out = p.out_device.as<uint16_t>() + begin * chunk.out_token_stride;
    chunk.q_tokens = end - begin;
    chunk.kv_tokens = end;
    ASSERT_EQ(AttentionCuda(p.shape, &chunk, 1, nullptr), KernelStatus::kOk);
    begin = end;
  }
  ASSERT_TRUE(testing::Synchronize());
  EXPECT_EQ(p.out_device.Download<char>(), whole);
}

TEST(AttentionCuda, SmallChunksEqualTheWhole) {
  for (double vertical : {kDense, 0.15}) {
    SCOPED_TRACE(vertical);
    Problem p({"", 9, 3, 64, 430, 430, vertical, 0.2}, DType::kBF16, 6);
    ExpectChunksEqualTheWhole(p, {1, 130, 430});
  }
}

// Also where the dense last rows are spread, and chunks end inside of them. 3235 lies inside the
// row tile that reaches dense_from, before dense_from itself.
TEST(AttentionCuda, ChunksOfSpreadRowsEqualTheWhole) {
  Problem p({"", 9, 3, 64, 3300, 3300, 0.05, 0.1, 3236}, DType::kBF16, 6);
  ASSERT_NE(p.device.workspace, nullptr);
  ExpectChunksEqualTheWhole(p, {2050, 3235, 3244, 3300});
}

// An index per query head has row tiles of 128 positions.
TEST(AttentionCuda, SpreadRowsOfAnIndexPerQueryHeadEqualReference) {
  Problem p({"", 4, 2, 64, 400, 4000, kDense, 0}, DType::kBF16, 12);
  std::mt19937 rng(12);
  HostIndex index(4, 4000, RowTilePositions(1), 0.05, 0.05, 3900, rng);
  p.host.index = &index.host;
  p.device.index = &index.device;
  p.workspace = DeviceBuffer(AttentionWorkspaceBytes(p.shape, 4, 3900, 4000));
  p.device.workspace = p.workspace.data();
  ASSERT_NE(p.device.workspace, nullptr);
  ASSERT_EQ(AttentionRef(p.shape, &p.host, 1, nullptr), KernelStatus::kOk);
  ExpectReference(p, cuda::KernelChoice::kFastest, "index per query head");
}

// Sequences with spread rows, with none, and one without a workspace: nobody's bits depend on who
// else is in the launch.
TEST(AttentionCuda, SpreadRowsInABatchEqualSingleSequences) {
  std::vector<std::unique_ptr<Problem>> problems;
  std::vector<AttentionSequence> batch;
  for (const Case& c :
       {Case{"", 8, 2, 128, 100, 4100, 0.02, 0.02, 4050}, Case{"", 8, 2, 128, 80, 80, kDense, 0},
        Case{"", 8, 2, 128, 300, 2300, 0.02, 0.02, 2290}, Case{"", 8, 2, 128, 60, 3000, 0.02, 0.02},
        Case{"", 8, 2, 128, 90, 3100, 0.02, 0.02, 3050}}) {
    problems.push_back(std::make_unique<Problem>(c, DType::kBF16, 40));
    batch.push_back(problems.back()->device);
  }
  problems.back()->device.workspace = batch.back().workspace = nullptr;
  ASSERT_EQ(
      AttentionCuda(problems[0]->shape, batch.data(), static_cast<int>(batch.size()), nullptr),
      KernelStatus::kOk);
  ASSERT_TRUE(testing::Synchronize());
  for (size_t i = 0; i < problems.size(); ++i) {
    Problem& p = *problems[i];
    const auto together = p.out_device.Download<char>();
    ASSERT_EQ(cudaMemset(p.out_device.data(), 0xff, together.size()), cudaSuccess);
    ASSERT_EQ(AttentionCuda(p.shape, &p.device, 1, nullptr), KernelStatus::kOk);
    ASSERT_TRUE(testing::Synchronize());
    EXPECT_EQ(p.out_device.Download<char>(), together) << "sequence " << i;
  }
}

TEST(AttentionCuda, SmallVarlenBatchEqualsSingleSequences) {
  std::vector<std::unique_ptr<Problem>> problems;
  std::vector<AttentionSequence> batch;
  for (int i = 0; i < 19; ++i) {  // more than one launch holds
    const int64_t kv_tokens = 1 + i * 37 % 300;
    const int64_t q_tokens = i % 3 == 0 ? kv_tokens : 1 + kv_tokens / 3;
    problems.push_back(
        std::make_unique<Problem>(Case{"", 9, 3, 64, q_tokens, kv_tokens, i % 2 == 0 ? kDense : 0.2,
                                       0.2, i % 4 == 1 ? kv_tokens - 5 : INT64_MAX},
                                  DType::kBF16, 100 + i));
    batch.push_back(problems.back()->device);
  }
  batch[4].q_tokens = 0;  // nothing to do for this one
  ASSERT_EQ(
      AttentionCuda(problems[0]->shape, batch.data(), static_cast<int>(batch.size()), nullptr),
      KernelStatus::kOk);
  ASSERT_TRUE(testing::Synchronize());
  for (size_t i = 0; i < problems.size(); ++i) {
    if (i == 4) continue;
    Problem& p = *problems[i];
    const auto together = p.out_device.Download<char>();
    ASSERT_EQ(cudaMemset(p.out_device.data(), 0xff, together.size()), cudaSuccess);
    ASSERT_EQ(AttentionCuda(p.shape, &p.device, 1, nullptr), KernelStatus::kOk);
    ASSERT_TRUE(testing::Synchronize());
    EXPECT_EQ(p.out_device.Download<char>(), together) << "sequence " << i;
  }
}

// Strides that put elements past 2^31.
TEST(AttentionCuda, LargeOffsets) {
  Problem p({"", 4, 2, 64, 140, 140, 0.2, 0.2}, DType::kBF16, 7);
  ASSERT_EQ(AttentionCuda(p.shape, &p.device, 1, nullptr), KernelStatus::kOk);
  ASSERT_TRUE(testing::Synchronize());
  const auto compact = p.out_device.Download<char>();
  const int64_t head_stride = (int64_t{1} << 31) + 640, token_stride = int64_t{1} << 24;
  const int64_t row = 64 * 2;
  DeviceBuffer big(2 * (head_stride + 140 * 64), false);
  DeviceBuffer wide(2 * (140 * token_stride), false);
  if (big.data() == nullptr || wide.data() == nullptr) GTEST_SKIP() << "not enough GPU memory";
  for (int h = 0; h < 2; ++h) {
    ASSERT_EQ(cudaMemcpy(big.as<char>() + 2 * h * head_stride,
                         p.k_device.as<char>() + 2 * h * p.device.kv_head_stride, 140 * row,
                         cudaMemcpyDeviceToDevice),
              cudaSuccess);
  }
  // Keys through a huge head stride: V uses the same strides, so it lies in a second buffer.
  DeviceBuffer big_v(2 * (head_stride + 140 * 64), false);
  if (big_v.data() == nullptr) GTEST_SKIP() << "not enough GPU memory";
  for (int h = 0; h < 2; ++h) {
    ASSERT_EQ(cudaMemcpy(big_v.as<char>() + 2 * h * head_stride,
                         p.v_device.as<char>() + 2 * h * p.device.kv_head_stride, 140 * row,
                         cudaMemcpyDeviceToDevice),
              cudaSuccess);
  }
  AttentionSequence s = p.device;
  s.k = big.data();
  s.v = big_v.data();
  s.kv_head_stride = head_stride;
  // Queries through a huge token stride.
  ASSERT_EQ(cudaMemcpy2D(wide.data(), 2 * token_stride, p.q_device.data(),
                         2 * p.device.q_token_stride, 4 * row, 140, cudaMemcpyDeviceToDevice),
            cudaSuccess);
  s.q = wide.data();
  s.q_token_stride = token_stride;
  ASSERT_EQ(cudaMemset(p.out_device.data(), 0xff, compact.size()), cudaSuccess);
  ASSERT_EQ(AttentionCuda(p.shape, &s, 1, nullptr), KernelStatus::kOk);
  ASSERT_TRUE(testing::Synchronize());
  EXPECT_EQ(p.out_device.Download<char>(), compact);
}

// A launcher that allocated, synchronised or used another stream could not be captured.
TEST(AttentionCuda, IsCapturedIntoAGraph) {
  Problem p({"", 9, 3, 64, 300, 300, 0.2, 0.2}, DType::kBF16, 9);
  ASSERT_EQ(AttentionCuda(p.shape, &p.device, 1, nullptr), KernelStatus::kOk);
  ASSERT_TRUE(testing::Synchronize());
  const auto expected = p.out_device.Download<char>();
  ASSERT_EQ(cudaMemset(p.out_device.data(), 0xff, expected.size()), cudaSuccess);
  DeviceBuffer counts(std::vector<PairCounts>(1));
  cudaStream_t stream;
  VSP_ASSERT_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  VSP_ASSERT_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  EXPECT_EQ(AttentionCuda(p.shape, &p.device, 1, stream), KernelStatus::kOk);
  EXPECT_EQ(CountPairsCuda(p.shape, p.device, counts.as<PairCounts>(), stream), KernelStatus::kOk);
  cudaGraph_t graph;
  VSP_ASSERT_CUDA(cudaStreamEndCapture(stream, &graph));
  EXPECT_TRUE(p.out_device.Download<char>() != expected) << "ran outside the capture";
  cudaGraphExec_t executable;
  VSP_ASSERT_CUDA(cudaGraphInstantiate(&executable, graph, 0));
  VSP_ASSERT_CUDA(cudaGraphLaunch(executable, stream));
  VSP_ASSERT_CUDA(cudaStreamSynchronize(stream));
  EXPECT_TRUE(p.out_device.Download<char>() == expected);
  EXPECT_GT(counts.Download<PairCounts>()[0].unmasked, 0);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaStreamDestroy(stream);
}

// Persistent kernels draw their work from counters: launches on several streams must not share one.
TEST(AttentionCuda, LaunchesOnSeveralStreamsDoNotMix) {
  constexpr int kStreams = 4;
  std::vector<std::unique_ptr<Problem>> problems;
  std::vector<std::vector<char>> expected;
  cudaStream_t streams[kStreams];
  for (int i = 0; i < kStreams; ++i) {
    VSP_ASSERT_CUDA(cudaStreamCreateWithFlags(&streams[i], cudaStreamNonBlocking));
    problems.push_back(std::make_unique<Problem>(Case{"", 32, 8, 128, 700, 900 + i, 0.1, 0.2},
                                                 DType::kBF16, 20 + i));
    Problem& p = *problems.back();
    ASSERT_EQ(AttentionCuda(p.shape, &p.device, 1, nullptr), KernelStatus::kOk);
    ASSERT_TRUE(testing::Synchronize());
    expected.push_back(p.out_device.Download<char>());
    ASSERT_EQ(cudaMemset(p.out_device.data(), 0xff, expected.back().size()), cudaSuccess);
  }
  for (int repeat = 0; repeat < 8; ++repeat) {
    for (int i = 0; i < kStreams; ++i) {
      Problem& p = *problems[i];
      ASSERT_EQ(AttentionCuda(p.shape, &p.device, 1, streams[i]), KernelStatus::kOk);
    }
  }
  ASSERT_TRUE(testing::Synchronize());
  for (int i = 0; i < kStreams; ++i) {
    EXPECT_EQ(problems[i]->out_device.Download<char>(), expected[i]) << "stream " << i;
    cudaStreamDestroy(streams[i]);
  }
}

TEST(AttentionCuda, RefusesWhatItCannotDo) {
  Problem p({"", 4, 2, 64, 10, 10, kDense, 0}, DType::kBF16, 8);
  AttentionShape shape = p.shape;
  shape.head_dim = 72;
  EXPECT_EQ(AttentionCuda(shape, &p.device, 1, nullptr), KernelStatus::kUnsupportedShape);
  shape = p.shape;
  shape.num_kv_heads = 3;
  EXPECT_EQ(AttentionCuda(shape, &p.device, 1, nullptr), KernelStatus::kUnsupportedShape);
  AttentionSequence s = p.device;
  s.kv_token_stride = 65;
  EXPECT_EQ(AttentionCuda(p.shape, &s, 1, nullptr), KernelStatus::kUnsupportedShape);
  s = p.device;
  s.q = p.q_device.as<char>() + 2;
  EXPECT_EQ(AttentionCuda(p.shape, &s, 1, nullptr), KernelStatus::kUnsupportedShape);
  EXPECT_EQ(AttentionCuda(p.shape, nullptr, 0, nullptr), KernelStatus::kOk);
}

}  // namespace
}  // namespace vsprefill::kernels
