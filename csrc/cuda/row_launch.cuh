// Launches over rows of logits: a block for each wide row, a warp for each narrow one.
#pragma once

#include <stdexcept>
#include <string>

#include "cuda/launch.cuh"
#include "cuda/narrow_rows.cuh"
#include "cuda/row_tiles.cuh"

namespace fastpost::cuda {

// The kernel's last argument is the number of the launch's first row.
template <class Kernel, class... Arguments>
void launch_wide_rows(const Call& call, int64_t rows, Kernel kernel, const Arguments&... arguments) {
  for (int64_t at = 0; at < rows; at += kMostBlocks)
    call.launch(kernel, std::min(rows - at, kMostBlocks), kRowThreads, arguments..., at);
}

template <class Narrow, class Wide, class... Arguments>
void launch_rows(const Call& call, int64_t rows, int64_t cols, Narrow narrow, Wide wide, const Arguments&... arguments) {
  if (rows == 0) return;
  if (cols < kNarrow)
    call.launch(narrow, narrow_blocks(rows), kNarrowThreads, arguments...);
  else
    launch_wide_rows(call, rows, wide, arguments...);
}

// Calls body with a value of the type that gradients have as operands of an output head's products.
template <class F>
void with_operand_dtype(const char* op, DType dtype, F&& body) {
  if (dtype == DType::f32) return body(float{});
  if (dtype == DType::bf16) return body(bf16{});
  throw std::invalid_argument(std::string(op) + ": operands are float32 or bfloat16");
}

}  // namespace fastpost::cuda
