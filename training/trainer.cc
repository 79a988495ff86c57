#include "training/trainer.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <numbers>
#include <utility>

#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "server/base/status_macros.h"
#include "training/progress.h"

namespace vsprefill::training {
namespace {

/// Steps between two readings of the proxy recall (it sorts, so it is not free).
constexpr int64_t kRecallEvery = 10;
/// The progress line shows exponential means over about this many steps.
constexpr double kSmoothing = 0.1;

torch::Tensor Scalar(int64_t value) { return torch::tensor(value, torch::kInt64); }

double Smooth(double old_value, double new_value, bool first) {
  return first ? new_value : old_value + kSmoothing * (new_value - old_value);
}

}  // namespace

double TrainedShare(const TrainOptions& options, int64_t step, double elapsed_seconds) {
  const double span = std::max<int64_t>(1, options.steps - options.warmup_steps);
  const double by_steps = std::max<int64_t>(0, step - options.warmup_steps) / span;
  const double by_time = options.max_seconds > 0 ? elapsed_seconds / options.max_seconds : 0;
  return std::min(1.0, std::max(by_steps, by_time));
}

double LearningRate(const TrainOptions& options, int64_t step, double elapsed_seconds) {
  const double warm = std::min(1.0, (step + 1.0) / std::max<int64_t>(1, options.warmup_steps));
  const double share = TrainedShare(options, step, elapsed_seconds);
  const double low = options.final_rate_share;
  return options.learning_rate * warm *
         (low + (1 - low) * 0.5 * (1 + std::cos(std::numbers::pi * share)));
}

Trainer::Trainer(const TrainOptions& options, const StudentShape& shape, torch::Device device)
    : options_(options),
      student_(shape, device, options.seed, options.bf16_hidden),
      optimizer_(student_.Parameters(), torch::optim::AdamWOptions(options.learning_rate)
                                            .betas({0.9, 0.98})
                                            .weight_decay(options.weight_decay)) {}

absl::StatusOr<KlLoss> Trainer::Step(const SampleSource& source) {
  const double rate = LearningRate(options_, step_, elapsed_seconds_);
  for (auto& group : optimizer_.param_groups()) group.options().set_lr(rate);
  optimizer_.zero_grad();
  const double weight = 1.0 / options_.texts_per_step;
  KlLoss mean;
  for (int64_t i = 0; i < options_.texts_per_step; ++i) {
    VSP_ASSIGN_OR_RETURN(const Sample sample, source(i));
    const KlLoss loss = student_.Accumulate(sample, weight, options_.slab_bytes);
    mean.vertical += weight * loss.vertical;
    mean.slash += weight * loss.slash;
    tokens_ += sample.columns.size(2);
  }
  if (!std::isfinite(mean.total())) {
    return absl::InternalError(
        absl::StrFormat("the loss at step %d is not finite: lower --learning_rate", step_));
  }
  optimizer_.step();
  ++step_;
  return mean;
}

absl::Status Trainer::Save(const std::string& path, const std::string& weights_id) {
  const std::string temporary = path + ".tmp";
  try {
    torch::serialize::OutputArchive archive;
    const std::vector<torch::Tensor> state = student_.State();
    for (size_t i = 0; i < state.size(); ++i) {
      archive.write(absl::StrFormat("student%d", i), state[i].detach());
    }
    archive.write("step", Scalar(step_));
    archive.write("tokens", Scalar(tokens_));
    archive.write("weights_id", c10::IValue(weights_id));
    torch::serialize::OutputArchive optimizer;
    optimizer_.save(optimizer);
    archive.write("optimizer", optimizer);
    archive.save_to(temporary);
    std::filesystem::rename(temporary, path);
  } catch (const std::exception& e) {
    return absl::InternalError(absl::StrFormat("cannot write checkpoint %s: %s", path, e.what()));
  }
  return absl::OkStatus();
}

absl::Status Trainer::Restore(const std::string& path, const std::string& weights_id) {
  try {
    torch::serialize::InputArchive archive;
    archive.load_from(path, torch::kCPU);
    c10::IValue stored_id;
    archive.read("weights_id", stored_id);
    if (stored_id.toStringRef() != weights_id) {
      return absl::FailedPreconditionError(
          absl::StrFormat("checkpoint %s belongs to weights_id %s, the model has %s", path,
                          stored_id.toStringRef(), weights_id));
    }
    torch::NoGradGuard no_grad;
    std::vector<torch::Tensor> state = student_.State();
    std::vector<torch::Tensor> stored(state.size());
    for (size_t i = 0; i < state.size(); ++i) {
      archive.read(absl::StrFormat("student%d", i), stored[i]);
      if (stored[i].sizes() != state[i].sizes()) {
        return absl::InvalidArgumentError(
            absl::StrFormat("checkpoint %s was made with other sizes (--hidden %d?)", path,
                            student_.shape().hidden));
      }
    }
    torch::serialize::InputArchive optimizer;
    archive.read("optimizer", optimizer);
    optimizer_.load(optimizer);
    for (size_t i = 0; i < state.size(); ++i) state[i].copy_(stored[i]);
    torch::Tensor step, tokens;
    archive.read("step", step);
    archive.read("tokens", tokens);
    step_ = step.item<int64_t>();
    tokens_ = tokens.item<int64_t>();
  } catch (const std::exception& e) {
    return absl::InvalidArgumentError(
        absl::StrFormat("cannot read checkpoint %s: %s", path, e.what()));
  }
  return absl::OkStatus();
}

absl::Status Trainer::CalibrateFrom(Teacher& teacher, const TextSampler& sampler) {
  std::vector<Sample> samples;
  for (int64_t i = 0; i < options_.calibration_texts; ++i) {
    VSP_ASSIGN_OR_RETURN(const Capture capture, teacher.Run(sampler.Text(i), false));
    samples.push_back(Teacher::ToSample(capture));
  }
  student_.Calibrate(samples);
  return absl::OkStatus();
}

absl::StatusOr<TrainResult> Trainer::Run(Teacher& teacher, const Corpus& corpus) {
  const TextSampler sampler(&corpus, options_.lengths, options_.seed);
  const std::string& weights_id = teacher.model().weights_id();
  if (options_.resume && std::filesystem::exists(options_.checkpoint)) {
    VSP_RETURN_IF_ERROR(Restore(options_.checkpoint, weights_id));
    absl::FPrintF(stderr, "resumed %s at step %d\n", options_.checkpoint, step_);
  } else {
    VSP_RETURN_IF_ERROR(CalibrateFrom(teacher, sampler));
  }

  const absl::Time start = absl::Now();
  const int64_t first_step = step_;
  Progress progress(options_.steps, step_);
  TrainResult result;
  KlLoss shown;
  int64_t tail_steps = 0, recall_readings = 0;
  double recall = 0;
  bool last = step_ >= options_.steps;
  while (!last) {
    elapsed_seconds_ = absl::ToDoubleSeconds(absl::Now() - start);
    const int64_t step = step_;
    const bool in_tail = TrainedShare(options_, step, elapsed_seconds_) >= 0.9;
    const bool read_recall = step % kRecallEvery == 0 || step + 1 == options_.steps || in_tail;
    auto source = [&](int64_t i) -> absl::StatusOr<Sample> {
      VSP_ASSIGN_OR_RETURN(
          const Capture capture,
          teacher.Run(sampler.Text(step * options_.texts_per_step + i), /*with_queries=*/false));
      Sample sample = Teacher::ToSample(capture);
      if (read_recall && i == 0) {
        const double reading = student_.ProxyRecall(sample, options_.slab_bytes);
        recall = Smooth(recall, reading, step == first_step);
        if (in_tail) {
          result.recall += reading;
          ++recall_readings;
        }
      }
      return sample;
    };
    VSP_ASSIGN_OR_RETURN(const KlLoss loss, Step(source));
    shown.vertical = Smooth(shown.vertical, loss.vertical, step == first_step);
    shown.slash = Smooth(shown.slash, loss.slash, step == first_step);
    if (in_tail) {
      result.loss.vertical += loss.vertical;
      result.loss.slash += loss.slash;
      ++tail_steps;
    }
    progress.Update(step_,
                    absl::StrFormat("KL vertical %.4f slash %.4f  recall@10%% %.3f  %d tokens",
                                    shown.vertical, shown.slash, recall, tokens_));
    last = step_ >= options_.steps ||
           (options_.max_seconds > 0 &&
            absl::ToDoubleSeconds(absl::Now() - start) >= options_.max_seconds);
    if (!options_.checkpoint.empty() && (step_ % options_.checkpoint_every == 0 || last)) {
      VSP_RETURN_IF_ERROR(Save(options_.checkpoint, weights_id));
    }
  }
  result.steps = step_;
  result.texts = step_ * options_.texts_per_step;
  result.tokens = tokens_;
  result.seconds = absl::ToDoubleSeconds(absl::Now() - start);
  result.loss.vertical /= std::max<int64_t>(1, tail_steps);
  result.loss.slash /= std::max<int64_t>(1, tail_steps);
  result.recall /= std::max<int64_t>(1, recall_readings);
  return result;
}

absl::StatusOr<KlLoss> HeldoutLoss(Teacher& teacher, const Student& student,
                                   const std::vector<absl::Span<const int32_t>>& texts,
                                   int64_t slab_bytes) {
  KlLoss mean;
  for (const absl::Span<const int32_t>& text : texts) {
    VSP_ASSIGN_OR_RETURN(const Capture capture, teacher.Run(text, /*with_queries=*/false));
    const KlLoss loss = student.Evaluate(Teacher::ToSample(capture), slab_bytes);
    mean.vertical += loss.vertical / texts.size();
    mean.slash += loss.slash / texts.size();
  }
  return mean;
}

}  // namespace vsprefill::training
