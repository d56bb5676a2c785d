// The skinny products of the branches on the GPU: what branches.cu gives to module.cpp. keep is the mask of branches.h,
// f = 65536 / (65536 - threshold); with threshold 0 nothing is dropped, and no seed is needed.
//
// type: b bfloat16, h float16. The wide matrices (x, a, da, dy, bt, out) have columns and strides that are multiples of
// 8, and addresses that are multiples of 16 bytes; the narrow ones (h, dh, db) any stride. Each returns the text of an
// error, or null.
#pragma once

#include <cstdint>

#include "dropout.h"

struct Narrow {  // a matrix, its rows `stride` elements apart
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
  int live;  // of gather: columns of h, up to the rank
};

constexpr int kMaxRank = 128;

using Stream = struct CUstream_st*;  // cudaStream_t

// h (rows, rank) = f (keep o x) a^T.
const char* launch_project(char type, const Shape& shape, Wide x, Wide a, Narrow h, const Dropout& dropout,
                           float* workspace, Stream stream);
// da (rank, columns) = f dh^T (keep o x).
const char* launch_weigh(char type, const Shape& shape, Narrow dh, Wide x, Wide da, const Dropout& dropout,
                         float* workspace, Stream stream);
// out (rows, columns) = keep o (f scale dh a) + bias, plus what out had where `add`; bias: (columns,) or null.
const char* launch_spread(char type, const Shape& shape, Narrow dh, Wide a, const void* bias, Wide out, bool add,
                          float scale, const Dropout& dropout, Stream stream);
// dh (rows, rank) = scale dy bt^T and db (columns, live) = scale dy^T h, in one pass over dy.
const char* launch_gather(char type, const Shape& shape, Wide dy, Wide bt, Narrow h, Narrow dh, Narrow db, float scale,
                          float* workspace, Stream stream);
// Bytes of workspace that "project", "weigh", "spread" or "gather" takes on the current device; -1 for other words.
int64_t workspace_bytes(const char* what, const Shape& shape);
