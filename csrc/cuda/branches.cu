// Dropout on the way into the branches: one pass, the mask made from its seed. Nothing waits for the host, and the seed
// is read on the device, so that a captured graph draws anew where its seed is drawn anew.
#include "../branches.h"

#include "dropout.h"

namespace {

constexpr int kThreads = 256, kRows = 16;  // a block works on a tile of columns and 16 rows

// Sixteen threads have a row's tile between them. Each makes four words of bits, and has eight elements, 16 apart: in
// every step the sixteen touch neighbours.
template <class T, bool Add>
__global__ void __launch_bounds__(kThreads) dropout_kernel(const T* __restrict__ x, T* __restrict__ out, Matrix matrix,
                                                           Dropout dropout, float scale) {
  const int64_t row = int64_t(blockIdx.x) * kRows + threadIdx.x / kTileLanes;
  const int64_t first = int64_t(blockIdx.y) * kTile + threadIdx.x % kTileLanes;
  if (row >= matrix.rows) return;
  const uint64_t seed = uint64_t(*dropout.seed);
  uint32_t c[4] = {blockIdx.y * kTileLanes + threadIdx.x % kTileLanes, uint32_t(row), dropout.branch, 0};
  philox(c, uint32_t(seed), uint32_t(seed >> 32));
  x += row * matrix.x_stride;
  out += row * matrix.out_stride;
#pragma unroll
  for (int i = 0; i < kTile / kTileLanes; ++i) {
    const int64_t k = first + i * kTileLanes;
    if (k >= matrix.columns) return;
    const uint32_t random = (i % 2 ? c[i / 2] >> 16 : c[i / 2]) & 0xffffu;
    const float kept = random >= dropout.threshold ? load(x[k]) * scale : 0.0f;
    store(out[k], Add ? load(out[k]) + kept : kept);
  }
}

template <class T>
const char* launch(bool add, const void* x, void* out, const Matrix& matrix, const Dropout& dropout,
                   cudaStream_t stream) {
  const dim3 grid(unsigned((matrix.rows + kRows - 1) / kRows), unsigned((matrix.columns + kTile - 1) / kTile));
  const float scale = float(65536.0 / (65536.0 - dropout.threshold));
  const auto kernel = add ? dropout_kernel<T, true> : dropout_kernel<T, false>;
  kernel<<<grid, kThreads, 0, stream>>>(static_cast<const T*>(x), static_cast<T*>(out), matrix, dropout, scale);
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace

const char* launch_dropout(char type, bool add, const void* x, void* out, const Matrix& matrix, const Dropout& dropout,
                           CUstream_st* stream) {
  if (matrix.rows == 0 || matrix.columns == 0) return nullptr;
  switch (type) {
    case 'f': return launch<float>(add, x, out, matrix, dropout, stream);
    case 'b': return launch<bf16>(add, x, out, matrix, dropout, stream);
    case 'h': return launch<f16>(add, x, out, matrix, dropout, stream);
    default: return "type must be f, b or h";
  }
}
