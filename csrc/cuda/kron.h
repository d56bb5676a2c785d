// Interface of the Kronecker ops (cnext/ops/kron.py): groups of matrices side by side, on a stream. Independent of
// Python and torch.
#pragma once

#include <cstdint>

using Stream = struct CUstream_st*;  // cudaStream_t, without a CUDA header

constexpr int kMostRank = 64;  // of a group

struct KronOp {
  const char* name;
  int part_lists;
  const char* group_lists;  // n rows (n,), r values (r,), f factor (r, r), float32; d factor in float64
  int scalars;
};

constexpr KronOp kKronOps[] = {
    {"kron_accumulate", 1, "nf", 0}, {"kron_pull", 2, "nrf", 1}, {"kron_merge", 2, "ndnd", 2}};

struct KronCall {
  char letter;  // of the matrices: f float32, b bfloat16, h float16
  const int64_t* groups;  // (group_count, 4): n, r, first matrix, matrices
  int64_t group_count;
  const int64_t* parts;  // (part_count, 3): rank, and the strides along n and along the rank: (rank, 1) or (1, n)
  int64_t part_count;
  const int64_t* part_addresses;   // (part_lists, part_count), in the op's order
  const int64_t* group_addresses;  // (group_lists, group_count)
  const double* scalars;
  void* workspace;
};

// Both return an error message, or null. `bytes`: of the workspace that the op needs for the groups.
const char* kron_workspace(const char* op, const int64_t* groups, int64_t group_count, int64_t* bytes);
const char* launch_kron(const char* op, const KronCall& call, Stream stream);
