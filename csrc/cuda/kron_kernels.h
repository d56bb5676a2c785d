// CUDA kernels of the Kronecker ops, and their launches: many groups in one, without synchronization.
//
// The tables are a kernel argument (up to 32 KiB), so that a launch can be captured in a graph. A block finds its group
// by bisection, and holds a tile of its rows in shared memory, in float32 and transposed: column j of the group is at
// j * pitch. Every thread moves pieces of 16 bytes, single elements where an address or the end of a matrix asks for
// it. Sums are in a fixed order: results are deterministic.
#pragma once

#include <algorithm>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <iterator>

#include "device.h"
#include "kron.h"

namespace {

constexpr int kThreads = 256, kGroups = 320, kParts = 640;  // of a launch
constexpr int kChunk = 1024, kAccumulateRows = 256;  // rows of a block and of a tile
constexpr int kPullRows = 128, kMergeRows = 16, kMergeThreads = 32;
constexpr int kSide = 8, kSquare = kSide * kSide;  // a thread's block of a factor
constexpr int kPad = 4;  // of a tile's columns: neighbors then start in other banks, and stay aligned to 16 bytes

template <int PartLists, int GroupLists>
struct Batch {
  int64_t part[PartLists][kParts], group[GroupLists][kGroups];  // addresses
  int64_t n[kGroups], partial[kGroups];  // partial: of each group's first block, in the workspace
  int32_t first_block[kGroups + 1], first_part[kGroups + 1];
  uint8_t r[kGroups], rank[kParts], transposed[kParts];
  double scalars[2];
  float* workspace;
  int32_t groups;
};

struct alignas(16) Quad {
  float value[4];
};

struct alignas(8) Owner {  // of a column of a group: its matrix, and that one's first column
  int32_t part, first;
};

CNEXT_HD int squares(int r) {  // blocks of kSide x kSide on and above the diagonal of a factor
  const int side = (r + kSide - 1) / kSide;
  return side * (side + 1) / 2;
}

// The place of a block of a factor, counted row by row.
CNEXT_DEVICE void place(int square, int r, int& row, int& column) {
  const int side = (r + kSide - 1) / kSide;
  row = 0;
  for (; square >= side - row; ++row) square -= side - row;
  column = row + square;
}

template <class B>
CNEXT_DEVICE int find_group(const B& b) {
  int low = 0, high = b.groups;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (b.first_block[middle] <= int(blockIdx.x) ? low : high) = middle;
  }
  return low;
}

template <class B>
CNEXT_DEVICE void find_owners(Owner* owners, const B& b, int group) {
  for (int column = int(threadIdx.x); column < b.r[group]; column += int(blockDim.x)) {
    Owner owner{b.first_part[group], 0};
    for (; owner.first + b.rank[owner.part] <= column; ++owner.part) owner.first += b.rank[owner.part];
    write(owners + column, owner);
  }
}

// ---- Pieces of 16 bytes

template <class T>
constexpr int kPiece = 16 / int(sizeof(T));

template <class T>
CNEXT_DEVICE float value(const Words& words, int i) {
  if constexpr (sizeof(T) == 4) {
    return from_bits(words.word[i]);
  } else {
    return load(T{uint16_t(words.word[i / 2] >> (i % 2 * 16))});
  }
}

CNEXT_DEVICE uint32_t bits(float x) { return bits_of(x); }
template <class T>
CNEXT_DEVICE uint32_t bits(T x) {
  return x.bits;
}

template <class T>
CNEXT_DEVICE void put(Words& words, int i, T x) {
  if constexpr (sizeof(T) == 4) {
    words.word[i] = bits(x);
  } else {
    const int shift = i % 2 * 16;
    words.word[i / 2] = (words.word[i / 2] & ~(0xffffu << shift)) | bits(x) << shift;
  }
}

// Adjacent elements of a matrix: rows of one column where it is transposed, else columns of a row and of the next one.
struct Piece {
  int row, column, first, rank;  // row: in the tile; column, first: in the group
  int valid;                     // elements that exist
  bool transposed;
  int part;
  int64_t at;  // in the matrix
};

// Where a piece goes in a tile, in one register: row, column, first column, rank and layout.
CNEXT_DEVICE uint32_t packed(const Piece& p) {
  return uint32_t(p.row | p.column << 8 | p.first << 16 | p.rank << 24) | uint32_t(p.transposed) << 31;
}

