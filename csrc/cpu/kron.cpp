// CPU kernels of the ops over Kronecker factors. Compiled once per instruction set (CNEXT_ISA): only the table may have
// external linkage.
//
// Rows are processed in tiles, packed as (r, rows): vectors hold one column of consecutive rows. Sums of squares are
// then sums of vectors, a product of two columns needs no broadcast, and only the triangle of G^T G is computed. Its
// vectors are summed across once per tile. No sum depends on the number of threads.
#include "kron.h"

#if defined(__AVX512F__) || (defined(__AVX2__) && defined(__FMA__))
#define CNEXT_AVX2
#include <immintrin.h>
#endif

#include "../averaging.h"

namespace {

#if defined(__AVX512F__)
using Vector = __m512;
constexpr int kLanes = 16, kTall = 4, kWide = 4;  // columns of G on the two sides of a block of products
CNEXT_HD Vector fma(Vector a, Vector b, Vector c) { return _mm512_fmadd_ps(a, b, c); }
#elif defined(CNEXT_AVX2)
using Vector = __m256;
constexpr int kLanes = 8, kTall = 4, kWide = 2;
CNEXT_HD Vector fma(Vector a, Vector b, Vector c) { return _mm256_fmadd_ps(a, b, c); }
#else
typedef float Vector __attribute__((vector_size(16), may_alias));
constexpr int kLanes = 4, kTall = 4, kWide = 2;
CNEXT_HD Vector fma(Vector a, Vector b, Vector c) { return a * b + c; }
#endif

constexpr int kMostRank = 64;
constexpr int kTile = 8192;  // floats of a tile
constexpr int kEight = 8;    // rows that are transposed, and solved, together

CNEXT_HD int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
CNEXT_HD int64_t up(int64_t size, int64_t block) { return (size + block - 1) / block * block; }
CNEXT_HD Vector& at(float* p) { return *reinterpret_cast<Vector*>(p); }
CNEXT_HD Vector at(const float* p) { return *reinterpret_cast<const Vector*>(p); }
CNEXT_HD Vector broadcast(float x) { return x - Vector{}; }  // plus zero would be an addition

// A tile: column j of the group's rows begins at data + j * pitch.
struct Tile {
  float* data;
  int64_t pitch;
  CNEXT_HD float* column(int64_t j) const { return data + j * pitch; }
};

CNEXT_HD int64_t tile_rows(int64_t r) { return kTile / up(r, kTall) / (2 * kLanes) * (2 * kLanes); }

// to = from^T, of 8 x 8.
CNEXT_HD void transpose(const float* from, int64_t from_stride, float* to, int64_t to_stride) {
#if defined(CNEXT_AVX2)
  __m256 half[2][4];
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h)
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      const float* line = from + i * from_stride + 4 * h;
      const __m128 low = _mm_loadu_ps(line), high = _mm_loadu_ps(line + 4 * from_stride);
      half[h][i] = _mm256_insertf128_ps(_mm256_castps128_ps256(low), high, 1);
    }
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    const __m256 a = _mm256_unpacklo_ps(half[h][0], half[h][1]), b = _mm256_unpacklo_ps(half[h][2], half[h][3]);
    const __m256 c = _mm256_unpackhi_ps(half[h][0], half[h][1]), d = _mm256_unpackhi_ps(half[h][2], half[h][3]);
    float* out = to + 4 * h * to_stride;
    _mm256_storeu_ps(out, _mm256_shuffle_ps(a, b, 0x44));
    _mm256_storeu_ps(out + to_stride, _mm256_shuffle_ps(a, b, 0xee));
    _mm256_storeu_ps(out + 2 * to_stride, _mm256_shuffle_ps(c, d, 0x44));
    _mm256_storeu_ps(out + 3 * to_stride, _mm256_shuffle_ps(c, d, 0xee));
  }
