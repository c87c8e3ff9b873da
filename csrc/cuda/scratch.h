// A call's scratch memory, cut into pieces. Host code.
#pragma once

#include <cstdint>

namespace pyeff::gpu {

// Cuts scratch into aligned pieces; without a base it only counts.
class Scratch {
 public:
  explicit Scratch(void* base) : base_(static_cast<char*>(base)) {}

  template <class T = void>
  T* take(int64_t bytes) {
    const int64_t at = used_;
    used_ += (bytes + 255) / 256 * 256;
    return reinterpret_cast<T*>(base_ ? base_ + at : nullptr);
  }
  int64_t used() const { return used_; }

 private:
  char* base_;
  int64_t used_ = 0;
};

}  // namespace pyeff::gpu
