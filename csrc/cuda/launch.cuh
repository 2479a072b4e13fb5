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

constexpr int kThreads = 512;
constexpr int64_t kMostBlocks = int64_t{1} << 30;  // of a launch

inline void check(cudaError_t status, const char* op, int device) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a failed launch must not surface again in somebody else's call
  throw std::runtime_error(std::string("fastpost: ") + op + " on cuda:" + std::to_string(device) +
                           " failed: " + cudaGetErrorString(status) +
                           ". `fastpost doctor` shows the devices, driver and architectures of this build.");
}

// One call of one operation: its name for errors, its device (made current until the call ends) and its stream.
class Call {
 public:
  Call(const char* op, int device, void* stream) : op_(op), device_(device), stream_(static_cast<cudaStream_t>(stream)) {
    check(cudaGetDevice(&previous_));
    if (previous_ != device_) check(cudaSetDevice(device_));
  }
  ~Call() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  template <class... Parameters, class... Arguments>
  void launch(void (*kernel)(Parameters...), int64_t blocks, int threads, const Arguments&... arguments) const {
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(static_cast<unsigned>(blocks));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.stream = stream_;
    check(cudaLaunchKernelEx(&config, kernel, arguments...));
  }

  // Blocks that fill the device when two fit on a multiprocessor: for grids that stay.
  int64_t resident() const {
    int count = 0;
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device_));
    return int64_t{2} * count;
  }

 private:
  void check(cudaError_t status) const { cuda::check(status, op_, device_); }

  const char* op_;
  int device_, previous_ = 0;
  cudaStream_t stream_;
};

// A type, to be passed as an argument.
template <class T>
struct TypeOf {
  using type = T;
};

// -- lists of tensors -----------------------------------------------------------------------------------------------------

// One tensor or span: a word per column (an address, or a number that a kernel wants), its length, and its first chunk,
// counted over the whole list so that sums land in the same place however the list is split.
template <int columns>
struct Entry {
  uint64_t word[columns];
  int64_t elements : 39;  // in one word, so that a thousand tensors of three columns fit into a launch
  int64_t first_chunk : 25;
};
constexpr int64_t kMostChunks = int64_t{1} << 24;  // in a list; 2^38 elements, more than a device holds

// Every launch copies a whole table, so short lists get a short one. The long one is what fits into a kernel's 32,764 bytes
// of parameters together with its other arguments.
constexpr int kShortTable = 64;
template <int columns>
constexpr int kLongTable = (32764 - 192) / static_cast<int>(sizeof(Entry<columns>));

template <int column_count, int entry_count, int64_t chunk_elements>
struct Table {
  static constexpr int columns = column_count, capacity = entry_count;
  static constexpr int64_t chunk_size = chunk_elements;

  int64_t first_chunk;
  int chunks, entries;
  Entry<columns> entry[capacity];
};

// Chunks for kernels that sum nothing and prepare nothing per chunk: small, so that all blocks end at about the same time.
// Sums need the plan's chunks.
constexpr int64_t kPieceElements = kChunkElements / 4;

// Launches kernel(table, arguments...) for each table that the rows fill, with a block per chunk. A grid that stays and
// walks the chunks is slower by 2 to 4 % (docs/measured-facts.md).
template <class List, class Kernel, class... Arguments>
void launch_tables(const Call& call, const std::vector<Entry<List::columns>>& rows, Kernel kernel,
                   const Arguments&... arguments) {
  constexpr int columns = List::columns;
  List table{};
  int64_t chunk = 0;
  const auto flush = [&] {
    table.chunks = static_cast<int>(chunk - table.first_chunk);
    if (table.chunks > 0) call.launch(kernel, table.chunks, kThreads, table, arguments...);
    table.first_chunk = chunk;
    table.entries = 0;
  };
  for (const Entry<columns>& row : rows) {
    if (row.elements == 0) continue;
    if (table.entries == List::capacity) flush();
    Entry<columns>& entry = table.entry[table.entries++];
    entry = row;
    entry.first_chunk = chunk;
    chunk += (row.elements + List::chunk_size - 1) / List::chunk_size;
    if (chunk >= kMostChunks) throw std::length_error("fastpost: a list of more than 2^38 elements on one device");
  }
  flush();
}

// kernel_for(TypeOf<table>{}) is the kernel for a table of that type.
template <int64_t chunk_size = kChunkElements, int columns, class KernelFor, class... Arguments>
void launch_list(const Call& call, const std::vector<Entry<columns>>& rows, KernelFor&& kernel_for,
                 const Arguments&... arguments) {
  using Short = Table<columns, kShortTable, chunk_size>;
  using Long = Table<columns, kLongTable<columns>, chunk_size>;
  if (rows.size() <= kShortTable)
    launch_tables<Short>(call, rows, kernel_for(TypeOf<Short>{}), arguments...);
  else
    launch_tables<Long>(call, rows, kernel_for(TypeOf<Long>{}), arguments...);
}

// The same for what is launched seldom, or waits for the device anyway: its kernels are compiled for the long table alone.
template <int64_t chunk_size = kChunkElements, int columns, class KernelFor, class... Arguments>
void launch_long_list(const Call& call, const std::vector<Entry<columns>>& rows, KernelFor&& kernel_for,
                      const Arguments&... arguments) {
  using Long = Table<columns, kLongTable<columns>, chunk_size>;
  launch_tables<Long>(call, rows, kernel_for(TypeOf<Long>{}), arguments...);
}

