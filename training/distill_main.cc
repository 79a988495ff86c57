// vsprefill-distill: trains and measures the VSIndexer of a model, or the gate of SeerAttention
// (docs/distillation.md).
#include <torch/torch.h>

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <map>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/flags/flag.h"
#include "absl/flags/parse.h"
#include "absl/flags/usage.h"
#include "absl/flags/usage_config.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "server/base/status_macros.h"
#include "server/model/seer_gate.h"
#include "server/model/vs_indexer.h"
#include "training/corpus.h"
#include "training/evaluate.h"
#include "training/seer_evaluate.h"
#include "training/teacher.h"
#include "training/threshold_scale.h"
#include "training/trainer.h"

ABSL_FLAG(std::string, model, "", "Hugging Face model directory: the frozen backbone");
ABSL_FLAG(std::string, device, "auto", "cpu, cuda, or auto: cuda where there is one");
ABSL_FLAG(std::string, dtype, "bf16",
          "of the backbone: bf16 or fp32; the indexer learns in float32");
ABSL_FLAG(std::string, gate, "",
          "seer: train or measure SeerAttention's gate instead of a VSIndexer; empty: the indexer");
ABSL_FLAG(int, gate_dim, 128, "width of that gate's vectors, even");
ABSL_FLAG(std::string, seer_gate, "", "gate to evaluate; empty: --out");
ABSL_FLAG(int, threads, 0, "CPU threads; 0: all cores");
ABSL_FLAG(std::string, corpus, "",
          "token file to train on (training/corpus/make_corpus.py); empty: no training");
ABSL_FLAG(std::string, heldout, "", "token file of texts that training never sees");
ABSL_FLAG(std::string, out, "", "indexer.safetensors or seer_gate.safetensors to write");
ABSL_FLAG(int, hidden, 512, "hidden width; 256 halves the indexer's cost and size");
ABSL_FLAG(int64_t, steps, 400, "optimiser steps");
ABSL_FLAG(double, max_seconds, 0,
          "end the training in good order (rate cooled down) when this has passed; 0: no limit");
ABSL_FLAG(int64_t, texts_per_step, 4, "texts whose gradients are added before each step");
ABSL_FLAG(std::vector<std::string>, lengths, std::vector<std::string>({"8192"}),
          "text lengths in tokens, mixed evenly; the longest that is served, alone, teaches best, "
          "shorter prompts included (docs/results/indexer_smollm2.md)");
ABSL_FLAG(double, learning_rate, 1e-3, "peak of the schedule: linear warm-up, then cosine");
ABSL_FLAG(int64_t, warmup_steps, 20, "steps of the warm-up");
ABSL_FLAG(double, weight_decay, 0, "AdamW's decoupled weight decay");
ABSL_FLAG(bool, bf16_hidden, false,
          "hidden layer's product in bfloat16 while training (faster on a GPU)");
ABSL_FLAG(uint64_t, seed, 1, "of the initial weights and of the order of the texts");
ABSL_FLAG(std::string, checkpoint, "", "file that holds the state of the training; empty: none");
ABSL_FLAG(int64_t, checkpoint_every, 50, "steps between two checkpoints");
ABSL_FLAG(bool, resume, false, "go on from --checkpoint where it exists");
ABSL_FLAG(int64_t, slab_mib, 0, "memory for hidden activations; 0: 256 on the CPU, 4096 on CUDA");
ABSL_FLAG(int, scale_texts, 24,
          "texts of --corpus that threshold_scale is fitted on after the training; 0: none is "
          "written");
ABSL_FLAG(int64_t, scale_length, 8192, "tokens of those texts");
ABSL_FLAG(double, scale_density, 0.125,
          "density that the default threshold is to give, the dense last rows left out");
ABSL_FLAG(std::string, output_scale, "",
          "JSON array [layers][groups]: scale fitted to the error of the output "
          "(bench/eval/selection_study.py allocate) that multiplies the fitted one; empty: none");
