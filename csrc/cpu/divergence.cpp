// Rows of logits on the CPU: one row after the other, rows shared out among threads.
#include <algorithm>
#include <cmath>
#include <vector>

#include "api.h"
#include "cpu/loops.h"
#include "cpu/pool.h"

namespace fastpost::cpu {
namespace {

constexpr int64_t kTaskElements = int64_t{1} << 14;

// body(row, end): end is where the rows of the same task, and so of the same thread, stop.
template <class Body>
void for_rows(int64_t rows, int64_t cols, int threads, const Body& body) {
  const int64_t narrow = kTaskElements / std::max<int64_t>(1, cols);
  const int64_t per_task = std::max<int64_t>({1, narrow, std::min<int64_t>(8, rows / (4 * std::max(1, threads)))});
  parallel_for((rows + per_task - 1) / per_task, threads, [&](int64_t task) {
    const int64_t end = std::min(rows, (task + 1) * per_task);
    for (int64_t row = task * per_task; row < end; ++row) body(row, end);
  });
}

}  // namespace

void divergence_rows(const LogitRows& clean, const LogitRows& noised, const LogitRows& grad_clean,
                     const LogitRows& grad_noised, DType dtype, int64_t rows, int64_t cols, const int64_t* labels,
                     int64_t ignore_index, const double* kl_weights, const double* ce_weights, double* kl, double* ce,
                     int threads) {
  const int64_t size = element_size(dtype);
  const auto at = [&](const LogitRows& block, int64_t row) -> void* {
    return block.address == nullptr ? nullptr : static_cast<char*>(block.address) + row * block.stride * size;
  };
  for_rows(rows, cols, threads, [&](int64_t i, int64_t end) {
    thread_local std::vector<float> scratch;  // two rows, so kept: it is small beside the logits
    if (scratch.size() < static_cast<size_t>(2 * cols)) scratch.resize(2 * cols);
    DivergenceRow row;
    row.clean_exp = scratch.data();
    row.noised_exp = scratch.data() + cols;
    row.clean = at(clean, i);
    row.noised = at(noised, i);
    row.next_clean = i + 1 < end ? at(clean, i + 1) : nullptr;
    row.next_noised = i + 1 < end ? at(noised, i + 1) : nullptr;
    row.grad_clean = at(grad_clean, i);
    row.grad_noised = at(grad_noised, i);
    row.cols = cols;
    row.label = labels == nullptr ? ignore_index : labels[i];
    row.kl_weight = noised.address == nullptr ? 0 : kl_weights == nullptr ? 1 : kl_weights[i];
    row.ce_weight = labels == nullptr || row.label == ignore_index ? 0 : ce_weights == nullptr ? 1 : ce_weights[i];
    const bool outside = row.ce_weight != 0 && (row.label < 0 || row.label >= cols);
    if (outside) row.ce_weight = 0;
    double kl_value, ce_value;
    divergence_loops().row(dtype, row, &kl_value, &ce_value);
    if (kl != nullptr) kl[i] = kl_value;
    if (ce != nullptr) ce[i] = outside ? NAN : ce_value;
  });
}

void js_rows(const LogitRows& clean, const LogitRows& noised, const LogitRows& grad_clean, const LogitRows& grad_noised,
             DType dtype, int64_t rows, int64_t cols, const double* weights, double* value, int threads) {
  const int64_t size = element_size(dtype);
  const auto at = [&](const LogitRows& block, int64_t row) -> void* {
    return block.address == nullptr ? nullptr : static_cast<char*>(block.address) + row * block.stride * size;
  };
  for_rows(rows, cols, threads, [&](int64_t i, int64_t end) {
    thread_local std::vector<float> scratch;
    thread_local std::vector<double> logs;
    if (scratch.size() < static_cast<size_t>(2 * cols)) scratch.resize(2 * cols);
    if (logs.size() < static_cast<size_t>(2 * cols)) logs.resize(2 * cols);
    DivergenceRow row = {};
    row.clean_exp = scratch.data();
    row.noised_exp = scratch.data() + cols;
    row.clean = at(clean, i);
    row.noised = at(noised, i);
    row.next_clean = i + 1 < end ? at(clean, i + 1) : nullptr;
    row.grad_clean = at(grad_clean, i);
    row.grad_noised = at(grad_noised, i);
    row.cols = cols;
    row.kl_weight = weights == nullptr ? 1 : weights[i];
    value[i] = divergence_loops().jensen_shannon(dtype, row, logs.data());
  });
}

void scale_rows(const LogitRows& block, DType dtype, int64_t rows, int64_t cols, const double* factors,
                int64_t factor_stride, int threads) {
  if (factor_stride == 0 && *factors == 1) return;
  const int64_t size = element_size(dtype);
  for_rows(rows, cols, threads, [&](int64_t i, int64_t) {
    const double factor = factors[i * factor_stride];
    if (factor != 1) params_loops().scale(dtype, static_cast<char*>(block.address) + i * block.stride * size, factor, cols);
  });
}

}  // namespace fastpost::cpu
