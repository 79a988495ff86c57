#include "server/model/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cmath>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"

namespace vsprefill::model {
namespace {

using testing::AllOf;
using testing::HasSubstr;

// A file with this header and `data_bytes` bytes of data.
std::string File(const std::string& header, size_t data_bytes, uint64_t claimed_header_bytes = 0) {
  const uint64_t length = claimed_header_bytes != 0 ? claimed_header_bytes : header.size();
  std::string file(8, '\0');
  for (int i = 0; i < 8; ++i) file[i] = static_cast<char>(length >> (8 * i));
  return file + header + std::string(data_bytes, '\1');
}

absl::StatusOr<SafetensorsContents> Parse(const std::string& file) {
  return ParseSafetensors(
      absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(file.data()), file.size()),
      "x.safetensors");
}

// The message of a refusal, which must be one line that begins with the file's name.
std::string Refusal(const std::string& file) {
  const absl::Status status = Parse(file).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_EQ(status.message().substr(0, 13), "x.safetensors");
  EXPECT_EQ(status.message().find('\n'), absl::string_view::npos);
  return std::string(status.message());
}

std::string Entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return absl::StrCat("\"", name, "\":{\"dtype\":\"", dtype, "\",\"shape\":", shape,
                      ",\"data_offsets\":", offsets, "}");
}

TEST(SafetensorsTest, ReadsTensorsAndMetadata) {
  const auto contents =
      Parse(File("{\"__metadata__\":{\"format\":\"pt\"}," + Entry("b", "F32", "[2,3]", "[4,28]") +
                     "," + Entry("a", "BF16", "[2]", "[0,4]") + "}",
                 28));
  ASSERT_TRUE(contents.ok()) << contents.status();
  EXPECT_EQ(contents->metadata.at("format"), "pt");
  EXPECT_EQ(contents->tensors.at("b").shape, (std::vector<int64_t>{2, 3}));
  EXPECT_EQ(contents->tensors.at("b").num_elements, 6);
  EXPECT_EQ(contents->tensors.at("b").data.size(), 24u);
}

TEST(SafetensorsTest, ScalarsAndEmptyTensorsAreFine) {
  EXPECT_TRUE(Parse(File("{}", 0)).ok());
  EXPECT_TRUE(Parse(File("{" + Entry("s", "F32", "[]", "[0,4]") + "," +
                             Entry("e", "F32", "[0,7]", "[4,4]") + "}",
                         4))
                  .ok());
}

TEST(SafetensorsTest, HostileHeadersEndInOneClearLine) {
  const std::string one = "{" + Entry("t", "F32", "[2]", "[0,8]") + "}";
  EXPECT_THAT(Refusal("abc"), HasSubstr("3 bytes"));
  EXPECT_THAT(Refusal(File(one, 8, uint64_t{1} << 63)), HasSubstr("9223372036854775808"));
  EXPECT_THAT(Refusal(File(one, 8, UINT64_MAX)), HasSubstr("18446744073709551615"));
  EXPECT_THAT(Refusal(File(one, 8, one.size() + 9)), HasSubstr("truncated"));
  EXPECT_THAT(Refusal(File(one, 7)), AllOf(HasSubstr("\"t\""), HasSubstr("truncated")));
  EXPECT_THAT(Refusal(File(one, 9)), HasSubstr("end at byte 8 of 9"));
  EXPECT_THAT(Refusal(File("{]", 0)), HasSubstr("JSON"));
  EXPECT_THAT(Refusal(File("[1]", 0)), HasSubstr("object"));
  EXPECT_THAT(Refusal(File(std::string(100000, '{'), 0)), HasSubstr("JSON"));
  EXPECT_THAT(Refusal(File("{\"a\":[[[[[[1]]]]]]}", 0)), HasSubstr("deeper"));
  EXPECT_THAT(Refusal(File("{\"t\":7}", 0)), HasSubstr("not an object"));
  EXPECT_THAT(Refusal(File("{\"t\":{\"dtype\":\"F32\",\"shape\":[]}}", 0)),
              HasSubstr("data_offsets"));
  EXPECT_THAT(Refusal(File("{\"__metadata__\":{\"a\":1}}", 0)), HasSubstr("__metadata__"));
}

