// Sums over whole lists in two stages, each in an order that follows from the elements' places alone.
#pragma once

#include "api.h"
#include "cuda/launch.cuh"

namespace fastpost::cuda {

// Sums of a block's threads, by warps and then across them, in an order fixed by the thread index alone. The result is on
// thread 0. Once per kernel: a second call would have to wait at a barrier first.
template <int count>
__device__ void block_sum(double (&value)[count]) {
  __shared__ double shared[count][kThreads / 32];
#pragma unroll
  for (int k = 0; k < count; ++k) {
    for (int step = 16; step > 0; step /= 2) value[k] += __shfl_down_sync(0xffffffffu, value[k], step);
    if (threadIdx.x % 32 == 0) shared[k][threadIdx.x / 32] = value[k];
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int k = 0; k < count; ++k) {
      value[k] = 0;
      for (int warp = 0; warp < kThreads / 32; ++warp) value[k] += shared[k][warp];
    }
}

// Where the sums of a list go: partial has room for `count` sums of each of `chunks` chunks, out for the result.
struct SumsOf {
  double* partial;
  double* out;
  int64_t chunks;
  // Counts the chunks that are done, and is 0 before and after; null where another kernel adds them up.
  unsigned* ticket;
};

// Adds up the chunks, in an order that depends on their number alone. By all threads of one block, which may have called
// block_sum before if a barrier has come since.
template <int count>
__device__ void fold_chunks(const SumsOf& sums) {
  double sum[count] = {};
  constexpr int ahead = count == 1 ? 4 : 1;  // so many chunks are on their way at once, and added one after another
  int64_t c = threadIdx.x;
#pragma unroll 1
  for (; c + (ahead - 1) * kThreads < sums.chunks; c += ahead * kThreads) {
    double value[ahead][count];
#pragma unroll
    for (int u = 0; u < ahead; ++u)
      for (int k = 0; k < count; ++k) value[u][k] = __ldcg(sums.partial + (c + u * kThreads) * count + k);
#pragma unroll
    for (int u = 0; u < ahead; ++u)
      for (int k = 0; k < count; ++k) sum[k] += value[u][k];
  }
#pragma unroll 1
  for (; ahead > 1 && c < sums.chunks; c += kThreads)
    for (int k = 0; k < count; ++k) sum[k] += __ldcg(sums.partial + c * count + k);
  block_sum(sum);
  if (threadIdx.x == 0)
    for (int k = 0; k < count; ++k) sums.out[k] = sum[k];
}

// Ends a kernel that sums: writes a chunk's sums, and adds up all chunks where this block is the last that is done. Without
// `folds` there must be no ticket.
template <bool folds = true, int count>
__device__ void store_sums(double (&value)[count], const SumsOf& sums, int64_t chunk) {
  __shared__ bool is_last;
  block_sum(value);
  if (threadIdx.x == 0) {
    for (int k = 0; k < count; ++k) sums.partial[chunk * count + k] = value[k];
    is_last = false;
    if (folds && sums.ticket != nullptr) {
      __threadfence();  // the sums are there before they are counted
      const unsigned last = static_cast<unsigned>(sums.chunks) - 1;
      is_last = atomicInc(sums.ticket, last) == last;  // which makes it 0 again
    }
  }
  if (!folds) return;
  __syncthreads();
  if (!is_last) return;
  __threadfence();  // what was counted is read after that
  fold_chunks<count>(sums);
}

namespace {

template <int count>
__global__ void __launch_bounds__(kThreads) fold_kernel(const SumsOf sums) {
  fold_chunks<count>(sums);
}

// Launches a kernel that sums over a list, launch(sums), and whatever it takes until they are added up: nothing more where
// one launch holds the whole list, whose blocks then have the ticket for themselves.
template <int count, int columns, class Launch>
void launch_sums(const Call& call, const Plan& plan, int64_t entries, const SumRoom& room, Launch&& launch) {
  SumsOf sums{room.partial, room.out, static_cast<int64_t>(plan.chunks().size()), nullptr};
  if (sums.chunks > 0 && entries <= kLongTable<columns>) sums.ticket = room.ticket;
  launch(sums);
  if (sums.ticket == nullptr) call.launch(fold_kernel<count>, 1, kThreads, sums);
}

}  // namespace

}  // namespace fastpost::cuda
