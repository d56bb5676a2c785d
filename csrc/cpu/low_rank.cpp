// CPU kernels of the low-rank products, in float32. Compiled once per instruction set (CNEXT_ISA): only the table may
// have external linkage.
//
// All use one microkernel: a few rows of C in registers, each element of A broadcast once per vector of B. Dropout is
// applied to blocks while they are in a cache. The order of every sum is independent of the number of threads.
#include "low_rank.h"

#define CNEXT_PASTE(a, b) a##b
#define CNEXT_NAME(prefix, isa) CNEXT_PASTE(prefix, isa)

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#include <immintrin.h>

#include <cstring>

#include "../branches.h"

namespace {

using In = LowRankTable::In;
using Out = LowRankTable::Out;

#ifdef __AVX512F__
using Vector = __m512;
constexpr int kLanes = 16, kTall = 12, kLow = 8;  // rows of a tile: a low one pads some ranks less
CNEXT_HD Vector load(const float* from) { return _mm512_loadu_ps(from); }
CNEXT_HD Vector broadcast(float x) { return _mm512_set1_ps(x); }
CNEXT_HD Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
CNEXT_HD void store(float* to, Vector x) { _mm512_storeu_ps(to, x); }
#else
using Vector = __m256;
constexpr int kLanes = 8, kTall = 6, kLow = 4;
CNEXT_HD Vector load(const float* from) { return _mm256_loadu_ps(from); }
CNEXT_HD Vector broadcast(float x) { return _mm256_set1_ps(x); }
CNEXT_HD Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
CNEXT_HD void store(float* to, Vector x) { _mm256_storeu_ps(to, x); }
#endif

constexpr int kWide = 2 * kLanes;    // columns of a tile
constexpr int kDepth = 512;          // of a sum over columns of x: a tile's rows of x stay in L1
constexpr int kHeight = 96;          // of a sum over rows of x: a tile's columns of x stay in L1
constexpr int kSpan = 1024;          // columns of dY that stay in a cache for both products of `grad_b`
constexpr int kPitch = kTile + 16;   // row stride of a dropped tile: one of 128 would map to few sets of the cache
constexpr int64_t kPacked = 1 << 17;  // packed elements that one pass over the rows reads: they stay in L2
constexpr int kMostRank = 128;
static_assert(kHeight % kTall == 0 && kSpan % kDepth == 0 && kDepth % kTile == 0 && kTile % kWide == 0,
              "blocks of blocks");

CNEXT_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
CNEXT_HD int64_t blocks(int64_t size, int64_t block) { return (size + block - 1) / block; }

// Microkernel: C = scale * A B, or C += scale * A B, of Rows x (Vectors * kLanes). A is read along its rows, or
// (Across) along its columns, where `a` holds its transpose.
template <int Rows, int Vectors, bool Across>
__attribute__((noinline)) void tile(int64_t depth, In a, In b, Out c, float scale, bool add) {
  Vector sum[Rows][Vectors];
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) sum[i][v] = broadcast(0.0f);
  const float *left = a.data, *right = b.data;
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; ++k) {
    Vector row[Vectors];
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) row[v] = load(right + v * kLanes);
#pragma GCC unroll 16
    for (int i = 0; i < Rows; ++i) {
      const Vector x = broadcast(left[Across ? i : i * a.stride]);
#pragma GCC unroll 2
      for (int v = 0; v < Vectors; ++v) sum[i][v] = fma(x, row[v], sum[i][v]);
    }
    left += Across ? a.stride : 1;
    right += b.stride;
  }
  const Vector factor = broadcast(scale);
#pragma GCC unroll 16
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 2
    for (int v = 0; v < Vectors; ++v) {
      float* to = c.at(i, v * kLanes);
      store(to, add ? fma(factor, sum[i][v], load(to)) : factor * sum[i][v]);
    }
}

// The same where only the first `rows` and `columns` of C exist; A and B are whole.
template <int Rows, int Vectors, bool Across>
CNEXT_HD void tile(int64_t depth, In a, In b, Out c, int64_t rows, int64_t columns, float scale, bool add) {
  constexpr int wide = Vectors * kLanes;
  if (rows >= Rows && columns >= wide) return tile<Rows, Vectors, Across>(depth, a, b, c, scale, add);
  float whole[Rows * wide];
  tile<Rows, Vectors, Across>(depth, a, b, {whole, wide}, scale, false);
  for (int64_t i = 0; i < least(rows, Rows); ++i)
    for (int64_t j = 0; j < least(columns, wide); ++j) *c.at(i, j) = whole[i * wide + j] + (add ? *c.at(i, j) : 0.0f);
}

