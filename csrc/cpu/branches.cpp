// Dropout on the way into the branches, one row at a time. Compiled once per instruction set (CNEXT_ISA), so nothing
// here may have external linkage save the table.
#include "../branches.h"

#include "dropout.h"

namespace {

CNEXT_HD double load(double x) { return x; }
CNEXT_HD void store(double& to, double x) { to = x; }

// Sixteen neighbours of a tile at a time: lane j of word w holds the bits of columns 32 w + j and 32 w + 16 + j.
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

template <class T, bool Add>
CNEXT_HD void lanes(const T* x, T* out, const uint32_t* word, int shift, uint32_t threshold,
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