#else
  for (int j = 0; j < kEight; ++j)
    for (int i = 0; i < kEight; ++i) to[j * to_stride + i] = from[i * from_stride + j];
#endif
}

template <class T>
CNEXT_HD void load_line(const T* from, float* to, int64_t count) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) to[k] = load(from[k]);
}

template <class T>
CNEXT_HD void store_line(const float* from, T* to, int64_t count) {
#pragma omp simd
  for (int64_t k = 0; k < count; ++k) store(to[k], from[k]);
}

// Reads rows [begin, begin + count) of a matrix into the columns of a tile.
template <class T>
void read(const T* from, const int64_t* part, int64_t begin, int64_t count, Tile to) {
  const int64_t rank = part[0], along = part[1], across = part[2];
  from += begin * along;
  if (along == 1) {
    for (int64_t j = 0; j < rank; ++j) load_line(from + j * across, to.column(j), count);
    return;
  }
  int64_t k = 0;
  for (; k + kEight <= count; k += kEight) {
    int64_t j = 0;
    for (; j + kEight <= rank; j += kEight) {
      const T* corner = from + k * along + j;
      if constexpr (sizeof(T) == 4) {
        transpose(corner, along, to.column(j) + k, to.pitch);
      } else {
        float block[kEight * kEight];
        for (int i = 0; i < kEight; ++i) load_line(corner + i * along, block + i * kEight, kEight);
        transpose(block, kEight, to.column(j) + k, to.pitch);
      }
    }
    for (; j < rank; ++j)
      for (int i = 0; i < kEight; ++i) to.column(j)[k + i] = load(from[(k + i) * along + j]);
  }
  for (; k < count; ++k)
    for (int64_t j = 0; j < rank; ++j) to.column(j)[k] = load(from[k * along + j]);
}

// The reverse.
template <class T>
void write(Tile from, const int64_t* part, int64_t begin, int64_t count, T* to) {
  const int64_t rank = part[0], along = part[1], across = part[2];
  to += begin * along;
  if (along == 1) {
    for (int64_t j = 0; j < rank; ++j) store_line(from.column(j), to + j * across, count);
    return;
  }
  int64_t k = 0;
  for (; k + kEight <= count; k += kEight) {
    int64_t j = 0;
    for (; j + kEight <= rank; j += kEight) {
      float block[kEight * kEight];
      transpose(from.column(j) + k, from.pitch, block, kEight);
      for (int i = 0; i < kEight; ++i) store_line(block + i * kEight, to + (k + i) * along + j, kEight);
    }
    for (; j < rank; ++j)
      for (int i = 0; i < kEight; ++i) store(to[(k + i) * along + j], from.column(j)[k + i]);
  }
  for (; k < count; ++k)
    for (int64_t j = 0; j < rank; ++j) store(to[k * along + j], from.column(j)[k]);
}

// Reads rows of list `which` of a group side by side, with zeros up to a multiple of kTall columns and 2 * kLanes rows.
template <class T>
void pack(const KronGroup& group, int which, int64_t begin, int64_t count, Tile to) {
  const int64_t width = up(count, 2 * kLanes);
  int64_t j = 0;
  for (int64_t p = 0; p < group.count; ++p) {
    const int64_t* part = group.parts + 3 * p;
    const T* from = reinterpret_cast<const T*>(group.lists[which * group.stride + p]);
    read(from, part, begin, count, Tile{to.column(j), to.pitch});
    j += part[0];
  }
  for (int64_t i = 0; i < j; ++i)
    for (int64_t k = count; k < width; ++k) to.column(i)[k] = 0.0f;
  for (; j < up(group.r, kTall); ++j)
    for (int64_t k = 0; k < width; ++k) to.column(j)[k] = 0.0f;
}

