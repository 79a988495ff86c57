// How CPU kernels use threads. One pool serves the process: the model installs LibTorch's intra-op
// pool, so that kernels and linear layers never compete for cores; without an installed runner a
// std::thread based one is used.
#pragma once

#include <cstdint>

namespace vsprefill::kernels {

/// Runs body(context, worker) once on each of num_workers() threads and returns when all are done.
struct ParallelRunner {
  int (*num_workers)() = nullptr;
  void (*run)(void (*body)(void* context, int worker), void* context) = nullptr;
};

/// Installs the process-wide runner. REQUIRES: called before the first kernel, from one thread.
void SetParallelRunner(ParallelRunner runner);
int NumWorkers();

/// Calls fn(task, worker) for each task in [0, num_tasks), tasks taken in ascending order by
/// whichever worker is free (put the heaviest first).
template <typename Fn>
void ParallelFor(int64_t num_tasks, const Fn& fn);

}  // namespace vsprefill::kernels

#include "kernels/cpu/parallel_inl.h"
