// CUDA kernels of the low-rank products, each one pass over the wide matrix, in bfloat16 and float16 with float32 sums.
//
// The mask of branches.h matches the fragments of the tensor cores: the 16 columns of a fragment are the 16 lanes of a
// tile, so that a thread computes the random bits of its own elements, eight Philox calls for 64 of them, without any
// exchange. Sums are deterministic: those that several blocks share are added by combine_kernel, in order.
#pragma once

#include "../branches.h"
#include "device.h"
#include "products.h"

namespace {

constexpr int kWarp = 32, kPad = 8;  // rows of a tile are padded by 16 bytes: ldmatrix then has no bank conflicts
constexpr int kPitch = kTile + kPad;

struct alignas(16) Floats {
  float value[4];
};

struct alignas(8) FloatPair {
  float low, high;
};

// ---- The mask

struct Draw {
  uint32_t key0, key1, branch, limit;  // limit: the threshold in the upper half
  bool dropped;
};

CNEXT_DEVICE Draw begin(const Dropout& dropout) {
  Draw draw{0, 0, dropout.branch, dropout.threshold << 16, dropout.threshold != 0};
  if (draw.dropped) {
    const uint64_t seed = uint64_t(read<int64_t>(dropout.seed));
    draw.key0 = uint32_t(seed);
    draw.key1 = uint32_t(seed >> 32);
  }
  return draw;
}

// Random words of 16 rows and a tile of 128 columns. Register e of a fragment of 16 columns holds two elements, h = 0
// and 1. With g = lane / 4 and q = lane % 4 they lie side by side, in row g + 8 (e % 2) and columns
// 2 q + 8 (e / 2) + h; or Stacked, where rows are summed over: rows 2 q + 8 (e % 2) + h, column g + 8 (e / 2).
struct Random {
  uint32_t word[8][4];  // [2 e + h][column / 32 within the tile]
};

template <bool Stacked>
CNEXT_DEVICE void fill(Random& random, const Draw& draw, uint32_t tile, uint32_t row, int lane) {
  const uint32_t g = uint32_t(lane) / 4, q = uint32_t(lane) % 4;
#pragma unroll
  for (uint32_t i = 0; i < 8; ++i) {
    const uint32_t e = i / 2, h = i % 2;
    const uint32_t column = Stacked ? g + 8 * (e / 2) : 2 * q + 8 * (e / 2) + h;
    uint32_t(&c)[4] = random.word[i];
    c[0] = tile * kTileLanes + column;
    c[1] = row + (Stacked ? 2 * q + 8 * (e % 2) + h : g + 8 * (e % 2));
    c[2] = draw.branch;
    c[3] = 0;
    philox(c, draw.key0, draw.key1);
  }
}

// Whether the element in half h of register e of the tile's columns 16 i to 16 i + 15 is dropped.
CNEXT_DEVICE bool is_dropped(const Random& random, int e, int h, int i, uint32_t limit) {
  const uint32_t word = random.word[2 * e + h][i / 2];
  return (i % 2 ? word : word << 16) < limit;
}

CNEXT_DEVICE void mask(uint32_t (&v)[4], const Random& random, int i, uint32_t limit) {
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    if (is_dropped(random, e, 0, i, limit)) v[e] &= 0xffff0000u;
    if (is_dropped(random, e, 1, i, limit)) v[e] &= 0x0000ffffu;
  }
}

// ---- Tiles

CNEXT_DEVICE uint32_t offset(int row, int column, int pitch) { return uint32_t(row * pitch + column) * 2; }

// A tile of Columns into shared memory, rows `pitch` elements apart, with zeros outside the matrix, whose columns are a
// multiple of 8 and whose rows are aligned. `threads` threads share the work; `thread` is this one's index.
template <int Columns>
CNEXT_DEVICE void copy_wide(uint32_t to, int pitch, const uint16_t* from, int64_t stride, int tile_rows, int64_t rows,
                            int64_t columns, int thread, int threads) {
  constexpr int chunks = Columns / 8;  // divides the threads: each keeps its column
  const int column = thread % chunks * 8, step = threads / chunks;
  const int filled = column < columns ? int(rows < tile_rows ? rows : tile_rows) : 0;
  to += offset(thread / chunks, column, pitch);
  const uint16_t* at = from + thread / chunks * stride + column;
#pragma unroll 4
  for (int row = thread / chunks; row < tile_rows; row += step) {
    const bool inside = row < filled;
    copy_async(to, inside ? at : from, inside ? 16 : 0);
    to += offset(step, 0, pitch);
    at += step * stride;
  }
}