// One row per tensor, with the named columns' addresses: for whatever sums or draws random numbers.
template <int columns>
std::vector<Entry<columns>> tensor_rows(const Plan& plan, const Column (&names)[columns]) {
  std::vector<Entry<columns>> rows(plan.tensors());
  for (int64_t t = 0; t < plan.tensors(); ++t) {
    for (int c = 0; c < columns; ++c)
      rows[t].word[c] = plan.has(names[c]) ? reinterpret_cast<uintptr_t>(plan.at(names[c], {t, 0, 0})) : 0;
    rows[t].elements = plan.elements(t);
  }
  return rows;
}

// One row per span: for element-wise work.
template <int columns>
std::vector<Entry<columns>> span_rows(const Plan& plan, const Column (&names)[columns]) {
  int mask = 0;
  for (const Column name : names) mask |= 1 << name;
  std::vector<Entry<columns>> rows;
  for (const Span& span : plan.spans(mask)) {
    Entry<columns>& row = rows.emplace_back();
    for (int c = 0; c < columns; ++c) row.word[c] = reinterpret_cast<uintptr_t>(span.base[names[c]]);
    row.elements = span.bytes / element_size(plan.dtype());
  }
  return rows;
}

// A chunk of the table: its entry, where it begins, its length, and its index in the whole list.
template <int columns>
struct Place {
  const Entry<columns>* entry;
  int64_t begin;
  int length;
  int64_t chunk;

  template <class T>
  __device__ T* at(int column) const {
    return reinterpret_cast<T*>(entry->word[column]) + begin;
  }
};

template <class List>
__device__ __forceinline__ Place<List::columns> locate(const List& table, int index) {
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
  const Entry<List::columns>& entry = table.entry[low];
  const int64_t begin = (chunk - entry.first_chunk) * List::chunk_size;
  const int64_t rest = entry.elements - begin;
  return {&entry, begin, static_cast<int>(rest < List::chunk_size ? rest : List::chunk_size), chunk};
}

// -- 16-byte accesses -----------------------------------------------------------------------------------------------------

template <class T>
struct alignas(16) Pack {
  static constexpr int size = 16 / sizeof(T);
  T value[size];
};

// Whether an address lies on 16 bytes; null does, since nothing is read or written there.
__device__ __forceinline__ bool aligned(const void* p) { return (reinterpret_cast<uintptr_t>(p) & 15u) == 0; }

// One access where the address allows it, else one per element: which thread holds which element must not depend on
// addresses, or sums would. The intrinsics keep an access whole; the compiler may split an assignment.
template <class T>
__device__ __forceinline__ Pack<T> load_pack(const T* from, bool wide) {
  Pack<T> pack;
  if (wide) {
    const float4* at = reinterpret_cast<const float4*>(from);
    const float4 raw = __ldca(at);
    memcpy(&pack, &raw, sizeof pack);
  } else {
#pragma unroll
    for (int k = 0; k < Pack<T>::size; ++k) pack.value[k] = from[k];
  }
  return pack;
}

template <class T>
__device__ __forceinline__ void store_pack(T* to, const Pack<T>& pack, bool wide) {
  if (wide) {
    float4 raw;
    memcpy(&raw, &pack, sizeof raw);
    float4* at = reinterpret_cast<float4*>(to);
    __stwb(at, raw);
  } else {
#pragma unroll
    for (int k = 0; k < Pack<T>::size; ++k) to[k] = pack.value[k];
  }
}

// Elements up to the next 16-byte boundary, at most n.
template <class T>
__device__ __forceinline__ int64_t head_of(int64_t n, const T* p) {
  const int64_t head = ((16u - (reinterpret_cast<uintptr_t>(p) & 15u)) & 15u) / sizeof(T);
  return head < n ? head : n;
}

// -- chunks ---------------------------------------------------------------------------------------------------------------

constexpr int kPair = 2;  // blocks of 512 threads that share a multiprocessor

// This thread's share of n elements, in packs of 16 bytes: held = load(i, wide), then use(i, held, wide), where i is the
// pack's first element and wide says that all addresses lie on 16 bytes. Then `together` packs are loaded before the first
// is used, because loads wait behind stores. single(i) does each element after the last whole pack.
template <class T, int together, class Load, class Use, class Single>
__device__ __forceinline__ void walk(int n, bool wide, Load&& load, Use&& use, Single&& single) {
  constexpr int size = Pack<T>::size, step = kThreads * size;
  const int end = n / size * size;
  int i = threadIdx.x * size;
  if (wide) {
#pragma unroll 1
    for (; i + (together - 1) * step < end; i += together * step) {
      decltype(load(0, true)) held[together];
#pragma unroll
      for (int k = 0; k < together; ++k) held[k] = load(i + k * step, true);
#pragma unroll
      for (int k = 0; k < together; ++k) use(i + k * step, held[k], true);
    }
  }
#pragma unroll 1
  for (; i < end; i += step) {
    auto held = load(i, wide);
    use(i, held, wide);
  }
#pragma unroll 1
  for (i = end + threadIdx.x; i < n; i += kThreads) single(i);
}

}  // namespace fastpost::cuda
