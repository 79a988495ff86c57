// Bytes that no gRPC client would send, from a raw socket: the server answers with an error or
// closes the connection, and serves the next request as if nothing had been.
#include <arpa/inet.h>
#include <gtest/gtest.h>
#include <netinet/in.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <random>
#include <string>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_split.h"
#include "absl/time/clock.h"
#include "tests/support/test_service.h"

namespace vsprefill::testing {
namespace {

class RawSocket {
 public:
  explicit RawSocket(const std::string& address) {
    const std::pair<std::string, std::string> parts = absl::StrSplit(address, ':');
    int port = 0;
    EXPECT_TRUE(absl::SimpleAtoi(parts.second, &port));
    fd_ = socket(AF_INET, SOCK_STREAM, 0);
    sockaddr_in to = {};
    to.sin_family = AF_INET;
    to.sin_port = htons(static_cast<uint16_t>(port));
    inet_pton(AF_INET, parts.first.c_str(), &to.sin_addr);
    EXPECT_EQ(connect(fd_, reinterpret_cast<sockaddr*>(&to), sizeof(to)), 0);
  }
  ~RawSocket() { close(fd_); }
  void Send(const std::string& bytes) {
    // The server may have closed already: that is an answer too.
    (void)!send(fd_, bytes.data(), bytes.size(), MSG_NOSIGNAL);
  }
  /// What comes until the peer closes or `quiet` passes without a byte.
  std::string ReadAll(absl::Duration quiet = absl::Milliseconds(300)) {
    std::string all;
    for (;;) {
      pollfd poller = {fd_, POLLIN, 0};
      if (poll(&poller, 1, static_cast<int>(absl::ToInt64Milliseconds(quiet))) <= 0) return all;
      char buffer[4096];
      const ssize_t n = recv(fd_, buffer, sizeof(buffer), 0);
      if (n <= 0) return all;
      all.append(buffer, n);
    }
  }

 private:
  int fd_;
};

constexpr char kPreface[] = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// An HTTP/2 frame (RFC 9113 §4.1).
std::string Frame(uint8_t type, uint8_t flags, uint32_t stream, const std::string& payload) {
  std::string frame;
  for (int shift : {16, 8, 0}) frame.push_back(static_cast<char>(payload.size() >> shift));
  frame.push_back(static_cast<char>(type));
  frame.push_back(static_cast<char>(flags));
  for (int shift : {24, 16, 8, 0}) frame.push_back(static_cast<char>(stream >> shift));
  return frame + payload;
}

std::string Settings() { return Frame(4, 0, 0, ""); }

/// HPACK literals, not indexed, not Huffman-coded.
std::string Headers(const std::string& path, uint32_t stream) {
  std::string block;
  const std::vector<std::pair<std::string, std::string>> headers = {
      {":method", "POST"},
      {":scheme", "http"},
      {":path", path},
      {":authority", "localhost"},
      {"content-type", "application/grpc"},
      {"te", "trailers"}};
  for (const auto& [name, value] : headers) {
    block.push_back(0);
    block.push_back(static_cast<char>(name.size()));
    block += name;
    block.push_back(static_cast<char>(value.size()));
    block += value;
  }
  return Frame(1, 4, stream, block);  // END_HEADERS
}

/// A gRPC message: compressed flag, length, bytes.
std::string Message(const std::string& bytes, uint32_t claimed_length, char compressed = 0) {
  std::string message(1, compressed);
  for (int shift : {24, 16, 8, 0}) message.push_back(static_cast<char>(claimed_length >> shift));
  return message + bytes;
}

std::string Call(const std::string& message,
                 const std::string& path = "/vsprefill.v1.PrefillService/Prefill") {
  return kPreface + Settings() + Headers(path, 1) + Frame(0, 1, 1, message);  // END_STREAM
}

class RawSocketTest : public ::testing::Test {
 protected:
  void ExpectHealthy() {
    EXPECT_TRUE(service_.AwaitQuiet());
    const v1::PrefillRequest request = MakeRequest("next", TestIds(100));
    const auto stub = v1::PrefillService::NewStub(service_.NewChannel());
    const StreamResult result = Prefill(*stub, request);
    ASSERT_TRUE(result.status.ok()) << result.status.error_message();
    EXPECT_EQ(CheckKv(request, result.chunks, result.accepted.layout(), result.done.manifest()),
              "");
    EXPECT_TRUE(service_.AwaitQuiet());
  }
  std::string Exchange(const std::string& bytes) {
    RawSocket socket(service_.address());
    socket.Send(bytes);
    return socket.ReadAll();
  }