template <class T>
void unpack(Tile from, const KronGroup& group, int which, int64_t begin, int64_t count) {
  int64_t j = 0;
  for (int64_t p = 0; p < group.count; ++p) {
    const int64_t* part = group.parts + 3 * p;
    T* to = reinterpret_cast<T*>(group.lists[which * group.stride + p]);
    write(Tile{from.column(j), from.pitch}, part, begin, count, to);
    j += part[0];
  }
}

#if defined(__AVX512F__)
// The halves' sum. Without the intrinsics: GCC 12 warns of its own header.
CNEXT_HD __m256 fold(__m512 x) {
  union {
    __m512 whole;
    __m256 half[2];
  } both{x};
  return both.half[0] + both.half[1];
}
#elif defined(CNEXT_AVX2)
CNEXT_HD __m256 fold(__m256 x) { return x; }
#endif

#if defined(CNEXT_AVX2)
// The sums of eight vectors.
CNEXT_HD __m256 sum_lanes(const __m256 (&x)[8]) {
  __m256 two[4], four[2];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k)
    two[k] = _mm256_unpacklo_ps(x[2 * k], x[2 * k + 1]) + _mm256_unpackhi_ps(x[2 * k], x[2 * k + 1]);
#pragma GCC unroll 2
  for (int k = 0; k < 2; ++k)
    four[k] = _mm256_shuffle_ps(two[2 * k], two[2 * k + 1], 0x44) + _mm256_shuffle_ps(two[2 * k], two[2 * k + 1], 0xee);
  return _mm256_permute2f128_ps(four[0], four[1], 0x20) + _mm256_permute2f128_ps(four[0], four[1], 0x31);
}
#endif

// sums[k] += the sum of vector k.
CNEXT_HD void add_lanes(const Vector (&x)[kTall * kWide], double* sums) {
#if defined(CNEXT_AVX2)
#pragma GCC unroll 2
  for (int part = 0; part < kTall * kWide; part += 8) {
    __m256 half[8];
#pragma GCC unroll 8
    for (int k = 0; k < 8; ++k) half[k] = fold(x[part + k]);
    const __m256 all = sum_lanes(half);
    double* to = sums + part;
    _mm256_storeu_pd(to, _mm256_loadu_pd(to) + _mm256_cvtps_pd(_mm256_castps256_ps128(all)));
    _mm256_storeu_pd(to + 4, _mm256_loadu_pd(to + 4) + _mm256_cvtps_pd(_mm256_extractf128_ps(all, 1)));
  }
#else
  for (int k = 0; k < kTall * kWide; ++k) sums[k] += double((x[k][0] + x[k][1]) + (x[k][2] + x[k][3]));
#endif
}

// sums += the products of kTall columns with kWide others, but those whose second column plus Skip is before the first.
template <int Skip>
__attribute__((noinline)) void products(const float* left, const float* right, int64_t pitch, int64_t width,
                                        const char* next, double* sums) {
  Vector block[kTall * kWide] = {};
#pragma GCC unroll 1
  for (int64_t k = 0; k < width; k += kLanes) {
    __builtin_prefetch(next + k * 4, 0, 2);
    Vector x[kTall];
#pragma GCC unroll 4
    for (int a = 0; a < kTall; ++a) x[a] = at(left + a * pitch + k);
#pragma GCC unroll 4
    for (int b = 0; b < kWide; ++b) {
      const Vector y = at(right + b * pitch + k);
#pragma GCC unroll 4
      for (int a = 0; a < kTall; ++a)
        if (b + Skip >= a) block[a * kWide + b] = fma(x[a], y, block[a * kWide + b]);
    }
  }
  add_lanes(block, sums);
}

// For every block of products, in order: its first columns.
template <class Visit>
CNEXT_HD void blocks(int64_t r, const Visit& visit) {
  for (int64_t i = 0; i < r; i += kTall)
    for (int64_t j = i; j < up(r, kTall); j += kWide) visit(i, j);
}

int64_t sums_size(int64_t r) {
  int64_t size = 0;
  blocks(r, [&](int64_t, int64_t) { size += kTall * kWide; });
  return size;
}

