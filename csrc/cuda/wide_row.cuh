// A wide row of logits, whoever makes its sums: what they come to, and the row's gradients and values.
#pragma once

#include "cuda/row_gradients.cuh"
#include "cuda/row_sums.cuh"
#include "cuda/row_task.cuh"

namespace fastpost::cuda {

// What a row's sums are of: both streams, or one against itself, for its cross-entropy.
enum class Streams : int { both, noised, clean };

// Whether a row's sums have to be taken again, and how: about the middle of its differences, 16-bit logits with care; less
// the largest logits, which are huge; of other streams, because the divergence is infinite or undefined.
enum class Next : int { done, recentred, huge, streams };

// Where 16-bit streams diverge by less, they are the same but for a few classes of next to no weight.
constexpr double kFaint = 1e-9;
constexpr double kMaybeFaint = 1e-6;  // as far as a row that is off its centre can tell

// A row's work, in shared memory: registers are for the loops.
struct Work {
  Task task;
  float clean_label, noised_label;  // the label's logits, read before gradients may overwrite them
  Start start;
  Next next;
  Streams streams;
  double kl, ce, noised_ce;
  bool undefined;        // there is no divergence
  bool clean_undefined;  // there is no gradient of the clean stream
  Whole whole;
};

template <class T>
__device__ __forceinline__ void set_up(Work& work, const Task& task, const Rows& r, int64_t row) {
  work = {};
  work.task = task;
  if (work.task.kl_weight == 0) work.streams = Streams::clean;
  if (work.task.ce_weight == 0 || work.task.label < 0) return;
  work.clean_label = to_float(row_of<T>(r.clean, row)[work.task.label]);
  if (work.task.kl_weight != 0) work.noised_label = to_float(row_of<T>(r.noised, row)[work.task.label]);
}

template <bool operand>
__device__ __forceinline__ Whole whole_of(const RowPart& sums, const RowMeaning& row, const Work& work, int64_t cols,
                                          const OperandRule& rule) {
  // Units in which probabilities that matter are near 1.
  const double unit = exponent_of(row.noised), clean_unit = exponent_of(row.clean);
  const double kl_weight = work.task.kl_weight, ce_weight = work.task.ce_weight;
  const bool uneven = kl_weight != 0 && fabs(kl_weight) < 1e-6 * fabs(ce_weight);
  const double weight = kl_weight == 0 || uneven ? ce_weight : kl_weight, share = kl_weight / weight;
  Whole whole;
  whole.careful = work.start.huge || uneven;
  whole.unit = static_cast<float>(sums.unit + unit);
  whole.clean_unit = static_cast<float>(sums.clean_unit + clean_unit);
  whole.centre = sums.centre;
  whole.log_ratio = static_cast<float>(row.log_ratio);
  whole.scale = static_cast<float>(weight * (power_of_two(unit) / row.noised));
  whole.clean_scale = static_cast<float>(weight * (power_of_two(clean_unit) / row.clean));
  whole.share = static_cast<float>(share);
  whole.clean_shift = static_cast<float>(ce_weight / weight - share * row.clean_kl);
  whole.noised_shift = static_cast<float>(share * row.noised_kl);
  whole.label_shift = static_cast<float>(-share * row.clean_kl);
  whole.clean_origin = work.start.clean_origin;
  whole.noised_origin = work.start.noised_origin;
  whole.noised_label_shift = whole.noised_shift;
  if constexpr (operand) {
    const double clean_share = rule.teaches ? share : 0, noised_ce_weight = work.task.noised_ce_weight;
    whole.clean_share = static_cast<float>(clean_share);
    whole.clean_shift = static_cast<float>(ce_weight / weight - clean_share * row.clean_kl);
    whole.label_shift = static_cast<float>(-clean_share * row.clean_kl);
    whole.noised_shift = static_cast<float>(share * row.noised_kl - noised_ce_weight / weight);
    whole.flat = static_cast<float>(rule.smoothing * ce_weight / cols);
    whole.noised_flat = static_cast<float>(rule.smoothing * noised_ce_weight / cols);
    whole.slope = static_cast<float>(rule.slope);
    whole.sum = rule.both && kl_weight != 0 ? 1.0f : 0.0f;
  }
  return whole;
}

// On one thread, once these streams are done: the sums of the next, which begin anew, or the end. Without a divergence each
// stream's cross-entropy is left, the clean one's last, because its gradient may be wanted.
__device__ __forceinline__ void go_on(Work& work) {
  const bool noised = work.streams == Streams::both && work.task.noised_ce_weight != 0;
  const bool clean = work.streams != Streams::clean && work.task.ce_weight != 0;
  work.next = noised || clean ? Next::streams : Next::done;
  work.streams = noised ? Streams::noised : Streams::clean;
  work.start = {};
}

// On one thread: what the sums come to.
template <class T, bool operand>
__device__ __forceinline__ void judge(const RowPart& sums, const RowMeaning& row, const Room& room, Work& work, int64_t cols,
                                      const OperandRule& rule) {
  work.next = Next::done;
  if (room.undefined || room.clean_lacks || room.noised_lacks) {
    if (work.streams == Streams::both) {
      work.kl = room.undefined ? NAN : INFINITY;
      work.undefined = true;
      work.clean_undefined = !operand || rule.teaches || rule.both;
    } else if (work.streams == Streams::noised) {
      work.noised_ce = NAN;
    } else {
      work.ce = NAN;
      work.clean_undefined = true;
    }
    return go_on(work);
  }
  if (!work.start.given) {
    work.start.given = true;
    // So far apart the streams have no centre.
    const bool apart = fabsf(sums.unit - sums.clean_unit) >= kFurthestCentre;
    if (room.huge || apart || !(row.noised > 0) || !(row.clean > 0)) {
      work.next = Next::huge;
    } else if (row.off_centre || (sizeof(T) == 2 && row.divergence > 0 && row.divergence < kFaint)) {
      work.start.careful = sizeof(T) == 2 && row.divergence < kMaybeFaint;
      work.start.unit = sums.unit;
      work.start.clean_unit = sums.clean_unit;
      work.start.centre = static_cast<float>(sums.centre + row.noised_mean);
      work.next = Next::recentred;
    }
    if (work.next != Next::done) return;
  }
  // The origin and the label's logit first: both may be too large for a logarithm next to them to keep its digits.
  const auto minus_log_of = [](double log_sum, double origin, double label) { return log_sum + (origin - label); };
  const double noised_ce = minus_log_of(row.log_noised, work.start.noised_origin, work.noised_label);
  if (work.streams == Streams::noised) {
    work.noised_ce = noised_ce;
    return go_on(work);
  }
  work.whole = whole_of<operand>(sums, row, work, cols, rule);
  if (work.task.ce_weight != 0) work.ce = minus_log_of(row.log_clean, work.start.clean_origin, work.clean_label);
  if (work.streams == Streams::clean) return;
  work.kl = row.divergence;
  if (work.task.noised_ce_weight != 0) work.noised_ce = noised_ce;
}

// A row that is set up. settle() makes its sums and what they come to; then its gradients are written, of type O (operand:
// as the rule has them; cut: the label may be another rank's), and its values. Without a divergence the noised stream stands
// in for itself: a row against itself costs a read that is in the cache, and saves a second set of loops.
template <class T, class O, bool operand, bool cut, class Settle>
__device__ __forceinline__ void do_row(const Rows& r, const OperandRule& rule, int64_t row, Work& work, Room& room,
                                       Settle&& settle) {
  // Looked up again wherever they are wanted, by whole warps.
  const auto diverges = [&] { return uniform(work.task.kl_weight != 0); };
  const auto classifies = [&] { return uniform(work.task.ce_weight != 0); };
  if (diverges() || classifies()) {
    settle();
    const bool together = uniform(work.streams == Streams::both) && !uniform(work.undefined);
    O* grad_a = uniform(work.clean_undefined) || !(together || classifies()) ? nullptr : row_of<O>(r.grad_clean, row);
    O* grad_b = together ? row_of<O>(r.grad_noised, row) : nullptr;
    if (grad_a != nullptr || grad_b != nullptr) {
      const T* a = row_of<T>(r.clean, row);
      write_gradients<T, O, operand>(a, together ? row_of<T>(r.noised, row) : a, grad_a, grad_b, r.cols, work.whole,
                                     room.ahead);
      __syncthreads();
      if (threadIdx.x == 0 && work.task.ce_weight != 0 && (!cut || work.task.label >= 0)) {
        // p - 1 at the label, from the logarithm so that a confident row keeps its digits.
        float furthest = 0;
        Whole whole = work.whole;
        whole.clean_shift = whole.label_shift;
        whole.noised_shift = whole.noised_label_shift;
        Gradient d = {0, 0};
        if (together) d = differentiate_carefully<T, operand>(work.clean_label, work.noised_label, whole, furthest);
        d.clean += static_cast<float>(work.task.ce_weight * expm1(-work.ce));
        if constexpr (operand) {
          d.clean += static_cast<float>(rule.smoothing * work.task.ce_weight);
          if (together && work.task.noised_ce_weight != 0)
            d.noised += static_cast<float>(work.task.noised_ce_weight * (expm1(-work.noised_ce) + rule.smoothing));
          d = finished(d, work.clean_label, together ? work.noised_label : 0.0f, whole);
          if (grad_b != nullptr && work.task.noised_ce_weight != 0) grad_b[work.task.label] = from_float<O>(d.noised);
        }
        if (grad_a != nullptr) grad_a[work.task.label] = from_float<O>(d.clean);
      }
    }
  }
  // What has no weight has no gradient, and what has no value has none that means anything.
  const bool clean_undefined = uniform(work.clean_undefined);
  const bool reached = classifies() || (diverges() && !uniform(work.undefined));
  if (clean_undefined || !reached) fill(row_of<O>(r.grad_clean, row), r.cols, clean_undefined ? NAN : 0.0f);
  if (uniform(work.undefined) || !diverges()) fill(row_of<O>(r.grad_noised, row), r.cols, diverges() ? NAN : 0.0f);
  if (threadIdx.x == 0) {
    r.kl[row] = work.kl;
    if (r.ce != nullptr) r.ce[row] = work.task.bad_label ? NAN : work.ce + work.noised_ce;
  }
}

}  // namespace fastpost::cuda
