#include "kernels/cpu/parallel.h"

#include <algorithm>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace vsprefill::kernels {
namespace {

// The worker that this thread currently is, or -1 outside of a parallel body.
thread_local int current_worker = -1;

// Persistent threads, one fewer than cores: the caller is worker 0. Never destroyed, because a
// static destructor could run while another thread still computes.
class ThreadPool {
 public:
  static ThreadPool& Instance() {
    static ThreadPool* const pool = new ThreadPool;
    return *pool;
  }

  int size() const { return static_cast<int>(threads_.size()) + 1; }

  void Run(void (*body)(void*, int), void* context) {
    std::lock_guard<std::mutex> one_caller(callers_);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      body_ = body;
      context_ = context;
      running_ = static_cast<int>(threads_.size());
      ++generation_;
    }
    start_.notify_all();
    body(context, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  ThreadPool() {
    const int cores = std::max(1, static_cast<int>(std::thread::hardware_concurrency()));
    for (int worker = 1; worker < cores; ++worker) {
      threads_.emplace_back([this, worker] { Loop(worker); });
      threads_.back().detach();
    }
  }

  void Loop(int worker) {
    int64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      start_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      auto* const body = body_;
      void* const context = context_;
      lock.unlock();
      body(context, worker);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex callers_;  // held for a whole Run
  std::mutex mutex_;    // guards everything below but threads_
  std::condition_variable start_, done_;
  void (*body_)(void*, int) = nullptr;
  void* context_ = nullptr;
  int running_ = 0;
  int64_t generation_ = 0;
  std::vector<std::thread> threads_;  // constant after construction
};

ParallelRunner& Runner() {
  static ParallelRunner runner{
      [] { return ThreadPool::Instance().size(); },
      [](void (*body)(void*, int), void* context) { ThreadPool::Instance().Run(body, context); }};
  return runner;
}

struct Marked {
  void (*body)(void*, int);
  void* context;
};

}  // namespace

void SetParallelRunner(ParallelRunner runner) { Runner() = runner; }

int NumWorkers() { return Runner().num_workers(); }

namespace internal {

int CurrentWorker() { return current_worker < 0 ? 0 : current_worker; }

void RunOnWorkers(void (*body)(void*, int), void* context) {
  if (current_worker >= 0) {
    body(context, current_worker);
    return;
  }
  Marked marked{body, context};
  Runner().run(
      [](void* raw, int worker) {
        auto* m = static_cast<Marked*>(raw);
        current_worker = worker;
        m->body(m->context, worker);
        current_worker = -1;
      },
      &marked);
}

}  // namespace internal
}  // namespace vsprefill::kernels
