// The averaging rules over contiguous runs of elements. Compiled once per instruction set (CNEXT_ISA), so nothing
// here may have external linkage save the table: an AVX-512 copy of a shared inline function would reach every machine.
#include "../averaging.h"

#include <cstddef>
#include <utility>

#include "foreach.h"

namespace {

constexpr int kLanes = 32;   // independent accumulators: the sum's order depends on nothing but the element's index
constexpr int kStrip = 512;  // elements whose counts are held in L1 before they are combined
constexpr int kFlush = 16;   // strips combined in float before they go into a double

CNEXT_HD double combine(char kind, double a, double b) {
  return kind == '+' ? a + b : kind == '<' ? (b < a ? b : a) : (b > a ? b : a);
}

// The local arrays live here and not in the loops, where `omp simd` would make an array of each of them.
template <class Rule, class... T>
CNEXT_HD void element(const Rule& rule, float (*counted)[kStrip], int64_t i, T&... p) {
  float x[] = {load(p)...};
  float s[Rule::columns + 1];
  rule(x, s);
  int k = 0;
  ((k < Rule::outputs ? store(p, x[k]) : void(), ++k), ...);
#pragma GCC unroll 8
  for (int c = 0; c < Rule::columns; ++c) counted[c][i] = s[c];
}

template <class Rule, class... T>
void loop(const Rule rule, int64_t n, float (*__restrict counted)[kStrip], T* __restrict... p) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) element(rule, counted, i, p[i]...);
}

template <class Rule>
CNEXT_HD float first(int k) {
  return Rule::kind(k) == '+' ? 0.0f : Rule::kind(k) == '<' ? __builtin_inff() : -__builtin_inff();
}

CNEXT_HD float combine(char kind, float a, float b) {
  return kind == '+' ? a + b : kind == '<' ? (b < a ? b : a) : (b > a ? b : a);
}

template <class Rule, class... T>
void counting(const Rule rule, int64_t n, double* columns, T*... p) {
  constexpr int C = Rule::columns;
  float counted[C][kStrip], lanes[C][kLanes];
  for (int64_t begin = 0, strips = 1; begin < n; begin += kStrip, ++strips) {
    const int64_t count = n - begin < kStrip ? n - begin : kStrip;
    loop(rule, count, counted, p + begin...);
    for (int k = 0; k < C; ++k) {
      if (strips % kFlush == 1)
        for (int j = 0; j < kLanes; ++j) lanes[k][j] = first<Rule>(k);
      for (int64_t i = count; i < kStrip; ++i) counted[k][i] = first<Rule>(k);
      for (int i = 0; i < kStrip; i += kLanes)
        for (int j = 0; j < kLanes; ++j) lanes[k][j] = combine(Rule::kind(k), lanes[k][j], counted[k][i + j]);
      if (strips % kFlush == 0 || begin + kStrip >= n)
        for (int j = 0; j < kLanes; ++j) columns[k] = combine(Rule::kind(k), columns[k], double(lanes[k][j]));
    }
  }
}

template <class Rule, class... T, std::size_t... I>
void unpack(const double* scalars, const double* row, void* const* operands, int64_t n, double* columns,
            std::index_sequence<I...>) {
  static_assert(sizeof...(T) == Rule::operands, "one type per operand");
  const Rule rule(scalars, row);
  if constexpr (Rule::columns == 0)
    loop(rule, n, nullptr, static_cast<T*>(operands[I])...);
  else
    counting(rule, n, columns, static_cast<T*>(operands[I])...);
}

template <class Rule, class... T>
void run(const double* scalars, const double* row, void* const* operands, int64_t n, double* columns) {
  unpack<Rule, T...>(scalars, row, operands, n, columns, std::index_sequence_for<T...>());
}

template <class Rule, class... T>
constexpr Kernel kernel(const char* name) {
  return {signature<Rule, letter<T>...>(name), run<Rule, T...>};
}

constexpr Kernel kKernels[] = {
#define CNEXT_KERNEL(name, ...) kernel<__VA_ARGS__>(name),
#include "../averaging.kernels.inc"
#undef CNEXT_KERNEL
};

}  // namespace

#define CNEXT_JOIN2(a, b) a##b
#define CNEXT_JOIN(a, b) CNEXT_JOIN2(a, b)
KernelTable CNEXT_JOIN(averaging_, CNEXT_ISA)() { return {kKernels, int(sizeof(kKernels) / sizeof(kKernels[0]))}; }
