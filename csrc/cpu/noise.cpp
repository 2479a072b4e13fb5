// Noise on the CPU: cuts rows and elements into tasks.
#include <algorithm>

#include "api.h"
#include "cpu/loops.h"
#include "cpu/pool.h"

namespace fastpost::cpu {
namespace {

constexpr int64_t kTaskElements = int64_t{1} << 15;

}  // namespace

void add_noise(const void* x, void* out, DType in_dtype, DType out_dtype, int64_t n, double eps, NoiseType type,
               uint64_t seed, const uint8_t* keep, int64_t row_length, int threads) {
  const char* from = static_cast<const char*>(x);
  char* to = static_cast<char*>(out);
  const int64_t in_size = element_size(in_dtype), out_size = element_size(out_dtype);
  const int64_t tasks = (n + kTaskElements - 1) / kTaskElements;
  parallel_for(tasks, threads, [&](int64_t task) {
    const int64_t end = std::min(n, (task + 1) * kTaskElements);
    for (int64_t i = task * kTaskElements; i < end;) {
      // Without a mask one stretch is the whole task; with one it is the part of a row that lies in the task.
      const int64_t stop = keep == nullptr ? end : std::min(end, (i / row_length + 1) * row_length);
      const bool noise = keep == nullptr || keep[i / row_length] != 0;
      noise_loops().add_noise(in_dtype, out_dtype, from + i * in_size, to + i * out_size, static_cast<uint64_t>(i), stop - i,
                              static_cast<float>(eps), static_cast<int>(type), seed, noise);
      i = stop;
    }
  });
}

void embedding_noise(const void* table, const int64_t* ids, void* clean, void* noised, DType table_dtype, DType noised_dtype,
                     int64_t tokens, int64_t width, int64_t table_stride, double eps, NoiseType type, uint64_t seed,
                     const uint8_t* keep, int threads) {
  const int64_t in_size = element_size(table_dtype), out_size = element_size(noised_dtype);
  const int64_t rows = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, width));
  parallel_for((tokens + rows - 1) / rows, threads, [&](int64_t task) {
    for (int64_t t = task * rows; t < std::min(tokens, (task + 1) * rows); ++t) {
      const char* row = static_cast<const char*>(table) + ids[t] * table_stride * in_size;
      if (clean != nullptr)
        params_loops().copy(static_cast<char*>(clean) + t * width * in_size, row, width * in_size, false);
      noise_loops().add_noise(table_dtype, noised_dtype, row, static_cast<char*>(noised) + t * width * out_size,
                              static_cast<uint64_t>(t * width), width, static_cast<float>(eps), static_cast<int>(type), seed,
                              keep == nullptr || keep[t] != 0);
    }
  });
}

}  // namespace fastpost::cpu
