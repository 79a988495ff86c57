// Times the CUDA kernels with device events: median of many runs, L2 flushed before each, random
// inputs. Prints a table; --json writes the same figures to a file.
//
// TFLOP/s of attention: 4 * head_dim * pairs / time; "useful" counts the pairs that enter a softmax
// (density * n (n + 1) / 2 per query head), "visited" those that the kernel multiplies (padding of
// the row tile and masked parts of tiles included).
#include <cuda_runtime_api.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "kernels/cuda/attention_kernels.h"
#include "kernels/cuda/indexer_kernels.h"
#include "kernels/cuda/select_kernels.h"
#include "kernels/kernel_set.h"

ABSL_FLAG(std::string, json, "", "also write the figures to this file, as a JSON array");
ABSL_FLAG(double, seconds, 0.4, "time spent on each figure");
ABSL_FLAG(int64_t, max_tokens, 131072, "leave out longer sequences");
ABSL_FLAG(int64_t, min_tokens, 0, "leave out shorter sequences");
ABSL_FLAG(std::vector<std::string>, filter, {},
          "run only figures whose names begin with one of these (comma-separated)");

namespace vsprefill::kernels {
namespace {

void Check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  std::fprintf(stderr, "kernel_bench: %s: %s\n", what, cudaGetErrorString(error));
  std::exit(1);
}

void Check(KernelStatus status, const std::string& what) {
  if (status == KernelStatus::kOk) return;
  std::fprintf(stderr, "kernel_bench: %s: kernel status %d\n", what.c_str(),
               static_cast<int>(status));
  std::exit(1);
}

/// Device memory for the life of the program's current figure group.
class Memory {
 public:
  explicit Memory(int64_t bytes) : bytes_(bytes) {
    Check(cudaMalloc(&data_, std::max<int64_t>(bytes, 1)), "cudaMalloc");
  }
  template <typename T>
  explicit Memory(const std::vector<T>& host)
      : Memory(static_cast<int64_t>(host.size() * sizeof(T))) {
    Check(cudaMemcpy(data_, host.data(), bytes_, cudaMemcpyHostToDevice), "cudaMemcpy");
  }
  Memory(const Memory&) = delete;
  ~Memory() { cudaFree(data_); }
  template <typename T>
  T* as() const {
    return static_cast<T*>(data_);
  }

  /// Random bf16 of about unit size: a few random MiB on the host, repeated on the device.
  void FillBf16(unsigned seed) {
    std::mt19937 rng(seed);
    std::normal_distribution<float> normal;
    const int64_t period = std::min<int64_t>(bytes_, 6 << 20);
    std::vector<uint16_t> host(period / 2);
    for (uint16_t& x : host) {
      const float value = normal(rng);
      uint32_t bits;
      static_assert(sizeof(bits) == sizeof(value));
      std::memcpy(&bits, &value, sizeof(bits));
      x = static_cast<uint16_t>(bits >> 16);
    }
    for (int64_t at = 0; at < bytes_; at += period) {
      Check(cudaMemcpy(as<char>() + at, host.data(), std::min(period, bytes_ - at),
                       cudaMemcpyHostToDevice),
            "cudaMemcpy");
    }
  }

 private:
  void* data_ = nullptr;
  int64_t bytes_;
};

struct Figure {
  std::string name;
  double milliseconds = 0, p10 = 0, p90 = 0;
  int runs = 0;
  std::vector<std::pair<std::string, double>> values;
};

class Bench {
 public:
  Bench() : flush_(256 << 20) {
    Check(cudaEventCreate(&begin_), "cudaEventCreate");
    Check(cudaEventCreate(&end_), "cudaEventCreate");
    Check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  }

  bool Wanted(const std::string& name) const {
    return AnyFilter([&](const std::string& filter) { return name.rfind(filter, 0) == 0; });
  }
  /// Whether a name that begins with `beginning` may be wanted.
  bool MayWant(const std::string& beginning) const {
    return Wanted(beginning) ||
           AnyFilter([&](const std::string& filter) { return filter.rfind(beginning, 0) == 0; });
  }
  Stream stream() const { return stream_; }