CNEXT_DEVICE Piece unpacked(uint32_t place) {
  Piece p{};
  p.row = int(place & 255);
  p.column = int(place >> 8 & 255);
  p.first = int(place >> 16 & 255);
  p.rank = int(place >> 24 & 127);
  p.transposed = place >> 31;
  return p;
}

template <class T, int Rows, class B>
CNEXT_DEVICE Piece piece(const B& b, const Owner* owners, int64_t n, int64_t row, int rows, int index) {
  constexpr int each = Rows / kPiece<T>;  // pieces of a column
  const Owner owner = read<Owner>(owners + index / each);
  Piece p;
  p.part = owner.part;
  p.first = owner.first;
  p.rank = b.rank[owner.part];
  p.transposed = b.transposed[owner.part];
  if (p.transposed) {
    p.column = index / each;
    p.row = index % each * kPiece<T>;
    p.at = (p.column - p.first) * n + row + p.row;
    p.valid = rows - p.row;
  } else {
    const int element = (index - p.first * each) * kPiece<T>;
    p.row = element / p.rank;
    p.column = p.first + element % p.rank;
    p.at = row * p.rank + element;
    p.valid = rows * p.rank - element;
  }
  p.valid = p.valid < 0 ? 0 : p.valid < kPiece<T> ? p.valid : kPiece<T>;
  return p;
}

template <class T>
CNEXT_DEVICE bool is_whole(const T* at, int valid) {
  return valid == kPiece<T> && reinterpret_cast<uintptr_t>(at) % 16 == 0;
}

template <class T>
CNEXT_DEVICE Words fetch(const T* from, int valid) {
  if (is_whole(from, valid)) return read<Words>(from);
  Words words{};
#pragma unroll
  for (int i = 0; i < kPiece<T>; ++i)
    if (i < valid) put(words, i, read<T>(from + i));
  return words;
}

template <class T>
CNEXT_DEVICE void send(T* to, const Words& words, int valid) {
  if (is_whole(to, valid)) return write_global(to, words);
#pragma unroll
  for (int i = 0; i < kPiece<T>; ++i)
    if (i < valid) {
      T x;
      store(x, value<T>(words, i));
      write(to + i, x);
    }
}

// work(i, at) for the elements i of a piece, with their place in the tile. Those after the end have one in it too.
template <int Count, class Work>
CNEXT_DEVICE void along_rows(const Piece& p, int pitch, const Work& work) {
  int row = p.row, column = p.column;
#pragma unroll
  for (int i = 0; i < Count; ++i) {
    work(i, column * pitch + row);
    if (++column == p.first + p.rank) column = p.first, ++row;
  }
}

// ---- rows += row sums of G^2, factor += G^T G

