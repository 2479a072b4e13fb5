// Noise on the CPU: cuts rows and elements into tasks.
#include <algorithm>

#include "api.h"
#include "cpu/loops.h"
#include "cpu/pool.h"

namespace fastpost::cpu {
namespace {

constexpr int64_t kTaskElements = int64_t{1} << 15;

float row_eps(double eps, const float* scales, int64_t row) {
  return scales == nullptr ? static_cast<float>(eps) : static_cast<float>(eps) * scales[row];
}

}  // namespace

void add_noise(const void* x, void* out, DType in_dtype, DType out_dtype, int64_t n, double eps, NoiseType type,
               uint64_t seed, const int64_t* rows, const float* scales, int64_t row_length, int threads) {
  const char* from = static_cast<const char*>(x);
  char* to = static_cast<char*>(out);
  const int64_t in_size = element_size(in_dtype), out_size = element_size(out_dtype);
  const bool by_row = rows != nullptr || scales != nullptr;
  const int64_t tasks = (n + kTaskElements - 1) / kTaskElements;
  parallel_for(tasks, threads, [&](int64_t task) {
    const int64_t end = std::min(n, (task + 1) * kTaskElements);
    for (int64_t i = task * kTaskElements; i < end;) {
      // One stretch is the whole task or, by rows, the part of a row that lies in the task.
      const int64_t row = by_row ? i / row_length : 0;
      const int64_t stop = by_row ? std::min(end, (row + 1) * row_length) : end;
      const int64_t place = rows == nullptr ? row : rows[row];
      const int64_t first = i + (place - row) * row_length;
      noise_loops().add_noise(in_dtype, out_dtype, from + i * in_size, to + i * out_size, static_cast<uint64_t>(first),
                              stop - i, row_eps(eps, scales, row), static_cast<int>(type), seed, place >= 0);
      i = stop;
    }
  });
}

void embedding_noise(const void* table, const int64_t* ids, void* clean, void* noised, DType table_dtype, DType noised_dtype,
                     int64_t tokens, int64_t width, int64_t table_stride, double eps, NoiseType type, uint64_t seed,
                     const int64_t* rows, const float* scales, int threads) {
  const int64_t in_size = element_size(table_dtype), out_size = element_size(noised_dtype);
  const int64_t per_task = std::max<int64_t>(1, kTaskElements / std::max<int64_t>(1, width));
  parallel_for((tokens + per_task - 1) / per_task, threads, [&](int64_t task) {
    for (int64_t t = task * per_task; t < std::min(tokens, (task + 1) * per_task); ++t) {
      const int64_t place = rows == nullptr ? t : rows[t];
      const char* row = static_cast<const char*>(table) + ids[t] * table_stride * in_size;
      if (clean != nullptr)
        params_loops().copy(static_cast<char*>(clean) + t * width * in_size, row, width * in_size, false);
      noise_loops().add_noise(table_dtype, noised_dtype, row, static_cast<char*>(noised) + t * width * out_size,
                              static_cast<uint64_t>(place * width), width, row_eps(eps, scales, t), static_cast<int>(type),
                              seed, place >= 0);
    }
  });
}

}  // namespace fastpost::cpu