  Figure& Time(const std::string& name, const std::function<KernelStatus()>& launch) {
    for (int i = 0; i < 2; ++i) Check(launch(), name);  // module load, first-touch
    Check(cudaStreamSynchronize(stream_), name.c_str());
    std::vector<float> times;
    double total = 0;
    while (times.size() < 5 || (total < absl::GetFlag(FLAGS_seconds) * 1e3 && times.size() < 300)) {
      Check(cudaMemsetAsync(flush_.as<char>(), static_cast<int>(times.size()), 256 << 20, stream_),
            "flush");
      Check(cudaEventRecord(begin_, stream_), "cudaEventRecord");
      Check(launch(), name);
      Check(cudaEventRecord(end_, stream_), "cudaEventRecord");
      Check(cudaEventSynchronize(end_), name.c_str());
      float milliseconds;
      Check(cudaEventElapsedTime(&milliseconds, begin_, end_), "cudaEventElapsedTime");
      times.push_back(milliseconds);
      total += milliseconds;
    }
    std::sort(times.begin(), times.end());
    Figure figure;
    figure.name = name;
    figure.runs = static_cast<int>(times.size());
    figure.milliseconds = times[times.size() / 2];
    figure.p10 = times[times.size() / 10];
    figure.p90 = times[times.size() * 9 / 10];
    figures_.push_back(figure);
    return figures_.back();
  }

  static void Print(const Figure& f) {
    std::printf("%-44s %9.4f ms (p10 %.4f, p90 %.4f, %d runs)", f.name.c_str(), f.milliseconds,
                f.p10, f.p90, f.runs);
    for (const auto& [key, value] : f.values) std::printf("  %s %.4g", key.c_str(), value);
    std::printf("\n");
    std::fflush(stdout);
  }

  void WriteJson(const std::string& path, const std::string& gpu) const {
    FILE* file = std::fopen(path.c_str(), "w");
    if (file == nullptr) {
      std::fprintf(stderr, "kernel_bench: cannot write %s\n", path.c_str());
      std::exit(1);
    }
    std::fprintf(file, "[");
    for (size_t i = 0; i < figures_.size(); ++i) {
      const Figure& f = figures_[i];
      std::fprintf(file,
                   "%s\n  {\"gpu\": \"%s\", \"name\": \"%s\", \"ms\": %.6g, \"p10_ms\": %.6g, "
                   "\"p90_ms\": %.6g, \"runs\": %d",
                   i == 0 ? "" : ",", gpu.c_str(), f.name.c_str(), f.milliseconds, f.p10, f.p90,
                   f.runs);
      for (const auto& [key, value] : f.values) {
        std::fprintf(file, ", \"%s\": %.6g", key.c_str(), value);
      }
      std::fprintf(file, "}");
    }
    std::fprintf(file, "\n]\n");
    std::fclose(file);
  }

 private:
  static bool AnyFilter(const std::function<bool(const std::string&)>& matches) {
    const std::vector<std::string> filters = absl::GetFlag(FLAGS_filter);
    return filters.empty() || std::any_of(filters.begin(), filters.end(), matches);
  }

  Memory flush_;
  cudaEvent_t begin_, end_;
  cudaStream_t stream_;
  std::vector<Figure> figures_;
};

struct Model {
  const char* name;
  int q_heads, kv_heads, head_dim;
  int hidden;  // model width
  int mlp;
  std::vector<int> indexer_hidden;  // the whole operator runs with the first
  std::vector<int64_t> tokens;
};

/// An index with the given numbers of random columns and of random bands beside the local ones.
struct SyntheticIndex {
  std::vector<int32_t> verticals, bands;
  std::vector<uint32_t> bits;
  Memory verticals_device, num_verticals_device, bits_device, bands_device, num_bands_device;
  SparseIndexView view;