// On an H200, r / 2 multiply-adds an element (67 TFLOP/s) take as long as its 4 or 2 bytes (4.8 TB/s) at r = 56 or 28:
// memory bounds smaller ranks, arithmetic larger ones. A thread has an 8 x 8 block of the factor and some rows, 16
// reads of 16 bytes of shared memory for 256 multiply-adds.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) accumulate_kernel(const __grid_constant__ Batch<1, 2> b) {
  constexpr int pitch = kAccumulateRows + kPad, together = 3;
  static_assert(kAccumulateRows == kThreads, "a thread has a row");
  float* const tile = reinterpret_cast<float*>(shared_memory());
  Owner* const owners = reinterpret_cast<Owner*>(tile + kMostRank * pitch);
  const int group = find_group(b), r = b.r[group], thread = int(threadIdx.x);
  const int64_t n = b.n[group], block = int(blockIdx.x) - b.first_block[group];
  const int64_t begin = block * kChunk, end = begin + kChunk < n ? begin + kChunk : n;
  float* const row_sums = reinterpret_cast<float*>(b.group[0][group]);
  const int all = squares(r);
  int slices = 32;
  while (all * slices > kThreads) slices /= 2;
  const int slice = thread % slices;
  const bool working = thread / slices < all;
  int square_row = 0, square_column = 0;
  if (working) place(thread / slices, r, square_row, square_column);
  float sums[kSide][kSide] = {};
  find_owners(owners, b, group);
  for (int64_t row = begin; row < end; row += kAccumulateRows) {
    const int rows = int(end - row < kAccumulateRows ? end - row : kAccumulateRows);
    const int count = r * (kAccumulateRows / kPiece<T>);
    __syncthreads();  // the owners are written, and the last tile is read
    for (int index = thread; index < count; index += together * kThreads) {
      uint32_t places[together];
      Words words[together];
#pragma unroll
      for (int k = 0; k < together; ++k)
        if (index + k * kThreads < count) {
          const Piece p = piece<T, kAccumulateRows>(b, owners, n, row, rows, index + k * kThreads);
          words[k] = fetch(reinterpret_cast<const T*>(b.part[0][p.part]) + p.at, p.valid);
          places[k] = packed(p);
        }
#pragma unroll
      for (int k = 0; k < together; ++k) {
        if (index + k * kThreads >= count) continue;
        const Piece p = unpacked(places[k]);
        if (!p.transposed) {
          along_rows<kPiece<T>>(p, pitch, [&](int i, int at) { write(tile + at, value<T>(words[k], i)); });
          continue;
        }
#pragma unroll
        for (int i = 0; i < kPiece<T>; i += 4)
          write(tile + p.column * pitch + p.row + i, Quad{{value<T>(words[k], i), value<T>(words[k], i + 1),
                                                           value<T>(words[k], i + 2), value<T>(words[k], i + 3)}});
      }
    }
    __syncthreads();
    float sum = 0;
    if (thread < rows)
      for (int column = 0; column < r; ++column) {
        const float x = read<float>(tile + column * pitch + thread);
        sum = fmaf(x, x, sum);
      }
    if (thread < rows && sum <= FLT_MAX) {
      write(row_sums + row + thread, read<float>(row_sums + row + thread) + sum);
    } else {  // beyond the end, or not finite
      for (int column = 0; column < r; ++column) write(tile + column * pitch + thread, 0.0f);
    }
    __syncthreads();
    if (!working) continue;
    for (int quad = slice; quad < kAccumulateRows / 4; quad += slices) {
      const float* const left = tile + square_row * kSide * pitch + 4 * quad;
      const float* const right = tile + square_column * kSide * pitch + 4 * quad;
      Quad x[kSide];
#pragma unroll
      for (int i = 0; i < kSide; ++i) x[i] = read<Quad>(left + i * pitch);
#pragma unroll
      for (int j = 0; j < kSide; ++j) {
        const Quad y = read<Quad>(right + j * pitch);
#pragma unroll
        for (int i = 0; i < kSide; ++i)
#pragma unroll
          for (int k = 0; k < 4; ++k) sums[i][j] = fmaf(x[i].value[k], y.value[k], sums[i][j]);
      }
    }
  }
  constexpr int stride = kThreads + 1;
  static_assert(kSquare * stride <= kMostRank * pitch, "the sums of all threads take the tile's place");
  __syncthreads();
  if (working)
#pragma unroll
    for (int i = 0; i < kSquare; ++i) write(tile + i * stride + thread, sums[i / kSide][i % kSide]);
  __syncthreads();
  float* const partial = b.workspace + b.partial[group] + block * all * kSquare;
  for (int i = thread; i < all * kSquare; i += kThreads) {
    const float* const from = tile + i % kSquare * stride + i / kSquare * slices;
    float sum = 0;
    for (int k = 0; k < slices; ++k) sum += read<float>(from + k);
    write(partial + i, sum);
  }
}

// Adds the blocks' sums to the factors, in order. A block per group and kThreads sums.
__global__ void __launch_bounds__(kThreads) combine_kernel(const __grid_constant__ Batch<1, 2> b) {
  const int group = int(blockIdx.x), r = b.r[group], at = int(blockIdx.y) * kThreads + int(threadIdx.x);
  const int size = squares(r) * kSquare, blocks = b.first_block[group + 1] - b.first_block[group];
  if (at >= size) return;
  int row, column;
  place(at / kSquare, r, row, column);
  row = row * kSide + at % kSquare / kSide;
  column = column * kSide + at % kSide;
  if (row > column || column >= r) return;
  const float* const partial = b.workspace + b.partial[group] + at;
  double sum = 0;
#pragma unroll 4
  for (int64_t k = 0; k < blocks; ++k) sum += double(read<float>(partial + k * size));
  float* const factor = reinterpret_cast<float*>(b.group[1][group]);
  const auto add = [&](float* to) { write(to, float(double(read<float>(to)) + sum)); };
  add(factor + row * r + column);
  if (row != column) add(factor + column * r + row);
}