// squares[k] = the sum of squares of row k; a row whose sum is not finite becomes zeros.
CNEXT_HD void sum_squares(Tile g, int64_t r, int64_t width, float* squares) {
  for (int64_t k = 0; k < width; k += kLanes) {
    Vector sum[kTall] = {};
    for (int64_t j = 0; j < r; j += kTall)
#pragma GCC unroll 4
      for (int a = 0; a < kTall; ++a) {
        const Vector x = at(g.column(j + a) + k);
        sum[a] = fma(x, x, sum[a]);
      }
    at(squares + k) = (sum[0] + sum[1]) + (sum[2] + sum[3]);
  }
  int bad = 0;
#pragma omp simd reduction(| : bad)
  for (int64_t k = 0; k < width; ++k) bad |= !finite(squares[k]);
  for (int64_t k = 0; k < (bad ? width : 0); ++k)
    if (!finite(squares[k])) {
      squares[k] = 0.0f;
      for (int64_t j = 0; j < r; ++j) g.column(j)[k] = 0.0f;
    }
}

// Where the next tile of a list is in memory, as one range for each column of it.
struct Ahead {
  const char* ranges[kMostRank];
  int size = 0;

  Ahead(const KronGroup& group, int which, int64_t element, int64_t begin, int64_t count) {
    for (int64_t p = 0; p < (count > 0 ? group.count : 0); ++p) {
      const int64_t *part = group.parts + 3 * p, rank = part[0], along = part[1], across = part[2];
      const char* from = reinterpret_cast<const char*>(group.lists[which * group.stride + p]) + begin * along * element;
      for (int64_t j = 0; j < rank; ++j) ranges[size++] = from + j * (along == 1 ? across : count) * element;
    }
  }
};

template <class T>
void accumulate(const KronGroup& group, int64_t begin, int64_t end, float* rows, double* sums) {
  alignas(64) float data[kTile], squares[kTile / kTall];
  const int64_t step = tile_rows(group.r), size = sums_size(group.r);
  const Tile g{data, step};
  for (int64_t k = 0; k < size; ++k) sums[k] = 0.0;
  for (; begin < end; begin += step) {
    const int64_t count = least(end - begin, step), width = up(count, kLanes);
    pack<T>(group, 0, begin, count, g);
    sum_squares(g, group.r, width, squares);
    for (int64_t k = 0; k < count; ++k) rows[begin + k] += squares[k];
    double* to = sums;
    const Ahead ahead(group, 0, sizeof(T), begin + count, least(end - begin - count, step));
    int64_t block = 0;
    blocks(group.r, [&](int64_t i, int64_t j) {
      const char* next = block < ahead.size ? ahead.ranges[block++] : reinterpret_cast<const char*>(g.data);
      const auto run = j == i ? products<0> : j - i < kTall ? products<kWide> : products<kTall>;
      run(g.column(i), g.column(j), g.pitch, width, next, to);
      to += kTall * kWide;
    });
  }
}

void add(int64_t r, const double* sums, float* factor) {
  blocks(r, [&](int64_t top, int64_t left) {
    for (int a = 0; a < kTall; ++a)
      for (int b = 0; b < kWide; ++b, ++sums) {
        const int64_t i = top + a, j = left + b;
        if (i > j || j >= r) continue;
        factor[i * r + j] = float(double(factor[i * r + j]) + *sums);
        if (i < j) factor[j * r + i] = float(double(factor[j * r + i]) + *sums);
      }
  });
}