TEST(SafetensorsTest, HostileTensorsEndInOneClearLine) {
  const auto refusal = [](const std::string& entry, size_t bytes) {
    return Refusal(File("{" + entry + "}", bytes));
  };
  EXPECT_THAT(refusal(Entry("t", "F31", "[2]", "[0,8]"), 8), HasSubstr("F31"));
  EXPECT_THAT(refusal(Entry("t", "F32", "[3]", "[0,8]"), 8),
              AllOf(HasSubstr("8 bytes"), HasSubstr("[3]"), HasSubstr("12")));
  EXPECT_THAT(refusal(Entry("t", "F32", "[-2]", "[0,8]"), 8), HasSubstr("-2"));
  EXPECT_THAT(refusal(Entry("t", "F32", "[2.0]", "[0,8]"), 8), HasSubstr("2.0"));
  EXPECT_THAT(refusal(Entry("t", "F32", "2", "[0,8]"), 8), HasSubstr("shape"));
  EXPECT_THAT(refusal(Entry("t", "F32", "[4294967296,4294967296]", "[0,8]"), 8),
              HasSubstr("too many"));
  EXPECT_THAT(refusal(Entry("t", "F32", "[18446744073709551615]", "[0,8]"), 8),
              HasSubstr("18446744073709551615"));
  EXPECT_THAT(refusal(Entry("t", "F32", "[1,1,1,1,1,1,1,1,2]", "[0,8]"), 8), HasSubstr("8 sizes"));
  EXPECT_THAT(refusal(Entry("t", "F32", "[2]", "[8,0]"), 8), HasSubstr("[8,0]"));
  EXPECT_THAT(refusal(Entry("t", "F32", "[2]", "[0,8,9]"), 8), HasSubstr("[0,8,9]"));
  EXPECT_THAT(refusal(Entry("t", "F32", "[2]", "[0,18446744073709551615]"), 8),
              HasSubstr("18446744073709551615"));
  EXPECT_THAT(
      refusal(Entry("a", "F32", "[2]", "[0,8]") + "," + Entry("b", "F32", "[2]", "[4,12]"), 12),
      AllOf(HasSubstr("overlap"), HasSubstr("\"b\"")));
  EXPECT_THAT(
      refusal(Entry("a", "F32", "[2]", "[0,8]") + "," + Entry("b", "F32", "[1]", "[12,16]"), 16),
      HasSubstr("belong to no tensor"));
  EXPECT_THAT(
      refusal(Entry("a", "F32", "[2]", "[0,8]") + "," + Entry("a", "F32", "[2]", "[0,8]"), 8),
      AllOf(HasSubstr("\"a\""), HasSubstr("twice")));
}

class SafetensorsDirectoryTest : public testing::Test {
 protected:
  void SetUp() override {
    dir_ =
        std::filesystem::path(testing::TempDir()) /
        absl::StrCat("safetensors_", testing::UnitTest::GetInstance()->current_test_info()->name());
    std::filesystem::remove_all(dir_);
    std::filesystem::create_directories(dir_);
  }
  void TearDown() override { std::filesystem::remove_all(dir_); }

  void Write(const std::string& name, const std::string& text) {
    std::ofstream(dir_ / name, std::ios::binary) << text;
  }
  absl::Status Open() { return SafetensorsReader::OpenDirectory(dir_.string()).status(); }

  std::filesystem::path dir_;
};

TEST_F(SafetensorsDirectoryTest, WritesWhatItReads) {
  const std::vector<float> values = {1.5f, -2.0f, 0.25f};
  TensorMap tensors;
  tensors["w"] = {
      "F32", {3}, 3, absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(values.data()), 12)};
  tensors["empty"] = {"BF16", {0, 4}, 0, {}};
  const std::string path = (dir_ / "model.safetensors").string();
  ASSERT_TRUE(WriteSafetensors(path, tensors, {{"note", "x"}}).ok());
  auto file = SafetensorsReader::OpenDirectory(dir_.string());
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->metadata().at("note"), "x");
  std::vector<float> read(3);
  const int64_t shape[] = {3};
  auto tensor = file->Get("w", shape);
  ASSERT_TRUE(tensor.ok()) << tensor.status();
  ASSERT_TRUE(ConvertToFloat(**tensor, absl::MakeSpan(read)).ok());
  EXPECT_EQ(read, values);

  const int64_t wrong[] = {1, 3};
  EXPECT_THAT(std::string(file->Get("w", wrong).status().message()),
              AllOf(HasSubstr("[3]"), HasSubstr("[1, 3]")));
  EXPECT_THAT(std::string(file->Get("v", shape).status().message()), HasSubstr("\"v\" is missing"));
  tensors["w"].shape = {4};
  EXPECT_TRUE(absl::IsInvalidArgument(WriteSafetensors(path, tensors)));
}

