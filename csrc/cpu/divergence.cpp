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

void* at(const LogitRows& block, int64_t row, int64_t size) {
  return block.address == nullptr ? nullptr : static_cast<char*>(block.address) + row * block.stride * size;
}

// The logits of row i of a task that stops before `end`, with the thread's scratch: two rows, so kept, being small beside
// the logits.
DivergenceRow row_of(const LogitRows& clean, const LogitRows& noised, int64_t size, int64_t cols, int64_t i, int64_t end) {
  thread_local std::vector<float> scratch;
  if (scratch.size() < static_cast<size_t>(2 * cols)) scratch.resize(2 * cols);
  DivergenceRow row = {};
  row.clean_exp = scratch.data();
  row.noised_exp = scratch.data() + cols;
  row.clean = at(clean, i, size);
  row.noised = at(noised, i, size);
  row.next_clean = i + 1 < end ? at(clean, i + 1, size) : nullptr;
  row.next_noised = i + 1 < end ? at(noised, i + 1, size) : nullptr;
  row.cols = cols;
  return row;
}

// The thread's scratch for logarithms.
double* logs_of(int64_t cols) {
  thread_local std::vector<double> logs;
  if (logs.size() < static_cast<size_t>(2 * cols)) logs.resize(2 * cols);
  return logs.data();
}

// Gives the row its weights and its label. Returns whether that is outside of the classes, and then has no weight.
bool weigh(DivergenceRow& row, int64_t i, const int64_t* labels, int64_t ignore_index, const double* kl_weights,
           const double* ce_weights) {
  row.label = labels == nullptr ? ignore_index : labels[i];
  row.kl_weight = row.noised == nullptr ? 0 : kl_weights == nullptr ? 1 : kl_weights[i];
  row.ce_weight = labels == nullptr || row.label == ignore_index ? 0 : ce_weights == nullptr ? 1 : ce_weights[i];
  const bool outside = row.ce_weight != 0 && (row.label < 0 || row.label >= row.cols);
  if (outside) row.ce_weight = 0;
  return outside;
}

}  // namespace

void divergence_rows(const LogitRows& clean, const LogitRows& noised, const LogitRows& grad_clean,
                     const LogitRows& grad_noised, DType dtype, int64_t rows, int64_t cols, const int64_t* labels,
                     int64_t ignore_index, const double* kl_weights, const double* ce_weights, double* kl, double* ce,
                     int threads) {
  const int64_t size = element_size(dtype);
  for_rows(rows, cols, threads, [&](int64_t i, int64_t end) {
    DivergenceRow row = row_of(clean, noised, size, cols, i, end);
    row.grad_clean = at(grad_clean, i, size);
    row.grad_noised = at(grad_noised, i, size);
    const bool outside = weigh(row, i, labels, ignore_index, kl_weights, ce_weights);
    double kl_value, ce_value;
    divergence_loops().row(dtype, row, &kl_value, &ce_value);
    if (kl != nullptr) kl[i] = kl_value;
    if (ce != nullptr) ce[i] = outside ? NAN : ce_value;
  });
}

