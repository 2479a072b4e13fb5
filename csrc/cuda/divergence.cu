// Rows of logits on CUDA. Wide rows are read twice, by one block each: once for all sums (row_sums.cuh), once for the
// gradients (row_gradients.cuh); wide_row.cuh has what lies between. Narrow rows are a warp's work.
#include "api.h"
#include "cuda/launch.cuh"
#include "cuda/narrow_rows.cuh"
#include "cuda/row_launch.cuh"
#include "cuda/row_task.cuh"
#include "cuda/wide_row.cuh"

namespace fastpost::cuda {
namespace {

// One block, one row, `first` being the first block's.
template <class T, class O, bool operand>
__device__ __forceinline__ void wide_row(const Rows& r, const OperandRule& rule, int64_t first) {
  __shared__ Room room;
  __shared__ Work work;
  constexpr Unscaled scale;
  const int64_t row = first + blockIdx.x;
  if (threadIdx.x == 0) set_up<T>(work, task_of(r, rule, row), r, row);
  __syncthreads();
  do_row<T, O, operand, false>(r, rule, row, work, room, [&] {
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
  });
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
