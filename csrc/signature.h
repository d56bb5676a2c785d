// What a kernel over lists of tensors takes, as its rule declares it.
#pragma once

struct Signature {
  const char* rule;
  const char* dtypes;  // one letter per operand: f float32, b bfloat16
  const char* kinds;   // one letter per counted column: + sum, < minimum, > maximum
  int scalars;         // numbers of a call
  int row_width;       // numbers of each tensor; 0 where the rule takes none
};

template <class Rule, class... T, int Letters, int Kinds>
static constexpr Signature signature(const char* rule, const char (&dtypes)[Letters], const char (&kinds)[Kinds]) {
  static_assert(sizeof...(T) == Rule::operands && Letters == Rule::operands + 1, "one type and one letter per operand");
  static_assert(Kinds == Rule::columns + 1, "one kind per counted column");
  static_assert(Rule::operands <= 8 && Rule::scalars <= 8, "the drivers hold eight of them");
  return {rule, dtypes, kinds, Rule::scalars, Rule::row_width};
}