ABSL_FLAG(double, output_scale_cap, 1.4, "larger values of --output_scale count as this");
ABSL_FLAG(bool, scale_only, false, "no training: fit the scale of --indexer again, write --out");
ABSL_FLAG(bool, evaluate, false,
          "measure the attention mass covered on --heldout (after training, or of --indexer)");
ABSL_FLAG(std::string, indexer, "", "indexer to evaluate; empty: --out");
ABSL_FLAG(std::vector<std::string>, evaluate_lengths, std::vector<std::string>({"8192"}),
          "lengths of the held-out texts");
ABSL_FLAG(std::vector<std::string>, densities,
          std::vector<std::string>({"0.05", "0.1", "0.15", "0.2", "0.3"}),
          "densities to compare at");
ABSL_FLAG(int, evaluate_texts, 8, "held-out texts per length");
ABSL_FLAG(int64_t, evaluate_tiles, 0,
          "row tiles measured per text, evenly spread; 0: all on CUDA, 12 on the CPU");
ABSL_FLAG(std::string, report, "", "JSON file for the evaluation's figures");

namespace vsprefill::training {
namespace {

constexpr char kUsage[] = R"(trains the VSIndexer of a language model, and measures it.

The backbone stays frozen. For each text its true attention is summed along columns and diagonals (never stored as
a matrix); the indexer learns to predict both distributions from keys and values alone (KL loss, AdamW).

Train (a few minutes on a data-centre GPU, hours on two cores):
  vsprefill-distill --model models/SmolLM2-135M-Instruct --corpus corpus_train.safetensors
      --heldout corpus_heldout.safetensors --out indexer.safetensors --checkpoint distill.ckpt

Go on after an interruption: the same command with --resume.

Fit only the scale of its thresholds again:
  vsprefill-distill --model DIR --scale_only --indexer indexer.safetensors --corpus corpus_train.safetensors
      --output_scale scale.json --out indexer.safetensors

Measure an indexer against other selections at equal density:
  vsprefill-distill --model DIR --evaluate --indexer indexer.safetensors --heldout corpus_heldout.safetensors
      --evaluate_lengths 2048,8192 --report report.json

Train SeerAttention's gate, which learns the block-wise largest values of the true attention, and measure it:
  vsprefill-distill --gate seer --model DIR --corpus corpus_train.safetensors --heldout corpus_heldout.safetensors
      --out seer_gate.safetensors --checkpoint gate.ckpt --evaluate --densities 0.1,0.2

The result belongs to exactly these weights: the server refuses it for others. Put it into the model directory as
indexer.safetensors (seer_gate.safetensors), or name it with vsprefill-server --indexer (--seer_gate).)";

template <typename T, typename Parse>
absl::StatusOr<std::vector<T>> ParseList(const char* flag, const std::vector<std::string>& items,
                                         T low, T high, const Parse& parse) {
  std::vector<T> values;
  for (const std::string& item : items) {
    T value = 0;
    if (!parse(item, &value) || value < low || value > high) {
      return absl::InvalidArgumentError(absl::StrFormat("--%s: '%s' is not in [%s, %s]", flag, item,
                                                        absl::StrCat(low), absl::StrCat(high)));
    }
    values.push_back(value);
  }
  if (values.empty()) return absl::InvalidArgumentError(absl::StrFormat("--%s is empty", flag));
  return values;
}

absl::StatusOr<std::vector<int64_t>> Lengths(const char* flag,
                                             const std::vector<std::string>& items) {
  return ParseList<int64_t>(
      flag, items, 16, int64_t{1} << 20,
      [](const std::string& s, int64_t* v) { return absl::SimpleAtoi(s, v); });
}

bool TrainsGate() { return absl::GetFlag(FLAGS_gate) == "seer"; }

absl::StatusOr<model::LoadOptions> BackboneOptions() {
  model::LoadOptions options;
  options.model_dir = absl::GetFlag(FLAGS_model);
  options.indexer_path = options.seer_gate_path = "none";
  options.cpu_threads = absl::GetFlag(FLAGS_threads);
  const std::string device = absl::GetFlag(FLAGS_device), dtype = absl::GetFlag(FLAGS_dtype);
  const bool has_cuda = torch::cuda::is_available();
  if (device != "cpu" && device != "cuda" && device != "auto") {
    return absl::InvalidArgumentError(
        absl::StrFormat("--device is '%s', expected cpu, cuda or auto", device));
  }
  if (dtype != "bf16" && dtype != "fp32") {
    return absl::InvalidArgumentError(
        absl::StrFormat("--dtype is '%s', expected bf16 or fp32", dtype));
  }
  const bool cuda = device == "cuda" || (device == "auto" && has_cuda);
  options.device = cuda ? kernels::DeviceKind::kCuda : kernels::DeviceKind::kCpu;
  options.dtype = dtype == "bf16" ? kernels::DType::kBF16 : kernels::DType::kF32;
  return options;
}

absl::Status CheckFlags() {
  if (absl::GetFlag(FLAGS_model).empty()) {
    return absl::InvalidArgumentError("--model is needed (see --help)");
  }
  const bool train = !absl::GetFlag(FLAGS_corpus).empty(), evaluate = absl::GetFlag(FLAGS_evaluate);
  if (const std::string gate = absl::GetFlag(FLAGS_gate); !gate.empty() && gate != "seer") {
    return absl::InvalidArgumentError(
        absl::StrFormat("--gate is '%s', expected seer or nothing", gate));
  }
  if (const int dim = absl::GetFlag(FLAGS_gate_dim);
      dim < 2 || dim > kernels::kMaxSeerGateDim || dim % 2 != 0) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "--gate_dim is %d, expected an even number in [2, %d]", dim, kernels::kMaxSeerGateDim));
  }
  for (const auto& [name, given, of_gate] :
       {std::tuple{"indexer", !absl::GetFlag(FLAGS_indexer).empty(), false},
        {"scale_only", absl::GetFlag(FLAGS_scale_only), false},
        {"bf16_hidden", absl::GetFlag(FLAGS_bf16_hidden), false},
        {"seer_gate", !absl::GetFlag(FLAGS_seer_gate).empty(), true}}) {
    if (given && of_gate != TrainsGate()) {
      return absl::InvalidArgumentError(absl::StrFormat("--%s means nothing %s --gate seer", name,
                                                        TrainsGate() ? "with" : "without"));
    }
  }
  if (!train && !evaluate) {
    return absl::InvalidArgumentError(
        "nothing to do: give --corpus, --evaluate or both (see --help)");
  }
  if (train && absl::GetFlag(FLAGS_out).empty()) {
    return absl::InvalidArgumentError("--out is needed to train");
  }
  if (absl::GetFlag(FLAGS_scale_only) &&
      (!train || absl::GetFlag(FLAGS_indexer).empty() || absl::GetFlag(FLAGS_scale_texts) == 0)) {
    return absl::InvalidArgumentError("--scale_only needs --indexer, --corpus and --scale_texts");
  }
  if (const double density = absl::GetFlag(FLAGS_scale_density);
      !(density >= 0.001 && density < 1)) {
    return absl::InvalidArgumentError(
        absl::StrFormat("--scale_density is %g, not in [0.001, 1)", density));
  }
  if (const double cap = absl::GetFlag(FLAGS_output_scale_cap); !(cap > 0)) {
    return absl::InvalidArgumentError(
        absl::StrFormat("--output_scale_cap is %g, not above 0", cap));
  }
  if (const int64_t length = absl::GetFlag(FLAGS_scale_length);
      length < 16 || length > (int64_t{1} << 20)) {
    return absl::InvalidArgumentError(
        absl::StrFormat("--scale_length is %d, not in [16, %d]", length, int64_t{1} << 20));
  }
  if (const int texts = absl::GetFlag(FLAGS_scale_texts); texts < 0 || texts > (1 << 20)) {
    return absl::InvalidArgumentError(
        absl::StrFormat("--scale_texts is %d, not in [0, %d]", texts, 1 << 20));
  }
  if (evaluate && absl::GetFlag(FLAGS_heldout).empty()) {
    return absl::InvalidArgumentError("--evaluate needs --heldout");
  }
  if (const std::string trained = TrainsGate() ? "seer_gate" : "indexer";
      evaluate && !train && absl::GetFlag(TrainsGate() ? FLAGS_seer_gate : FLAGS_indexer).empty()) {
    return absl::InvalidArgumentError(
        absl::StrFormat("--evaluate needs --%s where nothing is trained", trained));
  }
  if (absl::GetFlag(FLAGS_resume) && absl::GetFlag(FLAGS_checkpoint).empty()) {
    return absl::InvalidArgumentError("--resume needs --checkpoint");
  }
  for (const auto& [name, value] :
       {std::pair<const char*, int64_t>{"hidden", absl::GetFlag(FLAGS_hidden)},
        {"steps", absl::GetFlag(FLAGS_steps)},
        {"texts_per_step", absl::GetFlag(FLAGS_texts_per_step)},
        {"checkpoint_every", absl::GetFlag(FLAGS_checkpoint_every)},
        {"evaluate_texts", absl::GetFlag(FLAGS_evaluate_texts)}}) {
    if (value < 1 || value > (1 << 20)) {
      return absl::InvalidArgumentError(
          absl::StrFormat("--%s is %d, not in [1, %d]", name, value, 1 << 20));
    }
  }
  return absl::OkStatus();
}

