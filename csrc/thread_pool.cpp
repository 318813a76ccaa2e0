#include "thread_pool.h"

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if defined(__unix__) || defined(__APPLE__)
#include <pthread.h>
#endif

namespace lf {
namespace {

class Pool {
 public:
  void run(int64_t n, int threads, const std::function<void(int64_t)>& task) {
    {
      std::unique_lock<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1) workers_.emplace_back(&Pool::work, this, workers_.size());
      task_ = &task;
      n_ = n;
      next_.store(0);
      wanted_ = threads - 1;
      busy_ = wanted_;
      ++generation_;
    }
    wake_.notify_all();
    drain(task, n);
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
  }

  std::mutex entry;  // held by the caller that uses the pool

 private:
  void drain(const std::function<void(int64_t)>& task, int64_t n) {
    for (int64_t i = next_.fetch_add(1); i < n; i = next_.fetch_add(1)) task(i);
  }

  void work(size_t id) {
    uint64_t seen = 0;
    for (;;) {
      const std::function<void(int64_t)>* task;
      int64_t n;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (static_cast<int>(id) >= wanted_) continue;
        task = task_;
        n = n_;
      }
      drain(*task, n);
      std::unique_lock<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::vector<std::thread> workers_;
  const std::function<void(int64_t)>* task_ = nullptr;
  int64_t n_ = 0;
  std::atomic<int64_t> next_{0};
  int wanted_ = 0, busy_ = 0;
  uint64_t generation_ = 0;
};

// Never destroyed: its threads sleep until the process ends. A forked child has none of them, so it gets a new one.
Pool* pool = nullptr;

Pool& instance() {
  static const bool registered = [] {
    pool = new Pool;
#if defined(__unix__) || defined(__APPLE__)
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
#endif
    return true;
  }();
  (void)registered;
  return *pool;
}

}  // namespace

void parallel_for(int64_t n, int threads, const std::function<void(int64_t)>& task) {
  if (n < threads) threads = static_cast<int>(n);
  if (threads > 1) {
    Pool& shared = instance();
    std::unique_lock<std::mutex> entry(shared.entry, std::try_to_lock);
    if (entry.owns_lock()) return shared.run(n, threads, task);
  }
  for (int64_t i = 0; i < n; ++i) task(i);
}

}  // namespace lf
