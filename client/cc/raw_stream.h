// A server-streaming call read as bytes, without protobuf, by one thread that blocks. Internal.
#pragma once

#include <grpcpp/client_context.h>
#include <grpcpp/completion_queue.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/support/byte_buffer.h>

#include <string>

namespace vsprefill::client {

class RawStream {
 public:
  /// Sends `request` to `method` ("/package.Service/Method"). `context` and `stub` must outlive
  /// this object; the context's TryCancel ends it from another thread.
  RawStream(grpc::GenericStub& stub, const std::string& method, const grpc::ByteBuffer& request,
            grpc::ClientContext* context);
  /// Cancels the call unless Finish returned.
  ~RawStream();
  RawStream(const RawStream&) = delete;
  RawStream& operator=(const RawStream&) = delete;

  /// Waits for the next message; false when there is none to come.
  bool Read(grpc::ByteBuffer* message);
  /// How the call ended. Call it once, after Read returned false.
  grpc::Status Finish();

 private:
  bool Wait();

  grpc::ClientContext* const context_;
  grpc::CompletionQueue queue_;
  std::unique_ptr<grpc::GenericClientAsyncReaderWriter> call_;
  bool alive_ = true;
  bool finished_ = false;
};

/// The same bytes as `message` in protobuf's encoding, for RawStream.
template <typename Message>
grpc::ByteBuffer Serialize(const Message& message) {
  const std::string bytes = message.SerializeAsString();
  grpc::Slice slice(bytes);
  return grpc::ByteBuffer(&slice, 1);
}

}  // namespace vsprefill::client
