// The whole VSPrefill operator in a CUDA graph: indexer, selection and attention over the selected
// index. A launcher that allocated, synchronised or used another stream could not be captured.
#include "kernels/attention.h"
#include "kernels/indexer.h"
#include "kernels/selection.h"
#include "tests/kernels/cuda/gpu_test_support.h"

namespace vsprefill::kernels {
namespace {

using testing::DeviceBuffer;

/// One layer of one sequence, all on the device.
struct Operator {
  int q_heads, kv_heads, head_dim, hidden;
  int64_t n;
  DeviceBuffer q, k, v, out, w1, b1, w2, b2, prior, logits, workspace, dense_rows;
  DeviceBuffer verticals, bands, bits, numbers;
  SparseIndexView index;
  AttentionShape shape;

  Operator(int q_heads_in, int kv_heads_in, int head_dim_in, int hidden_in, int64_t tokens)
      : q_heads(q_heads_in),
        kv_heads(kv_heads_in),
        head_dim(head_dim_in),
        hidden(hidden_in),
        n(tokens) {
    std::mt19937 rng(11);
    const auto floats = [&](int64_t count, float scale) {
      std::normal_distribution<float> normal;
      std::vector<float> values(count);
      for (float& x : values) x = normal(rng) * scale;
      return DeviceBuffer(values);
    };
    w1 = DeviceBuffer(
        testing::RandomTensor(DType::kBF16, int64_t{2} * kv_heads * hidden * head_dim, rng, 0.1f)
            .bytes);
    b1 = floats(kv_heads * hidden, 0.3f);
    w2 = floats(2 * kv_heads * hidden, 0.3f);
    b2 = floats(2 * kv_heads, 1.0f);
    prior = floats(kv_heads * kSlashBuckets, 2.0f);
    out = DeviceBuffer(2 * n * q_heads * head_dim);
    logits = DeviceBuffer(2 * 4 * kv_heads * n);
    shape = {q_heads, kv_heads, head_dim, DType::kBF16,
             1.0f / std::sqrt(static_cast<float>(head_dim))};
    workspace = DeviceBuffer(SelectionWorkspaceBytes(kv_heads, n));
    dense_rows = DeviceBuffer(
        AttentionWorkspaceBytes(shape, kv_heads, n - SelectionParams().last_dense_tokens, n));
    const int row_tile = RowTilePositions(q_heads / kv_heads);
    index.vertical_stride = n;
    index.band_stride = BandWords(n, row_tile);
    index.band_list_stride = BandBlocks(n, row_tile);
    verticals = DeviceBuffer(4 * kv_heads * index.vertical_stride);
    bits = DeviceBuffer(4 * kv_heads * index.band_stride);
    bands = DeviceBuffer(4 * kv_heads * index.band_list_stride);
    numbers = DeviceBuffer(2 * 4 * kv_heads);
    index.verticals = verticals.as<int32_t>();
    index.band_bits = bits.as<uint32_t>();
    index.bands = bands.as<int32_t>();
    index.num_verticals = numbers.as<int32_t>();
    index.num_bands = numbers.as<int32_t>() + kv_heads;
  }

  /// Other queries, keys and values in the same place.
  void Fill(unsigned seed) {
    std::mt19937 rng(seed);
    const auto fill = [&](DeviceBuffer& buffer, int heads) {
      const auto tensor = testing::RandomTensor(DType::kBF16, n * heads * head_dim, rng);
      if (buffer.data() == nullptr) buffer = DeviceBuffer(tensor.bytes);
      ASSERT_EQ(
          cudaMemcpy(buffer.data(), tensor.data(), tensor.bytes.size(), cudaMemcpyHostToDevice),
          cudaSuccess);
    };
    fill(q, q_heads);
    fill(k, kv_heads);
    fill(v, kv_heads);
  }

