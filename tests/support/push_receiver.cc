#include "tests/support/push_receiver.h"

#include <chrono>
#include <utility>

#include "absl/strings/str_cat.h"

namespace vsprefill::testing {

PushReceiver::PushReceiver(std::function<grpc::Status(int)> on_message, grpc::Status answer,
                           const std::string& listen)
    : on_message_(std::move(on_message)), answer_(std::move(answer)) {
  grpc::ServerBuilder builder;
  int port = 0;
  builder.AddListeningPort(listen.empty() ? "127.0.0.1:0" : listen,
                           grpc::InsecureServerCredentials(), &port);
  builder.RegisterService(this);
  server_ = builder.BuildAndStart();
  address_ = absl::StrCat("127.0.0.1:", port);
}

PushReceiver::~PushReceiver() { server_->Shutdown(std::chrono::system_clock::now()); }

std::vector<Pushed> PushReceiver::pushes() {
  absl::MutexLock lock(&mu_);
  return pushes_;
}

grpc::Status PushReceiver::Push(grpc::ServerContext*, grpc::ServerReader<v1::PushRequest>* reader,
                                v1::PushResponse* response) {
  Pushed pushed;
  v1::PushRequest message;
  uint64_t bytes = 0;
  grpc::Status status = grpc::Status::OK;
  for (int count = 0;; ++count) {
    if (on_message_) status = on_message_(count);
    if (!status.ok() || !reader->Read(&message)) break;
    if (message.has_begin()) {
      pushed.begin = message.begin();
      pushed.order.push_back("begin");
    } else if (message.has_kv()) {
      bytes += message.kv().payload().size();
      pushed.chunks.push_back(message.kv());
      pushed.order.push_back("kv");
    } else if (message.has_finish()) {
      pushed.finish = message.finish();
      pushed.order.push_back("finish");
      pushed.complete = true;
    }
  }
  response->set_bytes(bytes);
  if (status.ok()) {
    status = pushed.complete
                 ? answer_
                 : grpc::Status(grpc::StatusCode::DATA_LOSS, "the push ended without finish");
  }
  absl::MutexLock lock(&mu_);
  pushes_.push_back(std::move(pushed));
  return status;
}

}  // namespace vsprefill::testing
