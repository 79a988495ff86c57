#include "server/rpc/lent_chunks.h"

#include <arpa/inet.h>
#include <dirent.h>
#include <netdb.h>
#include <netinet/in.h>
#include <sys/socket.h>

#include <algorithm>
#include <set>
#include <thread>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_replace.h"
#include "absl/strings/strip.h"
#include "absl/time/time.h"
#include "server/base/log.h"

namespace vsprefill::rpc {
namespace {

// With the grace of a failed stream before it, within the second in which memory is to be back.
constexpr absl::Duration kReleaseGrace = absl::Milliseconds(350);

// "ADDRESS:PORT", "" for a family without ports.
std::string Format(const sockaddr* address) {
  char text[INET6_ADDRSTRLEN];
  if (address->sa_family == AF_INET) {
    const auto* v4 = reinterpret_cast<const sockaddr_in*>(address);
    inet_ntop(AF_INET, &v4->sin_addr, text, sizeof(text));
    return absl::StrCat(text, ":", ntohs(v4->sin_port));
  }
  if (address->sa_family == AF_INET6) {
    const auto* v6 = reinterpret_cast<const sockaddr_in6*>(address);
    if (IN6_IS_ADDR_V4MAPPED(&v6->sin6_addr)) {
      inet_ntop(AF_INET, &v6->sin6_addr.s6_addr[12], text, sizeof(text));
    } else {
      inet_ntop(AF_INET6, &v6->sin6_addr, text, sizeof(text));
    }
    return absl::StrCat(text, ":", ntohs(v6->sin6_port));
  }
  return "";
}

std::string PeerOf(int fd) {
  sockaddr_storage storage{};
  socklen_t length = sizeof(storage);
  auto* address = reinterpret_cast<sockaddr*>(&storage);
  return getpeername(fd, address, &length) == 0 ? Format(address) : "";
}

// All addresses that `peer` may mean.
std::set<std::string> Addresses(absl::string_view peer) {
  if (!absl::ConsumePrefix(&peer, "ipv4:")) absl::ConsumePrefix(&peer, "ipv6:");
  const size_t colon = peer.rfind(':');
  if (colon == absl::string_view::npos) return {};
  const std::string host =
      absl::StrReplaceAll(peer.substr(0, colon), {{"%5B", ""}, {"%5D", ""}, {"[", ""}, {"]", ""}});
  const std::string port(peer.substr(colon + 1));
  addrinfo hints{};
  hints.ai_socktype = SOCK_STREAM;
  addrinfo* found = nullptr;
  std::set<std::string> addresses;
  if (getaddrinfo(host.c_str(), port.c_str(), &hints, &found) != 0) return {};
  for (const addrinfo* one = found; one != nullptr; one = one->ai_next) {
    addresses.insert(Format(one->ai_addr));
  }
  freeaddrinfo(found);
  addresses.erase("");
  return addresses;
}

}  // namespace

void LentChunks::Add(const std::shared_ptr<kv::StagedChunk>& chunk) {
  absl::MutexLock lock(&mu_);
  chunks_.erase(std::remove_if(chunks_.begin(), chunks_.end(),
                               [](const auto& held) { return held.expired(); }),
                chunks_.end());
  chunks_.push_back(chunk);
}

bool LentChunks::AnyHeld() const {
  absl::MutexLock lock(&mu_);
  return std::any_of(chunks_.begin(), chunks_.end(),
                     [](const auto& held) { return !held.expired(); });
}

void LentChunks::Reclaim(kv::KvSender& sender, std::string peer) {
  if (peer.empty() || !AnyHeld()) return;
  sender.PostAfter(kReleaseGrace, [self = shared_from_this(), peer = std::move(peer)] {
    if (!self->AnyHeld()) return;
    // A thread of its own: the name of a push target may have to be resolved.
    std::thread([peer] {
      const int connections = ShutDownConnections(peer);
      Log(LogLevel::kWarning, "connection_shut_down",
          {{"peer", peer}, {"connections", absl::StrCat(connections)}});
    }).detach();
  });
}

int ShutDownConnections(absl::string_view peer) {
  const std::set<std::string> addresses = Addresses(peer);
  int count = 0;
  DIR* directory = opendir("/proc/self/fd");
  if (directory == nullptr) return 0;
  while (const dirent* entry = readdir(directory)) {
    int fd;
    if (!absl::SimpleAtoi(entry->d_name, &fd) || addresses.count(PeerOf(fd)) == 0) continue;
    if (shutdown(fd, SHUT_RDWR) == 0) ++count;
  }
  closedir(directory);
  return count;
}

}  // namespace vsprefill::rpc