// The same for a narrow matrix, which may be some columns of a wider one.
template <int Columns>
CNEXT_DEVICE void copy_narrow(char* to, const uint16_t* from, int64_t stride, int tile_rows, int64_t rows,
                              int columns) {
  constexpr int chunks = Columns / 8, pitch = Columns + kPad;
  const bool aligned = reinterpret_cast<uintptr_t>(from) % 16 == 0 && stride % 8 == 0;
  if (aligned) {
    for (int c = int(threadIdx.x); c < tile_rows * chunks; c += int(blockDim.x)) {
      const int row = c / chunks, column = c % chunks * 8, left = columns - column;
      const int bytes = row >= rows || left <= 0 ? 0 : left < 8 ? 2 * left : 16;
      copy_async(shared_address(to) + offset(row, column, pitch), bytes ? from + row * stride + column : from, bytes);
    }
    return;
  }
  for (int c = int(threadIdx.x); c < tile_rows * Columns; c += int(blockDim.x)) {
    const int row = c / Columns, column = c % Columns;
    const bool inside = row < rows && column < columns;
    const uint16_t value = inside ? read<uint16_t>(from + row * stride + column) : uint16_t(0);
    write(to + offset(row, column, pitch), value);
  }
}

// ---- h = f (keep o x) a^T

struct Project {
  const uint16_t *x, *a;
  void* h;
  float* partial;  // (blocks along the columns, rows, Ranks), or null: h is written directly
  int64_t rows, columns, x_stride, a_stride, h_stride;
  int rank, tiles;  // tiles: of 128 columns, per block
  float factor;
  Dropout dropout;
};

// Each warp has 16 * Fragments rows; the block shares a tile of a.
template <class T, int Ranks, int Fragments, int Threads, int Resident>
__global__ void __launch_bounds__(Threads, Resident) project_kernel(const Project p) {
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int block_rows = int(blockDim.x) / kWarp * 16 * Fragments;
  const int64_t first_row = int64_t(blockIdx.x) * block_rows;
  const int64_t tiles = (p.columns + kTile - 1) / kTile, first = int64_t(blockIdx.y) * p.tiles;
  const int64_t last = first + p.tiles < tiles ? first + p.tiles : tiles;
  const uint32_t stage_bytes = uint32_t(block_rows + Ranks) * kPitch * 2, a_offset = uint32_t(block_rows) * kPitch * 2;
  const uint32_t shared = shared_address(shared_memory());
  const auto fetch = [&](int64_t tile) {
    const uint32_t stage = shared + uint32_t(tile % 2) * stage_bytes;
    const int64_t column = tile * kTile;
    copy_wide<kTile>(stage, kPitch, p.x + first_row * p.x_stride + column, p.x_stride, block_rows, p.rows - first_row,
                     p.columns - column, int(threadIdx.x), int(blockDim.x));
    copy_wide<kTile>(stage + a_offset, kPitch, p.a + column, p.a_stride, Ranks, p.rank, p.columns - column,
                     int(threadIdx.x), int(blockDim.x));
    commit_copies();
  };
  const Draw draw = begin(p.dropout);
  float sums[Fragments][Ranks / 8][4] = {};
  if (first < last) fetch(first);
  for (int64_t tile = first; tile < last; ++tile) {
    wait_copies<0>();
    __syncthreads();
    if (tile + 1 < last) fetch(tile + 1);
    const uint32_t stage = shared + uint32_t(tile % 2) * stage_bytes;
    const int own = warp * 16 * Fragments;
    Random random[Fragments];
    if (draw.dropped)
#pragma unroll
      for (int f = 0; f < Fragments; ++f)
        fill<false>(random[f], draw, uint32_t(tile), uint32_t(first_row) + uint32_t(own + 16 * f), lane);
    const uint32_t x_at = stage + offset(own + lane % 16, lane / 16 * 8, kPitch);
    const uint32_t a_at = stage + a_offset + offset(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8, kPitch);
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) {
      uint32_t v[Fragments][4];
#pragma unroll
      for (int f = 0; f < Fragments; ++f) {
        load_matrices(v[f], x_at + offset(16 * f, 16 * i, kPitch));
        if (draw.dropped) mask(v[f], random[f], i, draw.limit);
      }
#pragma unroll
      for (int n = 0; n < Ranks / 16; ++n) {
        uint32_t b[4];
        load_matrices(b, a_at + offset(16 * n, 16 * i, kPitch));
#pragma unroll
        for (int f = 0; f < Fragments; ++f) {
          multiply(T(), sums[f][2 * n], v[f], b[0], b[1]);
          multiply(T(), sums[f][2 * n + 1], v[f], b[2], b[3]);
        }
      }
    }
  }
