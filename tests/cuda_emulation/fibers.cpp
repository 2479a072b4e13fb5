// The fibers behind cuda_runtime.h.
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_runtime.h"

emulation::Index threadIdx, blockIdx, blockDim, gridDim;

namespace emulation {

namespace {

enum class At { runs, block_barrier, exchange, vote, done };

struct Request {
  void* shared;
  const void* global;
};

struct Fiber {
  ucontext_t start;
  jmp_buf where;
  std::unique_ptr<char[]> stack{new char[kStack]};
  static constexpr size_t kStack = 64 << 10;
  bool started = false;
  At at = At::runs;
  uint64_t handed = 0;                      // to the other lanes
  std::vector<Request> open;                // asked for, of no group yet
  std::deque<std::vector<Request>> groups;  // on their way, the oldest first
};

std::vector<Fiber> fibers;
const std::function<void()>* body;
jmp_buf scheduler;
ucontext_t scheduler_start;
unsigned current;
std::mt19937 order_of_threads(12345);

void entry() {
  (*body)();
  fibers[current].at = At::done;
  _longjmp(scheduler, 1);
}

void resume(unsigned thread) {
  Fiber& fiber = fibers[thread];
  current = thread;
  threadIdx.x = thread;
  if (_setjmp(scheduler) != 0) return;
  if (fiber.started) _longjmp(fiber.where, 1);
  fiber.started = true;
  getcontext(&fiber.start);
  fiber.start.uc_stack.ss_sp = fiber.stack.get();
  fiber.start.uc_stack.ss_size = Fiber::kStack;
  fiber.start.uc_link = nullptr;
  makecontext(&fiber.start, entry, 0);
  setcontext(&fiber.start);
}

void wait_at(At at) {
  Fiber& fiber = fibers[current];
  fiber.at = at;
  if (_setjmp(fiber.where) == 0) _longjmp(scheduler, 1);
}

// Releases the threads [begin, end) if all of them wait at the same place.
bool release(unsigned begin, unsigned end) {
  const At at = fibers[begin].at;
  if (at == At::runs || at == At::done) return false;
  for (unsigned t = begin; t < end; ++t)
    if (fibers[t].at != at) return false;
  for (unsigned t = begin; t < end; ++t) fibers[t].at = At::runs;
  return true;
}

void run_block(unsigned threads) {
  std::vector<unsigned> order(threads);
  for (unsigned t = 0; t < threads; ++t) {
    order[t] = t;
    fibers[t].started = false;
    fibers[t].at = At::runs;
    fibers[t].open.clear();
    fibers[t].groups.clear();
  }
  for (;;) {
    std::shuffle(order.begin(), order.end(), order_of_threads);
    for (const unsigned t : order)
      if (fibers[t].at == At::runs) resume(t);
    bool all_done = true, released = false;
    for (unsigned t = 0; t < threads; ++t) all_done = all_done && fibers[t].at == At::done;
    if (all_done) return;
    if (fibers[0].at == At::block_barrier) released = release(0, threads);
    if (!released)
      for (unsigned warp = 0; warp < threads; warp += 32)
        if (fibers[warp].at == At::exchange || fibers[warp].at == At::vote)
          released = release(warp, std::min(warp + 32, threads)) || released;
    if (!released) throw std::runtime_error("emulated kernel: threads wait at a barrier that others never reach");
  }
}

}  // namespace

void sync_block() { wait_at(At::block_barrier); }

uint64_t exchange(uint64_t value, unsigned from) {
  const unsigned warp = current / 32 * 32;
  fibers[current].handed = value;
  wait_at(At::exchange);
  const uint64_t taken = fibers[warp + from].handed;
  wait_at(At::exchange);  // everybody has read before anybody hands in the next value
  return taken;
}

bool vote(bool value) {
  const unsigned warp = current / 32 * 32;
  fibers[current].handed = value;
  wait_at(At::vote);
  bool any = false;
  for (unsigned lane = 0; lane < 32; ++lane) any = any || fibers[warp + lane].handed != 0;
  wait_at(At::vote);
  return any;
}

bool vote_block(bool value) {
  fibers[current].handed = value;
  wait_at(At::block_barrier);
  bool any = false;
  for (unsigned t = 0; t < blockDim.x; ++t) any = any || fibers[t].handed != 0;
  wait_at(At::block_barrier);
  return any;
}

void copy_ahead(void* shared, const void* global) {
  if ((reinterpret_cast<uintptr_t>(shared) | reinterpret_cast<uintptr_t>(global)) % 16 != 0)
    throw std::runtime_error("emulated kernel: cp.async of 16 bytes off their boundary");
  memset(shared, 0xff, 16);
  fibers[current].open.push_back({shared, global});
}

void end_group() {
  Fiber& fiber = fibers[current];
  fiber.groups.push_back(std::move(fiber.open));
  fiber.open.clear();
}

void wait_for_groups(unsigned later) {
  for (auto& groups = fibers[current].groups; groups.size() > later; groups.pop_front())
    for (const Request& request : groups.front()) memcpy(request.shared, request.global, 16);
}

float exp2_fast(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  bits *= 0x9E3779B1u;  // any error will do that looks random
  bits = (bits ^ bits >> 15) * 0x85EBCA77u;
  const double error = (static_cast<double>(bits ^ bits >> 13) * 0x1p-31 - 1) * 0x1p-22;
  const float y = static_cast<float>(exp2(static_cast<double>(x)) * (1 + error));
  return y < 0x1p-126f ? 0.0f : y;
}

void run(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  if (threads % 32 != 0) throw std::runtime_error("emulated kernel: a block of whole warps is needed");
  if (fibers.size() < threads) fibers = std::vector<Fiber>(threads);
  body = &kernel;
  blockDim.x = threads;
  gridDim.x = blocks;
  for (unsigned b = 0; b < blocks; ++b) {
    blockIdx.x = b;
    run_block(threads);
  }
}

}  // namespace emulation