  static std::vector<int32_t> Choose(int64_t first, int64_t end, int64_t count, unsigned seed) {
    std::vector<int32_t> all(end - first);
    for (int64_t i = first; i < end; ++i) all[i - first] = static_cast<int32_t>(i);
    std::mt19937 rng(seed);
    std::shuffle(all.begin(), all.end(), rng);
    all.resize(std::clamp<int64_t>(count, 0, end - first));
    std::sort(all.begin(), all.end());
    return all;
  }
  static std::vector<int32_t> Bands(int64_t n, int row_tile, int64_t more) {
    std::vector<int32_t> bands = {0, 1};
    const int64_t blocks = BandBlocks(n, row_tile);
    if (blocks > 2) {
      for (int32_t b : Choose(2, blocks, more, 3)) bands.push_back(b);
    }
    return bands;
  }
  static std::vector<uint32_t> Bits(const std::vector<int32_t>& bands, int64_t words) {
    std::vector<uint32_t> bits(words, 0);
    for (int32_t b : bands) bits[b / 32] |= 1u << (b % 32);
    return bits;
  }
  template <typename T>
  static std::vector<T> Repeat(const std::vector<T>& row, int groups) {
    std::vector<T> all;
    for (int g = 0; g < groups; ++g) all.insert(all.end(), row.begin(), row.end());
    return all;
  }
  SyntheticIndex(int groups, int64_t n, int row_tile, int64_t num_verticals, int64_t more_bands)
      : verticals(Choose(0, n, num_verticals, 2)),
        bands(Bands(n, row_tile, more_bands)),
        bits(Bits(bands, BandWords(n, row_tile))),
        verticals_device(Repeat(verticals, groups)),
        num_verticals_device(std::vector<int32_t>(groups, static_cast<int32_t>(verticals.size()))),
        bits_device(Repeat(bits, groups)),
        bands_device(Repeat(bands, groups)),
        num_bands_device(std::vector<int32_t>(groups, static_cast<int32_t>(bands.size()))) {
    view.num_groups = groups;
    view.verticals = verticals_device.as<int32_t>();
    view.vertical_stride = static_cast<int64_t>(verticals.size());
    view.num_verticals = num_verticals_device.as<int32_t>();
    view.band_bits = bits_device.as<uint32_t>();
    view.band_stride = static_cast<int64_t>(bits.size());
    view.bands = bands_device.as<int32_t>();
    view.band_list_stride = static_cast<int64_t>(bands.size());
    view.num_bands = num_bands_device.as<int32_t>();
  }
};

/// A block-sparse index: for each row tile its own key block and random ones, `density` of those it
/// sees.
struct SyntheticBlocks {
  std::vector<uint32_t> bits;
  Memory device;
  TileIndexView view;

  static std::vector<uint32_t> Bits(int groups, int64_t n, int row_tile, double density) {
    const int64_t tiles = (n + row_tile - 1) / row_tile, words = KeyBlockWords(n);
    std::vector<uint32_t> bits(groups * tiles * words, 0);
    std::mt19937 rng(4);
    for (int64_t i = 0; i < groups * tiles; ++i) {
      const int64_t own = std::min((i % tiles + 1) * row_tile, n) - 1;
      for (int64_t block = 0; block <= own / kKeyBlock; ++block) {
        const bool wanted = rng() < density * 4294967296.0;
        if (wanted || block >= i % tiles * row_tile / kKeyBlock) SetBit(&bits[i * words], block);
      }
    }
    return bits;
  }
  SyntheticBlocks(int groups, int64_t n, int row_tile, double density)
      : bits(Bits(groups, n, row_tile, density)), device(bits) {
    view.num_groups = groups;
    view.num_tiles = (n + row_tile - 1) / row_tile;
    view.blocks = device.as<uint32_t>();
    view.block_words = KeyBlockWords(n);
  }
};

/// One layer's attention over a whole prompt; queries as the service lays them out.
struct AttentionProblem {
  Memory q, k, v, out, counts;
  AttentionShape shape;
  AttentionSequence sequence;

