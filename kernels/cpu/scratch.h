// Per-thread scratch of the CPU kernels: grows to the largest request and is kept, so a call in
// steady state allocates nothing.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

namespace vsprefill::kernels::cpu {

class Scratch {
 public:
  /// At least `bytes`, 64-byte aligned, contents undefined; valid until the next call.
  void* Get(size_t bytes) {
    if (bytes > size_) {
      memory_.reset();
      const size_t rounded = (bytes + 4095) / 4096 * 4096;
      memory_.reset(std::aligned_alloc(64, rounded));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = rounded;
    }
    return memory_.get();
  }

 private:
  struct Free {
    void operator()(void* p) const { std::free(p); }
  };
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

/// Hands out consecutive 64-byte aligned pieces of one block. Measure with a null base first.
class Carver {
 public:
  explicit Carver(void* base) : base_(static_cast<char*>(base)) {}
  template <class T>
  T* Take(int64_t count) {
    T* piece = base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + offset_);
    offset_ += (sizeof(T) * count + 63) / 64 * 64;
    return piece;
  }
  size_t bytes() const { return offset_; }

 private:
  char* base_;
  size_t offset_ = 0;
};

}  // namespace vsprefill::kernels::cpu