absl::Status WriteFile(const std::string& path, const model::IndexerWeights& weights) {
  return model::WriteIndexer(path, weights);
}
absl::Status WriteFile(const std::string& path, const model::SeerGateWeights& weights) {
  return model::WriteSeerGate(path, weights);
}

template <class Weights>
absl::Status Write(const Weights& weights) {
  VSP_RETURN_IF_ERROR(WriteFile(absl::GetFlag(FLAGS_out), weights));
  absl::PrintF("wrote %s for weights_id %s\n", absl::GetFlag(FLAGS_out), weights.weights_id);
  return absl::OkStatus();
}

using Facts = std::map<std::string, std::string>;

void AddLoss(const KlLoss& loss, Facts* facts) {
  (*facts)["loss_vertical"] = absl::StrFormat("%.4f", loss.vertical);
  (*facts)["loss_slash"] = absl::StrFormat("%.4f", loss.slash);
}
void AddLoss(const SeerLoss& loss, Facts* facts) {
  (*facts)["loss"] = absl::StrFormat("%.4f", loss.kl);
}

/// What a file says of its loss on held-out texts.
std::string HeldoutFact(const KlLoss& loss) {
  return absl::StrFormat("%.4f,%.4f", loss.vertical, loss.slash);
}
std::string HeldoutFact(const SeerLoss& loss) { return absl::StrFormat("%.4f", loss.kl); }

