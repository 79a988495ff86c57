// The training loop: texts through the teacher, gradients into the student, AdamW, checkpoints. The
// same for both students: the VSIndexer's and SeerAttention's gate.
#pragma once

#include <torch/torch.h>

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "training/corpus.h"
#include "training/seer_student.h"
#include "training/student.h"
#include "training/teacher.h"

namespace vsprefill::training {

struct TrainOptions {
  int64_t steps = 400;     // optimiser steps
  double max_seconds = 0;  // ends (and cools the rate) earlier if this passes first; 0: no limit
  int64_t texts_per_step = 4;  // gradients accumulated before each
  double learning_rate = 1e-3;
  int64_t warmup_steps = 20;
  double final_rate_share = 0.02;  // cosine from learning_rate down to this share of it
  double weight_decay = 0.0;
  uint64_t seed = 1;
  std::vector<int64_t> lengths = {1024, 2048, 4096, 8192};
  int64_t calibration_texts = 4;
  int hidden = 512;
  bool bf16_hidden = false;
  int64_t slab_bytes = int64_t{256} << 20;
  std::string checkpoint;  // file; empty: none
  int64_t checkpoint_every = 50;
  bool resume = false;  // from `checkpoint` where it exists
};

/// Share of the training that is over, in [0, 1]: by steps after the warm-up or by time, whichever
/// is further.
double TrainedShare(const TrainOptions& options, int64_t step, double elapsed_seconds);
/// Learning rate at `step`: linear warm-up, then cosine over the share.
double LearningRate(const TrainOptions& options, int64_t step, double elapsed_seconds);

template <class Loss>
struct TrainResult {
  int64_t steps = 0, texts = 0, tokens = 0;
  double seconds = 0;
  Loss loss;          // mean of the last tenth of the training
  double recall = 0;  // proxy, mean of the last tenth of its readings
};

/// Student, optimiser and position in the data order: what a checkpoint holds. `Learner`: Student
/// or SeerStudent, for which trainer.cc instantiates it.
template <class Learner>
class BasicTrainer {
 public:
  using Sample = typename Learner::Sample;
  using Loss = typename Learner::Loss;

  BasicTrainer(const TrainOptions& options, const typename Learner::Shape& shape,
               torch::Device device);

  /// Gives sample i of a step; called for 0..texts_per_step - 1 in order, one sample alive at a
  /// time.
  using SampleSource = std::function<absl::StatusOr<Sample>(int64_t index)>;
  /// One optimiser step; the gradient is the mean over its samples. INTERNAL where the loss is not
  /// finite.
  absl::StatusOr<Loss> Step(const SampleSource& source);

  /// Writes everything that Restore needs, first beside the file, then renamed over it.
  absl::Status Save(const std::string& path, const std::string& weights_id);
  /// INVALID_ARGUMENT: not a checkpoint, or one of another shape; FAILED_PRECONDITION: of other
  /// weights.
  absl::Status Restore(const std::string& path, const std::string& weights_id);

  /// Trains to options.steps with the teacher's samples of `corpus`.
  absl::StatusOr<TrainResult<Loss>> Run(Teacher& teacher, const Corpus& corpus);

  Learner& student() { return student_; }
  int64_t step() const { return step_; }

 private:
  absl::Status CalibrateFrom(Teacher& teacher, const TextSampler& sampler);

  const TrainOptions options_;
  Learner student_;
  torch::optim::AdamW optimizer_;
  int64_t step_ = 0, tokens_ = 0;
  double elapsed_seconds_ = 0;  // of this Run, as of the current step's beginning
};

using Trainer = BasicTrainer<Student>;
using SeerTrainer = BasicTrainer<SeerStudent>;

/// Mean loss over held-out texts.
template <class Learner>
absl::StatusOr<typename Learner::Loss> HeldoutLoss(
    Teacher& teacher, const Learner& student, const std::vector<absl::Span<const int32_t>>& texts,
    int64_t slab_bytes);

}  // namespace vsprefill::training