void operand_rows(const LogitRows& clean, const LogitRows& noised, const LogitRows& first, const LogitRows& second,
                  DType operand_dtype, int64_t rows, int64_t cols, const int64_t* labels, int64_t ignore_index,
                  const double* kl_weights, const double* ce_weights, const OperandOptions& how, double* kl, double* ce,
                  int threads) {
  const int64_t size = element_size(DType::f32), operand_size = element_size(operand_dtype);
  // Gradients may take the operands' place unless that is too narrow, or the logits are there and still wanted.
  const bool direct = operand_dtype == DType::f32 && how.cap == 0;
  for_rows(rows, cols, threads, [&](int64_t i, int64_t end) {
    thread_local std::vector<float> gradients;
    if (!direct && gradients.size() < static_cast<size_t>(2 * cols)) gradients.resize(2 * cols);
    OperandRow operands = {};
    operands.first = at(first, i, operand_size);
    operands.second = at(second, i, operand_size);
    DivergenceRow row = row_of(clean, noised, size, cols, i, end);
    if (operands.first != nullptr) row.grad_clean = direct ? operands.first : gradients.data();
    if (operands.second != nullptr) row.grad_noised = direct ? operands.second : gradients.data() + cols;
    const bool outside = weigh(row, i, labels, ignore_index, kl_weights, ce_weights);
    if (how.noised_classifies && row.kl_weight != 0) row.noised_ce_weight = row.ce_weight;
    const auto evaluate = [&](const DivergenceRow& part, double* value, double* task) {
      if (how.mixture)
        divergence_loops().jensen_shannon(DType::f32, part, logs_of(cols), value, task);
      else
        divergence_loops().row(DType::f32, part, value, task);
    };
    double kl_value, ce_value;
    if (how.teaches || row.grad_clean == nullptr) {
      evaluate(row, &kl_value, &ce_value);
    } else {  // the clean stream's gradient is that of its cross-entropy, which is taken once the divergence is done
      DivergenceRow alone = row, other = row;
      other.grad_clean = nullptr;
      other.ce_weight = 0;
      double none, noised_ce;
      evaluate(other, &kl_value, &noised_ce);
      alone.kl_weight = alone.noised_ce_weight = 0;
      alone.grad_noised = nullptr;
      divergence_loops().row(DType::f32, alone, &none, &ce_value);
      ce_value += noised_ce;
    }
    kl[i] = kl_value;
    if (ce != nullptr) ce[i] = outside ? NAN : ce_value;
    if (operands.first == nullptr && operands.second == nullptr) return;

    float* grad_clean = static_cast<float*>(row.grad_clean);
    float* grad_noised = static_cast<float*>(row.grad_noised);
    const double smoothed = how.smoothing * row.ce_weight, noised_smoothed = how.smoothing * row.noised_ce_weight;
    if (grad_clean != nullptr && smoothed != 0) grad_clean[row.label] += static_cast<float>(smoothed);
    if (grad_noised != nullptr && noised_smoothed != 0) grad_noised[row.label] += static_cast<float>(noised_smoothed);
    if (direct && smoothed == 0 && (grad_clean == nullptr || grad_noised == nullptr)) return;
    operands.clean = static_cast<const float*>(row.clean);
    operands.noised = static_cast<const float*>(row.noised);
    operands.grad_clean = grad_clean;
    operands.grad_noised = grad_noised;
    operands.cols = cols;
    operands.flat = static_cast<float>(smoothed / cols);
    operands.noised_flat = static_cast<float>(noised_smoothed / cols);
    operands.slope = how.cap != 0 ? static_cast<float>(1 / how.cap) : 0;
    // Logits that are gradients by now are not to be read as logits, and what has no weight may be anything.
    const bool taught = how.teaches && row.kl_weight != 0;
    if (operands.slope == 0 || !(taught || row.ce_weight != 0)) operands.clean = grad_clean;
    if (operands.slope == 0 || row.kl_weight == 0) operands.noised = grad_noised;
    divergence_loops().operands(operand_dtype, operands);
  });
}

void distillation_rows(const LogitRows& teacher, const LogitRows& student, const LogitRows& grad_teacher,
                       const LogitRows& grad_student, DType operand_dtype, int64_t rows, int64_t cols, const int64_t* labels,
                       int64_t ignore_index, const double* weights, const double* ce_weights, const DistillationOptions& how,
                       double* value, double* ce, int threads) {
  const int64_t size = element_size(DType::f32), operand_size = element_size(operand_dtype);
  for_rows(rows, cols, threads, [&](int64_t i, int64_t) {
    thread_local std::vector<double> scratch;
    if (scratch.size() < static_cast<size_t>(4 * cols)) scratch.resize(4 * cols);
    DistillationRow row = {};
    row.teacher = static_cast<const float*>(at(teacher, i, size));
    row.student = static_cast<const float*>(at(student, i, size));
    row.scratch = scratch.data();
    row.grad_teacher = at(grad_teacher, i, operand_size);
    row.grad_student = at(grad_student, i, operand_size);
    row.cols = cols;
    row.label = labels == nullptr ? ignore_index : labels[i];
    row.weight = weights[i];
    row.ce_weight = labels == nullptr || row.label == ignore_index ? 0 : ce_weights == nullptr ? 1 : ce_weights[i];
    const bool outside = row.ce_weight != 0 && (row.label < 0 || row.label >= cols);
    if (outside) row.ce_weight = 0;
    row.divergence = how.divergence;
    row.beta = how.beta;
    row.temperature = how.temperature;
    row.teacher_cap = how.teacher_cap;
    row.student_cap = how.student_cap;
    row.smoothing = how.smoothing;
    double ce_value;
    distillation_loops().row(operand_dtype, row, &value[i], &ce_value);
    if (ce != nullptr) ce[i] = outside ? NAN : ce_value;
  });
}

