// CPU attention against the matrix product of the same machine in the same run: GFLOP/s per visited
// (query, key) pair, 4 * head_dim FLOP each, and its ratio to the GEMM that LibTorch runs on the
// same threads and dtype. Repetitions of all cases are interleaved and the best of each counts,
// because machines are shared.
//
//   kernel_bench_cpu --tokens=8000 --threads=1 --json=out.json
#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <functional>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/strings/numbers.h"
#include "kernels/attention.h"
#include "kernels/cpu/isa.h"
#include "kernels/cpu/parallel.h"
#include "kernels/distill.h"
#include "kernels/indexer.h"
#include "kernels/scalar.h"

ABSL_FLAG(int64_t, tokens, 8000, "sequence length");
ABSL_FLAG(int, q_heads, 9, "query heads");
ABSL_FLAG(int, kv_heads, 3, "KV heads");
ABSL_FLAG(int, head_dim, 64, "head dimension");
ABSL_FLAG(int, hidden, 512, "hidden width of the VSIndexer case");
ABSL_FLAG(std::vector<std::string>, densities, std::vector<std::string>({"0.05", "0.1", "0.2"}),
          "of the random selections, by commas: shares of verticals and bands together, up to 2; "
          "where they overlap the density is less");
ABSL_FLAG(int, repeats, 5, "repetitions; the best counts");
ABSL_FLAG(int, threads, 0, "1: the calling thread; 0: all cores");
ABSL_FLAG(bool, cpu_time, false,
          "CPU seconds per thread instead of wall time: for a machine that others use");
ABSL_FLAG(std::string, isa, "", "avx2, avx512 or avx512_bf16; empty: the best this processor has");
ABSL_FLAG(std::string, dtype, "bfloat16", "bfloat16 or float32");
ABSL_FLAG(std::string, json, "", "write the results to this file");

namespace vsprefill::bench {
namespace {

using kernels::DType;

double Seconds(const std::function<void()>& run) {
  const auto start = std::chrono::steady_clock::now();
  const std::clock_t cpu_start = std::clock();
  run();
  if (absl::GetFlag(FLAGS_cpu_time)) {
    return static_cast<double>(std::clock() - cpu_start) / CLOCKS_PER_SEC / kernels::NumWorkers();
  }
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

struct Case {
  std::string name;
  double flop = 0;
  double density = 1, cost_ratio = 1;
  std::function<void()> run;
  double best = std::numeric_limits<double>::infinity();
};

std::vector<char> RandomTensor(int64_t elements, DType dtype, uint32_t seed) {
  std::vector<char> bytes(elements * kernels::SizeOf(dtype));
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < elements; ++i) {
    kernels::StoreScalar(bytes.data(), i, dtype, normal(generator));
  }
  return bytes;
}

// Sinks, the local band, and verticals and bands at random in equal shares of `density`.
class RandomIndex {
 public:
  RandomIndex(double density, int groups, int group_size, int64_t tokens) {
    const int tile = kernels::RowTilePositions(group_size);
    const int64_t blocks = kernels::BandBlocks(tokens, tile);
    view.num_groups = groups;
    view.vertical_stride = tokens;
    view.band_stride = kernels::BandWords(tokens, tile);
    view.band_list_stride = blocks;
    verticals_.resize(groups * tokens);
    bits_.resize(groups * view.band_stride);
    bands_.resize(groups * blocks);
    num_verticals_.resize(groups);
    num_bands_.resize(groups);
    std::mt19937 generator(7);
    std::bernoulli_distribution chosen(density / 2);
    for (int g = 0; g < groups; ++g) {
      for (int64_t c = 0; c < tokens; ++c) {
        if (c < 64 || chosen(generator)) {
          verticals_[g * tokens + num_verticals_[g]++] = static_cast<int32_t>(c);
        }
      }
      for (int64_t b = 0; b < blocks; ++b) {
        if (b >= 2 && !chosen(generator)) continue;
        bands_[g * blocks + num_bands_[g]++] = static_cast<int32_t>(b);
        bits_[g * view.band_stride + b / 32] |= 1u << (b % 32);
      }
    }
    view.verticals = verticals_.data();
    view.num_verticals = num_verticals_.data();
    view.band_bits = bits_.data();
    view.bands = bands_.data();
    view.num_bands = num_bands_.data();
  }
  kernels::SparseIndexView view;