// ---- theta_i <- theta_start_i + (theta_i - theta_start_i) Q diag(1 / (1 + weight rows[i] values)) Q^T

constexpr int kPullPitch = kPullRows + kPad;
constexpr int padded(int r) { return (r + kSide - 1) / kSide * kSide; }
constexpr int pull_bytes(int r) { return padded(r) * (kPullPitch + padded(r)) * 4 + kMostRank * int(sizeof(Owner)); }

// A block has a tile of rows, a thread 4 rows and 8 columns of both products: 2 r multiply-adds an element, while 12 or
// 6 bytes move. By the rates above, arithmetic bounds it from r = 42 on in float32, from r = 21 in the 16-bit types.
template <class T>
__global__ void __launch_bounds__(kThreads, 2) pull_kernel(const __grid_constant__ Batch<2, 3> b) {
  constexpr int pitch = kPullPitch, together = 2;
  static_assert(kPullRows / 4 * (kMostRank / kSide) == kThreads, "every thread has one block of the product");
  Owner* const owners = reinterpret_cast<Owner*>(shared_memory());
  float* const tile = reinterpret_cast<float*>(owners + kMostRank);
  const int group = find_group(b), r = b.r[group], thread = int(threadIdx.x);
  const int width = (r + kSide - 1) / kSide * kSide;
  float* const vectors = tile + width * pitch;  // with zeros up to the width
  const int64_t n = b.n[group], row = int64_t(int(blockIdx.x) - b.first_block[group]) * kPullRows;
  const int rows = int(n - row < kPullRows ? n - row : kPullRows);
  const int count = r * (kPullRows / kPiece<T>);
  const float* const row_sums = reinterpret_cast<const float*>(b.group[0][group]);
  const float* const values = reinterpret_cast<const float*>(b.group[1][group]);
  const float* const given = reinterpret_cast<const float*>(b.group[2][group]);
  find_owners(owners, b, group);
  __syncthreads();
  for (int index = thread; index < count; index += together * kThreads) {
    Piece pieces[together];
    Words now[together], start[together];
#pragma unroll
    for (int k = 0; k < together; ++k)
      if (index + k * kThreads < count) {
        const Piece p = pieces[k] = piece<T, kPullRows>(b, owners, n, row, rows, index + k * kThreads);
        now[k] = fetch(reinterpret_cast<const T*>(b.part[0][p.part]) + p.at, p.valid);
        start[k] = fetch(reinterpret_cast<const T*>(b.part[1][p.part]) + p.at, p.valid);
      }
#pragma unroll
    for (int k = 0; k < together; ++k) {
      if (index + k * kThreads >= count) continue;
      const Piece& p = pieces[k];
      const auto gap = [&](int i) { return value<T>(now[k], i) - value<T>(start[k], i); };
      if (!p.transposed) {
        along_rows<kPiece<T>>(p, pitch, [&](int i, int at) { write(tile + at, gap(i)); });
        continue;
      }
#pragma unroll
      for (int i = 0; i < kPiece<T>; i += 4)
        write(tile + p.column * pitch + p.row + i, Quad{{gap(i), gap(i + 1), gap(i + 2), gap(i + 3)}});
    }
  }
  for (int i = thread; i < width * width; i += kThreads) {
    const int from = i / width, to = i % width;
    write(vectors + i, from < r && to < r ? read<float>(given + from * r + to) : 0.0f);
  }
  __syncthreads();
  const int quad = thread % (kPullRows / 4) * 4, column = thread / (kPullRows / 4) * kSide;
  float sums[kSide][4] = {};
  if (column < r)
    for (int k = 0; k < r; ++k) {
      const Quad x = read<Quad>(tile + k * pitch + quad);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Quad y = read<Quad>(vectors + k * width + column + 4 * half);
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int i = 0; i < 4; ++i)
            sums[4 * half + j][i] = fmaf(x.value[i], y.value[j], sums[4 * half + j][i]);
      }
    }
  __syncthreads();
  if (column < r) {
    float scale[4];
#pragma unroll
    for (int i = 0; i < 4; ++i)
      scale[i] = quad + i < rows ? float(b.scalars[0]) * read<float>(row_sums + row + quad + i) : 0.0f;
#pragma unroll
    for (int j = 0; j < kSide; ++j) {
      const float value = column + j < r ? read<float>(values + column + j) : 0.0f;
      Quad scaled;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        scaled.value[i] = sums[j][i] / (1.0f + scale[i] * value);
        sums[j][i] = 0.0f;
      }
      write(tile + (column + j) * pitch + quad, scaled);
    }
  }
  __syncthreads();
  if (column < r)
    for (int k = 0; k < r; k += 4) {  // four at a time, to read rows of the vectors
      Quad x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = read<Quad>(tile + (k + i) * pitch + quad);
#pragma unroll
      for (int j = 0; j < kSide; ++j) {
        const Quad y = read<Quad>(vectors + (column + j) * width + k);
#pragma unroll
        for (int of = 0; of < 4; ++of)
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[j][i] = fmaf(x[of].value[i], y.value[of], sums[j][i]);
      }
    }
  __syncthreads();
  if (column < r)
