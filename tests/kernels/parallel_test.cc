// ParallelFor, the installed runner and the choice of an instruction set.
#include "kernels/cpu/parallel.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "kernels/cpu/isa.h"

namespace vsprefill::kernels {
namespace {

TEST(ParallelForTest, RunsEveryTaskOnce) {
  for (const int64_t tasks : {0, 1, 2, 3, 1000}) {
    std::vector<std::atomic<int>> runs(tasks);
    ParallelFor(tasks, [&](int64_t i, int worker) {
      EXPECT_GE(worker, 0);
      EXPECT_LT(worker, NumWorkers());
      runs[i].fetch_add(1);
    });
    for (int64_t i = 0; i < tasks; ++i) EXPECT_EQ(runs[i].load(), 1) << "task " << i;
  }
}

TEST(ParallelForTest, NestedLoopsFinish) {
  std::atomic<int> runs{0};
  ParallelFor(8, [&](int64_t, int outer) {
    ParallelFor(8, [&](int64_t, int inner) {
      // A nested loop stays on its thread.
      EXPECT_EQ(inner, outer);
      runs.fetch_add(1);
    });
    ParallelFor(1, [&](int64_t, int inner) { EXPECT_EQ(inner, outer); });
  });
  EXPECT_EQ(runs.load(), 64);
}

TEST(ParallelForTest, ConcurrentCallersDoNotMix) {
  std::vector<std::thread> callers;
  std::vector<int64_t> sums(4);
  for (int caller = 0; caller < 4; ++caller) {
    callers.emplace_back([&sums, caller] {
      for (int round = 0; round < 50; ++round) {
        std::atomic<int64_t> sum{0};
        ParallelFor(100, [&](int64_t i, int) { sum.fetch_add(i); });
        sums[caller] += sum.load();
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const int64_t sum : sums) EXPECT_EQ(sum, 50 * 4950);
}

TEST(CpuIsaTest, OnlySupportedSetsCanBeForced) {
  const CpuIsa best = DetectCpuIsa();
  EXPECT_TRUE(CpuIsaSupported(best));
  if (CpuBf16IsSlow()) {
    EXPECT_TRUE(CpuIsaSupported(CpuIsa::kAvx512Bf16));
    EXPECT_EQ(best, CpuIsa::kAvx512);
  }
  for (const CpuIsa isa : {CpuIsa::kAvx2, CpuIsa::kAvx512, CpuIsa::kAvx512Bf16}) {
    const CpuIsa before = ActiveCpuIsa();
    EXPECT_EQ(SetCpuIsa(isa), CpuIsaSupported(isa));
    EXPECT_EQ(ActiveCpuIsa(), CpuIsaSupported(isa) ? isa : before);
    // Whoever has a wide set has the narrower ones.
    EXPECT_TRUE(isa > best || CpuIsaSupported(isa)) << CpuIsaName(isa);
  }
  EXPECT_TRUE(SetCpuIsa(best));
}

// Last in this file: the runner stays installed.
TEST(ParallelRunnerTest, InstalledRunnerIsUsed) {
  static std::atomic<int> calls{0};
  SetParallelRunner({[] { return 1; },
                     [](void (*body)(void*, int), void* context) {
                       calls.fetch_add(1);
                       body(context, 0);
                     }});
  EXPECT_EQ(NumWorkers(), 1);
  int64_t sum = 0;
  ParallelFor(10, [&](int64_t i, int) { sum += i; });
  EXPECT_EQ(sum, 45);
  EXPECT_EQ(calls.load(), 1);
}

}  // namespace
}  // namespace vsprefill::kernels
