// Owners of CUDA memory, streams and events; and the clear word where there is no usable device.
#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "gtest/gtest.h"
#include "server/base/allocator.h"
#include "server/base/device_cuda.h"
#include "server/base/memory_cuda.h"
#include "server/base/stream_cuda.h"

namespace vsprefill {
namespace {

TEST(CudaDevice, ProbeNamesDeviceOrReason) {
  const auto info = ProbeCudaDevice(0);
  if (info.ok()) {
    EXPECT_FALSE(info->name.empty());
    EXPECT_GE(info->major, 8);
    EXPECT_GT(info->memory_bytes, 0);
  } else {
    EXPECT_EQ(info.status().code(), absl::StatusCode::kUnavailable);
    EXPECT_FALSE(info.status().message().empty());
    EXPECT_EQ(CreateCudaAllocator(0).status().code(), absl::StatusCode::kUnavailable);
  }
  EXPECT_EQ(ProbeCudaDevice(-1).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(ProbeCudaDevice(999).status().code(), absl::StatusCode::kUnavailable);
}

class CudaMemoryTest : public testing::Test {
 protected:
  void SetUp() override {
    const auto info = ProbeCudaDevice(0);
    if (!info.ok()) GTEST_SKIP() << info.status().message();
  }
};

TEST_F(CudaMemoryTest, BytesSurviveTheRoundTrip) {
  auto allocator = CreateCudaAllocator(0);
  ASSERT_TRUE(allocator.ok()) << allocator.status();
  EXPECT_EQ((*allocator)->device(), kernels::DeviceKind::kCuda);
  constexpr int64_t kBytes = 3 << 20;
  auto device = Buffer::Create(**allocator, kBytes);
  ASSERT_TRUE(device.ok()) << device.status();
  EXPECT_EQ(reinterpret_cast<uintptr_t>(device->data()) % 256, 0u);
  auto out = PinnedBuffer::Create(kBytes);
  auto in = PinnedBuffer::Create(kBytes);
  ASSERT_TRUE(out.ok() && in.ok());
  auto* source = static_cast<uint8_t*>(out->data());
  for (int64_t i = 0; i < kBytes; ++i) source[i] = static_cast<uint8_t>(i * 7 + i / 251);
  auto stream = CudaStream::Create(0);
  ASSERT_TRUE(stream.ok()) << stream.status();
  ASSERT_TRUE(CopyAsync(device->data(), source, kBytes, stream->get()).ok());
  ASSERT_TRUE(CopyAsync(in->data(), device->data(), kBytes, stream->get()).ok());
  ASSERT_TRUE(stream->Synchronize().ok());
  const auto* result = static_cast<const uint8_t*>(in->data());
  EXPECT_TRUE(std::equal(source, source + kBytes, result));
}

TEST_F(CudaMemoryTest, TooMuchIsRefusedAndTheDeviceStaysUsable) {
  auto allocator = CreateCudaAllocator(0);
  ASSERT_TRUE(allocator.ok());
  EXPECT_EQ(Buffer::Create(**allocator, int64_t{1} << 50).status().code(),
            absl::StatusCode::kResourceExhausted);
  EXPECT_EQ((*allocator)->Allocate(-1).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(Buffer::Create(**allocator, 1024).ok());
  EXPECT_TRUE(Buffer::Create(**allocator, 0).ok());
  const auto memory = GetCudaMemory(0);
  ASSERT_TRUE(memory.ok());
  EXPECT_LE(memory->free_bytes, memory->total_bytes);
}

TEST_F(CudaMemoryTest, EventsOrderStreams) {
  auto first = CudaStream::Create(0), second = CudaStream::Create(0);
  auto begin = CudaEvent::Create(true), end = CudaEvent::Create(true);
  ASSERT_TRUE(first.ok() && second.ok() && begin.ok() && end.ok());
  ASSERT_TRUE(begin->Record(first->get()).ok());
  ASSERT_TRUE(begin->MakeWait(second->get()).ok());
  ASSERT_TRUE(end->Record(second->get()).ok());
  ASSERT_TRUE(end->Synchronize().ok());
  const auto reached = begin->Reached();
  ASSERT_TRUE(reached.ok());
  EXPECT_TRUE(*reached);
  const auto elapsed = end->ElapsedMilliseconds(*begin);
  ASSERT_TRUE(elapsed.ok()) << elapsed.status();
  EXPECT_GE(*elapsed, 0.0f);
  CudaStream moved = std::move(*first);
  EXPECT_EQ(first->get(), nullptr);
  EXPECT_TRUE(moved.Synchronize().ok());
}

}  // namespace
}  // namespace vsprefill
