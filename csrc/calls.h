// Calls from Python: lookup of a rule's kernel, and checks of a call against its signature. Shared by both modules; not
// for files that are compiled once per instruction set.
#pragma once

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <stdexcept>
#include <string>

#include "signature.h"

namespace {

using Addresses = pybind11::array_t<int64_t, pybind11::array::c_style>;

template <class Table>
const auto& find(const Table& table, const char* layer, const std::string& rule, const std::string& dtypes) {
  for (int i = 0; i < table.size; ++i)
    if (rule == table.kernels[i].signature.rule && dtypes == table.kernels[i].signature.dtypes) return table.kernels[i];
  throw std::invalid_argument(std::string("no ") + layer + " kernel for rule " + rule + " with dtypes " + dtypes);
}

// A row of doubles per tensor at an address; none where the address is 0.
struct Rows {
  uintptr_t address;
  int64_t width;
};

// A kernel sees raw addresses only: where a call gave too little, it would read or write out of bounds.
void check(const Signature& kernel, const Addresses& addresses, const Addresses& sizes, size_t scalars,
           const Rows& columns, const Rows& rows) {
  const auto expect = [&](const char* what, size_t expected, size_t given) {
    if (given != expected)
      throw std::invalid_argument(std::string("rule ") + kernel.rule + ": expected " + std::to_string(expected) + " " +
                                  what + ", got " + std::to_string(given) +
                                  "; expected what csrc/averaging.h declares");
  };
  if (addresses.ndim() != 2 || sizes.ndim() != 1 || addresses.shape(1) != sizes.shape(0))
    throw std::invalid_argument("addresses must be (operands, tensors) and sizes (tensors,)");
  expect("operands", std::strlen(kernel.dtypes), size_t(addresses.shape(0)));
  expect("scalars", size_t(kernel.scalars), scalars);
  expect("columns", std::strlen(kernel.kinds), columns.address ? size_t(columns.width) : 0);
  expect("numbers in a row", size_t(kernel.row_width), rows.address ? size_t(rows.width) : 0);
}

// The same for the ops of cnext.ops.kron. groups: (groups, 4) of n, r, first matrix and number of matrices; parts:
// (matrices, 3) of rank and strides along n and along the rank; addresses: (lists, matrices) and (lists, groups).
inline void check_kron(const std::string& op, const std::string& letter, const Addresses& groups,
                       const Addresses& parts, const Addresses& part_addresses, const Addresses& group_addresses,
                       size_t scalars) {
  struct {
    const char* op;
    int64_t part_lists, group_lists;
    size_t scalars;
  } constexpr kOps[] = {{"kron_accumulate", 1, 2, 0}, {"kron_pull", 2, 3, 1}, {"kron_merge", 2, 4, 2}};
  const auto require = [&](bool fits, const char* what) {
    if (!fits) throw std::invalid_argument(op + ": " + what + "; expected what cnext/ops/kron.py passes");
  };
  const auto shape = [](const Addresses& array, int64_t rows, int64_t columns) {
    return array.ndim() == 2 && array.shape(0) == rows && array.shape(1) == columns;
  };
  const auto* found = kOps;
  while (found != kOps + 3 && op != found->op) ++found;
  require(found != kOps + 3, "the op must be kron_accumulate, kron_pull or kron_merge");
  require(letter == "f" || letter == "b" || letter == "h", "letter must be f, b or h");
  require(groups.ndim() == 2 && groups.shape(1) == 4, "groups must be (groups, 4)");
  require(parts.ndim() == 2 && parts.shape(1) == 3, "parts must be (matrices, 3)");
  require(shape(part_addresses, found->part_lists, parts.shape(0)), "part_addresses must be (lists, matrices)");
  require(shape(group_addresses, found->group_lists, groups.shape(0)), "group_addresses must be (lists, groups)");
  require(scalars == found->scalars, "a wrong number of scalars");
  int64_t matrix = 0;
  for (int64_t g = 0; g < groups.shape(0); ++g) {
    const int64_t *group = groups.data(g, 0), n = group[0], r = group[1];
    require(n > 0 && r > 0 && r <= 64, "a group must have rows, and a total rank from 1 to 64");
    require(group[2] == matrix && group[3] > 0 && group[3] <= parts.shape(0) - matrix,
            "groups must have the matrices one after another");
    int64_t ranks = 0;
    for (const int64_t end = matrix + group[3]; matrix < end; ++matrix) {
      const int64_t *part = parts.data(matrix, 0), rank = part[0];
      require(rank > 0 && rank <= r - ranks, "the ranks of a group's matrices must be positive and sum to its own");
      require((part[1] == rank && part[2] == 1) || (part[1] == 1 && part[2] == n), "a matrix must be contiguous");
      ranks += rank;
    }
    require(ranks == r, "the ranks of a group's matrices must be positive and sum to its own");
  }
  require(matrix == parts.shape(0), "every matrix must be in a group");
}

template <class Table>
pybind11::list signatures(const Table& table) {
  pybind11::list all;
  for (int i = 0; i < table.size; ++i) {
    const Signature& s = table.kernels[i].signature;
    all.append(pybind11::make_tuple(s.rule, s.dtypes, s.kinds, s.scalars, s.row_width));
  }
  return all;
}

}  // namespace
