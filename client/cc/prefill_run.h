// One Prefill call and its Attach streams: reads each on a thread of its own, feeds one assembler
// and ends all of them at the first error. Internal to PrefillClient.
#pragma once

#include <grpcpp/client_context.h>
#include <grpcpp/generic/generic_stub.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/base/thread_annotations.h"
#include "absl/synchronization/mutex.h"
#include "absl/time/time.h"
#include "client/cc/kv_assembler.h"
#include "client/cc/prefill_client.h"
#include "client/cc/raw_stream.h"
#include "client/cc/types.h"
#include "client/cc/wire.h"
#include "vsprefill/v1/prefill.pb.h"

namespace vsprefill::client {

class PrefillRun {
 public:
  /// `stubs`: one per stripe, each on a connection of its own. All outlive this object.
  PrefillRun(const std::vector<grpc::GenericStub*>& stubs, const PrefillRequest& request,
             const PrefillHandlers& handlers);
  ~PrefillRun();

  /// Call once.
  absl::StatusOr<PrefillResult> Run();
  /// Ends the call; from any thread.
  void Cancel();

 private:
  /// What has been seen on one stream.
  struct Stripe {
    int index = 0;
    grpc::ClientContext context;
    bool accepted = false;
    bool first_token = false;
    bool done = false;
    std::thread thread;  // not of stripe 0
  };

  bool push() const { return !request_.push_targets.empty(); }
  void ReadStripe(Stripe& stripe, const std::string& method, const grpc::ByteBuffer& request);
  absl::Status ReadAll(Stripe& stripe, RawStream& stream);
  absl::Status OnMessage(Stripe& stripe, const grpc::ByteBuffer& message);
  absl::Status OnChunk(const Stripe& stripe, const WireChunk& chunk);
  absl::Status OnAccepted(Stripe& stripe, const v1::Accepted& proto);
  absl::Status OnDone(Stripe& stripe, const v1::Done& done);
  absl::Status CheckAccepted(const Accepted& accepted) const;
  void StartAttaching();
  void Fail(absl::Status status);
  absl::Status failure() const;

  const std::vector<grpc::GenericStub*> stubs_;
  const PrefillRequest& request_;
  const PrefillHandlers& handlers_;
  const absl::Time start_;
  std::vector<std::unique_ptr<Stripe>> stripes_;
  std::unique_ptr<KvAssembler> assembler_;  // set before the attached stripes start
  PrefillResult result_;                    // thread of stripe 0
  KvManifest manifest_;                     // thread of stripe 0
  mutable absl::Mutex mu_;
  absl::Status failure_ ABSL_GUARDED_BY(mu_);
  absl::Mutex progress_mu_;  // one call of on_progress at a time
};

}  // namespace vsprefill::client
