// Interface of the low-rank products. keep is the dropout mask of branches.h, f = 65536 / (65536 - threshold);
// threshold 0 means no dropout, and needs no seed.
//
// type: b bfloat16, h float16. The wide matrices (x, a, da, dy, bt, out) have columns and strides that are multiples of
// 8, and addresses that are multiples of 16 bytes; the narrow ones (h, dh, db) any stride. Each returns an error
// message, or null.
#pragma once

#include <cstdint>

#include "dropout.h"

struct Narrow {  // stride: between rows, in elements
  void* data;
  int64_t stride;
};

struct Wide {
  void* data;
  int64_t stride;
};

struct Shape {
  int64_t rows, columns;
  int rank;  // 1 to 128
  int live;  // of grad_b: columns of h, up to the rank
};

constexpr int kMaxRank = 128;

using Stream = struct CUstream_st*;  // cudaStream_t

// h (rows, rank) = f (keep o x) a^T.
const char* launch_project(char type, const Shape& shape, Wide x, Wide a, Narrow h, const Dropout& dropout,
                           float* workspace, Stream stream);
// da (rank, columns) = f dh^T (keep o x).
const char* launch_grad_a(char type, const Shape& shape, Narrow dh, Wide x, Wide da, const Dropout& dropout,
                         float* workspace, Stream stream);
// out (rows, columns) = keep o (f scale dh a) + bias, plus what out had where `add`; bias: (columns,) or null.
const char* launch_expand(char type, const Shape& shape, Narrow dh, Wide a, const void* bias, Wide out, bool add,
                          float scale, const Dropout& dropout, Stream stream);
// dh (rows, rank) = scale dy bt^T and db (columns, live) = scale dy^T h, in one pass over dy.
const char* launch_grad_b(char type, const Shape& shape, Wide dy, Wide bt, Narrow h, Narrow dh, Narrow db, float scale,
                          float* workspace, Stream stream);
// Bytes of workspace that "project", "grad_a", "expand" or "grad_b" needs on the current device; -1 for other names.
int64_t workspace_bytes(const char* what, const Shape& shape);