#pragma unroll
  for (int f = 0; f < Fragments; ++f)
#pragma unroll
    for (int n = 0; n < Ranks / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t row = first_row + (warp * Fragments + f) * 16 + half * 8 + lane / 4;
        const int column = 8 * n + lane % 4 * 2;
        const FloatPair sum{sums[f][n][2 * half], sums[f][n][2 * half + 1]};
        if (row >= p.rows) continue;
        if (p.partial) {
          write(p.partial + ((int64_t(blockIdx.y) * p.rows + row) * Ranks + column), sum);
          continue;
        }
        T* to = static_cast<T*>(p.h) + row * p.h_stride + column;
        T low, high;
        store(low, sum.low * p.factor);
        store(high, sum.high * p.factor);
        if (column < p.rank) write(to, low);
        if (column + 1 < p.rank) write(to + 1, high);
      }
}

// ---- da = f dh^T (keep o x)

struct GradA {
  const uint16_t *dh, *x;
  void* da;
  float* partial;  // (blocks along the rows, rank, columns), or null
  int64_t rows, columns, dh_stride, x_stride, da_stride;
  int rank, steps;  // steps: of 64 rows, per block
  float factor;
  Dropout dropout;
};

constexpr int kGradARows = 64, kGradAThreads = 128;

// A block has a tile of columns, each warp 32 of them. To apply the mask, each warp takes 16 rows of the whole tile and
// writes their masked fragments to shared memory.
template <class T, int Ranks, int Resident>
__global__ void __launch_bounds__(kGradAThreads, Resident) grad_a_kernel(const GradA p) {
  constexpr int kDhPitch = Ranks + kPad, kXBytes = kGradARows * kPitch * 2, kDhBytes = kGradARows * kDhPitch * 2;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int64_t tile = blockIdx.x, first_column = tile * kTile;
  const int64_t steps = (p.rows + kGradARows - 1) / kGradARows, first = int64_t(blockIdx.y) * p.steps;
  const int64_t last = first + p.steps < steps ? first + p.steps : steps;
  char* const memory = shared_memory();
  char* const masked = memory + 2 * (kXBytes + kDhBytes);
  const auto fetch = [&](int64_t step) {
    const int64_t row = step * kGradARows;
    char* const stage = memory + step % 2 * (kXBytes + kDhBytes);
    copy_wide<kTile>(shared_address(stage), kPitch, p.x + row * p.x_stride + first_column, p.x_stride, kGradARows,
                     p.rows - row, p.columns - first_column, int(threadIdx.x), kGradAThreads);
    copy_narrow<Ranks>(stage + kXBytes, p.dh + row * p.dh_stride, p.dh_stride, kGradARows, p.rows - row, p.rank);
    commit_copies();
  };
  const Draw draw = begin(p.dropout);
  float sums[Ranks / 16][4][4] = {};
  if (first < last) fetch(first);
  for (int64_t step = first; step < last; ++step) {
    wait_copies<0>();
    __syncthreads();
    if (step + 1 < last) fetch(step + 1);
    const uint32_t stage = shared_address(memory) + uint32_t(step % 2) * (kXBytes + kDhBytes);
    const uint32_t x_at = stage + offset(lane % 16, lane / 16 * 8, kPitch);
    const uint32_t dh_at = stage + kXBytes + offset(lane % 8 + lane / 16 * 8, lane / 8 % 2 * 8, kDhPitch);
    if (draw.dropped) {
      Random random;
      fill<true>(random, draw, uint32_t(tile), uint32_t(step * kGradARows) + uint32_t(16 * warp), lane);
#pragma unroll
      for (int i = 0; i < kTile / 16; ++i) {
        Words v;
        load_transposed(v.word, x_at + offset(16 * warp, 16 * i, kPitch));
        mask(v.word, random, i, draw.limit);
        write(masked + ((warp * 8 + i) * kWarp + lane) * 16, v);
      }
      __syncthreads();
    }
#pragma unroll
    for (int group = 0; group < kGradARows / 16; ++group) {
      Words v[2];
#pragma unroll
      for (int i = 0; i < 2; ++i)
        if (draw.dropped)
          v[i] = read<Words>(masked + ((group * 8 + 2 * warp + i) * kWarp + lane) * 16);
        else
          load_transposed(v[i].word, x_at + offset(16 * group, 16 * (2 * warp + i), kPitch));
#pragma unroll
      for (int r = 0; r < Ranks / 16; ++r) {
        uint32_t a[4];
        load_transposed(a, dh_at + offset(16 * group, 16 * r, kDhPitch));
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          const uint32_t(&b)[4] = v[n / 2].word;
          multiply(T(), sums[r][n], a, b[n % 2 * 2], b[n % 2 * 2 + 1]);
        }
      }
    }
  }