#pragma unroll
    for (int j = 0; j < kSide; ++j)
      write(tile + (column + j) * pitch + quad, Quad{{sums[j][0], sums[j][1], sums[j][2], sums[j][3]}});
  __syncthreads();
  for (int index = thread; index < count; index += together * kThreads) {
    Piece pieces[together];
    Words result[together];  // theta_start first: near in the cache
#pragma unroll
    for (int k = 0; k < together; ++k)
      if (index + k * kThreads < count) {
        const Piece p = pieces[k] = piece<T, kPullRows>(b, owners, n, row, rows, index + k * kThreads);
        result[k] = fetch(reinterpret_cast<const T*>(b.part[1][p.part]) + p.at, p.valid);
      }
#pragma unroll
    for (int k = 0; k < together; ++k) {
      if (index + k * kThreads >= count) continue;
      const Piece& p = pieces[k];
      const auto add = [&](int i, float more) {
        T x;
        store(x, value<T>(result[k], i) + more);
        put(result[k], i, x);
      };
      if (p.transposed) {
#pragma unroll
        for (int i = 0; i < kPiece<T>; i += 4) {
          const Quad more = read<Quad>(tile + p.column * pitch + p.row + i);
#pragma unroll
          for (int j = 0; j < 4; ++j) add(i + j, more.value[j]);
        }
      } else {
        along_rows<kPiece<T>>(p, pitch, [&](int i, int at) { add(i, read<float>(tile + at)); });
      }
      send(reinterpret_cast<T*>(b.part[0][p.part]) + p.at, result[k], p.valid);
    }
  }
}

// ---- theta_i += (theta_start_i - theta_i) beta_i

constexpr int merge_bytes(int r) { return (r * (r + 1) + r) * 8 + kMostRank * int(sizeof(Owner)); }

