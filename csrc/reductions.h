// Reductions of float64 statistics, shared by the C++ and the CUDA layer. A kind is one letter: '+' sum, '<' minimum,
// '>' maximum. Internal linkage, as the C++ layer compiles this file once per instruction set.
#pragma once

#include <math.h>

#include "floats.h"

namespace {

template <class Number>
CNEXT_HD Number combine(char kind, Number a, Number b) {
  return kind == '+' ? a + b : kind == '<' ? (b < a ? b : a) : (b > a ? b : a);
}

template <class Number>
CNEXT_HD Number identity(char kind) {
  return kind == '+' ? Number(0) : kind == '<' ? Number(INFINITY) : -Number(INFINITY);
}

}  // namespace
