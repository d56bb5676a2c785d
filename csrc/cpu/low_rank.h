// Interface of the low-rank products, one table per instruction set.
#pragma once

#include <cstdint>

#include "dropout.h"

// A matrix in memory: its first element and its row stride in elements.
template <class T>
struct Matrix {
  T* data;
  int64_t stride;
  T* at(int64_t row, int64_t column) const { return data + row * stride + column; }
};

// Rows and columns of the large matrix, and the rank, from 1 to 128.
struct Sizes {
  int64_t rows, columns, rank;
};

struct LowRankTable {
  using In = Matrix<const float>;
  using Out = Matrix<float>;

  // Workspace of a product in floats; `live` is for grad_b only.
  int64_t (*workspace)(const Sizes& sizes, int64_t live);
  // drop: null without dropout.
  void (*project)(In x, In a, Out h, const Sizes&, const Dropout* drop, float* workspace, int threads);
  void (*grad_a)(In dh, In x, Out da, const Sizes&, const Dropout* drop, float* workspace, int threads);
  void (*expand)(In dh, In a, Out out, const Sizes&, bool add, float scale, const Dropout* drop, float* workspace,
                 int threads);
  void (*grad_b)(In dy, In b, In h, Out dh, Out db, const Sizes&, int64_t live, float scale, float* workspace,
                 int threads);
};

// Null for an instruction set without fused multiply-add.
const LowRankTable* low_rank_baseline();
const LowRankTable* low_rank_avx2();
const LowRankTable* low_rank_avx512();
