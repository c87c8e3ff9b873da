// A pool of plain threads in the form that the kernels take: for the development module and the native tests, which
// have no torch. ThreadSanitizer follows it, as it cannot follow OpenMP.
#pragma once

#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

#include "cpu/parallel.h"

namespace pyeff::dev {

class Threads {
 public:
  // `count` threads work on each loop, the calling one among them.
  explicit Threads(int count) : count_(count) {
    for (int i = 1; i < count; ++i) workers_.emplace_back([this, i] { work(i); });
  }

  ~Threads() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      stopping_ = true;
    }
    start_.notify_all();
    for (auto& worker : workers_) worker.join();
  }

  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  Parallel parallel() {
    auto run = [](void* self, int64_t count, Parallel::Body body, void* argument) {
      static_cast<Threads*>(self)->run(count, body, argument);
    };
    return {run, this, count_};
  }

 private:
  // One loop at a time. A loop inside a loop is not supported: kernels have none.
  void run(int64_t count, Parallel::Body body, void* argument) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      size_ = count, body_ = body, argument_ = argument;
      busy_ = count_ - 1;
      ++round_;
    }
    start_.notify_all();
    share(0, count, body, argument);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

  void work(int index) {
    for (uint64_t seen = 0;;) {
      std::unique_lock<std::mutex> lock(mutex_);
      start_.wait(lock, [&] { return stopping_ || round_ != seen; });
      if (stopping_) return;
      seen = round_;
      const int64_t size = size_;
      const Parallel::Body body = body_;
      void* const argument = argument_;
      lock.unlock();
      share(index, size, body, argument);
      lock.lock();
      if (--busy_ == 0) done_.notify_one();
    }
  }

  void share(int index, int64_t size, Parallel::Body body, void* argument) const {
    const int64_t begin = size * index / count_, end = size * (index + 1) / count_;
    if (begin < end) body(argument, begin, end);
  }

  const int count_;
  std::mutex mutex_;
  std::condition_variable start_, done_;
  bool stopping_ = false;
  uint64_t round_ = 0;
  int busy_ = 0;
  int64_t size_ = 0;
  Parallel::Body body_ = nullptr;
  void* argument_ = nullptr;
  std::vector<std::thread> workers_;
};

}  // namespace pyeff::dev