  AttentionProblem(const Model& m, int64_t n)
      : q(2 * n * QueryStride(m)),
        k(2 * n * m.kv_heads * m.head_dim),
        v(2 * n * m.kv_heads * m.head_dim),
        out(2 * n * m.q_heads * m.head_dim),
        counts(sizeof(PairCounts)),
        shape{m.q_heads, m.kv_heads, m.head_dim, DType::kBF16,
              1.0f / std::sqrt(static_cast<float>(m.head_dim))} {
    q.FillBf16(1);
    k.FillBf16(2);
    v.FillBf16(3);
    sequence.q = q.as<void>();
    sequence.q_token_stride = QueryStride(m);
    sequence.q_head_stride = m.head_dim;
    sequence.k = k.as<void>();
    sequence.v = v.as<void>();
    sequence.kv_head_stride = n * m.head_dim;
    sequence.kv_token_stride = m.head_dim;
    sequence.out = out.as<void>();
    sequence.out_token_stride = int64_t{m.q_heads} * m.head_dim;
    sequence.out_head_stride = m.head_dim;
    sequence.q_tokens = sequence.kv_tokens = n;
  }
  static int64_t QueryStride(const Model& m) {
    return int64_t{m.q_heads + 2 * m.kv_heads} * m.head_dim;
  }
  /// Of the sequence with its index; waits for the device.
  PairCounts Pairs() const {
    PairCounts pairs;
    Check(cudaDeviceSynchronize(), "CountPairsCuda");
    Check(cudaMemset(counts.as<void>(), 0, sizeof(pairs)), "cudaMemset");
    Check(CountPairsCuda(shape, sequence, counts.as<PairCounts>(), nullptr), "CountPairsCuda");
    Check(cudaMemcpy(&pairs, counts.as<void>(), sizeof(pairs), cudaMemcpyDeviceToHost),
          "cudaMemcpy");
    return pairs;
  }
};

double Density(const PairCounts& pairs) {
  return static_cast<double>(pairs.unmasked) / static_cast<double>(pairs.dense);
}

void BenchAttention(Bench& bench, const Model& m, int64_t n) {
  if (!bench.MayWant("attention ")) return;
  const std::string where = std::string(m.name) + " n=" + std::to_string(n);
  AttentionProblem p(m, n);
  const AttentionShape& shape = p.shape;
  AttentionSequence& s = p.sequence;
  const auto run = [&](const std::string& name, const SparseIndexView* index,
                       const TileIndexView* tiles = nullptr) {
    if (!bench.Wanted(name)) return;
    s.index = index;
    s.tiles = tiles;
    const PairCounts pairs = p.Pairs();
    const cuda::KernelChoice kernel = name.find("generic") != std::string::npos
                                          ? cuda::KernelChoice::kGeneric
                                          : cuda::KernelChoice::kFastest;
    Figure& f =
        bench.Time(name, [&] { return cuda::AttentionWith(kernel, shape, &s, 1, bench.stream()); });
    const double flops = 4.0 * m.head_dim / (f.milliseconds * 1e-3) * 1e-12;
    f.values = {
        {"useful_tflops", flops * static_cast<double>(pairs.unmasked)},
        {"visited_tflops", flops * static_cast<double>(pairs.multiplied)},
        {"density", Density(pairs)},
        {"cost_ratio", static_cast<double>(pairs.multiplied) / static_cast<double>(pairs.dense)}};
    Bench::Print(f);
  };
  run("attention dense " + where, nullptr);
  const int row_tile = RowTilePositions(shape.group_size());
  // A column or a band at a random place is seen by half of the rows on average, so the share of
  // the selected ones is the density.
  for (double density : {0.05, 0.1, 0.2}) {
    const std::string label = std::to_string(density).substr(0, 4) + " " + where;
    const auto columns = static_cast<int64_t>(density * static_cast<double>(n));
    const int64_t wide = std::min<int64_t>(1024, columns);
    SyntheticIndex half(m.kv_heads, n, row_tile, columns / 2, columns / 2 / kBandBlock - 2);
    run("attention sparse " + label, &half.view);
    SyntheticIndex bands(m.kv_heads, n, row_tile, 0, columns / kBandBlock - 2);
    run("attention bands " + label, &bands.view);
    SyntheticIndex mixed(m.kv_heads, n, row_tile, wide, (columns - wide) / kBandBlock - 2);
    run("attention 1024 verticals " + label, &mixed.view);
    if (density == 0.05) run("attention generic sparse " + label, &half.view);
    SyntheticBlocks per_group(m.kv_heads, n, row_tile, density);
    run("attention blocks " + label, nullptr, &per_group.view);
    if (density == 0.05) run("attention generic blocks " + label, nullptr, &per_group.view);
    SyntheticBlocks per_head(m.q_heads, n, RowTilePositions(1), density);
    run("attention blocks per head " + label, nullptr, &per_head.view);
  }
}

/// A VSIndexer of one layer with random weights, over the keys and values of a whole prompt.
struct IndexerProblem {
  Memory w1, floats, logits;
  IndexerLayer layer;
  IndexerInput input;