// Copies rows x columns of a matrix into a larger one, with zeros around it.
CNEXT_HD In padded(In from, int64_t rows, int64_t columns, float* to, int64_t all_rows, int64_t pitch) {
  for (int64_t i = 0; i < all_rows; ++i) {
    const int64_t count = i < rows ? columns : 0;
    int64_t j = 0;
    for (; j + kLanes <= count; j += kLanes) store(to + i * pitch + j, load(from.at(i, j)));
    for (; j < count; ++j) to[i * pitch + j] = *from.at(i, j);
    for (; j < pitch; ++j) to[i * pitch + j] = 0.0f;
  }
  return {to, pitch};
}

// to = scale * from^T, of rows x columns.
void transpose(In from, int64_t rows, int64_t columns, Out to, float scale) {
  const __m128 factor = _mm_set1_ps(scale);
  int64_t i = 0;
  for (; i + 4 <= rows; i += 4) {
    int64_t j = 0;
    for (; j + 4 <= columns; j += 4) {
      __m128 line[4];
      for (int k = 0; k < 4; ++k) line[k] = _mm_loadu_ps(from.at(i + k, j)) * factor;
      _MM_TRANSPOSE4_PS(line[0], line[1], line[2], line[3]);
      for (int k = 0; k < 4; ++k) _mm_storeu_ps(to.at(j + k, i), line[k]);
    }
    for (; j < columns; ++j)
      for (int k = 0; k < 4; ++k) *to.at(j, i + k) = *from.at(i + k, j) * scale;
  }
  for (; i < rows; ++i)
    for (int64_t j = 0; j < columns; ++j) *to.at(j, i) = *from.at(i, j) * scale;
}

void drop_rows(In from, int64_t first_row, int64_t rows, int64_t first_column, int64_t columns, Out to, bool add,
               const Dropout& drop) {
  static const DropoutTable table = CNEXT_NAME(branches_, CNEXT_ISA)();
  Dropout here = drop;
  here.first_tile += uint32_t(first_column / kTile);
  const DropoutRow run = (add ? table.dropout_add : table.dropout)[0];
  for (int64_t i = 0; i < rows; ++i) run(from.at(i, 0), to.at(i, 0), first_row + i, columns, here);
}

// The transpose of (rank, columns) in panels of `wide` of the rank, padded with zeros.
void pack_transposed(In a, int64_t rank, int64_t columns, int64_t wide, float* packed, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t k = 0; k < columns; k += kTile)
    for (int64_t r = 0; r < rank; r += wide) {
      const int64_t count = least(columns - k, kTile), ranks = least(rank - r, wide);
      const Out to{packed + r * columns + k * wide, wide};
      transpose({a.at(r, k), a.stride}, ranks, count, to, 1.0f);
      for (int64_t j = 0; j < (ranks < wide ? count : 0); ++j)
        for (int64_t i = ranks; i < wide; ++i) *to.at(j, i) = 0.0f;
    }
}

// A strip of at most kTall rows of C = x A^T, over `depth` columns; packed: from the first of them on.
template <int Vectors>
CNEXT_HD void strip(int64_t depth, In x, const float* packed, int64_t packed_columns, Out h, int64_t rows, int64_t rank,
                    float scale, bool add) {
  constexpr int wide = Vectors * kLanes;
  for (int64_t r = 0; r < rank; r += wide)
    tile<kTall, Vectors, false>(depth, x, {packed + r * packed_columns, wide}, {h.at(0, r), h.stride}, rows, rank - r,
                                scale, add);
}