/// Trains an indexer or a gate of this shape and writes it.
template <class Learner>
auto Train(Teacher& teacher, const Corpus& corpus, const TrainOptions& options,
           const typename Learner::Shape& shape)
    -> absl::StatusOr<decltype(std::declval<Learner>().Export())> {
  absl::FPrintF(stderr, "corpus: %d documents, %d tokens; training %d steps of %d texts on %s\n",
                corpus.num_documents(), corpus.num_tokens(), options.steps, options.texts_per_step,
                teacher.model().device_description());
  BasicTrainer<Learner> trainer(options, shape, teacher.device());
  VSP_ASSIGN_OR_RETURN(const auto result, trainer.Run(teacher, corpus));
  auto weights = trainer.student().Export();
  weights.weights_id = teacher.model().weights_id();
  weights.facts = {{"steps", absl::StrFormat("%d", result.steps)},
                   {"texts", absl::StrFormat("%d", result.texts)},
                   {"tokens", absl::StrFormat("%d", result.tokens)},
                   {"lengths", absl::StrJoin(options.lengths, ",")},
                   {"learning_rate", absl::StrFormat("%g", options.learning_rate)},
                   {"seed", absl::StrFormat("%d", options.seed)},
                   {"device", teacher.model().device_description()}};
  AddLoss(result.loss, &weights.facts);
  absl::PrintF("trained %d steps, %d texts, %d tokens in %.0f s: %s, proxy recall %.3f\n",
               result.steps, result.texts, result.tokens, result.seconds, result.loss.ToString(),
               result.recall);
  if (!absl::GetFlag(FLAGS_heldout).empty()) {
    VSP_ASSIGN_OR_RETURN(const Corpus heldout, Corpus::Load(absl::GetFlag(FLAGS_heldout),
                                                            teacher.model().config().vocab_size));
    for (int64_t length : options.lengths) {
      const auto texts = EvaluationTexts(heldout, length, absl::GetFlag(FLAGS_evaluate_texts));
      if (texts.empty()) continue;
      VSP_ASSIGN_OR_RETURN(const auto loss,
                           HeldoutLoss(teacher, trainer.student(), texts, options.slab_bytes));
      absl::PrintF("held-out at %d tokens (%d texts): %s\n", length, texts.size(), loss.ToString());
      weights.facts[absl::StrFormat("heldout_kl_%d", length)] = HeldoutFact(loss);
    }
  }
  // Before a scale is fitted: a text that is missing there must not cost the training.
  VSP_RETURN_IF_ERROR(Write(weights));
  return weights;
}

