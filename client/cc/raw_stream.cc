#include "client/cc/raw_stream.h"

namespace vsprefill::client {

RawStream::RawStream(grpc::GenericStub& stub, const std::string& method,
                     const grpc::ByteBuffer& request, grpc::ClientContext* context)
    : context_(context) {
  context_->set_initial_metadata_corked(true);  // headers and request in one write
  call_ = stub.PrepareCall(context_, method, &queue_);
  call_->StartCall(nullptr);  // corked: yields no event
  call_->WriteLast(request, grpc::WriteOptions(), nullptr);
  alive_ = Wait();
}

RawStream::~RawStream() {
  if (!finished_) {
    context_->TryCancel();
    Finish();
  }
  queue_.Shutdown();
  void* tag;
  bool ok;
  while (queue_.Next(&tag, &ok)) {
  }
}

bool RawStream::Wait() {
  // One operation at a time is under way, so tags need no meaning.
  void* tag;
  bool ok = false;
  return queue_.Next(&tag, &ok) && ok;
}

bool RawStream::Read(grpc::ByteBuffer* message) {
  if (!alive_) return false;
  call_->Read(message, nullptr);
  alive_ = Wait();
  return alive_;
}

grpc::Status RawStream::Finish() {
  grpc::Status status;
  call_->Finish(&status, nullptr);
  Wait();
  finished_ = true;
  return status;
}

}  // namespace vsprefill::client
