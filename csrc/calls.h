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