template <int Vectors>
void project(In x, In a, Out h, const Sizes& sizes, const Dropout* drop, float* packed, int threads) {
  constexpr int wide = Vectors * kLanes, pitch = kDepth + 16;
  const int64_t rows = sizes.rows, columns = sizes.columns, rank = sizes.rank;
  pack_transposed(a, rank, columns, wide, packed, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t at = 0; at < rows; at += kTall) {
    const int64_t count = least(rows - at, kTall);
    float copy[kTall * pitch];
    for (int64_t k = 0; k < columns; k += kDepth) {
      const int64_t depth = least(columns - k, kDepth);
      In from{x.at(at, k), x.stride};
      if (drop) {
        drop_rows(from, at, count, k, depth, {copy, pitch}, false, *drop);
        if (count < kTall) std::memset(copy + count * pitch, 0, size_t(kTall - count) * pitch * 4);
        from = {copy, pitch};
      } else if (count < kTall || x.stride % 1024 == 0) {
        from = padded(from, count, depth, copy, kTall, pitch);
      }
      strip<Vectors>(depth, from, packed + k * wide, columns, {h.at(at, 0), h.stride}, count, rank, 1.0f, k > 0);
    }
  }
}

// A itself where `block` divides its columns, else a copy padded with zeros.
In even(In a, int64_t rows, int64_t columns, int64_t block, float* to, int threads) {
  if (columns % block == 0) return a;
  const int64_t pitch = blocks(columns, block) * block;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t i = 0; i < rows; ++i) padded({a.at(i, 0), a.stride}, 1, columns, to + i * pitch, 1, pitch);
  return {to, pitch};
}

// C = A^T B, or C += A^T B, for A of an even rank and at most kHeight rows, and as many columns of B up to kWide.
template <int Rows>
CNEXT_HD void column(int64_t depth, In a, int64_t rank, In b, Out c, int64_t columns, bool add) {
  for (int64_t r = 0; r < rank; r += Rows)
    tile<Rows, 2, true>(depth, {a.at(0, r), a.stride}, b, {c.at(r, 0), c.stride}, rank - r, columns, 1.0f, add);
}

template <int Rows>
void grad_a(In dh, In x, Out da, const Sizes& sizes, const Dropout* drop, float* packed, int threads) {
  const int64_t rows = sizes.rows, columns = sizes.columns, rank = sizes.rank;
  dh = even(dh, rows, rank, Rows, packed, threads);
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t begin = 0; begin < columns; begin += kTile) {
    const int64_t count = least(columns - begin, kTile);
    float copy[kHeight * kPitch];
    if (drop && count < kTile) std::memset(copy, 0, sizeof copy);  // the padding
    for (int64_t at = 0; at < rows; at += kHeight) {
      const int64_t height = least(rows - at, kHeight);
      In from{x.at(at, begin), x.stride};
      if (drop) {
        drop_rows(from, at, height, begin, count, {copy, kPitch}, false, *drop);
        from = {copy, kPitch};
      } else if (count < kTile) {
        from = padded(from, height, count, copy, height, kPitch);
      }
      for (int64_t j = 0; j < count; j += kWide)
        column<Rows>(height, {dh.at(at, 0), dh.stride}, rank, {from.at(0, j), from.stride},
                     {da.at(0, begin + j), da.stride}, count - j, at > 0);
    }
  }
}

void expand(In dh, In a, Out out, const Sizes& sizes, bool add, float scale, const Dropout* drop, float* packed,
            int threads) {
  constexpr int64_t pitch = kDepth + 16;
  const int64_t rows = sizes.rows, columns = sizes.columns, rank = sizes.rank;
  const int64_t panel = rank * kWide;
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t k = 0; k < columns; k += kWide)
    padded({a.at(0, k), a.stride}, rank, least(columns - k, kWide), packed + k * rank, rank, kWide);
  const int64_t span = kPacked / panel * kWide / kDepth * kDepth;
  for (int64_t first = 0; first < columns; first += span)
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t at = 0; at < rows; at += kTall) {
      const int64_t count = least(rows - at, kTall);
      float strip[kTall * kMostRank], product[kTall * pitch];
      In left{dh.at(at, 0), dh.stride};
      if (count < kTall) left = padded(left, count, rank, strip, kTall, rank);
      for (int64_t k = first; k < least(columns, first + span); k += kDepth) {
        const int64_t width = least(columns - k, kDepth);
        for (int64_t j = k; j < k + width; j += kWide) {
          const In right{packed + j * rank, kWide};
          if (drop)
            tile<kTall, 2, false>(rank, left, right, {product + (j - k), pitch}, scale, false);
          else
            tile<kTall, 2, false>(rank, left, right, {out.at(at, j), out.stride}, count, columns - j, scale, add);
        }
        if (drop) drop_rows({product, pitch}, at, count, k, width, {out.at(at, k), out.stride}, add, *drop);
      }
    }
}