  IndexerProblem(const Model& m, int hidden, int64_t n, const AttentionSequence& kv)
      : w1(4 * int64_t{m.kv_heads} * hidden * m.head_dim),
        floats(RandomFloats(m.kv_heads * (2 * hidden + kSlashBuckets))),
        logits(2 * 4 * m.kv_heads * n) {
    w1.FillBf16(3);
    layer.num_groups = m.kv_heads;
    layer.head_dim = m.head_dim;
    layer.hidden = hidden;
    layer.w1 = w1.as<void>();
    layer.b1 = layer.w2 = layer.b2 = layer.slash_prior = floats.as<float>();
    input.k = kv.k;
    input.v = kv.v;
    input.head_stride = kv.kv_head_stride;
    input.token_stride = kv.kv_token_stride;
    input.token_end = n;
    input.vertical_logits = logits.as<float>();
    input.slash_logits = logits.as<float>() + m.kv_heads * n;
    input.logit_stride = n;
  }
  static std::vector<float> RandomFloats(int64_t count) {
    std::mt19937 rng(5);
    std::normal_distribution<float> normal(0.0f, 0.05f);
    std::vector<float> values(count);
    for (float& x : values) x = normal(rng);
    return values;
  }
};

/// Selection from random logits that fall off with the position, as those of a model do.
struct SelectionProblem {
  Memory logits, verticals, bands, bits, numbers, workspace;
  SelectionInput input;
  SparseIndexView index;

  SelectionProblem(const Model& m, int64_t n)
      : SelectionProblem(m, n, RowTilePositions(m.q_heads / m.kv_heads)) {}
  KernelStatus Run(const SelectionParams& params, Stream stream, cuda::KernelChoice choice = {}) {
    return cuda::SelectWith(choice, input, params, workspace.as<void>(), &index, stream);
  }

