// Threads for loops: those of the OpenMP runtime that torch computes with, or a small pool of the core's own.
//
// After each of its operations torch's threads go on spinning for milliseconds, to be ready for the next. Threads beside
// them would have to share the cores with them: rows of logits took a third longer. So the core borrows them. It finds them
// in the process and is linked with no OpenMP runtime, of which a wheel would have to bring a second one along.
#pragma once

#include <cstdint>
#include <functional>

namespace fastpost::cpu {

// Runs body(0) ... body(tasks - 1), each once, on the calling thread and at most threads - 1 others; returns when all are
// done. Which thread runs a task is unspecified, so results must depend on the task alone. body must not throw. Of OpenMP
// each calling thread has a team of its own; the pool serves one caller at a time, and another runs all of its tasks itself.
void parallel_for(int64_t tasks, int threads, const std::function<void(int64_t)>& body);

}  // namespace fastpost::cpu
