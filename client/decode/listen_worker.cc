#include <atomic>
#include <csignal>
#include <ctime>
#include <memory>
#include <nlohmann/json.hpp>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "client/cc/kv_receiver.h"
#include "client/decode/cache_memory.h"
#include "client/decode/greedy.h"
#include "client/decode/room.h"
#include "client/decode/worker.h"
#include "server/base/status_macros.h"

namespace vsprefill::decode {
namespace {

std::string JsonLine(const client::ReceivedKv& kv, const GreedyResult& greedy) {
  const nlohmann::ordered_json json = {{"request_id", kv.request_id},
                                       {"attempt", kv.attempt},
                                       {"prompt_tokens", kv.shape.prompt_tokens},
                                       {"tokens", greedy.tokens},
                                       {"stop", greedy.stop}};
  // A request id may hold any bytes.
  return json.dump(-1, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + "\n";
}

/// Shuts the receiver down at SIGTERM or SIGINT, until it is destroyed.
class StopOnSignal {
 public:
  explicit StopOnSignal(client::KvReceiver& receiver)
      : thread_([this, &receiver] {
          sigset_t signals;
          sigemptyset(&signals);
          sigaddset(&signals, SIGTERM);
          sigaddset(&signals, SIGINT);
          const timespec wait = {0, 100'000'000};  // how soon `stop_` is seen
          while (!stop_) {
            if (sigtimedwait(&signals, nullptr, &wait) > 0) {
              receiver.Shutdown();
              return;
            }
          }
        }) {}
  ~StopOnSignal() {
    stop_ = true;
    thread_.join();
  }

 private:
  std::atomic<bool> stop_{false};
  std::thread thread_;
};

}  // namespace

absl::Status RunListen(const Options& options, model::Transformer& transformer, std::ostream& out) {
  // Declared before the receiver, whose threads allocate from it and which holds caches of it.
  kv::KvPool pool(options.kv_pool_bytes);
  client::KvReceiverOptions receiver_options;
  receiver_options.max_caches = options.max_caches;
  receiver_options.max_bytes = options.kv_pool_bytes;
  receiver_options.expected_kv_id = transformer.kv_layout().kv_id;
  receiver_options.allocate =
      [&](const std::string&,
          const client::KvShape& shape) -> absl::StatusOr<client::KvAllocation> {
    VSP_ASSIGN_OR_RETURN(
        std::shared_ptr<CacheMemory> memory,
        CacheMemory::Create(transformer, pool, shape,
                            RoomForNewTokens(transformer, shape, options.max_new_tokens)));
    return client::KvAllocation{memory->destination(), memory};
  };
  VSP_ASSIGN_OR_RETURN(std::unique_ptr<client::KvReceiver> receiver,
                       client::KvReceiver::Start(options.listen, std::move(receiver_options)));
  const StopOnSignal stop(*receiver);
  out << "listening on " << receiver->address() << std::endl;
  while (true) {
    absl::StatusOr<client::ReceivedKv> kv = receiver->Next();
    if (absl::IsCancelled(kv.status())) return absl::OkStatus();
    VSP_RETURN_IF_ERROR(kv.status());
    CacheMemory& memory = *static_cast<CacheMemory*>(kv->owner.get());
    VSP_ASSIGN_OR_RETURN(kv::KvCache * cache, memory.Commit(transformer));
    absl::StatusOr<GreedyResult> greedy =
        DecodeGreedily(transformer, *cache, kv->first_token, options.max_new_tokens);
    if (!greedy.ok()) {
      return absl::Status(greedy.status().code(), absl::StrCat("request ", kv->request_id, ": ",
                                                               greedy.status().message()));
    }
    out << JsonLine(*kv, *greedy) << std::flush;
  }
}

}  // namespace vsprefill::decode