template <int Vectors, int Rows>
void grad_b(In dy, In b, In h, Out dh, Out db, const Sizes& sizes, int64_t live, float scale, float* packed,
            int threads) {
  constexpr int wide = Vectors * kLanes, pitch = kDepth + 16;
  const int64_t rows = sizes.rows, columns = sizes.columns, rank = sizes.rank;
  const Out across{packed + blocks(rank, wide) * wide * columns, columns};  // dB^T
  pack_transposed(b, rank, columns, wide, packed, threads);
  h = even(h, rows, live, Rows, across.at(live, 0), threads);
  const int64_t step = int64_t(kHeight) * threads;
  for (int64_t first = 0; first < columns; first += kSpan)
    for (int64_t top = 0; top < rows; top += step)
#pragma omp parallel num_threads(threads)
    {
      const int64_t bottom = least(rows, top + step), end = least(columns, first + kSpan);
#pragma omp for schedule(static)
      for (int64_t at = top; at < bottom; at += kTall) {
        const int64_t count = least(bottom - at, kTall);
        float copy[kTall * pitch];
        for (int64_t k = first; k < end; k += kDepth) {
          const int64_t depth = least(end - k, kDepth);
          In from{dy.at(at, k), dy.stride};
          if (count < kTall || dy.stride % 1024 == 0) from = padded(from, count, depth, copy, kTall, pitch);
          strip<Vectors>(depth, from, packed + k * wide, columns, {dh.at(at, 0), dh.stride}, count, rank, scale, k > 0);
        }
      }
#pragma omp for schedule(static)
      for (int64_t k = first; k < end; k += kWide) {
        float copy[kHeight * kWide];
        for (int64_t at = top; at < bottom; at += kHeight) {
          const int64_t height = least(bottom - at, kHeight);
          In from{dy.at(at, k), dy.stride};
          if (columns - k < kWide) from = padded(from, height, columns - k, copy, height, kWide);
          column<Rows>(height, {h.at(at, 0), h.stride}, live, from, {across.at(0, k), across.stride}, columns - k,
                       at > 0);
        }
      }
    }
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t k = 0; k < columns; k += kTile)
    transpose({across.at(0, k), across.stride}, live, least(columns - k, kTile), {db.at(k, 0), db.stride}, scale);
}

// Whether low tiles pad the rank less than tall ones.
CNEXT_HD bool low(int64_t rank) { return blocks(rank, kLow) * kLow < blocks(rank, kTall) * kTall; }

void run_project(In x, In a, Out h, const Sizes& sizes, const Dropout* drop, float* workspace, int threads) {
  (sizes.rank <= kLanes ? project<1> : project<2>)(x, a, h, sizes, drop, workspace, threads);
}

void run_grad_a(In dh, In x, Out da, const Sizes& sizes, const Dropout* drop, float* workspace, int threads) {
  (low(sizes.rank) ? grad_a<kLow> : grad_a<kTall>)(dh, x, da, sizes, drop, workspace, threads);
}

void run_grad_b(In dy, In b, In h, Out dh, Out db, const Sizes& sizes, int64_t live, float scale, float* workspace,
                int threads) {
  const auto one = low(live) ? grad_b<1, kLow> : grad_b<1, kTall>, two = low(live) ? grad_b<2, kLow> : grad_b<2, kTall>;
  (sizes.rank <= kLanes ? one : two)(dy, b, h, dh, db, sizes, live, scale, workspace, threads);
}

int64_t workspace(const Sizes& sizes, int64_t live) {
  const int64_t columns = blocks(sizes.columns, kWide) * kWide, rank = blocks(sizes.rank, kWide) * kWide;
  return columns * (rank + live) + sizes.rows * (rank + kTall);
}

}  // namespace

const LowRankTable* CNEXT_NAME(low_rank_, CNEXT_ISA)() {
  static const LowRankTable table = {workspace, run_project, run_grad_a, expand, run_grad_b};
  return &table;
}
#else
const LowRankTable* CNEXT_NAME(low_rank_, CNEXT_ISA)() { return nullptr; }
#endif