TEST_F(SafetensorsDirectoryTest, ShardsAreOneModel) {
  Write("a.safetensors", File("{" + Entry("x", "F32", "[2]", "[0,8]") + "}", 8));
  Write("b.safetensors", File("{" + Entry("y", "F32", "[1]", "[0,4]") + "}", 4));
  Write("model.safetensors.index.json",
        R"({"metadata":{"total_size":12},"weight_map":{"x":"a.safetensors","y":"b.safetensors"}})");
  auto file = SafetensorsReader::OpenDirectory(dir_.string());
  ASSERT_TRUE(file.ok()) << file.status();
  EXPECT_EQ(file->tensors().size(), 2u);
  EXPECT_EQ(file->Find("y")->num_elements, 1);
}

TEST_F(SafetensorsDirectoryTest, BadShardsAreRefused) {
  EXPECT_TRUE(absl::IsNotFound(Open()));
  Write("a.safetensors", File("{" + Entry("x", "F32", "[2]", "[0,8]") + "}", 8));
  Write("b.safetensors", File("{" + Entry("x", "F32", "[2]", "[0,8]") + "}", 8));
  const auto refusal = [&](const std::string& weight_map) {
    Write("model.safetensors.index.json", absl::StrCat("{\"weight_map\":", weight_map, "}"));
    const absl::Status status = Open();
    EXPECT_FALSE(status.ok());
    return std::string(status.message());
  };
  EXPECT_THAT(refusal(R"({"x":"a.safetensors","y":"a.safetensors"})"),
              HasSubstr("\"y\" is not in"));
  EXPECT_THAT(refusal(R"({"x":"a.safetensors","z":"b.safetensors"})"), HasSubstr("both"));
  EXPECT_THAT(refusal(R"({"x":"c.safetensors"})"), HasSubstr("c.safetensors"));
  EXPECT_THAT(refusal(R"({"x":"../a.safetensors"})"), HasSubstr("plain file name"));
  EXPECT_THAT(refusal(R"({"x":3})"), HasSubstr("3"));
  EXPECT_THAT(refusal("[]"), HasSubstr("weight_map"));
}

TEST(SafetensorsConvertTest, EveryHalfAndBFloat16ValueConverts) {
  std::vector<uint16_t> bits(65536);
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = static_cast<uint16_t>(i);
  TensorView view{"F16",
                  {65536},
                  65536,
                  absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(bits.data()), 131072)};
  std::vector<float> out(bits.size());
  ASSERT_TRUE(ConvertToFloat(view, absl::MakeSpan(out)).ok());
  for (size_t i = 0; i < bits.size(); ++i) {
    const int exponent = (bits[i] >> 10) & 31;
    const int mantissa = bits[i] & 1023;
    const double sign = (bits[i] & 0x8000) != 0 ? -1 : 1;
    if (exponent == 31) {
      EXPECT_EQ(std::isnan(out[i]), mantissa != 0);
      EXPECT_EQ(std::isinf(out[i]), mantissa == 0);
      continue;
    }
    const double magnitude =
        exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    ASSERT_EQ(out[i], sign * magnitude) << i;
  }
  view.dtype = "BF16";
  std::vector<uint16_t> same(bits.size());
  ASSERT_TRUE(ConvertToFloat(view, absl::MakeSpan(out)).ok());
  TensorView floats{"F32",
                    {65536},
                    65536,
                    absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(out.data()), 262144)};
  ASSERT_TRUE(ConvertToBFloat16(floats, absl::MakeSpan(same)).ok());
  for (size_t i = 0; i < bits.size(); ++i) {
    if (!std::isnan(out[i])) {
      ASSERT_EQ(same[i], bits[i]);
    }
  }
}

TEST(SafetensorsConvertTest, RoundsToNearestEven) {
  const std::vector<float> values = {1.0f, 1.00390625f, 1.01171875f, 3.4e38f, -0.0f, NAN};
  const TensorView view{
      "F32", {6}, 6, absl::MakeConstSpan(reinterpret_cast<const uint8_t*>(values.data()), 24)};
  std::vector<uint16_t> out(6);
  ASSERT_TRUE(ConvertToBFloat16(view, absl::MakeSpan(out)).ok());
  EXPECT_EQ(out[0], 0x3f80);
  EXPECT_EQ(out[1], 0x3f80);  // a tie goes to the even neighbour
  EXPECT_EQ(out[2], 0x3f82);
  EXPECT_EQ(out[3], 0x7f80);
  EXPECT_EQ(out[4], 0x8000);
  EXPECT_GT(out[5] & 0x7fff, 0x7f80);
  std::vector<float> wrong(6);
  TensorView integers = view;
  integers.dtype = "I32";
  EXPECT_THAT(std::string(ConvertToFloat(integers, absl::MakeSpan(wrong)).message()),
              HasSubstr("I32"));
}

}  // namespace
}  // namespace vsprefill::model
