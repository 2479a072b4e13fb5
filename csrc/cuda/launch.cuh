// Tensor lists in one launch: the addresses travel as a kernel parameter, so there is no copy to the device, and a captured
// graph keeps them.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/plan.h"

namespace fastpost::cuda {

struct Entry {
  char* base[kColumns];
  int64_t elements;
  int64_t first_chunk;  // counted over the whole list, so that sums land in the same place however the list is split
};

constexpr int kEntries = 800;  // 40 bytes each, within the 32,764 bytes of a kernel's parameters

struct Table {
  int64_t first_chunk, chunks;
  int entries;
  Entry entry[kEntries];
};
static_assert(sizeof(Table) <= 32764 - 64, "a table and a kernel's other arguments must fit in its parameters");

constexpr int kThreads = 512;

inline void check(cudaError_t status, const char* op, int device) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a failed launch must not surface again in somebody else's call
  throw std::runtime_error(std::string("fastpost: ") + op + " on cuda:" + std::to_string(device) +
                           " failed: " + cudaGetErrorString(status) +
                           ". `fastpost doctor` shows the devices, driver and architectures of this build.");
}

// Makes a device current, and the one before it again.
class DeviceGuard {
 public:
  DeviceGuard(int device, const char* op) {
    check(cudaGetDevice(&previous_), op, device);
    if (previous_ != device) check(cudaSetDevice(device), op, device);
    device_ = device;
  }
  ~DeviceGuard() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }

 private:
  int previous_ = 0, device_ = 0;
};

inline int64_t chunks_of(int64_t elements) { return (elements + kChunkElements - 1) / kChunkElements; }

inline int multiprocessors(int device, const char* op) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), op, device);
  return count;
}

// launch(table, blocks) for each table that the rows (addresses, elements) fill: a grid that stays, two blocks per
// multiprocessor, and walks the chunks.
template <class Rows, class Launch>
void with_tables(const Rows& rows, int device, const char* op, Launch&& launch) {
  const int64_t resident = int64_t{2} * multiprocessors(device, op);
  Table table{};
  int64_t chunk = 0;
  const auto flush = [&] {
    table.chunks = chunk - table.first_chunk;
    if (table.chunks > 0) launch(table, static_cast<int>(std::min(resident, table.chunks)));
    table.first_chunk = chunk;
    table.entries = 0;
  };
  table.first_chunk = 0;
  table.entries = 0;
  for (const auto& row : rows) {
    if (row.elements == 0) continue;
    if (table.entries == kEntries) flush();
    Entry& entry = table.entry[table.entries++];
    std::copy(row.base.begin(), row.base.end(), entry.base);
    entry.elements = row.elements;
    entry.first_chunk = chunk;
    chunk += chunks_of(row.elements);
  }
  flush();
}

struct Row {
  std::array<char*, kColumns> base;
  int64_t elements;
};

// One row per tensor: for whatever sums or draws random numbers.
inline std::vector<Row> tensor_rows(const Plan& plan) {
  std::vector<Row> rows(plan.tensors());
  for (const Chunk& chunk : plan.chunks()) {
    Row& row = rows[chunk.tensor];
    if (chunk.begin == 0)
      for (int c = 0; c < kColumns; ++c)
        row.base[c] = plan.has(static_cast<Column>(c)) ? plan.at(static_cast<Column>(c), chunk) : nullptr;
    row.elements = chunk.begin + chunk.length;
  }
  return rows;
}

// One row per span: for element-wise work.
inline std::vector<Row> span_rows(const Plan& plan, int column_mask) {
  std::vector<Row> rows;
  for (const Span& span : plan.spans(column_mask)) rows.push_back({span.base, span.bytes / element_size(plan.dtype())});
  return rows;
}

// A chunk of the table: its entry, where it begins, and its index in the whole list.
struct Place {
  const Entry* entry;
  int64_t begin, length, chunk;
};

__device__ __forceinline__ Place locate(const Table& table, int64_t index) {
  const int64_t chunk = table.first_chunk + index;
  int low = 0, high = table.entries - 1;
#pragma unroll 1
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.entry[middle].first_chunk <= chunk)
      low = middle;
    else
      high = middle - 1;
  }
  const Entry& entry = table.entry[low];
  const int64_t begin = (chunk - entry.first_chunk) * kChunkElements;
  const int64_t rest = entry.elements - begin;
  return {&entry, begin, rest < kChunkElements ? rest : kChunkElements, chunk};
}

template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T value[size];
};

// Elements up to the next 16-byte boundary of all addresses, or n when they are out of step: the part to walk one by one.
template <class T>
__device__ __forceinline__ int64_t head_of(int64_t n, const void* a, const void* b, const void* c) {
  const auto offset = [](const void* p) { return static_cast<unsigned>(reinterpret_cast<uintptr_t>(p) & 15u); };
  const unsigned at = offset(a);
  if ((b != nullptr && offset(b) != at) || (c != nullptr && offset(c) != at)) return n;
  const int64_t head = ((16u - at) & 15u) / sizeof(T);
  return head < n ? head : n;
}

// Sums of a block's threads, by warps and then across them, in an order fixed by the thread index alone. The result is on
// thread 0.
template <int count>
__device__ void block_sum(double (&value)[count]) {
  __shared__ double shared[count][kThreads / 32];
  __syncthreads();  // the last chunk's sums have been read
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

}  // namespace fastpost::cuda
