// The averaging rules over contiguous runs of elements. Compiled once per instruction set (CNEXT_ISA), so nothing
// here may have external linkage save the table: an AVX-512 copy of a shared inline function would reach every machine.
#include "../averaging.h"

#include <cstddef>
#include <utility>

#include "foreach.h"

namespace {

constexpr int kLanes = 32;     // independent accumulators: the sum's order depends on nothing but the element's index
constexpr int kFlush = 8192;   // elements summed in float before they go into a double

CNEXT_HD double combine(char kind, double a, double b) {
  return kind == '+' ? a + b : kind == '<' ? (b < a ? b : a) : (b > a ? b : a);
}

template <class Rule, class... T>
CNEXT_HD void element(const Rule& rule, float* s, T&... p) {
  float x[] = {load(p)...};
  rule(x, s);
  int k = 0;
  ((k < Rule::outputs ? store(p, x[k]) : void(), ++k), ...);
}

template <class Rule, class... T>
void plain(const Rule rule, int64_t n, T* __restrict... p) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    float s[1];
    element(rule, s, p[i]...);
  }
}

template <class Rule>
CNEXT_HD float first(int k) {
  return Rule::kind(k) == '+' ? 0.0f : Rule::kind(k) == '<' ? __builtin_inff() : -__builtin_inff();
}

template <class Rule, class... T>
void counting(const Rule rule, int64_t n, double* columns, T* __restrict... p) {
  constexpr int C = Rule::columns;
  for (int64_t begin = 0; begin < n; begin += kFlush) {
    const int64_t end = n - begin < kFlush ? n : begin + kFlush;
    float lanes[C][kLanes];
    for (int k = 0; k < C; ++k)
      for (int j = 0; j < kLanes; ++j) lanes[k][j] = first<Rule>(k);
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) {
#pragma omp simd
      for (int j = 0; j < kLanes; ++j) {
        float s[C];
        element(rule, s, p[i + j]...);
        for (int k = 0; k < C; ++k)
          lanes[k][j] = Rule::kind(k) == '+'   ? lanes[k][j] + s[k]
                        : Rule::kind(k) == '<' ? (s[k] < lanes[k][j] ? s[k] : lanes[k][j])
                                               : (s[k] > lanes[k][j] ? s[k] : lanes[k][j]);
      }
    }
    for (int j = 0; i < end; ++i, ++j) {
      float s[C];
      element(rule, s, p[i]...);
      for (int k = 0; k < C; ++k) lanes[k][j] = float(combine(Rule::kind(k), lanes[k][j], s[k]));
    }
    for (int k = 0; k < C; ++k)
      for (int j = 0; j < kLanes; ++j) columns[k] = combine(Rule::kind(k), columns[k], lanes[k][j]);
  }
}

template <class Rule, class... T, std::size_t... I>
void unpack(const double* scalars, const double* row, void* const* operands, int64_t n, double* columns,
            std::index_sequence<I...>) {
  static_assert(sizeof...(T) == Rule::operands, "one type per operand");
  const Rule rule(scalars, row);
  if constexpr (Rule::columns == 0)
    plain(rule, n, static_cast<T*>(operands[I])...);
  else
    counting(rule, n, columns, static_cast<T*>(operands[I])...);
}

template <class Rule, class... T>
void run(const double* scalars, const double* row, void* const* operands, int64_t n, double* columns) {
  unpack<Rule, T...>(scalars, row, operands, n, columns, std::index_sequence_for<T...>());
}

const Kernel kKernels[] = {
#define CNEXT_KERNEL(name, dtypes, kinds, ...) {name, dtypes, kinds, run<__VA_ARGS__>},
#include "../averaging.kernels.inc"
#undef CNEXT_KERNEL
};

}  // namespace

#define CNEXT_JOIN2(a, b) a##b
#define CNEXT_JOIN(a, b) CNEXT_JOIN2(a, b)
KernelTable CNEXT_JOIN(averaging_, CNEXT_ISA)() { return {kKernels, int(sizeof(kKernels) / sizeof(kKernels[0]))}; }