#pragma unroll
  for (int r = 0; r < Ranks / 16; ++r)
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = 16 * r + half * 8 + lane / 4;
        const int64_t column = first_column + warp * 32 + 8 * n + lane % 4 * 2;
        const FloatPair sum{sums[r][n][2 * half], sums[r][n][2 * half + 1]};
        if (row >= p.rank || column >= p.columns) continue;
        if (p.partial)
          write(p.partial + (int64_t(blockIdx.y) * p.rank + row) * p.columns + column, sum);
        else
          write(static_cast<T*>(p.da) + row * p.da_stride + column, pack(T(), sum.low * p.factor, sum.high * p.factor));
      }
}

// ---- out = keep o (factor dh a) + bias [+ out]

struct Expand {
  const uint16_t *dh, *a;
  const void* bias;
  uint16_t* out;
  int64_t rows, columns, dh_stride, a_stride, out_stride;
  int rank, tiles;  // tiles: of 128 columns, per block
  bool add;
  float factor;
  Dropout dropout;
};

constexpr int kExpandThreads = 256;  // at most

// Each warp has 16 rows, and keeps their dh in registers; the block shares a tile of a. The output is staged in the
// warp's part of shared memory, so that rows are written, and with `add` read, 16 bytes at a time. Plus: with a bias or
// `add`.
template <class T, int Ranks, bool Plus, int Resident>
__global__ void __launch_bounds__(kExpandThreads, Resident) expand_kernel(const Expand p) {
  constexpr int kABytes = Ranks * kPitch * 2, kDhPitch = Ranks + kPad;
  const int block_rows = int(blockDim.x) / kWarp * 16, out_bytes = block_rows * kPitch * 2;
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int64_t first_row = int64_t(blockIdx.x) * block_rows, own_row = first_row + 16 * warp;
  const int64_t tiles = (p.columns + kTile - 1) / kTile, first = int64_t(blockIdx.y) * p.tiles;
  const int64_t last = first + p.tiles < tiles ? first + p.tiles : tiles;
  char* const memory = shared_memory();
  char* const outs = memory + 2 * kABytes;
  const auto own = [&](int64_t tile) {
    return outs + (Plus && p.add ? tile % 2 * out_bytes : 0) + warp * 16 * kPitch * 2;
  };
  const auto fetch = [&](int64_t tile) {
    const int64_t column = tile * kTile;
    copy_wide<kTile>(shared_address(memory) + uint32_t(tile % 2) * kABytes, kPitch, p.a + column, p.a_stride, Ranks,
                     p.rank, p.columns - column, int(threadIdx.x), int(blockDim.x));
    if (Plus && p.add)
      copy_wide<kTile>(shared_address(own(tile)), kPitch, p.out + own_row * p.out_stride + column, p.out_stride, 16,
                       p.rows - own_row, p.columns - column, lane, kWarp);
    commit_copies();
  };
  const Draw draw = begin(p.dropout);
  uint32_t left[Ranks / 16][4];
  copy_narrow<Ranks>(outs, p.dh + first_row * p.dh_stride, p.dh_stride, block_rows, p.rows - first_row, p.rank);
  commit_copies();
  wait_copies<0>();
  __syncthreads();
#pragma unroll
  for (int r = 0; r < Ranks / 16; ++r)
    load_matrices(left[r], shared_address(outs) + offset(16 * warp + lane % 16, 16 * r + lane / 16 * 8, kDhPitch));
  __syncthreads();
  if (first < last) fetch(first);
  for (int64_t tile = first; tile < last; ++tile) {
    wait_copies<0>();
    __syncthreads();
    if (tile + 1 < last) fetch(tile + 1);
    char* const staged = own(tile);
    const uint32_t a_at =
        shared_address(memory) + uint32_t(tile % 2) * kABytes + offset(lane % 16, lane / 16 * 8, kPitch);
    Random random;
    if (draw.dropped) fill<false>(random, draw, uint32_t(tile), uint32_t(own_row), lane);
#pragma unroll
    for (int i = 0; i < kTile / 16; ++i) {
      float sums[2][4] = {};
#pragma unroll
      for (int r = 0; r < Ranks / 16; ++r) {
        uint32_t b[4];
        load_transposed(b, a_at + offset(16 * r, 16 * i, kPitch));
        multiply(T(), sums[0], left[r], b[0], b[1]);
        multiply(T(), sums[1], left[r], b[2], b[3]);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int row = lane / 4 + e % 2 * 8, column = 16 * i + lane % 4 * 2 + e / 2 * 8;
        char* const to = staged + offset(row, column, kPitch);
        float low = sums[e / 2][e % 2 * 2] * p.factor, high = sums[e / 2][e % 2 * 2 + 1] * p.factor;
        if (draw.dropped) {
          low = is_dropped(random, e, 0, i, draw.limit) ? 0.0f : low;
          high = is_dropped(random, e, 1, i, draw.limit) ? 0.0f : high;
        }
        if (Plus) {
          uint32_t had = 0, bias = 0;
          if (p.add) had = read<uint32_t>(to);
          if (p.bias && tile * kTile + column < p.columns) {
            const uint16_t* from = static_cast<const uint16_t*>(p.bias) + tile * kTile + column;
            bias = uint32_t(read<uint16_t>(from)) | uint32_t(read<uint16_t>(from + 1)) << 16;
          }
          low += load(T{uint16_t(bias)}) + load(T{uint16_t(had)});
          high += load(T{uint16_t(bias >> 16)}) + load(T{uint16_t(had >> 16)});
        }
        write(to, pack(T(), low, high));
      }
    }
    __syncwarp();
    const int64_t column = tile * kTile + lane % 16 * 8;
    const int filled = column < p.columns ? int(p.rows - own_row < 16 ? p.rows - own_row : 16) : 0;
    const char* from = staged + offset(lane / 16, lane % 16 * 8, kPitch);
    uint16_t* to = p.out + (own_row + lane / 16) * p.out_stride + column;
#pragma unroll
    for (int row = lane / 16; row < 16; row += 2) {
      const Words words = read<Words>(from);
      if (row < filled) write_global(to, words);
      from += offset(2, 0, kPitch);
      to += 2 * p.out_stride;
    }
  }
}

