// A decode worker for tests: takes pushes, keeps what it got, and misbehaves on demand.
#pragma once

#include <grpcpp/grpcpp.h>

#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/synchronization/mutex.h"
#include "vsprefill/v1/kv.grpc.pb.h"

namespace vsprefill::testing {

struct Pushed {
  v1::PushBegin begin;
  std::vector<v1::KvChunk> chunks;
  v1::PushFinish finish;
  std::vector<std::string> order;  // "begin", "kv", "finish"
  bool complete = false;           // the stream ended after finish
};

class PushReceiver final : public v1::KvReceiver::Service {
 public:
  /// `on_message` is called before each read (with the number read so far); a status that is not OK
  /// ends the call with it. `answer` is what a complete push is answered with.
  explicit PushReceiver(std::function<grpc::Status(int)> on_message = nullptr,
                        grpc::Status answer = grpc::Status::OK, const std::string& listen = "");
  ~PushReceiver() override;

  const std::string& address() const { return address_; }
  std::vector<Pushed> pushes();

  grpc::Status Push(grpc::ServerContext* context, grpc::ServerReader<v1::PushRequest>* reader,
                    v1::PushResponse* response) override;

 private:
  const std::function<grpc::Status(int)> on_message_;
  const grpc::Status answer_;
  std::string address_;
  absl::Mutex mu_;
  std::vector<Pushed> pushes_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<grpc::Server> server_;
};

}  // namespace vsprefill::testing
