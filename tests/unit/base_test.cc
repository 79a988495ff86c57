#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstring>
#include <string>

#include "server/base/allocator.h"
#include "server/base/clock.h"
#include "server/base/json.h"
#include "server/base/kernel_status.h"
#include "server/base/log.h"
#include "server/base/mapped_file.h"
#include "server/base/status_macros.h"

namespace vsprefill {
namespace {

using testing::HasSubstr;

absl::StatusOr<int> Half(int value) {
  if (value % 2 != 0) return absl::InvalidArgumentError("odd");
  return value / 2;
}

absl::StatusOr<int> Quarter(int value) {
  VSP_ASSIGN_OR_RETURN(const int half, Half(value));
  VSP_RETURN_IF_ERROR(Half(half).status());
  return Half(half);
}

TEST(StatusMacrosTest, ErrorsLeaveTheFunction) {
  EXPECT_EQ(*Quarter(8), 2);
  EXPECT_TRUE(absl::IsInvalidArgument(Quarter(6).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(Quarter(7).status()));
}

TEST(AllocatorTest, HostBuffersAreAligned) {
  for (const int64_t bytes : {0, 1, 100, 5 << 20}) {
    auto buffer = Buffer::Create(HostAllocator(), bytes);
    ASSERT_TRUE(buffer.ok()) << buffer.status();
    EXPECT_EQ(reinterpret_cast<uintptr_t>(buffer->data()) % 64, 0u);
    if (bytes > 0) std::memset(buffer->data(), 1, bytes);
    Buffer moved = *std::move(buffer);
    EXPECT_EQ(moved.bytes(), bytes);
    moved.Reset();
    EXPECT_EQ(moved.data(), nullptr);
  }
  EXPECT_FALSE(Buffer::Create(HostAllocator(), -1).ok());
  EXPECT_FALSE(Buffer::Create(HostAllocator(), INT64_MAX / 2).ok());
}

TEST(KernelStatusTest, NamesTheOperation) {
  EXPECT_TRUE(FromKernelStatus(kernels::KernelStatus::kOk, "x").ok());
  const absl::Status status =
      FromKernelStatus(kernels::KernelStatus::kUnsupportedShape, "attention head_dim 24");
  EXPECT_TRUE(absl::IsUnimplemented(status));
  EXPECT_THAT(std::string(status.message()), HasSubstr("attention head_dim 24"));
  EXPECT_TRUE(absl::IsInternal(FromKernelStatus(kernels::KernelStatus::kDeviceError, "attention")));
}

TEST(JsonTest, RefusesDuplicatesAndDepth) {
  EXPECT_TRUE(ParseJson(R"({"a":{"b":1},"b":[{"a":1},{"a":2}]})", "x").ok());
  EXPECT_THAT(std::string(ParseJson(R"({"a":1,"b":{"c":1,"c":2}})", "x").status().message()),
              HasSubstr("\"c\" occurs twice"));
  EXPECT_TRUE(ParseJson("[[[]]]", "x", 3).ok());
  EXPECT_THAT(std::string(ParseJson("[[[[]]]]", "x", 3).status().message()),
              HasSubstr("deeper than 3"));
}

TEST(LogTest, QuotesWhatNeedsQuotes) {
  EXPECT_EQ(FormatLogLine(LogLevel::kInfo, "started",
                          {{"a", "1"}, {"b", "x y"}, {"c", "q\"\n"}, {"d", ""}}),
            "started a=1 b=\"x y\" c=\"q\\\"\\n\" d=\"\"");
}

TEST(LogTest, ThrottleCountsWhatItDrops) {
  LogThrottle throttle(absl::Seconds(10));
  FakeClock clock;
  int64_t suppressed = -1;
  EXPECT_TRUE(throttle.Allow(clock.Now(), &suppressed));
  EXPECT_EQ(suppressed, 0);
  clock.Advance(absl::Seconds(9));
  EXPECT_FALSE(throttle.Allow(clock.Now(), &suppressed));
  EXPECT_FALSE(throttle.Allow(clock.Now(), &suppressed));
  clock.Advance(absl::Seconds(1));
  EXPECT_TRUE(throttle.Allow(clock.Now(), &suppressed));
  EXPECT_EQ(suppressed, 2);
}

TEST(MappedFileTest, SaysWhatIsWrong) {
  EXPECT_TRUE(absl::IsNotFound(MappedFile::Open("/no/such/file").status()));
  EXPECT_TRUE(absl::IsInvalidArgument(MappedFile::Open("/").status()));
  EXPECT_TRUE(absl::IsResourceExhausted(ReadTextFile("CMakeLists.txt", 3).status()));
  EXPECT_FALSE(FileExists("/"));
}

}  // namespace
}  // namespace vsprefill