/// Fits weights.threshold_scale on the corpus; leaves it as it is where --scale_texts is 0.
absl::Status FitScale(Teacher& teacher, const Corpus& corpus, int64_t max_tiles,
                      model::IndexerWeights& weights) {
  const int count = absl::GetFlag(FLAGS_scale_texts);
  if (count == 0) return absl::OkStatus();
  const int64_t length = absl::GetFlag(FLAGS_scale_length);
  const auto texts = EvaluationTexts(corpus, length, count);
  if (texts.empty()) {
    return absl::InvalidArgumentError(absl::StrFormat(
        "%s has no text of %d tokens to fit threshold_scale on: give a shorter --scale_length, or "
        "--scale_texts 0 for none",
        absl::GetFlag(FLAGS_corpus), length));
  }
  ScaleOptions options;
  options.density = absl::GetFlag(FLAGS_scale_density);
  options.output_scale_cap = absl::GetFlag(FLAGS_output_scale_cap);
  options.max_tiles = max_tiles;
  if (const std::string path = absl::GetFlag(FLAGS_output_scale); !path.empty()) {
    VSP_ASSIGN_OR_RETURN(options.output_scale, ReadOutputScale(path));
  }
  VSP_ASSIGN_OR_RETURN(weights.threshold_scale,
                       FitThresholdScale(teacher, weights, texts, options));
  weights.facts["scale"] =
      absl::StrFormat("%d texts of %d tokens, density %g", texts.size(), length, options.density);
  return absl::OkStatus();
}