void top_k_rows(const LogitRows& logits, const LogitRows& grad, DType operand_dtype, int64_t rows, int64_t cols,
                const TopKTeacher& teacher, const int64_t* labels, int64_t ignore_index, const double* weights,
                const double* ce_weights, const TopKOptions& how, double* value, double* ce, int threads) {
  const int64_t size = element_size(DType::f32), operand_size = element_size(operand_dtype), k = teacher.classes;
  for_rows(rows, cols, threads, [&](int64_t i, int64_t) {
    thread_local std::vector<float> scratch;
    thread_local std::vector<double> known;
    if (scratch.size() < static_cast<size_t>(2 * cols)) scratch.resize(2 * cols);
    if (known.size() < static_cast<size_t>(k)) known.resize(k);
    TopKRow row = {};
    row.logits = static_cast<float*>(at(logits, i, size));
    row.scratch = scratch.data();
    row.known = known.data();
    row.grad = at(grad, i, operand_size);
    row.cols = cols;
    row.label = labels == nullptr ? ignore_index : labels[i];
    row.ids = teacher.ids + i * k;
    row.log_probs = teacher.log_probs + i * (k + (teacher.has_rest ? 1 : 0));
    row.classes = k;
    row.teacher_has_rest = teacher.has_rest;
    row.weight = weights[i];
    row.ce_weight = ce_weights == nullptr ? 0 : ce_weights[i];
    row.how = how;
    const bool counts = row.weight != 0 || row.ce_weight != 0, classified = counts && row.label != ignore_index;
    row.labelled = classified && row.label >= 0 && row.label < cols;
    double ce_value;
    top_k_loops().row(operand_dtype, row, &value[i], &ce_value);
    if (ce != nullptr) ce[i] = classified && !row.labelled ? NAN : ce_value;
  });
}

void js_rows(const LogitRows& clean, const LogitRows& noised, const LogitRows& grad_clean, const LogitRows& grad_noised,
             DType dtype, int64_t rows, int64_t cols, const double* weights, double* value, int threads) {
  const int64_t size = element_size(dtype);
  for_rows(rows, cols, threads, [&](int64_t i, int64_t end) {
    DivergenceRow row = row_of(clean, noised, size, cols, i, end);
    row.grad_clean = at(grad_clean, i, size);
    row.grad_noised = at(grad_noised, i, size);
    row.kl_weight = weights == nullptr ? 1 : weights[i];
    double none;
    divergence_loops().jensen_shannon(dtype, row, logs_of(cols), &value[i], &none);
  });
}

RowLosses row_losses(bool jensen_shannon, const LogitRows& clean, const LogitRows& noised, const LogitRows& grad_clean,
                     const LogitRows& grad_noised, DType dtype, int64_t rows, int64_t cols, const int64_t* labels,
                     int64_t ignore_index, const bool* mask, const RowReduction& how, int threads) {
  std::vector<double> columns(static_cast<size_t>(4 * rows));
  double *kl = columns.data(), *ce = kl + rows, *kl_weights = ce + rows, *ce_weights = kl_weights + rows;
  int64_t counted = 0;
  RowLosses sums = {0, 0, 0, true, {}};
  for (int64_t i = 0; i < rows; ++i) {
    const bool counts = labels != nullptr ? labels[i] != ignore_index : mask == nullptr || mask[i];
    if (counts && labels != nullptr && (labels[i] < 0 || labels[i] >= cols)) sums.served = false;
    ce_weights[i] = counts ? 1 : 0;
    kl_weights[i] = counts || how.kl_everywhere ? 1 : 0;
    counted += counts ? 1 : 0;
  }
  if (!sums.served) return sums;
  const double share = how.averaged ? 1.0 / static_cast<double>(std::max<int64_t>(counted, 1)) : 1;
  const double ce_scale = how.ce_scale * share, kl_scale = how.kl_everywhere ? how.kl_scale : how.kl_scale * share;
  for (int64_t i = 0; i < rows; ++i) {
    ce_weights[i] *= ce_scale;
    kl_weights[i] *= kl_scale * how.kl_weight;
  }
  if (jensen_shannon)
    js_rows(clean, noised, grad_clean, grad_noised, dtype, rows, cols, kl_weights, kl, threads);
  else
    divergence_rows(clean, noised, grad_clean, grad_noised, dtype, rows, cols, labels, ignore_index, kl_weights, ce_weights,
                    kl, ce, threads);
  bool finite = true;
  for (int64_t i = 0; i < rows; ++i) {
    const bool counts = labels == nullptr || labels[i] != ignore_index;
    finite = finite && std::isfinite(kl[i]);
    sums.loss += kl[i] * kl_weights[i];
    if (kl_weights[i] != 0) sums.divergence += kl[i];
    if (labels == nullptr || !counts) continue;
    sums.loss += ce[i] * ce_weights[i];
    sums.task += ce[i];
  }
  sums.divergence *= kl_scale;
  sums.task *= ce_scale;
  if (!finite) sums.divergences.assign(kl, kl + rows);
  return sums;
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

void scale_gradients(const LogitRows& first, const LogitRows& second, DType dtype, int64_t rows, int64_t cols,
                     const float* factor, int threads) {
  const double by = *factor;
  scale_rows(first, dtype, rows, cols, &by, 0, threads);
  if (second.address != nullptr) scale_rows(second, dtype, rows, cols, &by, 0, threads);
}

}  // namespace fastpost::cpu
