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
               uint64_t seed, const int64_t* rows, int64_t row_length, int threads) {
  const char* from = static_cast<const char*>(x);
  char* to = static_cast<char*>(out);
  const int64_t in_size = element_size(in_dtype), out_size = element_size(out_dtype);
  const int64_t tasks = (n + kTaskElements - 1) / kTaskElements;
  parallel_for(tasks, threads, [&](int64_t task) {
    const int64_t end = std::min(n, (task + 1) * kTaskElements);
    for (int64_t i = task * kTaskElements; i < end;) {
      // Without places one stretch is the whole task; with them it is the part of a row that lies in the task.
      const int64_t row = rows == nullptr ? 0 : i / row_length;
      const int64_t stop = rows == nullptr ? end : std::min(end, (row + 1) * row_length);
      const int64_t place = rows == nullptr ? 0 : rows[row];
      const int64_t first = i + (place - row) * row_length;
      noise_loops().add_noise(in_dtype, out_dtype, from + i * in_size, to + i * out_size, static_cast<uint64_t>(first),
                              stop - i, static_cast<float>(eps), static_cast<int>(type), seed, place >= 0);
      i = stop;
    }
  });
}

void embedding_noise(const void* table, const int64_t* ids, void* clean, void* noised, DType table_dtype, DType noised_dtype,
                     int64_t tokens, int64_t width, int64_t table_stride, double eps, NoiseType type, uint64_t seed,
                     const int64_t* rows, int threads) {
  const int64_t in_size = element_size(table_dtype), out_size = element_size(noised_dtype);
  const int64_t per_task = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, width));
  parallel_for((tokens + per_task - 1) / per_task, threads, [&](int64_t task) {
    for (int64_t t = task * per_task; t < std::min(tokens, (task + 1) * per_task); ++t) {
      const int64_t place = rows == nullptr ? t : rows[t];
      const char* row = static_cast<const char*>(table) + ids[t] * table_stride * in_size;
      if (clean != nullptr)
        params_loops().copy(static_cast<char*>(clean) + t * width * in_size, row, width * in_size, false);
      noise_loops().add_noise(table_dtype, noised_dtype, row, static_cast<char*>(noised) + t * width * out_size,
                              static_cast<uint64_t>(place * width), width, static_cast<float>(eps), static_cast<int>(type),
                              seed, place >= 0);
    }
  });
}

}  // namespace fastpost::cpu