/// Prints and reports what `evaluate` (texts of one length to LengthReport) says of each length.
template <class Weights, class EvaluateFn>
absl::Status Measure(Teacher& teacher, const Weights& weights, const char* size_name, int size,
                     const std::vector<int64_t>& lengths, const EvaluateFn& evaluate) {
  VSP_ASSIGN_OR_RETURN(const Corpus heldout, Corpus::Load(absl::GetFlag(FLAGS_heldout),
                                                          teacher.model().config().vocab_size));
  std::vector<LengthReport> reports;
  for (int64_t length : lengths) {
    const auto texts = EvaluationTexts(heldout, length, absl::GetFlag(FLAGS_evaluate_texts));
    if (texts.empty()) {
      return absl::InvalidArgumentError(
          absl::StrFormat("%s has no text of %d tokens", absl::GetFlag(FLAGS_heldout), length));
    }
    VSP_ASSIGN_OR_RETURN(LengthReport report, evaluate(texts));
    absl::PrintF("%s", FormatTable(report));
    std::fflush(stdout);
    reports.push_back(std::move(report));
  }
  if (!absl::GetFlag(FLAGS_report).empty()) {
    std::ofstream file(absl::GetFlag(FLAGS_report));
    file << FormatJson(reports, weights.weights_id, size_name, size, weights.facts);
    if (!file.flush()) {
      return absl::InternalError(absl::StrFormat("cannot write %s", absl::GetFlag(FLAGS_report)));
    }
  }
  return absl::OkStatus();
}

/// The indexer: trains or reads one, fits its scale where something is written, measures it.
absl::Status RunIndexer(Teacher& teacher, const std::optional<Corpus>& corpus, bool trains,
                        const TrainOptions& train, const std::vector<int64_t>& measured,
                        const EvaluateOptions& evaluate) {
  model::IndexerWeights weights;
  if (trains) {
    VSP_ASSIGN_OR_RETURN(
        weights, Train<Student>(teacher, *corpus, train, teacher.student_shape(train.hidden)));
  } else {
    const model::ModelConfig& config = teacher.model().config();
    VSP_ASSIGN_OR_RETURN(weights,
                         model::ReadIndexer(absl::GetFlag(FLAGS_indexer),
                                            {teacher.model().weights_id(), config.num_layers,
                                             config.num_kv_heads, config.head_dim}));
  }
  if (corpus.has_value()) {
    VSP_RETURN_IF_ERROR(FitScale(teacher, *corpus, evaluate.max_tiles, weights));
    VSP_RETURN_IF_ERROR(Write(weights));
  }
  if (!absl::GetFlag(FLAGS_evaluate)) return absl::OkStatus();
  return Measure(teacher, weights, "hidden", weights.hidden, measured,
                 [&](const auto& texts) { return Evaluate(teacher, weights, texts, evaluate); });
}

/// SeerAttention's gate: trains or reads one, measures it.
absl::Status RunSeerGate(Teacher& teacher, const std::optional<Corpus>& corpus,
                         const TrainOptions& train, const std::vector<int64_t>& measured,
                         const EvaluateOptions& evaluate) {
  const model::ModelConfig& config = teacher.model().config();
  model::SeerGateWeights weights;
  if (corpus.has_value()) {
    VSP_ASSIGN_OR_RETURN(weights,
                         Train<SeerStudent>(teacher, *corpus, train,
                                            SeerShape::Of(config, absl::GetFlag(FLAGS_gate_dim))));
  } else {
    VSP_ASSIGN_OR_RETURN(
        weights, model::ReadSeerGate(absl::GetFlag(FLAGS_seer_gate),
                                     {teacher.model().weights_id(), config.num_layers,
                                      config.num_q_heads, config.num_kv_heads, config.head_dim}));
  }
  if (!absl::GetFlag(FLAGS_evaluate)) return absl::OkStatus();
  return Measure(teacher, weights, "gate_dim", weights.gate_dim, measured, [&](const auto& texts) {
    return EvaluateSeer(teacher, weights, texts, evaluate);
  });
}