// ---- dh = scale dy bt^T, db = scale dy^T h

struct GradB {
  const uint16_t *dy, *bt, *h;
  float *dh, *db;  // (slabs of columns, rows, Ranks) and (blocks along the rows, columns, Ranks)
  int64_t rows, columns, dy_stride, bt_stride, h_stride;
  int rank, live, steps, stages;  // steps: of 32 rows, per block; stages: 2, or 3 where there is room
};

constexpr int kGradBRows = 32;

// A block has a slab of columns, each warp Columns of it, and keeps its parts of bt and db in registers. Every step
// loads 32 rows of the slab into shared memory once, for both products; the warps' partial sums of dh are added there.
template <class T, int Ranks, int Columns, int Threads>
__global__ void __launch_bounds__(Threads, 1) grad_b_kernel(const GradB p) {
  constexpr int kWarps = Threads / kWarp, kSlab = kWarps * Columns;
  constexpr int kDyPitch = kSlab + kPad, kHPitch = Ranks + kPad, kSumPitch = Ranks + kPad;
  constexpr int kDyBytes = kGradBRows * kDyPitch * 2, kHBytes = kGradBRows * kHPitch * 2;
  static_assert(Threads % (kSlab / 8) == 0, "copy_wide keeps each thread at its column");
  const int warp = int(threadIdx.x) / kWarp, lane = int(threadIdx.x) % kWarp;
  const int64_t first_column = int64_t(blockIdx.x) * kSlab, own_column = first_column + warp * Columns;
  const int64_t steps = (p.rows + kGradBRows - 1) / kGradBRows, first = int64_t(blockIdx.y) * p.steps;
  const int64_t last = first + p.steps < steps ? first + p.steps : steps;
  char* const memory = shared_memory();
  float* const shares = reinterpret_cast<float*>(memory + p.stages * (kDyBytes + kHBytes));
  const auto stage_of = [&](int64_t step) { return memory + int(step - first) % p.stages * (kDyBytes + kHBytes); };
  const auto fetch = [&](int64_t step) {  // always commits a group, if need be an empty one
    if (step >= last) return commit_copies();
    const int64_t row = step * kGradBRows;
    char* const stage = stage_of(step);
    copy_wide<kSlab>(shared_address(stage), kDyPitch, p.dy + row * p.dy_stride + first_column, p.dy_stride, kGradBRows,
                     p.rows - row, p.columns - first_column, int(threadIdx.x), Threads);
    if (p.live)
      copy_narrow<Ranks>(stage + kDyBytes, p.h + row * p.h_stride, p.h_stride, kGradBRows, p.rows - row, p.live);
    commit_copies();
  };
  for (int i = 0; i + 1 < p.stages; ++i) fetch(first + i);
  uint32_t right[Columns / 16][Ranks / 8][2];
#pragma unroll
  for (int c = 0; c < Columns / 16; ++c)
#pragma unroll
    for (int n = 0; n < Ranks / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t column = own_column + 16 * c + lane % 4 * 2 + half * 8;
        const int row = 8 * n + lane / 4;
        right[c][n][half] = row < p.rank && column < p.columns ? read<uint32_t>(p.bt + row * p.bt_stride + column) : 0;
      }
  float db[Columns / 16][Ranks / 8][4] = {};
  for (int64_t step = first; step < last; ++step) {
    if (p.stages == 3)
      wait_copies<1>();
    else
      wait_copies<0>();
    __syncthreads();
    fetch(step + p.stages - 1);
    const uint32_t stage = shared_address(stage_of(step));
    const uint32_t dy_at = stage + uint32_t(warp * Columns) * 2;
#pragma unroll
    for (int f = 0; f < kGradBRows / 16; ++f) {
      float dh[Ranks / 8][4] = {};
#pragma unroll
      for (int c = 0; c < Columns / 16; ++c) {
        uint32_t v[4];
        load_matrices(v, dy_at + offset(16 * f + lane % 16, 16 * c + lane / 16 * 8, kDyPitch));
#pragma unroll
        for (int n = 0; n < Ranks / 8; ++n) multiply(T(), dh[n], v, right[c][n][0], right[c][n][1]);
      }
#pragma unroll
      for (int n = 0; n < Ranks / 8; ++n)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          write(shares + (warp * kGradBRows + 16 * f + half * 8 + lane / 4) * kSumPitch + 8 * n + lane % 4 * 2,
                FloatPair{dh[n][2 * half], dh[n][2 * half + 1]});
    }
    if (p.live) {
#pragma unroll
      for (int f = 0; f < kGradBRows / 16; ++f) {
        uint32_t h[Ranks / 16][4];
#pragma unroll
        for (int r = 0; r < Ranks / 16; ++r)
          load_transposed(h[r], stage + kDyBytes + offset(16 * f + lane % 16, 16 * r + lane / 16 * 8, kHPitch));
#pragma unroll
        for (int c = 0; c < Columns / 16; ++c) {
          uint32_t v[4];
          const int row = 16 * f + lane % 8 + lane / 16 * 8;
          load_transposed(v, dy_at + offset(row, 16 * c + lane / 8 % 2 * 8, kDyPitch));
#pragma unroll
          for (int n = 0; n < Ranks / 8; ++n) multiply(T(), db[c][n], v, h[n / 2][n % 2 * 2], h[n / 2][n % 2 * 2 + 1]);
        }
      }
    }
    __syncthreads();
    for (int c = int(threadIdx.x); c < kGradBRows * Ranks / 4; c += Threads) {
      const int row = c / (Ranks / 4), column = c % (Ranks / 4) * 4;
      Floats sum = read<Floats>(shares + row * kSumPitch + column);
#pragma unroll
      for (int w = 1; w < kWarps; ++w) {
        const Floats more = read<Floats>(shares + (w * kGradBRows + row) * kSumPitch + column);
#pragma unroll
        for (int k = 0; k < 4; ++k) sum.value[k] += more.value[k];
      }
      const int64_t at = step * kGradBRows + row;
      if (at < p.rows) write_global(p.dh + (int64_t(blockIdx.x) * p.rows + at) * Ranks + column, sum);
    }
  }
  if (!p.live) return;
#pragma unroll
  for (int c = 0; c < Columns / 16; ++c)
#pragma unroll
    for (int n = 0; n < Ranks / 8; ++n)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int64_t column = own_column + 16 * c + half * 8 + lane / 4;
        if (column < p.columns)
          write(p.db + (int64_t(blockIdx.y) * p.columns + column) * Ranks + 8 * n + lane % 4 * 2,
                FloatPair{db[c][n][2 * half], db[c][n][2 * half + 1]});
      }
}

