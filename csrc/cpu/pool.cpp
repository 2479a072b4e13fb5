#include "cpu/pool.h"

#include <pthread.h>

#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

namespace fastpost::cpu {
namespace {

// POSIX's, since std::condition_variable::wait has a symbol version of GCC 12 (GLIBCXX_3.4.30): a wheel that asks for it is
// refused by systems with an older libstdc++ (RHEL 9 has GCC 11's).
class Condition {
 public:
  template <class Predicate>
  void wait(std::unique_lock<std::mutex>& lock, Predicate holds) {
    while (!holds()) pthread_cond_wait(&condition_, lock.mutex()->native_handle());
  }
  void notify_one() { pthread_cond_signal(&condition_); }
  void notify_all() { pthread_cond_broadcast(&condition_); }

 private:
  pthread_cond_t condition_ = PTHREAD_COND_INITIALIZER;
};

class Pool {
 public:
  void run(int64_t tasks, int threads, const std::function<void(int64_t)>& body) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1)
        workers_.emplace_back([this, index = static_cast<int>(workers_.size())] { work(index); });
      body_ = &body;
      tasks_ = tasks;
      next_.store(0, std::memory_order_relaxed);
      invited_ = threads - 1;
      busy_ = threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    drain();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    body_ = nullptr;
  }

  std::mutex& in_use() { return in_use_; }

 private:
  void drain() {
    for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < tasks_;) (*body_)(task);
  }

  void work(int index) {
    uint64_t seen = 0;
    for (;;) {
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (index >= invited_) continue;
      }
      drain();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex in_use_, mutex_;
  Condition wake_, done_;
  std::vector<std::thread> workers_;
  const std::function<void(int64_t)>* body_ = nullptr;
  std::atomic<int64_t> next_{0};
  int64_t tasks_ = 0;
  int invited_ = 0, busy_ = 0;
  uint64_t generation_ = 0;
};

// Never destroyed: its threads may outlive static destruction. A forked child has none of them, so it starts a new pool
// and leaks the old one, whose locks may be held for ever.
std::atomic<Pool*> current_pool{nullptr};

Pool& pool() {
  static const int registered = pthread_atfork(nullptr, nullptr, [] { current_pool.store(nullptr); });
  (void)registered;
  Pool* existing = current_pool.load();
  if (existing == nullptr) {
    Pool* fresh = new Pool;
    if (current_pool.compare_exchange_strong(existing, fresh)) return *fresh;
    delete fresh;  // another thread was first; this one has no workers yet
  }
  return *existing;
}

}  // namespace

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& body) {
  if (threads > tasks) threads = static_cast<int>(tasks);
  if (threads > 1) {
    Pool& shared = pool();
    std::unique_lock<std::mutex> lock(shared.in_use(), std::try_to_lock);
    if (lock.owns_lock()) {
      shared.run(tasks, threads, body);
      return;
    }
  }
  for (int64_t task = 0; task < tasks; ++task) body(task);
}

}  // namespace fastpost::cpu