absl::Status Main() {
  VSP_RETURN_IF_ERROR(CheckFlags());
  VSP_ASSIGN_OR_RETURN(const model::LoadOptions backbone, BackboneOptions());
  const bool cuda = backbone.device == kernels::DeviceKind::kCuda;
  TrainOptions train;
  EvaluateOptions evaluate;
  VSP_ASSIGN_OR_RETURN(train.lengths, Lengths("lengths", absl::GetFlag(FLAGS_lengths)));
  VSP_ASSIGN_OR_RETURN(const std::vector<int64_t> measured,
                       Lengths("evaluate_lengths", absl::GetFlag(FLAGS_evaluate_lengths)));
  VSP_ASSIGN_OR_RETURN(
      evaluate.densities,
      ParseList<double>("densities", absl::GetFlag(FLAGS_densities), 0.001, 1.0,
                        [](const std::string& s, double* v) { return absl::SimpleAtod(s, v); }));
  evaluate.max_tiles = absl::GetFlag(FLAGS_evaluate_tiles);
  if (evaluate.max_tiles == 0 && !cuda) evaluate.max_tiles = 12;
  train.hidden = absl::GetFlag(FLAGS_hidden);
  train.steps = absl::GetFlag(FLAGS_steps);
  train.max_seconds = absl::GetFlag(FLAGS_max_seconds);
  train.texts_per_step = absl::GetFlag(FLAGS_texts_per_step);
  train.learning_rate = absl::GetFlag(FLAGS_learning_rate);
  train.warmup_steps = absl::GetFlag(FLAGS_warmup_steps);
  train.weight_decay = absl::GetFlag(FLAGS_weight_decay);
  train.bf16_hidden = absl::GetFlag(FLAGS_bf16_hidden);
  train.seed = absl::GetFlag(FLAGS_seed);
  train.checkpoint = absl::GetFlag(FLAGS_checkpoint);
  train.checkpoint_every = absl::GetFlag(FLAGS_checkpoint_every);
  train.resume = absl::GetFlag(FLAGS_resume);
  const int64_t slab_mib = absl::GetFlag(FLAGS_slab_mib);
  train.slab_bytes = (slab_mib > 0 ? slab_mib : cuda ? 4096 : 256) << 20;

  const bool writes = !absl::GetFlag(FLAGS_corpus).empty();
  const bool trains = writes && !absl::GetFlag(FLAGS_scale_only);
  int64_t longest = 0;
  if (writes && !TrainsGate() && absl::GetFlag(FLAGS_scale_texts) > 0)
    longest = absl::GetFlag(FLAGS_scale_length);
  if (trains) {
    longest = std::max(longest, *std::max_element(train.lengths.begin(), train.lengths.end()));
  }
  if (absl::GetFlag(FLAGS_evaluate)) {
    longest = std::max(longest, *std::max_element(measured.begin(), measured.end()));
  }
  VSP_ASSIGN_OR_RETURN(const std::unique_ptr<Teacher> teacher, Teacher::Create(backbone, longest));

  std::optional<Corpus> corpus;
  if (writes) {
    VSP_ASSIGN_OR_RETURN(
        corpus, Corpus::Load(absl::GetFlag(FLAGS_corpus), teacher->model().config().vocab_size));
  }
  return TrainsGate() ? RunSeerGate(*teacher, corpus, train, measured, evaluate)
                      : RunIndexer(*teacher, corpus, trains, train, measured, evaluate);
}

}  // namespace
}  // namespace vsprefill::training

int main(int argc, char** argv) {
  absl::SetProgramUsageMessage(vsprefill::training::kUsage);
  // Abseil looks for flags in a file that is named like the program; these stand in this one.
  absl::FlagsUsageConfig usage;
  usage.contains_help_flags = [](absl::string_view file) {
    return absl::EndsWith(file, "distill_main.cc");
  };
  absl::SetFlagsUsageConfig(usage);
  absl::ParseCommandLine(argc, argv);
  absl::Status status;
  try {
    status = vsprefill::training::Main();
  } catch (const std::exception& e) {  // LibTorch, mostly for lack of memory
    status = absl::InternalError(e.what());
  }
  if (!status.ok()) {
    absl::FPrintF(stderr, "vsprefill-distill: %s\n", status.message());
    return 1;
  }
  return 0;
}