// A warp solves one row after another, by elimination without pivoting: the system is symmetric and positive definite.
// It runs once a task.
template <class T>
__global__ void __launch_bounds__(kMergeThreads) merge_kernel(const __grid_constant__ Batch<2, 4> b) {
  Owner* const owners = reinterpret_cast<Owner*>(shared_memory());
  const int group = find_group(b), r = b.r[group], lane = int(threadIdx.x), pitch = r + 1;
  double* const system = reinterpret_cast<double*>(owners + kMostRank);  // (r, r + 1), last the right side
  double* const gap = system + r * pitch;  // theta_start_i - theta_i, then the solution
  const int64_t n = b.n[group], begin = int64_t(int(blockIdx.x) - b.first_block[group]) * kMergeRows;
  const int64_t end = begin + kMergeRows < n ? begin + kMergeRows : n;
  const auto numbers = [&](int list) { return reinterpret_cast<const float*>(b.group[list][group]); };
  const auto factor = [&](int list, int i, int j) {
    return read<double>(reinterpret_cast<const double*>(b.group[list][group]) + i * r + j);
  };
  const auto element = [&](int list, int64_t row, int column) {
    const Owner owner = read<Owner>(owners + column);
    const int rank = b.rank[owner.part], k = column - owner.first;
    return reinterpret_cast<T*>(b.part[list][owner.part]) + (b.transposed[owner.part] ? k * n + row : row * rank + k);
  };
  find_owners(owners, b, group);
  for (int64_t row = begin; row < end; ++row) {
    for (int j = lane; j < r; j += kMergeThreads)  // of the columns whose owners and solution are this thread's own
      write(gap + j, double(load(read<T>(element(1, row, j)))) - double(load(read<T>(element(0, row, j)))));
    __syncthreads();
    const double fresh = double(read<float>(numbers(0) + row));
    const double kept = double(read<float>(numbers(2) + row)) / b.scalars[0];
    for (int i = 0; i < r; ++i) {
      for (int j = lane; j < r; j += kMergeThreads) {
        const double f = fresh * factor(1, i, j);
        const double m = kept * factor(3, i, j);
        write(system + i * pitch + j, f + m + (i == j ? b.scalars[1] : 0.0));
      }
    }
    for (int i = lane; i < r; i += kMergeThreads) {
      double sum = 0;
      for (int j = 0; j < r; ++j) sum += kept * factor(3, i, j) * read<double>(gap + j);
      write(system + i * pitch + r, sum);
    }
    __syncthreads();
    for (int k = 0; k < r; ++k) {
      const double inverse = 1.0 / read<double>(system + k * pitch + k);
      for (int j = k + 1 + lane; j <= r; j += kMergeThreads) {
        const double top = read<double>(system + k * pitch + j) * inverse;
        for (int i = k + 1; i < r; ++i) {
          double* const at = system + i * pitch;
          write(at + j, read<double>(at + j) - read<double>(at + k) * top);
        }
      }
      __syncthreads();
    }
    for (int k = r - 1; k >= 0; --k) {
      const double x = read<double>(system + k * pitch + r) / read<double>(system + k * pitch + k);
      if (lane == 0) write(gap + k, x);
      for (int i = lane; i < k; i += kMergeThreads) {
        double* const at = system + i * pitch;
        write(at + r, read<double>(at + r) - read<double>(at + k) * x);
      }
      __syncthreads();
    }
    for (int j = lane; j < r; j += kMergeThreads) {
      T* const at = element(0, row, j);
      T x;
      store(x, float(double(load(read<T>(at))) + read<double>(gap + j)));
      write(at, x);
    }
  }
}

// ---- Launches

constexpr int64_t blocks_of(int64_t rows, int64_t each) { return (rows + each - 1) / each; }

// What is wrong with the tables, or null: a kernel would read or write out of bounds.
const char* wrong(const int64_t* groups, int64_t count) {
  for (int64_t g = 0; g < count; ++g) {
    const int64_t *group = groups + 4 * g, *before = group - 4;
    if (group[0] < 1 || group[1] < 1 || group[1] > kMostRank) return "a group's n must be positive, its r 1 to 64";
    if (group[3] < 1 || group[3] > group[1] || group[2] != (g ? before[2] + before[3] : 0))
      return "the matrices of a group must follow those of the one before, at most r of them";
  }
  return nullptr;
}

const char* wrong(const KronCall& call) {
  if (const char* error = wrong(call.groups, call.group_count)) return error;
  int64_t at = 0;
  for (int64_t g = 0; g < call.group_count; ++g) {
    const int64_t n = call.groups[4 * g], r = call.groups[4 * g + 1], matrices = call.groups[4 * g + 3];
    int64_t left = r;
    if (at + matrices > call.part_count) return "the groups have more matrices than there are";
    for (const int64_t end = at + matrices; at < end; ++at) {
      const int64_t* part = call.parts + 3 * at;
      if (part[0] < 1 || part[0] > r) return "a rank must be positive, and the ranks of a group's matrices r together";
      left -= part[0];
      if (!(part[1] == part[0] && part[2] == 1) && !(part[1] == 1 && part[2] == n))
        return "a matrix's strides must be (rank, 1) or (1, n)";
    }
    if (left) return "the ranks of a group's matrices must be r together";
  }
  return at == call.part_count ? nullptr : "the groups have fewer matrices than there are";
}

int64_t workspace_floats(int64_t n, int64_t r) { return blocks_of(n, kChunk) * squares(int(r)) * kSquare; }

