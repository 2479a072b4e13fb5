// What the API asks of each row of logits.
#pragma once

#include "api.h"
#include "cuda/launch.cuh"

namespace fastpost::cuda {

struct Rows {
  const LogitRows clean, noised, grad_clean, grad_noised;
  int64_t rows, cols;
  const int64_t* labels;
  int64_t ignore_index;
  const double *kl_weights, *ce_weights;
  double *kl, *ce;
};

// What becomes of a row's gradients where they are operands of products (operand_rows in api.h).
struct OperandRule {
  double smoothing, slope;  // slope: 1 / cap, or 0
  bool teaches, both;       // both: the first operand has the noised stream's gradient added
  bool noised_classifies;
};

template <class T>
__device__ __forceinline__ T* row_of(const LogitRows& block, int64_t row) {
  return block.address == nullptr ? nullptr : static_cast<T*>(block.address) + row * block.stride;
}

// What a row is asked for, as the API says it.
struct Task {
  double kl_weight, ce_weight, noised_ce_weight;  // 0: not wanted
  int64_t label;                                  // below 0: another rank's column
  bool bad_label;
};

__device__ __forceinline__ Task task_of(const Rows& r, const OperandRule& rule, int64_t row) {
  Task task{0, 0, 0, 0, false};
  if (r.noised.address != nullptr) task.kl_weight = r.kl_weights == nullptr ? 1.0 : r.kl_weights[row];
  if (r.labels != nullptr && r.labels[row] != r.ignore_index) {
    task.label = r.labels[row];
    task.ce_weight = r.ce_weights == nullptr ? 1.0 : r.ce_weights[row];
    task.bad_label = task.ce_weight != 0 && (task.label < 0 || task.label >= r.cols);
    if (task.bad_label) task.ce_weight = 0;
    if (rule.noised_classifies && task.kl_weight != 0) task.noised_ce_weight = task.ce_weight;
  }
  return task;
}

}  // namespace fastpost::cuda