  KernelStatus Run(cudaStream_t stream) {
    IndexerLayer layer;
    layer.num_groups = kv_heads;
    layer.head_dim = head_dim;
    layer.hidden = hidden;
    layer.w1 = w1.data();
    layer.b1 = b1.as<float>();
    layer.w2 = w2.as<float>();
    layer.b2 = b2.as<float>();
    layer.slash_prior = prior.as<float>();
    IndexerInput input;
    input.k = k.data();
    input.v = v.data();
    input.head_stride = n * head_dim;
    input.token_stride = head_dim;
    input.token_end = n;
    input.vertical_logits = logits.as<float>();
    input.slash_logits = logits.as<float>() + kv_heads * n;
    input.logit_stride = n;
    KernelStatus status = IndexerCuda(layer, input, stream);
    if (status != KernelStatus::kOk) return status;
    SelectionInput select;
    select.vertical_logits = input.vertical_logits;
    select.slash_logits = input.slash_logits;
    select.logit_stride = n;
    select.num_groups = kv_heads;
    select.group_size = q_heads / kv_heads;
    select.kv_tokens = select.prompt_tokens = n;
    SelectionParams params;
    params.threshold = 1.0f;
    params.max_density = 0.3f;
    status = SelectCuda(select, params, workspace.data(), &index, stream);
    if (status != KernelStatus::kOk) return status;
    AttentionSequence s;
    s.q = q.data();
    s.q_token_stride = int64_t{q_heads} * head_dim;
    s.q_head_stride = head_dim;
    s.k = k.data();
    s.v = v.data();
    s.kv_head_stride = n * head_dim;
    s.kv_token_stride = head_dim;
    s.out = out.data();
    s.out_token_stride = int64_t{q_heads} * head_dim;
    s.out_head_stride = head_dim;
    s.q_tokens = s.kv_tokens = n;
    s.index = &index;
    s.workspace = dense_rows.data();
    return AttentionCuda(shape, &s, 1, stream);
  }

  void Poison() {
    for (DeviceBuffer* buffer : {&out, &logits}) {
      EXPECT_EQ(cudaMemset(buffer->data(), 0xff, buffer->Download<char>().size()), cudaSuccess);
    }
    EXPECT_EQ(cudaMemset(numbers.data(), 0, 8 * kv_heads), cudaSuccess);
    EXPECT_TRUE(testing::Synchronize());
  }
};

void CheckGraph(Operator op) {
  cudaStream_t stream;
  VSP_ASSERT_CUDA(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const std::string what = "head_dim " + std::to_string(op.head_dim);
  op.Fill(1);
  VSP_ASSERT_CUDA(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  EXPECT_EQ(op.Run(stream), KernelStatus::kOk) << what;
  cudaGraph_t graph;
  VSP_ASSERT_CUDA(cudaStreamEndCapture(stream, &graph));
  cudaGraphExec_t executable;
  VSP_ASSERT_CUDA(cudaGraphInstantiate(&executable, graph, 0));
  // What is selected depends on the input alone: the graph holds none of it.
  for (unsigned seed : {1u, 2u, 3u}) {
    op.Fill(seed);
    op.Poison();
    ASSERT_EQ(op.Run(stream), KernelStatus::kOk) << what;
    VSP_ASSERT_CUDA(cudaStreamSynchronize(stream));
    const auto out = op.out.Download<char>();
    const auto numbers = op.numbers.Download<int32_t>();
    op.Poison();
    VSP_ASSERT_CUDA(cudaGraphLaunch(executable, stream));
    VSP_ASSERT_CUDA(cudaStreamSynchronize(stream));
    EXPECT_TRUE(op.out.Download<char>() == out) << what << ", seed " << seed;
    EXPECT_EQ(op.numbers.Download<int32_t>(), numbers) << what << ", seed " << seed;
    for (int g = 0; g < op.kv_heads; ++g) {
      EXPECT_GT(numbers[g], 0) << what;
      EXPECT_LT(numbers[g], op.n) << what;
    }
  }
  VSP_ASSERT_CUDA(cudaGraphExecDestroy(executable));
  VSP_ASSERT_CUDA(cudaGraphDestroy(graph));
  VSP_ASSERT_CUDA(cudaStreamDestroy(stream));
}

TEST(WholeOperator, SmallReplaysFromAGraph) {
  CheckGraph(Operator(9, 3, 64, 256, 700));
  CheckGraph(Operator(8, 2, 128, 512, 600));
}

TEST(WholeOperator, ReplaysFromAGraph) {
  CheckGraph(Operator(9, 3, 64, 512, 6001));
  CheckGraph(Operator(32, 8, 128, 512, 5003));
}

}  // namespace
}  // namespace vsprefill::kernels