// work(batch, blocks, largest r) for as many groups at a time as an argument holds.
template <int PartLists, int GroupLists, class Work>
const char* in_batches(const KronCall& call, int scalars, int rows_of_a_block, const Work& work) {
  using B = Batch<PartLists, GroupLists>;
  static_assert(sizeof(B) <= 32764 && kParts >= kMostRank, "within the limit, and enough for a group");
  static thread_local B b;  // as large as the argument, so not on the stack
  std::copy(call.scalars, call.scalars + scalars, b.scalars);
  b.workspace = static_cast<float*>(call.workspace);
  int64_t partial = 0;
  for (int64_t g = 0; g < call.group_count;) {
    int count = 0, parts = 0, largest = 0;
    int64_t blocks = 0;
    for (; g < call.group_count && count < kGroups; ++g, ++count) {
      const int64_t *group = call.groups + 4 * g, matrices = group[3], more = blocks_of(group[0], rows_of_a_block);
      if (parts + matrices > kParts || blocks + more > INT32_MAX) break;
      for (int k = 0; k < GroupLists; ++k) b.group[k][count] = call.group_addresses[k * call.group_count + g];
      b.n[count] = group[0];
      b.r[count] = uint8_t(group[1]);
      b.partial[count] = partial;
      b.first_block[count] = int32_t(blocks);
      b.first_part[count] = parts;
      for (int64_t p = group[2]; p < group[2] + matrices; ++p, ++parts) {
        for (int k = 0; k < PartLists; ++k) b.part[k][parts] = call.part_addresses[k * call.part_count + p];
        b.rank[parts] = uint8_t(call.parts[3 * p]);
        b.transposed[parts] = call.parts[3 * p + 1] == 1 && call.parts[3 * p + 2] != 1;
      }
      partial += workspace_floats(group[0], group[1]);
      blocks += more;
      largest = std::max(largest, int(group[1]));
    }
    if (!count) return "a group has more than 2^35 rows";
    b.first_block[count] = int32_t(blocks);
    b.first_part[count] = parts;
    b.groups = count;
    if (const char* error = work(b, unsigned(blocks), largest)) return error;
  }
  return nullptr;
}

template <class T>
const char* run_kron(const char* op, const KronCall& call, Stream stream) {
  if (!std::strcmp(op, "kron_accumulate"))
    return in_batches<1, 2>(call, 0, kChunk, [&](const Batch<1, 2>& b, unsigned blocks, int largest) {
      constexpr int bytes = kMostRank * ((kAccumulateRows + kPad) * 4 + int(sizeof(Owner)));
      const char* error = launch(accumulate_kernel<T>, dim3(blocks), kThreads, bytes, stream, b);
      const unsigned sums = unsigned(blocks_of(squares(largest) * kSquare, kThreads));
      return error ? error : launch(combine_kernel, dim3(unsigned(b.groups), sums), kThreads, 0, stream, b);
    });
  if (!std::strcmp(op, "kron_pull"))
    return in_batches<2, 3>(call, 1, kPullRows, [&](const Batch<2, 3>& b, unsigned blocks, int largest) {
      return launch(pull_kernel<T>, dim3(blocks), kThreads, pull_bytes(largest), stream, b);
    });
  return in_batches<2, 4>(call, 2, kMergeRows, [&](const Batch<2, 4>& b, unsigned blocks, int largest) {
    return launch(merge_kernel<T>, dim3(blocks), kMergeThreads, merge_bytes(largest), stream, b);
  });
}

bool is_op(const char* op) {
  const auto is_it = [&](const KronOp& one) { return !std::strcmp(op, one.name); };
  return std::any_of(std::begin(kKronOps), std::end(kKronOps), is_it);
}

constexpr const char* kUnknownOp = "expected kron_accumulate, kron_pull or kron_merge";

const char* workspace_of(const char* op, const int64_t* groups, int64_t group_count, int64_t* bytes) {
  *bytes = 0;
  if (!is_op(op)) return kUnknownOp;
  if (const char* error = wrong(groups, group_count)) return error;
  if (!std::strcmp(op, "kron_accumulate"))
    for (int64_t g = 0; g < group_count; ++g) *bytes += 4 * workspace_floats(groups[4 * g], groups[4 * g + 1]);
  return nullptr;
}

const char* kron(const char* op, const KronCall& call, Stream stream) {
  if (!is_op(op)) return kUnknownOp;
  if (const char* error = wrong(call)) return error;
  switch (call.letter) {
    case 'f': return run_kron<float>(op, call, stream);
    case 'b': return run_kron<bf16>(op, call, stream);
    case 'h': return run_kron<f16>(op, call, stream);
    default: return "letter must be f, b or h";
  }
}

}  // namespace
