// Wide rows of logits whose columns are cut across ranks: the walks of divergence.cu, with the ranks' sums added up between
// them. All ranks begin a row at its largest logits, which they have agreed on, so that their sums are about one centre and
// in one unit. A row that needs another look gets it in a second call, on all ranks: a row off its centre, and the clean
// stream of a row without a divergence.
#include "api.h"
#include "cuda/launch.cuh"
#include "cuda/row_launch.cuh"
#include "cuda/wide_row.cuh"

namespace fastpost::cuda {
namespace {

// What a row's columns add up to, on one rank or on all.
struct ShardSums {
  NearSums near;
  FarSums far;
  double undefined, clean_lacks, noised_lacks;  // how many ranks have met it: numbers, as they are added up
  double label;                                 // the clean stream's logit there
};
static_assert(sizeof(ShardSums) == kShardSums * sizeof(double));

// What a kernel has beside this rank's rows, from all ranks.
struct Shard {
  const float* tops;        // the clean stream's of all rows, then the noised one's
  const ShardSums* before;  // from the first call; null in it
};

__device__ __forceinline__ Task shard_task_of(const Rows& r, int64_t row) {
  Task task{0, 0, 0, 0, false};
  task.kl_weight = r.kl_weights[row];
  if (r.labels == nullptr || r.labels[row] == kShardIgnored) return task;
  task.label = r.labels[row];
  task.ce_weight = r.ce_weights[row];
  task.bad_label = task.ce_weight != 0 && task.label == kShardNoClass;
  if (task.bad_label) task.ce_weight = 0;
  return task;
}

// From the largest logits of the streams that are summed up.
__device__ __forceinline__ Start start_of(const float* tops, int64_t rows, int64_t row, Streams streams) {
  const float clean = tops[row], noised = streams == Streams::clean ? clean : tops[rows + row];
  Start start{};
  start.given = true;
  if (fmaxf(fabsf(clean), fabsf(noised)) >= kHuge<float>) {
    start.careful = start.huge = true;
    start.clean_origin = clean;
    start.noised_origin = noised;
  } else {
    start.unit = rintf(noised * kLog2e);
    start.clean_unit = rintf(clean * kLog2e);
    start.centre = clean - noised;
  }
  return start;
}

// By the whole block.
__device__ __forceinline__ void begin(Work& work, const Shard& shard, const Rows& r, int64_t row) {
  if (threadIdx.x == 0) {
    set_up<float>(work, shard_task_of(r, row), r, row);
    work.start = start_of(shard.tops, r.rows, row, work.streams);
  }
  __syncthreads();
}

// By the first warp: what the sums of all ranks come to. They may ask for other ones only if `may_ask`.
__device__ __forceinline__ void conclude(const ShardSums& all, bool may_ask, const Shard& shard, const Rows& r, int64_t row,
                                         int64_t vocab, const OperandRule& rule, Room& room, Work& work) {
  const RowPart sums = {work.start.unit, work.start.clean_unit, work.start.centre, all.near, all.far};
  const RowMeaning meaning = meaning_by_warp(sums, Unscaled{});
  if (threadIdx.x != 0) return;
  room.clear();
  room.clean_lacks = all.clean_lacks != 0;
  room.noised_lacks = all.noised_lacks != 0;
  const bool empty = !(meaning.clean > 0 && meaning.noised > 0) && !room.clean_lacks && !room.noised_lacks;
  room.undefined = all.undefined != 0 || empty;
  work.clean_label = static_cast<float>(all.label);
  work.start.given = !may_ask || work.start.huge;
  judge<float, true>(sums, meaning, room, work, vocab, rule);
  if (work.next == Next::streams) work.start = start_of(shard.tops, r.rows, row, work.streams);
}

// One block, one row: what its columns here add up to; nothing where nobody will look at it.
__global__ void __launch_bounds__(kRowThreads, 3)
    shard_sums_kernel(const __grid_constant__ Rows r, const __grid_constant__ Shard shard, ShardSums* sums, int64_t first) {
  __shared__ Room room;
  __shared__ Work work;
  const int64_t row = first + blockIdx.x;
  begin(work, shard, r, row);
  const bool wanted = uniform(work.task.kl_weight != 0) || uniform(work.task.ce_weight != 0);
  if (wanted && shard.before != nullptr && threadIdx.x < kWarp)
    conclude(shard.before[row], true, shard, r, row, 1, {}, room, work);
  __syncthreads();
  if (!wanted || (shard.before != nullptr && uniform(work.next) == Next::done)) {
    if (threadIdx.x == 0) sums[row] = ShardSums{};
    return;
  }
  if (threadIdx.x == 0) room.clear();
  __syncthreads();
  const float* a = row_of<float>(r.clean, row);
  const float* b = uniform(work.streams) == Streams::clean ? a : row_of<float>(r.noised, row);
  const RowPart part = gathered(part_of(a, b, r.cols, Unscaled{}, work.start, room), Unscaled{}, room);
  if (threadIdx.x != 0) return;
  const bool labelled = work.task.ce_weight != 0 && work.task.label >= 0;
  sums[row] = {part.near,
               part.far,
               static_cast<double>(room.undefined),
               static_cast<double>(room.clean_lacks),
               static_cast<double>(room.noised_lacks),
               labelled ? a[work.task.label] : 0.0};
}

// One block, one row: its gradients here, and its values.
template <class O>
__global__ void __launch_bounds__(kRowThreads, 3)
    shard_operands_kernel(const __grid_constant__ Rows r, const __grid_constant__ OperandRule rule,
                          const __grid_constant__ Shard shard, const ShardSums* __restrict__ sums,
                          const double* __restrict__ vocab, int64_t first) {
  __shared__ Room room;
  __shared__ Work work;
  const int64_t row = first + blockIdx.x;
  begin(work, shard, r, row);
  do_row<float, O, true, true>(r, rule, row, work, room, [&] {
    if (threadIdx.x < kWarp) {
      const int64_t columns = static_cast<int64_t>(*vocab);
      conclude(shard.before[row], true, shard, r, row, columns, rule, room, work);
      __syncwarp();
      if (uniform(work.next) != Next::done) conclude(sums[row], false, shard, r, row, columns, rule, room, work);
    }
    __syncthreads();
  });
}

}  // namespace

void shard_sums(const LogitRows& clean, const LogitRows& noised, int64_t rows, int64_t cols, const ShardRows& shard,
                const double* before, double* sums, int device, void* stream) {
  const Call call("shard_sums", device, stream);
  const Rows work{clean, noised, {}, {}, rows, cols, shard.labels, 0, shard.kl_weights, shard.ce_weights, nullptr, nullptr};
  launch_wide_rows(call, rows, shard_sums_kernel, work, Shard{shard.tops, reinterpret_cast<const ShardSums*>(before)},
                   reinterpret_cast<ShardSums*>(sums));
}

void shard_operands(const LogitRows& clean, const LogitRows& noised, const LogitRows& first, const LogitRows& second,
                    DType operand_dtype, int64_t rows, int64_t cols, const ShardRows& shard, const double* before,
                    const double* sums, const double* vocab, const OperandOptions& how, double* kl, double* ce, int device,
                    void* stream) {
  const Call call("shard_operands", device, stream);
  const Rows work{clean, noised, first, second, rows, cols, shard.labels, 0, shard.kl_weights, shard.ce_weights, kl, ce};
  const OperandRule rule{how.smoothing, how.cap != 0 ? 1 / how.cap : 0, how.teaches,
                         first.address != nullptr && second.address != nullptr, false};
  with_operand_dtype("shard_operands", operand_dtype, [&](auto t) {
    launch_wide_rows(call, rows, shard_operands_kernel<decltype(t)>, work, rule,
                     Shard{shard.tops, reinterpret_cast<const ShardSums*>(before)}, reinterpret_cast<const ShardSums*>(sums),
                     vocab);
  });
}

}  // namespace fastpost::cuda
