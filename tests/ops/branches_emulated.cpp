// The branches' CUDA kernels, emulated on the host, beside float64: every line that this prints is an error. Arguments:
// "wrong" has the kernels take another branch's mask than float64 does.
#include "../../csrc/cuda/branches_launch.h"
#include "../../csrc/cuda/dropout_kernels.h"

#include <cmath>
#include <random>

namespace {

std::mt19937 generator(7);
int cases = 0, errors = 0;
uint32_t wrong_by = 0;
const uint32_t kUnwritten = 0xffffffffu;
const int64_t kSeed = 0x123456789abcdef;

template <class T>
struct Values {
  int64_t rows, columns, stride;
  T* data;

  T& at(int64_t row, int64_t column) const { return data[row * stride + column]; }
  double value(int64_t row, int64_t column) const { return double(load(at(row, column))); }
  Wide wide() const { return {data, stride}; }
  Narrow narrow() const { return {data, stride}; }
};

// Rows `gap` elements further apart than they are long, `before` elements into their buffer.
template <class T>
Values<T> made(int64_t rows, int64_t columns, int64_t gap, int64_t before, bool filled) {
  const int64_t stride = columns + gap;
  const int64_t count = before + (rows ? (rows - 1) * stride + columns : 0);
  Values<T> m{rows, columns, stride, simt::buffer<T>(size_t(count)) + before};
  std::normal_distribution<float> normal;
  for (int64_t r = 0; filled && r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) store(m.at(r, c), normal(generator));
  return m;
}

bool kept(const Dropout& dropout, int64_t row, int64_t column) {
  if (!dropout.threshold) return true;
  uint32_t c[4] = {uint32_t(column / kTile * kTileLanes + column % kTileLanes), uint32_t(row), dropout.branch, 0};
  philox(c, uint32_t(kSeed), uint32_t(uint64_t(kSeed) >> 32));
  const int i = int(column % kTile) / kTileLanes;
  return (c[i / 2] >> (i % 2 * 16) & 0xffffu) >= dropout.threshold;
}

void error(const char* what, const Shape& s, const char* why) {
  std::printf("%s of (%d, %d), rank %d, live %d: %s\n", what, int(s.rows), int(s.columns), s.rank, s.live, why);
  ++errors;
}

// Every element within the rounding of its type and of the sum; `magnitude` is of the sum of absolute terms.
template <class T, class Expected>
void compare(const char* what, const Shape& s, const Values<T>& got, const Expected& expected) {
  const double unit = std::is_same<T, bf16>::value ? 1.0 / 256 : 1.0 / 2048;
  char said[160];
  for (int64_t r = 0; r < got.rows; ++r)
    for (int64_t c = 0; c < got.columns; ++c) {
      double magnitude = 0;
      const double right = expected(r, c, magnitude), value = got.value(r, c);
      if (std::fabs(value - right) <= unit * std::fabs(right) + 3e-6 * magnitude + 1e-7) continue;
      std::snprintf(said, sizeof said, "(%d, %d) is %g, not %g", int(r), int(c), value, right);
      return error(what, s, said);
    }
}

// What lies between the rows has to stay as it was.
template <class T>
void untouched(const char* what, const Shape& s, const Values<T>& m) {
  for (int64_t r = 0; r + 1 < m.rows; ++r)
    for (int64_t c = m.columns; c < m.stride; ++c)
      if (std::memcmp(&m.at(r, c), &kUnwritten, sizeof(T)))
        return error(what, s, "something between the rows is written");
}

struct Case {
  Shape shape;
  double probability;
  int processors;    // of the device: how many parts there are
  int64_t wide_gap;  // a multiple of 8
  int64_t gap, before;
  bool add, bias;
};

template <class T>
void run(const Case& one) {
  ++cases;
  simt::backwards = cases % 2;
  simt::apart = cases / 2 % 2;
  const Shape& s = one.shape;
  const char type = letter<T>;
  const Device device{one.processors, cases % 3 ? 227 * 1024 : 163 * 1024};
  int64_t* seed = simt::buffer<int64_t>(1);
  *seed = kSeed;
  const Dropout right{seed, uint32_t(std::lround(one.probability * 65536)), 3};
  const Dropout dropout{right.threshold ? seed : nullptr, right.threshold, right.branch + wrong_by};
  const double factor = 65536.0 / (65536 - right.threshold);
  const float scale = 0.5f;
  const auto workspace = [&](const char* what) {
    return simt::buffer<float>(size_t(workspace_bytes(what, s, device)) / 4);
  };
  const auto require = [&](const char* what, const char* said) {
    if (said) error(what, s, said);
  };
  const Values<T> x = made<T>(s.rows, s.columns, one.wide_gap, 0, true);
  const Values<T> a = made<T>(s.rank, s.columns, one.wide_gap, 0, true);
  const Values<T> dh = made<T>(s.rows, s.rank, one.gap, one.before, true);

  const Values<T> h = made<T>(s.rows, s.rank, one.gap, one.before, false);
  require("project", project(type, s, x.wide(), a.wide(), h.narrow(), dropout, workspace("project"), device, nullptr));
  compare("project", s, h, [&](int64_t m, int64_t r, double& magnitude) {
    double total = 0;
    for (int64_t k = 0; k < s.columns; ++k) {
      if (!kept(right, m, k)) continue;
      const double term = factor * x.value(m, k) * a.value(r, k);
      total += term;
      magnitude += std::fabs(term);
    }
    return total;
  });
  untouched("project", s, h);

  const Values<T> da = made<T>(s.rank, s.columns, one.wide_gap, 0, false);
  require("grad_a", grad_a(type, s, dh.narrow(), x.wide(), da.wide(), dropout, workspace("grad_a"), device, nullptr));
  compare("grad_a", s, da, [&](int64_t r, int64_t k, double& magnitude) {
    double total = 0;
    for (int64_t m = 0; m < s.rows; ++m) {
      if (!kept(right, m, k)) continue;
      const double term = factor * dh.value(m, r) * x.value(m, k);
      total += term;
      magnitude += std::fabs(term);
    }
    return total;
  });
  untouched("grad_a", s, da);

  const Values<T> out = made<T>(s.rows, s.columns, one.wide_gap, 0, one.add);
  const Values<T> bias = made<T>(1, s.columns, 0, 1, true);
  std::vector<double> had;
  for (int64_t m = 0; m < s.rows; ++m)
    for (int64_t k = 0; k < s.columns; ++k) had.push_back(one.add ? out.value(m, k) : 0);
  require("expand", expand(type, s, dh.narrow(), a.wide(), one.bias ? bias.data : nullptr, out.wide(), one.add, scale,
                           dropout, device, nullptr));
  compare("expand", s, out, [&](int64_t m, int64_t k, double& magnitude) {
    double total = had[size_t(m * s.columns + k)] + (one.bias ? bias.value(0, k) : 0);
    magnitude = std::fabs(total);
    for (int64_t r = 0; r < s.rank && kept(right, m, k); ++r) {
      const double term = factor * scale * dh.value(m, r) * a.value(r, k);
      total += term;
      magnitude += std::fabs(term);
    }
    return total;
  });
  untouched("expand", s, out);

  const Values<T> hl = made<T>(s.rows, s.live, one.gap, one.before, true);
  const Values<T> sent = made<T>(s.rows, s.rank, one.gap, one.before, false);
  const Values<T> db = made<T>(s.columns, s.live, one.gap, one.before, false);
  require("grad_b", grad_b(type, s, x.wide(), a.wide(), hl.narrow(), sent.narrow(), db.narrow(), scale,
                           workspace("grad_b"), device, nullptr));
  compare("grad_b, dh", s, sent, [&](int64_t m, int64_t r, double& magnitude) {
    double total = 0;
    for (int64_t n = 0; n < s.columns; ++n) {
      const double term = scale * x.value(m, n) * a.value(r, n);
      total += term;
      magnitude += std::fabs(term);
    }
    return total;
  });
  compare("grad_b, db", s, db, [&](int64_t n, int64_t l, double& magnitude) {
    double total = 0;
    for (int64_t m = 0; m < s.rows; ++m) {
      const double term = scale * x.value(m, n) * hl.value(m, l);
      total += term;
      magnitude += std::fabs(term);
    }
    return total;
  });
  untouched("grad_b, dh", s, sent);
  untouched("grad_b, db", s, db);
  simt::release();
}

// out = drop(x) or out += drop(x), by pieces of 16 bytes and, where a gap or an offset is odd, by elements.
template <class T>
void run_dropout(int64_t rows, int64_t columns, int64_t gap, int64_t before, bool add) {
  ++cases;
  const Shape s{rows, columns, 0, 0};
  int64_t* seed = simt::buffer<int64_t>(1);
  *seed = kSeed;
  const Dropout dropout{seed, uint32_t(std::lround(0.3 * 65536)), 3};
  const Values<T> x = made<T>(rows, columns, gap, before, true), out = made<T>(rows, columns, gap, before, add);
  std::vector<double> had;
  for (int64_t m = 0; m < rows; ++m)
    for (int64_t k = 0; k < columns; ++k) had.push_back(add ? out.value(m, k) : 0);
  const Matrix matrix{rows, columns, x.stride, out.stride};
  const char* said = drop(letter<T>, add, x.data, out.data, matrix, Dropout{seed, dropout.threshold, 3}, nullptr);
  if (said) error("dropout", s, said);
  compare("dropout", s, out, [&](int64_t m, int64_t k, double& magnitude) {
    const double old = had[size_t(m * columns + k)], term = x.value(m, k) * (65536.0 / (65536 - dropout.threshold));
    magnitude = std::fabs(old) + std::fabs(term);
    return old + (kept(dropout, m, k) ? term : 0);
  });
  untouched("dropout", s, out);
  simt::release();
}

template <class T>
void run_dropouts() {
  for (const bool add : {false, true}) {
    run_dropout<T>(70, 136, 8, 0, add);
    run_dropout<T>(19, 264, 0, 0, add);
    run_dropout<T>(19, 136, 1, 0, add);
    run_dropout<T>(17, 128, 0, 1, add);
    run_dropout<T>(3, 131, 0, 0, add);
  }
}

}  // namespace

