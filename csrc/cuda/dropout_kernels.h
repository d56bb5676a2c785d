// CUDA kernels of dropout, in one pass: 16 bytes at a time where strides and columns allow it, else single elements.
#pragma once

#include "../branches.h"
#include "device.h"
#include "dropout.h"

namespace {

constexpr int kDropoutThreads = 256, kDropoutLines = kDropoutThreads / kTileLanes;  // 16 threads per tile of a row

CNEXT_DEVICE uint32_t random_bits(const uint32_t (&c)[4], int i) {
  return (i % 2 ? c[i / 2] >> 16 : c[i / 2]) & 0xffffu;
}

// Eight adjacent elements.
template <class T>
struct Eight {
  Words words[sizeof(T) / 2];

  CNEXT_DEVICE void get(const T* from) {
#pragma unroll
    for (int i = 0; i < int(sizeof(T)) / 2; ++i) words[i] = read<Words>(from + i * 16 / int(sizeof(T)));
  }

  CNEXT_DEVICE void put(T* to) const {
#pragma unroll
    for (int i = 0; i < int(sizeof(T)) / 2; ++i) write_global(to + i * 16 / int(sizeof(T)), words[i]);
  }

  CNEXT_DEVICE float value(int i) const {
    if constexpr (sizeof(T) == 4) {
      return from_bits(words[i / 4].word[i % 4]);
    } else {
      return load(T{uint16_t(words[0].word[i / 2] >> (i % 2 * 16))});
    }
  }

  CNEXT_DEVICE void set(int i, float low, float high) {  // elements i and i + 1, i even
    if constexpr (sizeof(T) == 4) {
      words[i / 4].word[i % 4] = bits_of(low);
      words[i / 4].word[i % 4 + 1] = bits_of(high);
    } else {
      words[0].word[i / 2] = pack(T(), low, high);
    }
  }
};

// A thread has eight adjacent columns of some rows, but computes the random bits of eight that are 16 apart: ballots
// exchange them. Every thread votes, also outside of the matrix.
template <class T, bool Add, int Rows>
__global__ void __launch_bounds__(kDropoutThreads) dropout_vectors(const T* __restrict__ x, T* __restrict__ out,
                                                                   const Matrix matrix, const Dropout dropout,
                                                                   const float scale) {
  const int lane = int(threadIdx.x) % kTileLanes, half = int(threadIdx.x) / kTileLanes % 2;
  const int64_t first = int64_t(blockIdx.x) * (kDropoutLines * Rows) + threadIdx.x / kTileLanes;
  const int64_t column = int64_t(blockIdx.y) * kTile + 8 * lane;
  const uint64_t seed = uint64_t(read<int64_t>(dropout.seed));
  Eight<T> from[Rows], had[Rows];
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    const int64_t row = first + r * kDropoutLines;
    if (row < matrix.rows && column < matrix.columns) {
      from[r].get(x + row * matrix.x_stride + column);
      if (Add) had[r].get(out + row * matrix.out_stride + column);
    }
  }
#pragma unroll
  for (int r = 0; r < Rows; ++r) {
    const int64_t row = first + r * kDropoutLines;
    uint32_t c[4] = {(uint32_t(matrix.first_tile) + blockIdx.y) * kTileLanes + uint32_t(lane),
                     uint32_t(matrix.first_row + row), dropout.branch, 0};
    philox(c, uint32_t(seed), uint32_t(seed >> 32));
    uint32_t kept = 0;
#pragma unroll
    for (int i = 0; i < kTile / kTileLanes; ++i) {
      const uint32_t all = ballot(random_bits(c, i) >= dropout.threshold);
      kept = i == lane / 2 ? all >> (16 * half + 8 * (lane % 2)) : kept;
    }
    if (row < matrix.rows && column < matrix.columns) {
#pragma unroll
      for (int i = 0; i < 8; i += 2) {
        float low = kept >> i & 1 ? from[r].value(i) * scale : 0.0f;
        float high = kept >> i & 2 ? from[r].value(i + 1) * scale : 0.0f;
        if (Add) {
          low += had[r].value(i);
          high += had[r].value(i + 1);
        }
        from[r].set(i, low, high);
      }
      from[r].put(out + row * matrix.out_stride + column);
    }
  }
}

