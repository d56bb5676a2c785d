// Interface of the dropout kernels.
#pragma once

#include <cstdint>

struct Dropout {
  const int64_t* seed;  // one, on the device
  uint32_t threshold;   // in units of 2^-16
  uint32_t branch;
};

struct Matrix {
  int64_t rows, columns;
  int64_t x_stride, out_stride;           // between rows, in elements
  int64_t first_row = 0, first_tile = 0;  // its position in the mask; a tile is 128 columns
};

// type: f float32, b bfloat16, h float16. out = drop(x), or out += drop(x) where `add`. Returns an error message, or
// null.
const char* launch_dropout(char type, bool add, const void* x, void* out, const Matrix& matrix, const Dropout& dropout,
                           struct CUstream_st* stream);
