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

Student MakeLearner(const TrainOptions& options, const StudentShape& shape, torch::Device device) {
  return Student(shape, device, options.seed, options.bf16_hidden);
}
SeerStudent MakeLearner(const TrainOptions& options, const SeerShape& shape, torch::Device device) {
  return SeerStudent(shape, device, options.seed);
}

Sample ToSample(const Student&, const Capture& capture, int64_t /*slab_bytes*/) {
  return Teacher::ToSample(capture);
}
SeerSample ToSample(const SeerStudent& student, const Capture& capture, int64_t slab_bytes) {
  return SeerStudent::ToSample(student.shape(), capture, slab_bytes);
}

/// What the student sees of a text.
template <class Learner>
absl::StatusOr<typename Learner::Sample> Watch(Teacher& teacher, const Learner& student,
                                               absl::Span<const int32_t> ids, int64_t slab_bytes) {
  VSP_ASSIGN_OR_RETURN(const Capture capture,
                       teacher.Run(ids, Learner::kNeedsQueries, Learner::kNeedsSums));
  return ToSample(student, capture, slab_bytes);
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

template <class Learner>
BasicTrainer<Learner>::BasicTrainer(const TrainOptions& options,
                                    const typename Learner::Shape& shape, torch::Device device)
    : options_(options),
      student_(MakeLearner(options, shape, device)),
      optimizer_(student_.Parameters(), torch::optim::AdamWOptions(options.learning_rate)
                                            .betas({0.9, 0.98})
                                            .weight_decay(options.weight_decay)) {}

template <class Learner>
absl::StatusOr<typename BasicTrainer<Learner>::Loss> BasicTrainer<Learner>::Step(
    const SampleSource& source) {
  const double rate = LearningRate(options_, step_, elapsed_seconds_);
  for (auto& group : optimizer_.param_groups()) group.options().set_lr(rate);
  optimizer_.zero_grad();
  const double weight = 1.0 / options_.texts_per_step;
  Loss mean;
  for (int64_t i = 0; i < options_.texts_per_step; ++i) {
    VSP_ASSIGN_OR_RETURN(const Sample sample, source(i));
    mean.Add(weight, student_.Accumulate(sample, weight, options_.slab_bytes));
    tokens_ += sample.tokens;
  }
  if (!std::isfinite(mean.total())) {
    return absl::InternalError(
        absl::StrFormat("the loss at step %d is not finite: lower --learning_rate", step_));
  }
  optimizer_.step();
  ++step_;
  return mean;
}

template <class Learner>
absl::Status BasicTrainer<Learner>::Save(const std::string& path, const std::string& weights_id) {
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

template <class Learner>
absl::Status BasicTrainer<Learner>::Restore(const std::string& path,
                                            const std::string& weights_id) {
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
        return absl::InvalidArgumentError(absl::StrFormat(
            "checkpoint %s was made with other sizes (--hidden, --gate_dim?)", path));
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

template <class Learner>
absl::Status BasicTrainer<Learner>::CalibrateFrom(Teacher& teacher, const TextSampler& sampler) {
  if constexpr (requires { student_.Calibrate(std::vector<Sample>()); }) {
    std::vector<Sample> samples;
    for (int64_t i = 0; i < options_.calibration_texts; ++i) {
      VSP_ASSIGN_OR_RETURN(samples.emplace_back(),
                           Watch(teacher, student_, sampler.Text(i), options_.slab_bytes));
    }
    student_.Calibrate(samples);
  }
  return absl::OkStatus();
}

template <class Learner>
absl::StatusOr<TrainResult<typename BasicTrainer<Learner>::Loss>> BasicTrainer<Learner>::Run(
    Teacher& teacher, const Corpus& corpus) {
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
  TrainResult<Loss> result;
  Loss shown, tail;
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
          Sample sample, Watch(teacher, student_, sampler.Text(step * options_.texts_per_step + i),
                               options_.slab_bytes));
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
    VSP_ASSIGN_OR_RETURN(const Loss loss, Step(source));
    const double share = step == first_step ? 1 : kSmoothing;
    Loss smoothed;
    smoothed.Add(1 - share, shown);
    smoothed.Add(share, loss);
    shown = smoothed;
    if (in_tail) {
      tail.Add(1, loss);
      ++tail_steps;
    }
    progress.Update(step_, absl::StrFormat("%s  recall@10%% %.3f  %d tokens", shown.ToString(),
                                           recall, tokens_));
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
  result.loss.Add(1.0 / std::max<int64_t>(1, tail_steps), tail);
  result.recall /= std::max<int64_t>(1, recall_readings);
  return result;
}

template <class Learner>
absl::StatusOr<typename Learner::Loss> HeldoutLoss(
    Teacher& teacher, const Learner& student, const std::vector<absl::Span<const int32_t>>& texts,
    int64_t slab_bytes) {
  typename Learner::Loss mean;
  for (const absl::Span<const int32_t>& text : texts) {
    VSP_ASSIGN_OR_RETURN(const auto sample, Watch(teacher, student, text, slab_bytes));
    mean.Add(1.0 / texts.size(), student.Evaluate(sample, slab_bytes));
  }
  return mean;
}

template class BasicTrainer<Student>;
template class BasicTrainer<SeerStudent>;
template absl::StatusOr<KlLoss> HeldoutLoss(Teacher&, const Student&,
                                            const std::vector<absl::Span<const int32_t>>&, int64_t);
template absl::StatusOr<SeerLoss> HeldoutLoss(Teacher&, const SeerStudent&,
                                              const std::vector<absl::Span<const int32_t>>&,
                                              int64_t);

}  // namespace vsprefill::training
