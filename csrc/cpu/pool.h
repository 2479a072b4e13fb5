// A small pool of threads, instead of an OpenMP runtime that the wheel would have to bring along.
#pragma once

#include <cstdint>
#include <functional>

namespace fastpost::cpu {

// Runs body(0) ... body(tasks - 1), each once, on the calling thread and at most threads - 1 helpers; returns when all are
// done. Which thread runs a task is unspecified, so results must depend on the task alone. Called while another thread
// uses the pool, it runs everything on the caller. body must not throw.
void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& body);

}  // namespace fastpost::cpu