// For any strides: a thread has the eight elements whose random bits it computes.
template <class T, bool Add>
__global__ void __launch_bounds__(kDropoutThreads) dropout_elements(const T* __restrict__ x, T* __restrict__ out,
                                                                    const Matrix matrix, const Dropout dropout,
                                                                    const float scale) {
  const int lane = int(threadIdx.x) % kTileLanes;
  const int64_t row = int64_t(blockIdx.x) * kDropoutLines + threadIdx.x / kTileLanes;
  const int64_t column = int64_t(blockIdx.y) * kTile + lane;
  if (row >= matrix.rows) return;
  const uint64_t seed = uint64_t(read<int64_t>(dropout.seed));
  uint32_t c[4] = {(uint32_t(matrix.first_tile) + blockIdx.y) * kTileLanes + uint32_t(lane),
                     uint32_t(matrix.first_row + row), dropout.branch, 0};
  philox(c, uint32_t(seed), uint32_t(seed >> 32));
  const T* from = x + row * matrix.x_stride + column;
  T* to = out + row * matrix.out_stride + column;
  const int64_t left = matrix.columns - column;
  float value[8] = {}, had[8] = {};
#pragma unroll
  for (int i = 0; i < 8; ++i)
    if (i * kTileLanes < left) {
      value[i] = load(read<T>(from + i * kTileLanes));
      if (Add) had[i] = load(read<T>(to + i * kTileLanes));
    }
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const float kept = random_bits(c, i) >= dropout.threshold ? value[i] * scale : 0.0f;
    T result;
    store(result, Add ? had[i] + kept : kept);
    if (i * kTileLanes < left) write(to + i * kTileLanes, result);
  }
}

template <class T, bool Add>
const char* run_dropout(const T* __restrict__ x, T* __restrict__ out, const Matrix& matrix, const Dropout& dropout, CUstream_st* stream) {
  constexpr int rows = sizeof(T) == 4 ? 2 : 4, unit = 16 / int(sizeof(T));
  const bool vectors = matrix.columns % 8 == 0 && matrix.x_stride % unit == 0 && matrix.out_stride % unit == 0 &&
                       reinterpret_cast<uintptr_t>(x) % 16 == 0 && reinterpret_cast<uintptr_t>(out) % 16 == 0;
  const int64_t lines = vectors ? kDropoutLines * rows : kDropoutLines;
  const int64_t tall = (matrix.rows + lines - 1) / lines, wide = (matrix.columns + kTile - 1) / kTile;
  const auto kernel = vectors ? dropout_vectors<T, Add, rows> : dropout_elements<T, Add>;
  const float scale = float(65536.0 / (65536.0 - dropout.threshold));
  const dim3 grid{unsigned(tall), unsigned(wide)};
  return launch(kernel, grid, kDropoutThreads, 0, stream, x, out, matrix, dropout, scale);
}

const char* drop(char type, bool add, const void* x, void* out, const Matrix& matrix, const Dropout& dropout,
                 CUstream_st* stream) {
  if (matrix.rows == 0 || matrix.columns == 0) return nullptr;
  const auto run = [&](auto element) {
    using T = decltype(element);
    const T* from = static_cast<const T*>(x);
    T* to = static_cast<T*>(out);
    return add ? run_dropout<T, true>(from, to, matrix, dropout, stream)
               : run_dropout<T, false>(from, to, matrix, dropout, stream);
  };
  switch (type) {
    case 'f': return run(float());
    case 'b': return run(bf16());
    case 'h': return run(f16());
    default: return "type must be f, b or h";
  }
}

}  // namespace
