// Rows of logits on CUDA. Wide rows are read twice, by one block each: once for all sums (row_sums.cuh), once for the
// gradients (row_gradients.cuh). Narrow rows are a warp's work.
#include "api.h"
#include "cuda/launch.cuh"
#include "cuda/narrow_rows.cuh"
#include "cuda/row_gradients.cuh"
#include "cuda/row_launch.cuh"
#include "cuda/row_sums.cuh"
#include "cuda/row_task.cuh"

namespace fastpost::cuda {
namespace {

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
__device__ __forceinline__ void set_up(Work& work, const Rows& r, const OperandRule& rule, int64_t row) {
  work = {};
  work.task = task_of(r, rule, row);
  if (work.task.kl_weight == 0) work.streams = Streams::clean;
  if (work.task.ce_weight == 0) return;
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
    if (room.huge || !(row.noised > 0) || !(row.clean > 0)) {
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

// One block, one row, `first` being the first block's. Without a divergence the noised stream stands in for itself: a row
// against itself costs a read that is in the cache, and saves a second set of loops. Gradients are of type O; operand: as
// the rule has them.
template <class T, class O, bool operand>
__device__ __forceinline__ void wide_row(const Rows& r, const OperandRule& rule, int64_t first) {
  __shared__ Room room;
  __shared__ Work work;
  constexpr Unscaled scale;
  const int64_t row = first + blockIdx.x;
  if (threadIdx.x == 0) set_up<T>(work, r, rule, row);
  __syncthreads();
  // Looked up again wherever they are wanted, by whole warps.
  const auto diverges = [&] { return uniform(work.task.kl_weight != 0); };
  const auto classifies = [&] { return uniform(work.task.ce_weight != 0); };
  if (diverges() || classifies()) {
#pragma unroll 1
    for (;;) {
      if (threadIdx.x == 0) room.clear();
      __syncthreads();
      const Streams streams = uniform(work.streams);
      const T* a = row_of<T>(streams == Streams::noised ? r.noised : r.clean, row);
      const T* b = row_of<T>(streams == Streams::clean ? r.clean : r.noised, row);
      const RowPart sums = gathered(part_of(a, b, r.cols, scale, work.start, room), scale, room);
      if (threadIdx.x < kWarp) {
        const RowMeaning meaning = meaning_by_warp(sums, scale);
        if (threadIdx.x == 0) judge<T, operand>(sums, meaning, room, work, r.cols, rule);
      }
      __syncthreads();
      const Next next = uniform(work.next);
      if (next == Next::done) break;
      if (next == Next::huge) {
        const Seed top = tops_of(a, b, r.cols, room);
        if (threadIdx.x == 0) {
          work.start.careful = work.start.huge = true;
          work.start.clean_origin = top.clean;
          work.start.noised_origin = top.noised;
        }
      }
    }
    const bool together = uniform(work.streams == Streams::both) && !uniform(work.undefined);
    O* grad_a = uniform(work.clean_undefined) || !(together || classifies()) ? nullptr : row_of<O>(r.grad_clean, row);
    O* grad_b = together ? row_of<O>(r.grad_noised, row) : nullptr;
    if (grad_a != nullptr || grad_b != nullptr) {
      const T* a = row_of<T>(r.clean, row);
      write_gradients<T, O, operand>(a, together ? row_of<T>(r.noised, row) : a, grad_a, grad_b, r.cols, work.whole,
                                     room.ahead);
      __syncthreads();
      if (threadIdx.x == 0 && work.task.ce_weight != 0) {
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

template <class T>
__global__ void __launch_bounds__(kRowThreads, 3) wide_rows_kernel(const __grid_constant__ Rows r, int64_t first) {
  wide_row<T, T, false>(r, {}, first);
}

template <class O>
__global__ void __launch_bounds__(kRowThreads, 3)
    wide_operands_kernel(const __grid_constant__ Rows r, const __grid_constant__ OperandRule rule, int64_t first) {
  wide_row<float, O, true>(r, rule, first);
}

template <class T>
__global__ void __launch_bounds__(kNarrowThreads, 2) narrow_rows_kernel(const __grid_constant__ Rows r) {
  narrow_rows<T, T, false>(r, {});
}

template <class O>
__global__ void __launch_bounds__(kNarrowThreads, 2)
    narrow_operands_kernel(const __grid_constant__ Rows r, const __grid_constant__ OperandRule rule) {
  narrow_rows<float, O, true>(r, rule);
}

// Rounded once from double, as on every backend.
template <class T>
__device__ __forceinline__ void scale_row(T* x, int64_t cols, double factor) {
  const Cut<T> cut(x, cols);
  const auto scaled = [&](T value) { return from_float<T>(static_cast<float>(to_float(value) * factor)); };
#pragma unroll 1
  for (int64_t v = threadIdx.x; v < cut.packs; v += kRowThreads) {
    T* at = x + cut.head + v * Pack<T>::size;
    Pack<T> pack = load_pack(at, true);
#pragma unroll
    for (int k = 0; k < Pack<T>::size; ++k) pack.value[k] = scaled(pack.value[k]);
    store_pack(at, pack, true);
  }
  const int64_t i = threadIdx.x < kWarp ? cut.single() : -1;
  if (i >= 0) x[i] = scaled(x[i]);
}

// A factor of 1 leaves its row alone.
template <class T>
__global__ void __launch_bounds__(kRowThreads, 2)
    scale_rows_kernel(T* block, int64_t stride, int64_t rows, int64_t cols, const double* __restrict__ factors,
                      int64_t factor_stride) {
#pragma unroll 1
  for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
    const double factor = factors[row * factor_stride];
    if (factor != 1.0) scale_row(block + row * stride, cols, factor);
  }
}

// Rows of one or two matrices, all times a factor that may be known on the device alone; `last` columns in the last row.
// A factor of 1 ends every block at once.
template <class T>
__global__ void __launch_bounds__(kRowThreads, 2)
    scale_gradients_kernel(const __grid_constant__ LogitRows first, const __grid_constant__ LogitRows second, int64_t rows,
                           int64_t cols, int64_t last, const float* __restrict__ factor) {
  const double by = *factor;
  if (by == 1.0) return;
  const int64_t all = second.address == nullptr ? rows : 2 * rows;
#pragma unroll 1
  for (int64_t i = blockIdx.x; i < all; i += gridDim.x) {
    const int64_t row = i < rows ? i : i - rows;
    T* const x = i < rows ? row_of<T>(first, row) : row_of<T>(second, row);
    scale_row(x, row + 1 < rows ? cols : last, by);
  }
}

constexpr int64_t kPiece = int64_t{1} << 13;  // elements of contiguous gradients that a block scales at a time

}  // namespace

void divergence_rows(const LogitRows& clean, const LogitRows& noised, const LogitRows& grad_clean,
                     const LogitRows& grad_noised, DType dtype, int64_t rows, int64_t cols, const int64_t* labels,
                     int64_t ignore_index, const double* kl_weights, const double* ce_weights, double* kl, double* ce,
                     int device, void* stream) {
  const Call call("divergence_rows", device, stream);
  const Rows work{clean, noised, grad_clean, grad_noised, rows, cols, labels, ignore_index, kl_weights, ce_weights, kl, ce};
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    launch_rows(call, rows, cols, narrow_rows_kernel<T>, wide_rows_kernel<T>, work);
  });
}

void operand_rows(const LogitRows& clean, const LogitRows& noised, const LogitRows& first, const LogitRows& second,
                  DType operand_dtype, int64_t rows, int64_t cols, const int64_t* labels, int64_t ignore_index,
                  const double* kl_weights, const double* ce_weights, const OperandOptions& how, double* kl, double* ce,
                  int device, void* stream) {
  if (how.mixture)
    return js_operand_rows(clean, noised, first, second, operand_dtype, rows, cols, labels, ignore_index, kl_weights,
                           ce_weights, how, kl, ce, device, stream);
  const Call call("operand_rows", device, stream);
  const Rows work{clean, noised, first, second, rows, cols, labels, ignore_index, kl_weights, ce_weights, kl, ce};
  const OperandRule rule{how.smoothing, how.cap != 0 ? 1 / how.cap : 0, how.teaches,
                         first.address != nullptr && second.address != nullptr, how.noised_classifies};
  with_operand_dtype("operand_rows", operand_dtype, [&](auto t) {
    using O = decltype(t);
    launch_rows(call, rows, cols, narrow_operands_kernel<O>, wide_operands_kernel<O>, work, rule);
  });
}

void scale_rows(const LogitRows& block, DType dtype, int64_t rows, int64_t cols, const double* factors,
                int64_t factor_stride, int device, void* stream) {
  const Call call("scale_rows_", device, stream);
  if (rows == 0 || cols == 0) return;
  with_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    // Where all rows have one factor, which mostly is 1, blocks that find nothing to do are few.
    const int64_t blocks = std::min(rows, factor_stride == 0 ? call.resident() : kMostBlocks);
    call.launch(scale_rows_kernel<T>, blocks, kRowThreads, static_cast<T*>(block.address), block.stride, rows, cols, factors,
                factor_stride);
  });
}

void scale_gradients(const LogitRows& first, const LogitRows& second, DType dtype, int64_t rows, int64_t cols,
                     const float* factor, int device, void* stream) {
  const Call call("scale_gradients", device, stream);
  LogitRows blocks[2] = {first, second};
  int64_t last = cols;
  const auto contiguous = [&](const LogitRows& block) { return block.address == nullptr || block.stride == cols; };
  if (contiguous(first) && contiguous(second)) {  // then it does not matter where a row ends
    const int64_t elements = rows * cols;
    rows = (elements + kPiece - 1) / kPiece;
    cols = kPiece;
    last = elements - (rows - 1) * kPiece;
    for (LogitRows& block : blocks) block.stride = kPiece;
  }
  const int64_t all = second.address == nullptr ? rows : 2 * rows;
  with_dtype(dtype, [&](auto t) {
    call.launch(scale_gradients_kernel<decltype(t)>, std::min(all, call.resident()), kRowThreads, blocks[0], blocks[1], rows,
                cols, last, factor);
  });
}

}  // namespace fastpost::cuda