// to += from * matrix, for `width` rows. matrix: (r, wide).
void multiply(Tile from, const float* matrix, int64_t r, int64_t wide, int64_t width, Tile to) {
  for (int64_t k = 0; k < width; k += 2 * kLanes)
    for (int64_t j = 0; j < r; j += kTall) {
      Vector sum[2][kTall] = {};
      for (int64_t i = 0; i < r; ++i) {
        const Vector x = at(from.column(i) + k), y = at(from.column(i) + k + kLanes);
#pragma GCC unroll 4
        for (int a = 0; a < kTall; ++a) {
          const Vector m = broadcast(matrix[i * wide + j + a]);
          sum[0][a] = fma(x, m, sum[0][a]);
          sum[1][a] = fma(y, m, sum[1][a]);
        }
      }
#pragma GCC unroll 2
      for (int b = 0; b < 2; ++b)
#pragma GCC unroll 4
        for (int a = 0; a < kTall; ++a) {
          Vector& out = at(to.column(j + a) + k + b * kLanes);
          out = out + sum[b][a];
        }
    }
}

template <class T>
void pull(const KronGroup& group, int64_t begin, int64_t end, const float* rows, const float* values,
          const float* vectors, float weight) {
  alignas(64) float memory[3][kTile], scale[kTile / kTall];
  float there[kMostRank * kMostRank], back[kMostRank * kMostRank];
  const int64_t r = group.r, wide = up(r, kTall), step = tile_rows(r);
  const Tile gap{memory[0], step}, turned{memory[1], step}, start{memory[2], step};
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < wide; ++j) {
      there[i * wide + j] = j < r ? vectors[i * r + j] : 0.0f;
      back[i * wide + j] = j < r ? vectors[j * r + i] : 0.0f;
    }
  for (; begin < end; begin += step) {
    const int64_t count = least(end - begin, step), width = up(count, 2 * kLanes);
    pack<T>(group, 0, begin, count, gap);
    pack<T>(group, 1, begin, count, start);
    for (int64_t j = 0; j < wide; ++j)
      for (int64_t k = 0; k < width; k += kLanes) {
        Vector& to = at(gap.column(j) + k);
        to = to - at(start.column(j) + k);
        at(turned.column(j) + k) = Vector{};
      }
    multiply(gap, there, r, wide, width, turned);
    for (int64_t k = 0; k < width; ++k) scale[k] = k < count ? weight * rows[begin + k] : 0.0f;
    for (int64_t j = 0; j < r; ++j) {
      const Vector value = broadcast(values[j]), one = broadcast(1.0f);
      for (int64_t k = 0; k < width; k += kLanes) {
        Vector& to = at(turned.column(j) + k);
        to = to / (one + at(scale + k) * value);
      }
    }
    multiply(turned, back, r, wide, width, start);
    unpack<T>(start, group, 0, begin, count);
  }
}

// Eight rows' systems in the lanes of a vector.
typedef double Eight __attribute__((vector_size(64)));

CNEXT_HD int64_t triangle(int64_t i) { return i * (i + 1) / 2; }

// l[i][j] -= sum over k < j of l[i][k] l[j][k], for `Rows` rows from row i on.
template <int Rows>
CNEXT_HD void eliminate(Eight* l, int64_t i, int64_t j) {
  const Eight* other = l + triangle(j);
  Eight *row[Rows], sum[Rows];
#pragma GCC unroll 4
  for (int a = 0; a < Rows; ++a) {
    row[a] = l + triangle(i + a);
    sum[a] = row[a][j];
  }
  for (int64_t k = 0; k < j; ++k) {
    const Eight y = other[k];
#pragma GCC unroll 4
    for (int a = 0; a < Rows; ++a) sum[a] -= row[a][k] * y;
  }
#pragma GCC unroll 4
  for (int a = 0; a < Rows; ++a) row[a][j] = sum[a];
}