int main(int count, char** words) {
  if (count > 1 && !std::strcmp(words[1], "wrong")) {
    wrong_by = 1;
    run<bf16>({{20, 136, 5, 5}, 0.3, 4, 0, 0, 0, false, false});
    return errors != 3;  // each of the three that drop
  }
  run<bf16>({{1, 8, 5, 5}, 0.3, 132, 0, 0, 0, false, false});
  run<bf16>({{64, 128, 32, 32}, 0.3, 132, 0, 0, 0, false, true});
  run<f16>({{70, 136, 32, 7}, 0.3, 132, 8, 3, 1, true, false});
  run<bf16>({{200, 648, 32, 32}, 0.3, 1, 0, 64, 32, true, true});
  run<bf16>({{200, 648, 32, 20}, 0.0, 132, 24, 3, 5, false, true});
  run<bf16>({{200, 1000, 5, 3}, 0.3, 2, 0, 3, 2, false, false});
  run<f16>({{64, 136, 96, 96}, 0.3, 132, 0, 8, 8, true, false});
  run<bf16>({{200, 648, 90, 41}, 0.3, 1, 8, 0, 0, false, false});
  run<bf16>({{1, 136, 96, 96}, 0.0, 132, 0, 0, 0, false, true});
  run<bf16>({{70, 648, 64, 40}, 0.3, 132, 8, 8, 8, false, false});
  run<bf16>({{70, 264, 128, 128}, 0.3, 3, 0, 0, 0, true, true});
  run<bf16>({{40, 136, 101, 70}, 0.0, 132, 0, 3, 1, false, false});
  run<bf16>({{40, 136, 97, 33}, 0.3, 132, 0, 8, 0, false, true});
  run<f16>({{200, 8, 5, 5}, 0.0, 132, 8, 1, 1, true, true});
  run<bf16>({{0, 136, 5, 5}, 0.3, 132, 0, 0, 0, false, false});
  run_dropouts<float>();
  run_dropouts<bf16>();
  run_dropouts<f16>();
  std::printf("%d cases, %d errors\n", cases, errors);
  return errors != 0;
}