// ---- out = factor * the sum of the parts

struct Sum {
  const float* partial;  // (parts, rows, pitch); pitch a multiple of 4
  void* out;
  int64_t rows, columns, pitch, stride;  // stride: of out
  int parts;
  float factor;
};

constexpr int kCombineThreads = 256;

CNEXT_DEVICE int64_t quarters(const Sum& sum) { return sum.rows * ((sum.columns + 3) / 4); }

// Up to two matrices in one launch; a thread has four columns. The parts are added in order.
template <class T>
__global__ void __launch_bounds__(kCombineThreads) combine_kernel(const Sum one, const Sum other) {
  int64_t at = int64_t(blockIdx.x) * kCombineThreads + threadIdx.x;
  const int64_t ones = quarters(one);
  if (at >= ones + quarters(other)) return;
  const bool first = at < ones;
  const Sum p = first ? one : other;
  at -= first ? 0 : ones;
  const int64_t per_row = (p.columns + 3) / 4, row = at / per_row, column = at % per_row * 4;
  const float* from = p.partial + row * p.pitch + column;
  Floats sum = read<Floats>(from);
#pragma unroll 8
  for (int part = 1; part < p.parts; ++part) {
    from += p.rows * p.pitch;
    const Floats more = read<Floats>(from);
#pragma unroll
    for (int k = 0; k < 4; ++k) sum.value[k] += more.value[k];
  }
  T* out = static_cast<T*>(p.out) + row * p.stride + column;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    T value;
    store(value, sum.value[k] * p.factor);
    if (column + k < p.columns) write(out + k, value);
  }
}

}  // namespace