  TestService service_;
};

TEST_F(RawSocketTest, AValidCallByHandWorks) {
  // The frames above are right, so that the tests below fail for the reason they name.
  const std::string request = MakeRequest("raw", TestIds(10)).SerializeAsString();
  const std::string answer = Exchange(Call(Message(request, request.size())));
  EXPECT_NE(answer.find("fake-kv-id"), std::string::npos);
  ExpectHealthy();
}

TEST_F(RawSocketTest, BytesThatAreNoProtobufAreInvalidArgument) {
  const std::string valid = MakeRequest("raw", TestIds(10)).SerializeAsString();
  const std::vector<std::string> messages = {
      std::string("\x0a\xff\xff\xff\xff\x0f", 6),  // a string longer than the message
      valid.substr(0, valid.size() - 3),           // cut off inside token_ids
      std::string(100, '\xff'),                    // a varint without end
      std::string("\x0a\x02\xc3\x28", 4),          // request_id is not UTF-8
      std::string("\x0f"),                         // wire type 7
  };
  for (const std::string& message : messages) {
    const std::string answer = Exchange(Call(Message(message, message.size())));
    // grpc-status 3 in the trailers, sent as a literal.
    EXPECT_NE(answer.find("grpc-status"), std::string::npos) << answer.size();
    EXPECT_NE(answer.find("PrefillRequest"), std::string::npos);
    ExpectHealthy();
  }
  EXPECT_EQ(
      service_.Metric(
          R"(vsprefill_requests_rejected_total{engine="0",model_name="fake",reason="invalid"})"),
      static_cast<double>(messages.size()));
}

TEST_F(RawSocketTest, FramesThatLieAboutTheirLength) {
  const std::string request = MakeRequest("raw", TestIds(10)).SerializeAsString();
  for (uint32_t claimed :
       {0u, 1u, static_cast<uint32_t>(request.size() + 1), 0x7fffffffu, 0xffffffffu}) {
    Exchange(Call(Message(request, claimed)));
    ExpectHealthy();
  }
}

TEST_F(RawSocketTest, CompressedWithoutAnEncoding) {
  const std::string request = MakeRequest("raw", TestIds(10)).SerializeAsString();
  Exchange(Call(Message(request, request.size(), 1)));
  ExpectHealthy();
}

TEST_F(RawSocketTest, TheSameForAttachAndUnaryCalls) {
  for (const char* method : {"Attach", "GetModelInfo", "GetLoad", "NoSuchMethod"}) {
    Exchange(Call(Message(std::string(50, '\xff'), 50),
                  absl::StrCat("/vsprefill.v1.PrefillService/", method)));
    ExpectHealthy();
  }
}

TEST_F(RawSocketTest, ConnectionsThatEndAnywhere) {
  const std::string request = MakeRequest("raw", TestIds(3000)).SerializeAsString();
  const std::string call = Call(Message(request, request.size()));
  for (size_t length = 0; length < call.size(); length += 1 + call.size() / 40) {
    RawSocket socket(service_.address());
    socket.Send(call.substr(0, length));
  }
  ExpectHealthy();
}

TEST_F(RawSocketTest, ACallThatIsResetWhileItIsAnswered) {
  const std::string request = MakeRequest("raw", TestIds(3000)).SerializeAsString();
  RawSocket socket(service_.address());
  socket.Send(Call(Message(request, request.size())));
  absl::SleepFor(absl::Milliseconds(3));
  socket.Send(Frame(3, 0, 1, std::string("\0\0\0\x08", 4)));  // RST_STREAM, CANCEL
  socket.ReadAll();
  ExpectHealthy();
}

TEST_F(RawSocketTest, RandomBytes) {
  std::mt19937 random(7);
  for (int i = 0; i < 50; ++i) {
    std::string noise(random() % 2000, 0);
    for (char& c : noise) c = static_cast<char>(random());
    RawSocket socket(service_.address());
    socket.Send(i % 2 == 0 ? noise : kPreface + Settings() + noise);
  }
  ExpectHealthy();
}

TEST_F(RawSocketTest, RandomMutationsOfACall) {
  std::mt19937 random(11);
  const std::string request = MakeRequest("raw", TestIds(40)).SerializeAsString();
  const std::string call = Call(Message(request, request.size()));
  for (int i = 0; i < 200; ++i) {
    std::string mutated = call;
    for (int n = 1 + random() % 4; n > 0; --n) {
      mutated[24 + random() % (mutated.size() - 24)] = static_cast<char>(random());
    }
    RawSocket socket(service_.address());
    socket.Send(mutated);
    if (i % 4 == 0) socket.ReadAll(absl::Milliseconds(5));
  }
  ExpectHealthy();
}

TEST_F(RawSocketTest, TheMetricsPortToo) {
  for (const std::string& bytes :
       {std::string("\xff\xfe\x00garbage\r\n\r\n", 15),
        std::string("GET /metrics HTTP/9.9\r\n\r\n"),
        std::string("POST /metrics HTTP/1.1\r\nContent-Length: 99999999999\r\n\r\n"),
        std::string(100000, 'A')}) {
    RawSocket socket(service_.metrics_address());
    socket.Send(bytes);
  }
  EXPECT_EQ(HttpGet(service_.metrics_address(), "/livez").first, 200);
}

}  // namespace
}  // namespace vsprefill::testing
