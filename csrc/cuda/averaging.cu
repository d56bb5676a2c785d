// CUDA kernels of the averaging ops: one pass over lists of tensors, without temporaries or synchronization.
//
// The lists are a kernel argument (up to 32 KiB), so a launch needs no table in device memory and can be captured in a
// graph. Each block finds its tensor by bisection. Statistics are reduced per block, and then by the tensor's last
// block in the order of the blocks: they do not depend on which block came last.
#include "../averaging.h"

#include <cstddef>
#include <utility>

#include "../reductions.h"
#include "foreach.h"

#if CUDART_VERSION < 12010
#error "cnext needs CUDA 12.1 or newer: older ones limit kernel arguments to 4 KB"
#endif

namespace {

constexpr int kThreads = 256, kVector = 4, kArgumentBytes = 32000;

template <int Operands>
struct Batch {
  static constexpr int capacity = (kArgumentBytes - int(sizeof(Scalars) + sizeof(Statistics)) - 64) / (8 * Operands + 12);
  int64_t addresses[Operands][capacity];
  int64_t sizes[capacity];
  int32_t first_block[capacity + 1];  // of each tensor, within this launch
  int32_t tensors;
  Scalars scalars;
  Statistics statistics;  // of this launch's tensors and blocks
};

template <class T>
struct alignas(sizeof(T) * kVector) Vector {
  T lane[kVector];
};

template <class Rule, class... T>
__device__ __forceinline__ void element(const Rule& rule, double* totals, T&... lane) {
  float x[] = {load(lane)...};
  float s[Rule::columns + 1];
  rule(x, s);
  int k = 0;
  ((k < Rule::outputs ? store(lane, x[k]) : void(), ++k), ...);
#pragma unroll
  for (int c = 0; c < Rule::columns; ++c) totals[c] = combine(Rule::kind(c), totals[c], double(s[c]));
}

template <class Rule, class... T>
__device__ __forceinline__ void vector_step(const Rule& rule, double* totals, int64_t i, T*... p) {
  auto each = [&](Vector<T>... v) {
#pragma unroll
    for (int j = 0; j < kVector; ++j) element(rule, totals, v.lane[j]...);
    int k = 0;
    ((k < Rule::outputs ? void(*reinterpret_cast<Vector<T>*>(p + i) = v) : void(), ++k), ...);
  };
  each(*reinterpret_cast<const Vector<T>*>(p + i)...);
}

template <class Rule, class... T>
__device__ __forceinline__ void scalar_step(const Rule& rule, double* totals, int64_t i, T*... p) {
  auto each = [&](T... v) {
    element(rule, totals, v...);
    int k = 0;
    ((k < Rule::outputs ? void(p[i] = v) : void(), ++k), ...);
  };
  each(p[i]...);
}

template <class Rule, class... T>
__device__ __forceinline__ void work(const Rule& rule, double* totals, int64_t count, T*... p) {
  const bool aligned = ((reinterpret_cast<uintptr_t>(p) % sizeof(Vector<T>) == 0) && ...);
  const int64_t vectors = aligned ? count / kVector : 0;
  for (int64_t i = threadIdx.x; i < vectors; i += kThreads) vector_step(rule, totals, i * kVector, p...);
  for (int64_t i = vectors * kVector + threadIdx.x; i < count; i += kThreads) scalar_step(rule, totals, i, p...);
}

// Reduces `totals` over the block into thread 0, in a fixed order.
template <class Rule>
__device__ void reduce_block(double* totals) {
  __shared__ double shared[Rule::columns][kThreads / 32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  for (int c = 0; c < Rule::columns; ++c) {
    for (int d = 16; d; d /= 2)
      totals[c] = combine(Rule::kind(c), totals[c], __shfl_down_sync(0xffffffffu, totals[c], d));
    if (lane == 0) shared[c][warp] = totals[c];
  }
  __syncthreads();
  if (threadIdx.x == 0)
    for (int c = 0; c < Rule::columns; ++c)
      for (int w = 1; w < kThreads / 32; ++w) totals[c] = combine(Rule::kind(c), totals[c], shared[c][w]);
}

template <class Rule>
__device__ void reduce_tensor(double* totals, const Statistics& statistics, int tensor, int first, int blocks) {
  __shared__ bool last;
  reduce_block<Rule>(totals);
  if (threadIdx.x == 0) {
    for (int c = 0; c < Rule::columns; ++c) statistics.partial[int64_t(blockIdx.x) * Rule::columns + c] = totals[c];
    __threadfence();
    last = atomicAdd(&statistics.tickets[tensor], 1u) == uint32_t(blocks - 1);
  }
  __syncthreads();
  if (!last) return;
  __threadfence();
  for (int c = 0; c < Rule::columns; ++c) totals[c] = identity<double>(Rule::kind(c));
  for (int b = threadIdx.x; b < blocks; b += kThreads)
    for (int c = 0; c < Rule::columns; ++c)
      totals[c] = combine(Rule::kind(c), totals[c], __ldcg(&statistics.partial[int64_t(first + b) * Rule::columns + c]));
  __syncthreads();
  reduce_block<Rule>(totals);
  if (threadIdx.x == 0) {
    for (int c = 0; c < Rule::columns; ++c) statistics.columns[int64_t(tensor) * Rule::columns + c] = totals[c];
    statistics.tickets[tensor] = 0;
  }
}

template <class Rule, class... T, std::size_t... I>
__device__ __forceinline__ void body(const Batch<sizeof...(T)>& batch, std::index_sequence<I...>) {
  const int block = int(blockIdx.x);
  int low = 0, high = batch.tensors;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (batch.first_block[middle] <= block ? low : high) = middle;
  }
  const int first = batch.first_block[low], blocks = batch.first_block[low + 1] - first;
  const int64_t begin = int64_t(block - first) * kBlockElements, left = batch.sizes[low] - begin;
  const double* row = batch.scalars.rows ? batch.scalars.rows + low * batch.scalars.row_width : nullptr;
  const Rule rule(batch.scalars.values, row);
  double totals[Rule::columns + 1];
  for (int c = 0; c < Rule::columns; ++c) totals[c] = identity<double>(Rule::kind(c));
  work(rule, totals, left < kBlockElements ? left : kBlockElements, reinterpret_cast<T*>(batch.addresses[I][low]) + begin...);
  if constexpr (Rule::columns > 0) reduce_tensor<Rule>(totals, batch.statistics, low, first, blocks);
}

template <class Rule, class... T>
__global__ void __launch_bounds__(kThreads) foreach_kernel(const __grid_constant__ Batch<sizeof...(T)> batch) {
  body<Rule, T...>(batch, std::index_sequence_for<T...>());
}

template <class Rule, class... T>
const char* launch(const Lists& lists, const Scalars& scalars, const Statistics& statistics, Stream stream) {
  constexpr int operands = int(sizeof...(T));
  static_assert(operands == Rule::operands && sizeof(Batch<operands>) <= 32764, "one type per operand, within the limit");
  static thread_local Batch<operands> batch;  // as large as the argument, so not on the stack
  int64_t done_tensors = 0, done_blocks = 0;
  for (int64_t t = 0; t < lists.tensors;) {
    int32_t blocks = 0;
    int n = 0;
    // A tensor without elements takes one block, which writes its statistics.
    for (; t < lists.tensors && n < Batch<operands>::capacity; ++t, ++n) {
      const int64_t needed = lists.sizes[t] > 0 ? (lists.sizes[t] + kBlockElements - 1) / kBlockElements : 1;
      if (blocks + needed > INT32_MAX) break;
      for (int k = 0; k < operands; ++k) batch.addresses[k][n] = lists.addresses[k * lists.tensors + t];
      batch.sizes[n] = lists.sizes[t];
      batch.first_block[n] = blocks;
      blocks += int32_t(needed);
    }
    if (n == 0) return "a tensor has more than 2^43 elements";
    batch.first_block[n] = blocks;
    batch.tensors = n;
    batch.scalars = scalars;
    if (scalars.rows) batch.scalars.rows += done_tensors * scalars.row_width;
    if (statistics.columns)
      batch.statistics = {statistics.columns + done_tensors * Rule::columns, statistics.partial + done_blocks * Rule::columns,
                      statistics.tickets + done_tensors};
    foreach_kernel<Rule, T...><<<unsigned(blocks), kThreads, 0, stream>>>(batch);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess) return cudaGetErrorString(error);
    done_tensors += n;
    done_blocks += blocks;
  }
  return nullptr;
}

template <class Rule, class... T>
constexpr Kernel kernel(const char* name) {
  return {signature<Rule, letter<T>...>(name), launch<Rule, T...>};
}

constexpr Kernel kKernels[] = {
#define CNEXT_KERNEL(name, ...) kernel<__VA_ARGS__>(name),
#include "../averaging.kernels.inc"
#undef CNEXT_KERNEL
};

}  // namespace

KernelTable averaging_kernels() { return {kKernels, int(sizeof(kKernels) / sizeof(kKernels[0]))}; }
