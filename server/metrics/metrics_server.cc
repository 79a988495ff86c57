#include "server/metrics/metrics_server.h"

#include <httplib.h>

#include <thread>
#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"

namespace vsprefill::metrics {

struct MetricsServer::Impl {
  httplib::Server server;
  std::thread thread;
  std::string address;
};

absl::StatusOr<std::unique_ptr<MetricsServer>> MetricsServer::Start(const std::string& address,
                                                                    Metrics& metrics,
                                                                    std::function<bool()> ready) {
  const size_t colon = address.rfind(':');
  int port = 0;
  if (colon == std::string::npos || colon == 0 ||
      !absl::SimpleAtoi(address.substr(colon + 1), &port) || port < 0 || port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat("metrics address \"", address, "\" is not HOST:PORT with a port of 0..65535"));
  }
  std::string host = address.substr(0, colon);
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    host = host.substr(1, host.size() - 2);  // IPv6
  }

  auto impl = std::make_unique<Impl>();
  // A scrape is short; few threads are enough and a slow reader cannot hold them for long.
  impl->server.new_task_queue = [] { return new httplib::ThreadPool(2); };
  // The library's default shares the port with any other process (SO_REUSEPORT).
  impl->server.set_socket_options([](socket_t socket) {
    const int yes = 1;
    setsockopt(socket, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes));
  });
  impl->server.set_read_timeout(5);
  impl->server.set_write_timeout(5);
  impl->server.set_keep_alive_timeout(5);
  impl->server.set_payload_max_length(1024);
  impl->server.Get("/metrics", [&metrics](const httplib::Request&, httplib::Response& response) {
    response.set_content(metrics.Render(), "text/plain; version=0.0.4; charset=utf-8");
  });
  impl->server.Get("/livez", [](const httplib::Request&, httplib::Response& response) {
    response.set_content("ok\n", "text/plain");
  });
  impl->server.Get(
      "/readyz", [ready = std::move(ready)](const httplib::Request&, httplib::Response& response) {
        const bool is_ready = ready();
        response.status = is_ready ? 200 : 503;
        response.set_content(is_ready ? "ok\n" : "not ready\n", "text/plain");
      });
  if (port == 0) {
    port = impl->server.bind_to_any_port(host.c_str());
    if (port <= 0) port = -1;
  } else if (!impl->server.bind_to_port(host.c_str(), port)) {
    port = -1;
  }
  if (port < 0) {
    return absl::UnavailableError(absl::StrCat("cannot listen on metrics address ", address));
  }
  impl->address = absl::StrCat(address.substr(0, colon), ":", port);
  Impl* raw = impl.get();
  impl->thread = std::thread([raw] { raw->server.listen_after_bind(); });
  while (!impl->server.is_running()) std::this_thread::yield();
  return std::unique_ptr<MetricsServer>(new MetricsServer(std::move(impl)));
}

MetricsServer::MetricsServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}

MetricsServer::~MetricsServer() {
  impl_->server.stop();
  impl_->thread.join();
}

const std::string& MetricsServer::address() const { return impl_->address; }

}  // namespace vsprefill::metrics
