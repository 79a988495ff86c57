// ParallelFor's task counter. Include kernels/cpu/parallel.h instead.
#pragma once

#include <atomic>
#include <cstdint>

namespace vsprefill::kernels {

namespace internal {
/// Runs body(context, worker) on every worker of the installed runner; runs it once, as the calling
/// worker, where the caller is itself inside such a body (nested loops stay on their thread).
void RunOnWorkers(void (*body)(void* context, int worker), void* context);
/// The worker that the calling thread is inside a loop body; 0 outside of one.
int CurrentWorker();
}  // namespace internal

template <typename Fn>
void ParallelFor(int64_t num_tasks, const Fn& fn) {
  struct Context {
    std::atomic<int64_t> next{0};
    int64_t num_tasks;
    const Fn* fn;
  };
  if (num_tasks <= 0) return;
  Context context{{0}, num_tasks, &fn};
  auto body = [](void* raw, int worker) {
    auto* c = static_cast<Context*>(raw);
    for (int64_t task = c->next.fetch_add(1, std::memory_order_relaxed); task < c->num_tasks;
         task = c->next.fetch_add(1, std::memory_order_relaxed)) {
      (*c->fn)(task, worker);
    }
  };
  if (num_tasks == 1) {
    body(&context, internal::CurrentWorker());
  } else {
    internal::RunOnWorkers(body, &context);
  }
}

}  // namespace vsprefill::kernels
