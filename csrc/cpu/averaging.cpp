// CPU kernels of the averaging ops. Compiled once per instruction set (CNEXT_ISA): only the table may have external
// linkage, else the linker could keep the AVX-512 copy of an inline function for every machine.
#include "../averaging.h"

#include <cstddef>
#include <utility>

#include "../reductions.h"
#include "foreach.h"

namespace {

constexpr int kLanes = 32;        // accumulators: the order of a sum depends on the elements' indices alone
constexpr int64_t kFlush = 8192;  // elements reduced in float before the result goes into a double

// The local arrays are here and not in the loops, where `omp simd` would make an array of each.
template <class Rule, class... T>
CNEXT_HD void element(const Rule& rule, float (*lanes)[kLanes], int64_t i, T&... p) {
  float x[] = {load(p)...};
  float s[Rule::columns + 1];
  rule(x, s);
  int k = 0;
  ((k < Rule::outputs ? store(p, x[k]) : void(), ++k), ...);
#pragma GCC unroll 8
  for (int c = 0; c < Rule::columns; ++c) lanes[c][i] = combine(Rule::kind(c), lanes[c][i], s[c]);
}

// n elements; kLanes where the rule has statistics.
template <class Rule, class... T>
CNEXT_HD void loop(const Rule& rule, int64_t n, float (*__restrict lanes)[kLanes], T* __restrict... p) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) element(rule, lanes, i, p[i]...);
}

template <class Rule, class... T>
void counting(const Rule rule, int64_t n, double* columns, T*... p) {
  float lanes[Rule::columns][kLanes];
  for (int64_t begin = 0; begin < n; begin += kFlush) {
    const int64_t end = n - begin < kFlush ? n : begin + kFlush;
    for (int k = 0; k < Rule::columns; ++k)
      for (int j = 0; j < kLanes; ++j) lanes[k][j] = identity<float>(Rule::kind(k));
    int64_t i = begin;
    for (; i + kLanes <= end; i += kLanes) loop(rule, kLanes, lanes, p + i...);
    for (int64_t j = 0; j < end - i; ++j) {
      asm volatile("");  // keeps the compiler from vectorizing less than a vector
      element(rule, lanes, j, p[i + j]...);
    }
    for (int k = 0; k < Rule::columns; ++k)
      for (int j = 0; j < kLanes; ++j) columns[k] = combine(Rule::kind(k), columns[k], double(lanes[k][j]));
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