 private:
  std::vector<int32_t> verticals_, num_verticals_, bands_, num_bands_;
  std::vector<uint32_t> bits_;
};

void Check(kernels::KernelStatus status) {
  if (status == kernels::KernelStatus::kOk) return;
  std::fprintf(stderr, "kernel_bench_cpu: this shape is not supported\n");
  std::exit(1);
}

int Main() {
  const int64_t n = absl::GetFlag(FLAGS_tokens);
  const int q_heads = absl::GetFlag(FLAGS_q_heads), kv_heads = absl::GetFlag(FLAGS_kv_heads);
  const int d = absl::GetFlag(FLAGS_head_dim), g = q_heads / kv_heads;
  const DType dtype = absl::GetFlag(FLAGS_dtype) == "float32" ? DType::kF32 : DType::kBF16;
  if (absl::GetFlag(FLAGS_threads) == 1) {
    kernels::SetParallelRunner(
        {[] { return 1; }, [](void (*body)(void*, int), void* context) { body(context, 0); }});
  }
  at::set_num_threads(kernels::NumWorkers());
  for (const auto isa :
       {kernels::CpuIsa::kAvx2, kernels::CpuIsa::kAvx512, kernels::CpuIsa::kAvx512Bf16}) {
    if (absl::GetFlag(FLAGS_isa) == kernels::CpuIsaName(isa) && !kernels::SetCpuIsa(isa)) {
      std::fprintf(stderr, "this processor lacks %s\n", kernels::CpuIsaName(isa));
      return 1;
    }
  }

  const at::ScalarType type = dtype == DType::kF32 ? at::kFloat : at::kBFloat16;
  const int64_t side = 2048;
  const at::Tensor a = at::randn({side, side}).to(type), b = at::randn({side, side}).to(type);
  std::vector<Case> cases;
  cases.push_back(
      {"torch linear 2048^3", 2.0 * side * side * side, 1, 1, [&] { at::linear(a, b); }});

  const std::vector<char> q = RandomTensor(n * q_heads * d, dtype, 1);
  const std::vector<char> k = RandomTensor(n * kv_heads * d, dtype, 2);
  const std::vector<char> v = RandomTensor(n * kv_heads * d, dtype, 3);
  std::vector<char> out(q.size());
  const kernels::AttentionShape shape{q_heads, kv_heads, d, dtype,
                                      1.0f / std::sqrt(static_cast<float>(d))};
  kernels::AttentionSequence dense;
  dense.q = q.data();
  dense.q_token_stride = dense.out_token_stride = int64_t{q_heads} * d;
  dense.q_head_stride = dense.out_head_stride = d;
  dense.k = k.data();
  dense.v = v.data();
  dense.kv_head_stride = n * d;
  dense.kv_token_stride = d;
  dense.out = out.data();
  dense.q_tokens = dense.kv_tokens = n;
  std::vector<std::unique_ptr<RandomIndex>> indexes;
  std::vector<double> densities = {0};  // 0: dense
  for (const std::string& text : absl::GetFlag(FLAGS_densities)) {
    double& density = densities.emplace_back();
    if (!absl::SimpleAtod(text, &density) || !(density > 0 && density <= 2)) {
      std::fprintf(stderr, "--densities: \"%s\" is not a number in (0, 2]\n", text.c_str());
      std::exit(2);
    }
  }
  for (const double density : densities) {
    kernels::AttentionSequence s = dense;
    if (density > 0) {
      indexes.push_back(std::make_unique<RandomIndex>(density, kv_heads, g, n));
      s.index = &indexes.back()->view;
    }
    kernels::PairCounts counts;
    Check(kernels::CountPairsCpu(shape, s, &counts, nullptr));
    char name[64];
    std::snprintf(name, sizeof(name),
                  density > 0 ? "attention, selection %.0f %%" : "attention, dense", 100 * density);
    const double dense_pairs = static_cast<double>(counts.dense);
    cases.push_back({name, 4.0 * d * static_cast<double>(counts.unmasked),
                     static_cast<double>(counts.unmasked) / dense_pairs,
                     static_cast<double>(counts.multiplied) / dense_pairs,
                     [&shape, s] { Check(kernels::AttentionCpu(shape, &s, 1, nullptr)); }});
  }
  kernels::AttentionSequence decode = dense;
  decode.q_tokens = 1;
  cases.push_back({"attention, one query", 4.0 * d * static_cast<double>(n) * q_heads, 1, 1,
                   [&shape, decode] { Check(kernels::AttentionCpu(shape, &decode, 1, nullptr)); }});

  const int64_t hidden = absl::GetFlag(FLAGS_hidden);
  const std::vector<char> w1 = RandomTensor(kv_heads * hidden * 2 * d, dtype, 4);
  const std::vector<float> zeros(kv_heads * std::max<int64_t>(2 * hidden, kernels::kSlashBuckets));
  std::vector<float> logits(2 * kv_heads * n);
  const kernels::IndexerLayer layer{kv_heads,
                                    d,
                                    static_cast<int>(hidden),
                                    dtype,
                                    w1.data(),
                                    zeros.data(),
                                    zeros.data(),
                                    zeros.data(),
                                    zeros.data()};
  kernels::IndexerInput input;
  input.k = k.data();
  input.v = v.data();
  input.head_stride = n * d;
  input.token_stride = d;
  input.dtype = dtype;
  input.token_end = n;
  input.vertical_logits = logits.data();
  input.slash_logits = logits.data() + kv_heads * n;
  input.logit_stride = n;
  cases.push_back({"VSIndexer", 2.0 * static_cast<double>(n * kv_heads * hidden) * (2 * d + 2), 1,
                   1, [&] { Check(kernels::IndexerCpu(layer, input, nullptr)); }});

  std::vector<float> lse(n * q_heads), sums(2 * n * kv_heads);
  kernels::AttentionSumsArgs sums_args;
  sums_args.shape = shape;
  sums_args.sequence = dense;
  sums_args.lse = lse.data();
  sums_args.columns = sums.data();
  sums_args.diagonals = sums.data() + n * kv_heads;
  const double causal = static_cast<double>(n) * static_cast<double>(n + 1) / 2 * q_heads;
  cases.push_back({"attention sums (2 passes)", 4.0 * d * causal, 1, 1,
                   [&] { Check(kernels::AttentionSumsCpu(sums_args, nullptr)); }});

  for (int i = 0; i < absl::GetFlag(FLAGS_repeats); ++i) {
    for (Case& c : cases) c.best = std::min(c.best, Seconds(c.run));
  }
  std::printf("%ld tokens, %d/%d heads, head_dim %d, %s, %s, %d threads, best of %d\n", long{n},
              q_heads, kv_heads, d, kernels::Name(dtype),
              kernels::CpuIsaName(kernels::ActiveCpuIsa()), kernels::NumWorkers(),
              absl::GetFlag(FLAGS_repeats));
  std::printf("%-28s %9s %10s %9s %9s %8s\n", "case", "ms", "GFLOP/s", "of GEMM", "density",
              "cost");
  nlohmann::json results = nlohmann::json::array();
  const double gemm = cases[0].flop / cases[0].best;
  for (const Case& c : cases) {
    const double rate = c.flop / c.best;
    std::printf("%-28s %9.2f %10.1f %9.3f %9.4f %8.4f\n", c.name.c_str(), 1e3 * c.best, rate / 1e9,
                rate / gemm, c.density, c.cost_ratio);
    results.push_back({{"case", c.name},
                       {"seconds", c.best},
                       {"gflops", rate / 1e9},
                       {"ratio_to_gemm", rate / gemm},
                       {"density", c.density},
                       {"cost_ratio", c.cost_ratio}});
  }
  if (const std::string path = absl::GetFlag(FLAGS_json); !path.empty()) {
    const nlohmann::json report = {{"tokens", n},
                                   {"q_heads", q_heads},
                                   {"kv_heads", kv_heads},
                                   {"head_dim", d},
                                   {"dtype", kernels::Name(dtype)},
                                   {"isa", kernels::CpuIsaName(kernels::ActiveCpuIsa())},
                                   {"threads", kernels::NumWorkers()},
                                   {"results", results}};
    std::FILE* const file = std::fopen(path.c_str(), "w");
    if (file == nullptr) {
      std::perror(path.c_str());
      return 1;
    }
    std::fprintf(file, "%s\n", report.dump(1).c_str());
    std::fclose(file);
  }
  return 0;
}

}  // namespace
}  // namespace vsprefill::bench

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage("CPU attention kernels against the GEMM of the same run");
  absl::ParseCommandLine(argc, argv);
  return vsprefill::bench::Main();
}