// Solves A x = b for symmetric matrices by A = L D L^T, x in place of b, L in place of A, whose row i begins at
// triangle(i). Four rows at a time read the rows above them once. No pivot of A >= damping I is below damping.
void solve(int64_t r, double damping, Eight* __restrict l, Eight* __restrict x) {
  Eight inverse[kMostRank];
  for (int64_t top = 0; top < r; top += 4) {
    const int64_t bottom = least(r, top + 4);
    for (int64_t j = 0; j < top; ++j) {
      if (bottom - top == 4)
        eliminate<4>(l, top, j);
      else
        for (int64_t i = top; i < bottom; ++i) eliminate<1>(l, i, j);
    }
    for (int64_t i = top; i < bottom; ++i) {
      for (int64_t j = top; j < i; ++j) eliminate<1>(l, i, j);
      Eight *row = l + triangle(i), pivot = row[i], value = x[i];
      for (int64_t k = 0; k < i; ++k) {
        const Eight scaled = row[k];  // of L D
        row[k] = scaled * inverse[k];
        pivot -= scaled * row[k];
        value -= row[k] * x[k];
      }
      inverse[i] = 1.0 / (pivot > damping ? pivot : Eight{} + damping);
      x[i] = value;
    }
  }
  for (int64_t i = r - 1; i >= 0; --i) x[i] *= inverse[i];
  for (int64_t i = r - 1; i > 0; --i)
    for (int64_t j = 0; j < i; ++j) x[j] -= l[triangle(i) + j] * x[i];
}

template <class T>
void merge(const KronGroup& group, int64_t begin, int64_t end, const float* rows_new, const double* factor_new,
           const float* rows_old, const double* factor_old, double c, double damping) {
  constexpr int kPitch = 2 * kLanes;
  alignas(64) float memory[2][kMostRank * kPitch] = {};
  double old[kMostRank * kMostRank];  // with zeros up to a multiple of kTall columns
  Eight a[kMostRank * (kMostRank + 1) / 2], x[kMostRank], gap[kMostRank];
  const int64_t r = group.r, wide = up(r, kTall);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < wide; ++j) old[i * wide + j] = j < r ? factor_old[i * r + j] : 0.0;
  const Tile now{memory[0], kPitch}, start{memory[1], kPitch};
  for (; begin < end; begin += kEight) {
    const int64_t count = least(end - begin, kEight);
    pack<T>(group, 0, begin, count, now);
    pack<T>(group, 1, begin, count, start);
    Eight m{}, f{};
    for (int64_t k = 0; k < count; ++k) {
      m[k] = double(rows_old[begin + k]) / c;
      f[k] = double(rows_new[begin + k]);
    }
    for (int64_t i = 0; i < wide; ++i)
      for (int k = 0; k < kEight; ++k) gap[i][k] = double(start.column(i)[k]) - double(now.column(i)[k]);
    for (int64_t i = 0; i < r; ++i) {
      const double *p = old + i * wide, *q = factor_new + i * r;
      Eight sum[kTall] = {};
      for (int64_t j = 0; j < r; j += kTall)
#pragma GCC unroll 4
        for (int b = 0; b < kTall; ++b) sum[b] += gap[j + b] * p[j + b];
      x[i] = m * ((sum[0] + sum[1]) + (sum[2] + sum[3]));
      Eight* row = a + triangle(i);
      for (int64_t j = 0; j <= i; ++j) row[j] = m * p[j] + f * q[j];
      row[i] += damping;
    }
    solve(r, damping, a, x);
    for (int64_t i = 0; i < r; ++i)
      for (int k = 0; k < kEight; ++k) now.column(i)[k] = float(double(now.column(i)[k]) + x[i][k]);
    unpack<T>(now, group, 0, begin, count);
  }
}

}  // namespace

#define CNEXT_JOIN2(a, b) a##b
#define CNEXT_JOIN(a, b) CNEXT_JOIN2(a, b)
const KronTable* CNEXT_JOIN(kron_, CNEXT_ISA)() {
  static const KronTable table = {sums_size,
                                  {accumulate<float>, accumulate<bf16>, accumulate<f16>},
                                  add,
                                  {pull<float>, pull<bf16>, pull<f16>},
                                  {merge<float>, merge<bf16>, merge<f16>}};
  return &table;
}