 private:
  SelectionProblem(const Model& m, int64_t n, int row_tile)
      : logits(RandomLogits(m.kv_heads, n)),
        verticals(4 * m.kv_heads * n),
        bands(4 * m.kv_heads * BandBlocks(n, row_tile)),
        bits(4 * m.kv_heads * BandWords(n, row_tile)),
        numbers(8 * m.kv_heads),
        workspace(SelectionWorkspaceBytes(m.kv_heads, n)) {
    index.verticals = verticals.as<int32_t>();
    index.vertical_stride = n;
    index.num_verticals = numbers.as<int32_t>();
    index.num_bands = numbers.as<int32_t>() + m.kv_heads;
    index.bands = bands.as<int32_t>();
    index.band_list_stride = BandBlocks(n, row_tile);
    index.band_bits = bits.as<uint32_t>();
    index.band_stride = BandWords(n, row_tile);
    input.vertical_logits = logits.as<float>();
    input.slash_logits = logits.as<float>() + m.kv_heads * n;
    input.logit_stride = n;
    input.num_groups = m.kv_heads;
    input.group_size = m.q_heads / m.kv_heads;
    input.kv_tokens = input.prompt_tokens = n;
  }
  static std::vector<float> RandomLogits(int groups, int64_t n) {
    std::mt19937 rng(1);
    std::normal_distribution<float> normal;
    std::vector<float> values(2 * groups * n);
    for (int64_t i = 0; i < 2 * groups * n; ++i) {
      values[i] = 2 * normal(rng) - 1.2f * std::log1p(static_cast<float>(i % n));
    }
    return values;
  }
};

void BenchIndexer(Bench& bench, const Model& m, int64_t n) {
  if (!bench.MayWant("indexer ")) return;
  AttentionProblem kv(m, n);
  for (const int hidden : m.indexer_hidden) {
    const std::string where =
        "h=" + std::to_string(hidden) + " " + m.name + " n=" + std::to_string(n);
    for (const auto& [label, choice] : {std::pair{"indexer ", cuda::KernelChoice::kFastest},
                                        {"indexer generic ", cuda::KernelChoice::kGeneric}}) {
      const std::string name = label + where;
      if (!bench.Wanted(name)) continue;
      IndexerProblem p(m, hidden, n, kv.sequence);
      Figure& f = bench.Time(name, [&, choice = choice] {
        return cuda::IndexerWith(choice, p.layer, p.input, bench.stream());
      });
      const double flops =
          2.0 * static_cast<double>(n) * m.kv_heads * hidden * (2 * m.head_dim + 2);
      f.values = {{"tflops", flops / (f.milliseconds * 1e-3) * 1e-12}};
      Bench::Print(f);
    }
  }
}

void BenchSelection(Bench& bench, const Model& m, int64_t n) {
  if (!bench.MayWant("select ")) return;
  SelectionProblem p(m, n);
  SelectionParams capped;
  capped.max_density = 0.05f;
  capped.threshold = 0.1f;
  SelectionParams cumulative;
  cumulative.rule = SelectionRule::kCumulative;
  for (const auto& [label, params] : {std::pair<const char*, SelectionParams>{"mass-per-cost", {}},
                                      {"capped", capped},
                                      {"cumulative", cumulative}}) {
    for (const auto& [kernel, choice] : {std::pair{"", cuda::KernelChoice::kFastest},
                                         {"generic ", cuda::KernelChoice::kGeneric}}) {
      const std::string name =
          std::string("select ") + kernel + label + " " + m.name + " n=" + std::to_string(n);
      if (!bench.Wanted(name)) continue;
      Bench::Print(bench.Time(name, [&, &params = params, choice = choice] {
        return p.Run(params, bench.stream(), choice);
      }));
    }
  }
}

/// VSPrefill as the service runs it on one layer: indexer, selection, attention over what was
/// selected. The threshold is set so that the selection has the wanted density (or the least that
/// the forced part leaves); its logits are not the indexer's, whose weights are random.
void BenchWholeOperator(Bench& bench, const Model& m, int64_t n) {
  if (!bench.MayWant("whole op ")) return;
  AttentionProblem attention(m, n);
  IndexerProblem indexer(m, m.indexer_hidden[0], n, attention.sequence);
  SelectionProblem selection(m, n);
  attention.sequence.index = &selection.index;
  const Memory workspace(AttentionWorkspaceBytes(attention.shape, m.kv_heads,
                                                 n - SelectionParams().last_dense_tokens, n));
  attention.sequence.workspace = workspace.as<void>();
  const std::vector<double> densities =
      n > 32768 ? std::vector{0.025, 0.05, 0.1} : std::vector{0.05, 0.1, 0.2, 0.3, 0.5};
  for (const double density : densities) {
    const std::string where =
        std::to_string(density).substr(0, 5) + " " + m.name + " n=" + std::to_string(n);
    if (!bench.Wanted("whole op " + where)) continue;
    SelectionParams params;
    double lowest = 1e-6, highest = 1e6, reached = 1;
    for (int i = 0; i < 30 && std::abs(reached / density - 1) > 0.005; ++i) {
      params.threshold = static_cast<float>(std::sqrt(lowest * highest));
      Check(selection.Run(params, nullptr), "SelectCuda");
      reached = Density(attention.Pairs());
      (reached > density ? lowest : highest) = params.threshold;
    }
    const auto index = [&] {
      const KernelStatus status = IndexerCuda(indexer.layer, indexer.input, bench.stream());
      return status != KernelStatus::kOk ? status : selection.Run(params, bench.stream());
    };
    const auto attend = [&] {
      return AttentionCuda(attention.shape, &attention.sequence, 1, bench.stream());
    };
    const auto whole = [&] {
      const KernelStatus status = index();
      return status != KernelStatus::kOk ? status : attend();
    };
    const double index_ms = bench.Time("whole op, index " + where, index).milliseconds;
    const double attend_ms = bench.Time("whole op, attention " + where, attend).milliseconds;
    Figure& f = bench.Time("whole op " + where, whole);
    f.values = {{"density", reached},
                {"threshold", params.threshold},
                {"hidden", indexer.layer.hidden},
                {"index_ms", index_ms},
                {"attention_ms", attend_ms},
                {"index_share", index_ms / f.milliseconds}};
    Bench::Print(f);
  }
}

/// Milliseconds.
double BenchCopy(Bench& bench, const std::string& name, int64_t bytes) {
  Memory from(bytes), to(bytes);
  from.FillBf16(1);
  Figure& f = bench.Time(name, [&] {
    return cudaMemcpyAsync(to.as<void>(), from.as<void>(), bytes, cudaMemcpyDeviceToDevice,
                           static_cast<cudaStream_t>(bench.stream())) == cudaSuccess
               ? KernelStatus::kOk
               : KernelStatus::kDeviceError;
  });
  f.values = {{"GB/s", 2.0 * static_cast<double>(bytes) / (f.milliseconds * 1e-3) * 1e-9}};
  Bench::Print(f);
  return f.milliseconds;
}

void BenchLayerOps(Bench& bench, const Model& m, int64_t n) {
  const std::string where = std::string(m.name) + " n=" + std::to_string(n);
  const int64_t qkv_width = int64_t{m.q_heads + 2 * m.kv_heads} * m.head_dim;
  Memory residual(2 * n * m.hidden), delta(2 * n * m.hidden), normed(2 * n * m.hidden),
      weight(2 * m.hidden), qkv(2 * n * qkv_width), k_cache(2 * n * m.kv_heads * m.head_dim),
      v_cache(2 * n * m.kv_heads * m.head_dim), gate_up(4 * n * m.mlp), gated(2 * n * m.mlp);
  for (Memory* memory : {&residual, &delta, &weight, &qkv, &gate_up}) memory->FillBf16(1);
  const std::vector<float> table(n * m.head_dim / 2, 0.6f);
  Memory cosines(table), sines(table);
  // Beside each pass a copy that moves as many bytes: small tensors do not reach the bandwidth of
  // large ones, whoever moves them.
  const auto report = [&](const std::string& name, double bytes,
                          const std::function<KernelStatus()>& launch) {
    if (!bench.Wanted(name)) return;
    const double copy = BenchCopy(bench, "copy as for " + name, static_cast<int64_t>(bytes / 2));
    Figure& f = bench.Time(name, launch);
    f.values = {{"GB/s", bytes / (f.milliseconds * 1e-3) * 1e-9},
                {"of copy", copy / f.milliseconds}};
    Bench::Print(f);
  };
  RmsNormArgs norm;
  norm.residual = residual.as<void>();
  norm.delta = delta.as<void>();
  norm.weight = weight.as<void>();
  norm.out = normed.as<void>();
  norm.tokens = n;
  norm.width = m.hidden;
  report("rms_norm " + where, 8.0 * static_cast<double>(n) * m.hidden,
         [&] { return RmsNormCuda(norm, bench.stream()); });
  QkvRopeAppendArgs rope;
  rope.qkv = qkv.as<void>();
  rope.tokens = n;
  rope.num_q_heads = m.q_heads;
  rope.num_kv_heads = m.kv_heads;
  rope.head_dim = m.head_dim;
  rope.cos = cosines.as<float>();
  rope.sin = sines.as<float>();
  rope.k_cache = k_cache.as<void>();
  rope.v_cache = v_cache.as<void>();
  rope.cache_head_stride = n * m.head_dim;
  report("qkv_rope_append " + where,
         static_cast<double>(n) * (4.0 * static_cast<double>(qkv_width) + 4.0 * m.head_dim),
         [&] { return QkvRopeAppendCuda(rope, bench.stream()); });
  SiluMulArgs silu;
  silu.gate_up = gate_up.as<void>();
  silu.out = gated.as<void>();
  silu.tokens = n;
  silu.width = m.mlp;
  report("silu_mul " + where, 6.0 * static_cast<double>(n) * m.mlp,
         [&] { return SiluMulCuda(silu, bench.stream()); });
}

void BenchSums(Bench& bench, const Model& m, int64_t n) {
  const std::string name = std::string("attention_sums ") + m.name + " n=" + std::to_string(n);
  if (!bench.Wanted(name)) return;
  const int64_t q_stride = int64_t{m.q_heads} * m.head_dim;
  const AttentionShape shape = {m.q_heads, m.kv_heads, m.head_dim, DType::kBF16,
                                1.0f / std::sqrt(static_cast<float>(m.head_dim))};
  Memory q(2 * n * q_stride), k(2 * n * m.kv_heads * m.head_dim),
      lse(4 * AttentionSumsScratch(shape, n)), columns(4 * n * m.kv_heads),
      diagonals(4 * n * m.kv_heads);
  q.FillBf16(1);
  k.FillBf16(2);
  AttentionSumsArgs args;
  args.shape = shape;
  args.sequence.q = q.as<void>();
  args.sequence.q_token_stride = q_stride;
  args.sequence.q_head_stride = m.head_dim;
  args.sequence.k = k.as<void>();
  args.sequence.kv_head_stride = n * m.head_dim;
  args.sequence.kv_token_stride = m.head_dim;
  args.sequence.q_tokens = args.sequence.kv_tokens = n;
  args.lse = lse.as<float>();
  args.columns = columns.as<float>();
  args.diagonals = diagonals.as<float>();
  Figure& f = bench.Time(name, [&] { return AttentionSumsCuda(args, bench.stream()); });
  // Of the dense forward pass (two products), so that the two can be compared.
  const double scores = 2 * 2.0 * m.head_dim * m.q_heads * static_cast<double>(n) * (n + 1) / 2;
  f.values = {{"tflops", scores / (f.milliseconds * 1e-3) * 1e-12}};
  Bench::Print(f);
}

int Main() {
  int devices = 0;
  const cudaError_t error = cudaGetDeviceCount(&devices);
  if (error != cudaSuccess || devices == 0) {
    std::printf("SKIPPED: no usable CUDA device (%s)\n", cudaGetErrorString(error));
    return 77;
  }
  cudaDeviceProp properties;
  Check(cudaGetDeviceProperties(&properties, 0), "cudaGetDeviceProperties");
  std::printf("GPU: %s, %d multiprocessors, L2 %d MiB\n", properties.name,
              properties.multiProcessorCount, properties.l2CacheSize >> 20);
  Bench bench;
  BenchCopy(bench, "device copy 1 GiB", int64_t{1} << 30);
  const Model models[] = {
      {"SmolLM2-135M",
       9,
       3,
       64,
       576,
       1536,
       {256, 512, 1024},
       {1024, 2048, 4096, 8192, 16384, 32768}},
      {"Llama-3.1-8B",
       32,
       8,
       128,
       4096,
       14336,
       {512, 256, 1024},
       {2048, 4096, 8192, 16384, 32768, 131072, 262144}},
  };
  for (const Model& m : models) {
    for (int64_t n : m.tokens) {
      if (n > absl::GetFlag(FLAGS_max_tokens) || n < absl::GetFlag(FLAGS_min_tokens)) continue;
      BenchAttention(bench, m, n);
      BenchIndexer(bench, m, n);
      BenchSelection(bench, m, n);
      BenchWholeOperator(bench, m, n);
      if (n <= 32768) BenchSums(bench, m, n);
    }
    BenchLayerOps(bench, m, 8192);
  }
  const std::string path = absl::GetFlag(FLAGS_json);
  if (!path.empty()) bench.WriteJson(path, properties.name);
  return 0;
}

}  // namespace
}  // namespace vsprefill::kernels

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage(
      "Times the CUDA kernels (median of event timings, L2 flushed). Exit code 77 without a GPU.");
  absl::ParseCommandLine(argc, argv);
  return vsprefill::kernels::Main();
}
