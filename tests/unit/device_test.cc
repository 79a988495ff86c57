#include "server/model/device.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>

namespace vsprefill::model {
namespace {

TEST(DeviceTest, CpuIsAlwaysThere) {
  const auto chosen = ChooseDevice("cpu");
  ASSERT_TRUE(chosen.ok());
  EXPECT_EQ(chosen->kind, kernels::DeviceKind::kCpu);
}

TEST(DeviceTest, AutoTakesWhatCudaWouldTakeAndSaysWhy) {
  const auto automatic = ChooseDevice("auto");
  const auto cuda = ChooseDevice("cuda");
  ASSERT_TRUE(automatic.ok()) << automatic.status();
  EXPECT_FALSE(automatic->reason.empty());
  EXPECT_EQ(automatic->reason.find('\n'), std::string::npos);
  if (cuda.ok()) {
    EXPECT_EQ(automatic->kind, kernels::DeviceKind::kCuda);
  } else {
    EXPECT_EQ(automatic->kind, kernels::DeviceKind::kCpu);
    EXPECT_TRUE(absl::IsUnavailable(cuda.status())) << cuda.status();
    EXPECT_THAT(automatic->reason, testing::StartsWith("cpu, because "));
  }
}

TEST(DeviceTest, OtherWordsAreRefused) {
  const absl::Status status = ChooseDevice("tpu").status();
  EXPECT_TRUE(absl::IsInvalidArgument(status));
  EXPECT_THAT(std::string(status.message()), testing::HasSubstr("tpu"));
}

}  // namespace
}  // namespace vsprefill::model
