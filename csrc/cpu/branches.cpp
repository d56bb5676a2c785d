// CPU kernels of dropout on the branches' input, one row at a time. Compiled once per instruction set (CNEXT_ISA): only
// the table may have external linkage.
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include <cstring>

#include "../branches.h"

#include "dropout.h"

namespace {

CNEXT_HD double load(double x) { return x; }
CNEXT_HD void store(double& to, double x) { to = x; }

// Sixteen adjacent columns of a tile at a time: lane j of word w holds the bits of columns 32 w + j and 32 w + 16 + j.
#ifdef __AVX2__
// `philox` with each lane in the lower half of 64 bits, as the multiplication of 32 x 32 to 64 bits takes it: even
// lanes, then odd ones. The upper halves of the counters are not read.
#ifdef __AVX512F__
using Lanes = __m512i;
CNEXT_HD Lanes lanes_of(uint64_t x) { return _mm512_set1_epi64(int64_t(x)); }
// With a mask of ones, as GCC warns about the variants without one.
CNEXT_HD Lanes product(Lanes a, Lanes b) { return _mm512_maskz_mul_epu32(0xFF, a, b); }
CNEXT_HD Lanes upper(Lanes x) { return _mm512_maskz_srli_epi64(0xFF, x, 32); }
CNEXT_HD Lanes joined(Lanes even, Lanes odd) {
  return _mm512_mask_shuffle_epi32(even, 0xAAAA, odd, _MM_PERM_CCAA);
}
#else
using Lanes = __m256i;
CNEXT_HD Lanes lanes_of(uint64_t x) { return _mm256_set1_epi64x(int64_t(x)); }
CNEXT_HD Lanes product(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
CNEXT_HD Lanes upper(Lanes x) { return _mm256_srli_epi64(x, 32); }
CNEXT_HD Lanes joined(Lanes even, Lanes odd) { return _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0xAA); }
#endif

CNEXT_HD void tile_bits(uint32_t (&words)[4][kTileLanes], uint32_t tile, uint32_t row, const Dropout& dropout) {
  constexpr int size = sizeof(Lanes) / 4, parts = kTileLanes / size;
  Lanes c[parts][2][4];
  uint64_t first[size / 2];
  for (int part = 0; part < parts; ++part)
    for (int odd = 0; odd < 2; ++odd) {
      for (int j = 0; j < size / 2; ++j) first[j] = tile * kTileLanes + uint32_t(part * size + 2 * j + odd);
      std::memcpy(&c[part][odd][0], first, sizeof first);
      c[part][odd][1] = lanes_of(row);
      c[part][odd][2] = lanes_of(dropout.branch);
      c[part][odd][3] = lanes_of(0);
    }
  uint32_t key[2] = {uint32_t(dropout.seed), uint32_t(dropout.seed >> 32)};
#pragma GCC unroll 7
  for (int round = 0; round < kRounds; ++round, key[0] += kWeyl0, key[1] += kWeyl1)
#pragma GCC unroll 4
    for (int i = 0; i < 2 * parts; ++i) {
      Lanes* x = c[i / 2][i % 2];
      const Lanes p0 = product(x[0], lanes_of(kMultiplier0)), p1 = product(x[2], lanes_of(kMultiplier1));
      x[0] = upper(p1) ^ x[1] ^ lanes_of(key[0]);
      x[1] = p1;
      x[2] = upper(p0) ^ x[3] ^ lanes_of(key[1]);
      x[3] = p0;
    }
  for (int part = 0; part < parts; ++part)
    for (int w = 0; w < 4; ++w) {
      const Lanes word = joined(c[part][0][w], c[part][1][w]);
      std::memcpy(words[w] + part * size, &word, sizeof word);
    }
}
#else
CNEXT_HD void tile_bits(uint32_t (&words)[4][kTileLanes], uint32_t tile, uint32_t row, const Dropout& dropout) {
#pragma omp simd
  for (int j = 0; j < kTileLanes; ++j) {
    uint32_t c[4] = {tile * kTileLanes + uint32_t(j), row, dropout.branch, 0};
    philox(c, uint32_t(dropout.seed), uint32_t(dropout.seed >> 32));
    words[0][j] = c[0];
    words[1][j] = c[1];
    words[2][j] = c[2];
    words[3][j] = c[3];
  }
}
#endif

template <class T, bool Add>
CNEXT_HD void lanes(const T* __restrict x, T* __restrict out, const uint32_t* word, int shift, uint32_t threshold,
                    decltype(load(T{})) scale) {
#pragma omp simd
  for (int j = 0; j < kTileLanes; ++j) {
    const auto kept = ((word[j] >> shift) & 0xffffu) >= threshold ? load(x[j]) * scale : 0;
    store(out[j], Add ? load(out[j]) + kept : kept);
  }
}

template <class T, bool Add>
void run(const void* from, void* to, int64_t row, int64_t columns, const Dropout& dropout) {
  using Wide = decltype(load(T{}));
  const T* x = static_cast<const T*>(from);
  T* out = static_cast<T*>(to);
  const Wide scale = Wide(65536.0 / (65536.0 - dropout.threshold));
  uint32_t words[4][kTileLanes];
  for (int64_t begin = 0; begin < columns; begin += kTile) {
    tile_bits(words, dropout.first_tile + uint32_t(begin / kTile), uint32_t(row), dropout);
    if (columns - begin >= kTile) {
      for (int w = 0; w < 4; ++w)
        for (int t = 0; t < 2; ++t) {
          const int64_t at = begin + 32 * w + 16 * t;
          lanes<T, Add>(x + at, out + at, words[w], 16 * t, dropout.threshold, scale);
        }
      continue;
    }
    for (int64_t k = begin; k < columns; ++k) {
      const uint32_t random = words[(k - begin) / 32][k % 16] >> (16 * ((k / 16) % 2)) & 0xffffu;
      const Wide kept = random >= dropout.threshold ? load(x[k]) * scale : Wide(0);
      store(out[k], Add ? load(out[k]) + kept : kept);
    }
  }
}

}  // namespace

#define CNEXT_PASTE(a, b) a##b
#define CNEXT_TABLE(isa) CNEXT_PASTE(branches_, isa)
DropoutTable CNEXT_TABLE(CNEXT_ISA)() {
  return {{run<float, false>, run<bf16, false>, run<f16, false>, run<double, false>},
          {run<float, true>, run<bf16, true>, run<f16, true>, run<double, true>}};
}
