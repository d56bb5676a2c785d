// Signature of a kernel over lists of tensors: its rule, operand types, reductions and counts of scalars.
#pragma once

#include <utility>

struct Signature {
  const char* rule;
  const char* dtypes;  // one letter per operand: f float32, b bfloat16, h float16
  const char* kinds;   // one letter per column of the statistics: + sum, < minimum, > maximum
  int scalars;         // of a call
  int row_width;       // float64 values per tensor; 0 where the rule takes none
};

namespace {

template <char... Letters>
struct Text {
  static constexpr char value[] = {Letters..., '\0'};
};

template <class Rule, int... K>
constexpr const char* kinds(std::integer_sequence<int, K...>) {
  return Text<Rule::kind(K)...>::value;
}

// Letters: of the operands' types.
template <class Rule, char... Letters>
constexpr Signature signature(const char* rule) {
  static_assert(sizeof...(Letters) == Rule::operands, "one type per operand");
  static_assert(Rule::operands <= 8 && Rule::scalars <= 8, "the drivers hold at most eight");
  return {rule, Text<Letters...>::value, kinds<Rule>(std::make_integer_sequence<int, Rule::columns>()), Rule::scalars,
          Rule::row_width};
}

}  // namespace
