// Products of which one side is the branches' rank: what the kernels of low_rank.cpp give to module.cpp.
#pragma once

#include <cstdint>

#include "dropout.h"

// A matrix in memory: its first element, and the elements from row to row.
template <class T>
struct Matrix {
  T* data;
  int64_t stride;
  T* at(int64_t row, int64_t column) const { return data + row * stride + column; }
};

// Of the large matrix, and the rank, from 1 to 128.
struct Sizes {
  int64_t rows, columns, rank;
};

struct LowRankTable {
  using In = Matrix<const float>;
  using Out = Matrix<float>;

  // Floats of workspace that a pass needs; `live` is of gather alone.
  int64_t (*workspace)(const Sizes& sizes, int64_t live);
  // drop: null where nothing is dropped.
  void (*project)(In x, In a, Out h, const Sizes&, const Dropout* drop, float* workspace, int threads);
  void (*weigh)(In dh, In x, Out da, const Sizes&, const Dropout* drop, float* workspace, int threads);
  void (*spread)(In dh, In a, Out out, const Sizes&, bool add, float scale, const Dropout* drop, float* workspace,
                 int threads);
  void (*gather)(In dy, In b, In h, Out dh, Out db, const Sizes&, int64_t live, float scale, float* workspace,
                 int threads);
};

// Null for an instruction set without fused multiply-add.
const LowRankTable* low_rank_baseline();
const LowRankTable* low_rank_avx2();
const LowRankTable* low_rank_avx512();
