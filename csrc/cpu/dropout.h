// Interface of the dropout kernels, one table per instruction set.
#pragma once

#include <cstdint>

struct Dropout {
  uint64_t seed;
  uint32_t threshold;  // in units of 2^-16
  uint32_t branch;
  uint32_t first_tile;  // of 128 columns: the row's first column in a larger matrix
};

// x and out: one row of `columns` elements; row: its number in the larger matrix.
using DropoutRow = void (*)(const void* x, void* out, int64_t row, int64_t columns, const Dropout& dropout);

struct DropoutTable {
  DropoutRow dropout[4];      // out = drop(x), by type: float32, bfloat16, float16, float64
  DropoutRow dropout_add[4];  // out += drop(x)
};

DropoutTable branches_baseline();
DropoutTable branches_avx2();
DropoutTable branches_avx512();
