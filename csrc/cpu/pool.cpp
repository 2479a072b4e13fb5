#include "cpu/pool.h"

#include <dlfcn.h>
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <mutex>
#include <thread>
#include <vector>

namespace fastpost::cpu {
namespace {

// Tasks that threads take one after the other.
class Tasks {
 public:
  Tasks(int64_t count, const std::function<void(int64_t)>& body) : count_(count), body_(body) {}

  void drain() {
    for (int64_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) body_(task);
  }

 private:
  const int64_t count_;
  const std::function<void(int64_t)>& body_;
  std::atomic<int64_t> next_{0};
};

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
  void run(Tasks& tasks, int threads) {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      while (static_cast<int>(workers_.size()) < threads - 1)
        workers_.emplace_back([this, index = static_cast<int>(workers_.size())] { work(index); });
      tasks_ = &tasks;
      invited_ = threads - 1;
      busy_ = threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    tasks.drain();
    std::unique_lock<std::mutex> lock(mutex_);
    done_.wait(lock, [this] { return busy_ == 0; });
    tasks_ = nullptr;
  }

  std::mutex& in_use() { return in_use_; }

 private:
  void work(int index) {
    uint64_t seen = 0;
    for (;;) {
      Tasks* tasks;
      {
        std::unique_lock<std::mutex> lock(mutex_);
        wake_.wait(lock, [&] { return generation_ != seen; });
        seen = generation_;
        if (index >= invited_) continue;
        tasks = tasks_;
      }
      tasks->drain();
      std::lock_guard<std::mutex> lock(mutex_);
      if (--busy_ == 0) done_.notify_one();
    }
  }

  std::mutex in_use_, mutex_;
  Condition wake_, done_;
  std::vector<std::thread> workers_;
  Tasks* tasks_ = nullptr;
  int invited_ = 0, busy_ = 0;
  uint64_t generation_ = 0;
};

// Never destroyed: its threads may outlive static destruction.
std::atomic<Pool*> current_pool{nullptr};

Pool& pool() {
  Pool* existing = current_pool.load();
  if (existing == nullptr) {
    Pool* fresh = new Pool;
    if (current_pool.compare_exchange_strong(existing, fresh)) return *fresh;
    delete fresh;  // another thread was first; this one has no workers yet
  }
  return *existing;
}

// What OpenMP's compilers call for a parallel region: body(data) on each thread of a team, the caller's included.
using ParallelRegion = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

// That of the runtime that the process's torch is linked with; null where there is none.
ParallelRegion region_of_torch() {
  void* torch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  return torch == nullptr ? nullptr : reinterpret_cast<ParallelRegion>(dlsym(torch, "GOMP_parallel"));
}

// Whether this process was forked, and has begun no other program since: Linux's flag PF_FORKNOEXEC.
bool was_forked() {
  FILE* file = fopen("/proc/self/stat", "r");
  if (file == nullptr) return false;
  char text[1024] = {};
  const size_t length = fread(text, 1, sizeof text - 1, file);
  fclose(file);
  const char* name_ends = length > 0 ? strrchr(text, ')') : nullptr;  // a process may have any name
  unsigned flags = 0;
  return name_ends != nullptr && sscanf(name_ends + 1, " %*c %*d %*d %*d %*d %*d %u", &flags) == 1 && (flags & 0x40) != 0;
}

// A forked child has none of its parent's threads. An OpenMP runtime would wait for them for ever; a pool, whose locks may
// be held for ever, is left behind for a new one. The fork may have come before the core was loaded.
std::atomic<bool> forked{was_forked()};

[[maybe_unused]] const int watching = pthread_atfork(nullptr, nullptr, [] {
  forked.store(true);
  current_pool.store(nullptr);
});

}  // namespace

void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& body) {
  Tasks work(tasks, body);
  if (tasks <= 1 || threads <= 1) return work.drain();
  static const ParallelRegion region = region_of_torch();
  if (region != nullptr && !forked.load()) {
    // All threads, however few the tasks: libgomp ends those that a region leaves out, and the next one starts them again.
    region([](void* data) { static_cast<Tasks*>(data)->drain(); }, &work, static_cast<unsigned>(threads), 0);
    return;
  }
  Pool& own = pool();
  std::unique_lock<std::mutex> lock(own.in_use(), std::try_to_lock);
  if (!lock.owns_lock()) return work.drain();  // another thread is using the pool
  own.run(work, static_cast<int>(std::min<int64_t>(threads, tasks)));
}

}  // namespace fastpost::cpu
