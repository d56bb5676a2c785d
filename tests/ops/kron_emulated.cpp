// The CUDA kernels of the Kronecker ops, emulated on the host, beside float64: every line that this prints is an error.
// Arguments: "wrong" gives the kernels a matrix in the other layout than float64 reads.
#include "../../csrc/cuda/kron_kernels.h"

#include <random>

namespace {

std::mt19937 generator(7);
std::normal_distribution<float> normal;
int cases = 0, errors = 0;
bool wrong_layout = false;

template <class T>
struct Matrix {
  int64_t n, rank, stride_n, stride_rank;
  T* data;
  std::vector<double> had;  // (n, rank)

  T& at(int64_t row, int64_t column) const { return data[row * stride_n + column * stride_rank]; }
};

// `before` elements into its buffer.
template <class T>
Matrix<T> made(int64_t n, int64_t rank, bool transposed, int64_t before) {
  T* const data = simt::buffer<T>(size_t(before + n * rank)) + before;
  Matrix<T> m{n, rank, transposed ? 1 : rank, transposed ? n : 1, data, {}};
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < rank; ++j) {
      store(m.at(i, j), normal(generator));
      m.had.push_back(double(load(m.at(i, j))));
    }
  return m;
}

struct Group {
  int64_t n;
  std::vector<int> ranks;
  int64_t before;  // elements before its matrices: their alignment
};

using Side = std::vector<double>;  // (n, r)

template <class T>
struct Call {
  std::vector<Group> sizes;
  std::vector<int64_t> groups, parts, part_addresses, group_addresses;
  std::vector<std::vector<Matrix<T>>> lists;
  std::vector<std::vector<float*>> of_groups;
  std::vector<std::vector<double*>> precise;
  int64_t matrices = 0;

  int64_t r(size_t g) const { return groups[4 * g + 1]; }
  int64_t n(size_t g) const { return groups[4 * g]; }

  Side side_by_side(size_t list, size_t g) const {
    Side all;
    for (int64_t i = 0; i < n(g); ++i)
      for (int64_t p = groups[4 * g + 2]; p < groups[4 * g + 2] + groups[4 * g + 3]; ++p) {
        const Matrix<T>& m = lists[list][size_t(p)];
        for (int64_t j = 0; j < m.rank; ++j) all.push_back(m.had[size_t(i * m.rank + j)]);
      }
    return all;
  }

  // work(value, row, column of the group) for what a list holds now.
  template <class Work>
  void each(size_t list, size_t g, const Work& work) const {
    int64_t first = 0;
    for (int64_t p = groups[4 * g + 2]; p < groups[4 * g + 2] + groups[4 * g + 3]; ++p) {
      const Matrix<T>& m = lists[list][size_t(p)];
      for (int64_t i = 0; i < m.n; ++i)
        for (int64_t j = 0; j < m.rank; ++j) work(double(load(m.at(i, j))), i, first + j);
      first += m.rank;
    }
  }

  Call(const std::vector<Group>& given, const KronOp& op) : sizes(given) {
    int64_t layout = 0;
    for (const Group& g : sizes) {
      int64_t r = 0;
      for (const int rank : g.ranks) r += rank;
      groups.insert(groups.end(), {g.n, r, matrices, int64_t(g.ranks.size())});
      matrices += int64_t(g.ranks.size());
    }
    for (int list = 0; list < op.part_lists; ++list) {
      layout = 0;
      lists.emplace_back();
      for (const Group& g : sizes)
        for (const int rank : g.ranks) {
          // Alternating, and the other way round after every four.
          const bool transposed = (layout + layout / 4 + int64_t(sizes.size())) % 2;
          ++layout;
          lists.back().push_back(made<T>(g.n, rank, transposed, g.before));
          const Matrix<T>& m = lists.back().back();
          part_addresses.push_back(int64_t(m.data));
          if (list == 0) parts.insert(parts.end(), {int64_t(rank), m.stride_n, m.stride_rank});
        }
    }
    for (const char* kind = op.group_lists; *kind; ++kind) {
      of_groups.emplace_back();
      precise.emplace_back();
      for (size_t g = 0; g < sizes.size(); ++g) {
        const int64_t size = *kind == 'n' ? n(g) : *kind == 'r' ? r(g) : r(g) * r(g);
        if (*kind == 'd') {
          double* factor = simt::buffer<double>(size_t(size) + 1) + 1;  // at an address that 8 bytes divide only
          gram(factor, r(g));
          precise.back().push_back(factor);
          group_addresses.push_back(int64_t(factor));
          continue;
        }
        float* values = simt::buffer<float>(size_t(size) + 1) + 1;  // at an address that 4 bytes divide only
        for (int64_t i = 0; i < size && *kind != 'f'; ++i) values[i] = std::fabs(normal(generator)) * float(i % 7);
        if (*kind == 'f') gram(values, r(g));
        of_groups.back().push_back(values);
        group_addresses.push_back(int64_t(values));
      }
    }
    if (wrong_layout) {
      int64_t* part = parts.data();
      part[1] = part[1] == 1 ? part[0] : 1;
      part[2] = part[2] == 1 ? sizes[0].n : 1;
    }
  }

  template <class F>
  static void gram(F* factor, int64_t r) {  // of full rank
    std::vector<F> x(size_t(r * (r + 2)));
    for (F& one : x) one = F(normal(generator)) / std::sqrt(F(r));
    for (int64_t i = 0; i < r; ++i)
      for (int64_t j = 0; j < r; ++j) {
        F sum = 0;
        for (int64_t k = 0; k < r + 2; ++k) sum += x[size_t(k * r + i)] * x[size_t(k * r + j)];
        factor[i * r + j] = sum;
      }
  }

  const char* run(const KronOp& op, const std::vector<double>& scalars) const {
    int64_t bytes = 0;
    if (const char* error = workspace_of(op.name, groups.data(), int64_t(sizes.size()), &bytes)) return error;
    float* workspace = simt::buffer<float>(size_t(bytes / 4));
    return kron(op.name, {letter<T>, groups.data(), int64_t(sizes.size()), parts.data(), matrices,
                          part_addresses.data(), group_addresses.data(), scalars.data(), workspace}, nullptr);
  }
};

template <class T>
struct Compare {
  const char* what;
  bool failed = false;

  void operator()(double got, double right, double allowed, int64_t g, int64_t i, int64_t j) {
    if (std::fabs(got - right) <= allowed || failed) return;
    std::printf("%s %c, group %d: (%d, %d) is %g, not %g\n", what, letter<T>, int(g), int(i), int(j), got, right);
    failed = true;
    ++errors;
  }
};

// Half the distance between neighbors: relative, and of denormals.
template <class T>
constexpr double kLeast = std::is_same<T, f16>::value ? 3e-8 : 0;
template <class T>
constexpr double kUnit = std::is_same<T, float>::value ? 6e-8 : std::is_same<T, bf16>::value ? 1.0 / 256 : 1.0 / 2048;

void require(const char* said) {
  if (!said) return;
  std::printf("%s\n", said);
  ++errors;
}

template <class T>
void accumulate(const std::vector<Group>& sizes) {
  Call<T> call(sizes, kKronOps[0]);
  for (Matrix<T>& m : call.lists[0])  // values that are not finite, and one whose square is not
    for (int64_t i = 3; i < m.n; i += 11) {
      const float bad[] = {NAN, INFINITY, letter<T> == 'h' ? -INFINITY : 1e30f};
      store(m.at(i, i % m.rank), bad[i % 3]);
      m.had[size_t(i * m.rank + i % m.rank)] = NAN;
    }
  std::vector<std::vector<double>> rows, factors;
  for (size_t g = 0; g < sizes.size(); ++g) {
    rows.emplace_back(call.of_groups[0][g], call.of_groups[0][g] + call.n(g));
    factors.emplace_back(call.of_groups[1][g], call.of_groups[1][g] + call.r(g) * call.r(g));
  }
  require(call.run(kKronOps[0], {}));
  Compare<T> compare{"accumulate"};
  for (size_t g = 0; g < sizes.size(); ++g) {
    const int64_t n = call.n(g), r = call.r(g);
    const Side all = call.side_by_side(0, g);
    std::vector<double> magnitude(size_t(r * r));
    for (int64_t i = 0; i < n; ++i) {
      const double* x = all.data() + i * r;
      double sum = 0;
      for (int64_t j = 0; j < r; ++j) sum += x[j] * x[j];
      if (!std::isfinite(sum)) sum = 0, x = nullptr;
      const double right = rows[g][size_t(i)] + sum;
      compare(call.of_groups[0][g][i], right, 1e-6 * right, int64_t(g), i, -1);
      for (int64_t j = 0; x && j < r; ++j)
        for (int64_t k = 0; k < r; ++k) {
          factors[g][size_t(j * r + k)] += x[j] * x[k];
          magnitude[size_t(j * r + k)] += std::fabs(x[j] * x[k]);
        }
    }
    for (int64_t j = 0; j < r; ++j)
      for (int64_t k = 0; k < r; ++k) {
        const double right = factors[g][size_t(j * r + k)];
        compare(call.of_groups[1][g][j * r + k], right, 1e-6 * (magnitude[size_t(j * r + k)] + std::fabs(right)),
                int64_t(g), j, k);
      }
  }
}

template <class T>
void pull(const std::vector<Group>& sizes) {
  Call<T> call(sizes, kKronOps[1]);
  const double weight = 0.3;
  for (size_t g = 0; g < sizes.size(); ++g)  // not symmetric
    for (int64_t i = 0; i < call.r(g) * call.r(g); ++i)
      call.of_groups[2][g][i] = normal(generator) / std::sqrt(float(call.r(g)));
  require(call.run(kKronOps[1], {weight}));
  Compare<T> compare{"pull"};
  for (size_t g = 0; g < sizes.size(); ++g) {
    const int64_t r = call.r(g);
    const Side now = call.side_by_side(0, g), start = call.side_by_side(1, g);
    const float *rows = call.of_groups[0][g], *values = call.of_groups[1][g], *vectors = call.of_groups[2][g];
    Side turned, sizes_turned;  // (theta - theta_start) Q / (1 + weight rows values), and the sum of its terms' sizes
    for (int64_t i = 0; i < call.n(g); ++i)
      for (int64_t k = 0; k < r; ++k) {
        double sum = 0, magnitude = 0;
        for (int64_t j = 0; j < r; ++j) {
          const double term = (now[size_t(i * r + j)] - start[size_t(i * r + j)]) * vectors[j * r + k];
          sum += term;
          magnitude += std::fabs(term);
        }
        const double shrunk = 1 + weight * rows[i] * values[k];
        turned.push_back(sum / shrunk);
        sizes_turned.push_back(magnitude / shrunk);
      }
    call.each(0, g, [&](double got, int64_t i, int64_t j) {
      double sum = start[size_t(i * r + j)], magnitude = std::fabs(sum);
      for (int64_t k = 0; k < r; ++k) {
        sum += turned[size_t(i * r + k)] * vectors[j * r + k];
        magnitude += sizes_turned[size_t(i * r + k)] * std::fabs(double(vectors[j * r + k]));
      }
      compare(got, sum, kUnit<T> * std::fabs(sum) + kLeast<T> + 1e-6 * magnitude, int64_t(g), i, j);
    });
  }
}

// Solved by elimination with pivots, in long double.
std::vector<long double> solved(std::vector<std::vector<long double>> a) {
  const size_t r = a.size();
  for (size_t k = 0; k < r; ++k) {
    size_t best = k;
    for (size_t i = k; i < r; ++i)
      if (std::fabs(a[i][k]) > std::fabs(a[best][k])) best = i;
    std::swap(a[k], a[best]);
    for (size_t i = 0; i < r; ++i)
      for (size_t j = r + 1; i != k && j-- > k;) a[i][j] -= a[k][j] * (a[i][k] / a[k][k]);
  }
  std::vector<long double> x;
  for (size_t k = 0; k < r; ++k) x.push_back(a[k][r] / a[k][k]);
  return x;
}

template <class T>
void merge(const std::vector<Group>& sizes) {
  Call<T> call(sizes, kKronOps[2]);
  const double c = 0.7, damping = 1e-3;
  require(call.run(kKronOps[2], {c, damping}));
  Compare<T> compare{"merge"};
  for (size_t g = 0; g < sizes.size(); ++g) {
    const int64_t r = call.r(g);
    const Side now = call.side_by_side(0, g), start = call.side_by_side(1, g);
    std::vector<double> right;
    for (int64_t i = 0; i < call.n(g); ++i) {
      std::vector<std::vector<long double>> system(size_t(r), std::vector<long double>(size_t(r) + 1));
      for (int64_t j = 0; j < r; ++j)
        for (int64_t k = 0; k < r; ++k) {
          const double m = double(call.of_groups[2][g][i]) / c * call.precise[3][g][j * r + k];
          const double f = double(call.of_groups[0][g][i]) * call.precise[1][g][j * r + k];
          system[size_t(j)][size_t(k)] = m + f + (j == k ? damping : 0);
          system[size_t(j)][size_t(r)] += m * (start[size_t(i * r + k)] - now[size_t(i * r + k)]);
        }
      const std::vector<long double> x = solved(system);
      for (int64_t j = 0; j < r; ++j) right.push_back(now[size_t(i * r + j)] + double(x[size_t(j)]));
    }
    call.each(0, g, [&](double got, int64_t i, int64_t j) {
      const double expected = right[size_t(i * r + j)];
      compare(got, expected, kUnit<T> * std::fabs(expected) + kLeast<T> + 1e-9, int64_t(g), i, j);
    });
  }
}

template <class T>
void run(const std::vector<Group>& sizes) {
  for (const auto& op : {accumulate<T>, pull<T>, merge<T>}) {
    simt::backwards = ++cases % 2;
    simt::apart = cases / 2 % 2;
    op(sizes);
    simt::release();
  }
}

void refuses(const char* op, std::vector<int64_t> groups, std::vector<int64_t> parts) {
  ++cases;
  const int64_t matrices = int64_t(parts.size()) / 3;
  std::vector<int64_t> none(64);
  const double scalars[2] = {1, 1};
  const KronCall call{'f', groups.data(), int64_t(groups.size()) / 4, parts.data(), matrices, none.data(), none.data(),
                      scalars, nullptr};
  if (kron(op, call, nullptr)) return;
  std::printf("%s takes wrong tables, with n %d\n", op, int(groups[0]));
  ++errors;
}

}  // namespace

int main(int count, char** words) {
  if (count > 1 && !std::strcmp(words[1], "wrong")) {
    wrong_layout = true;
    run<float>({{20, {5, 3}, 0}});
    return errors != 3;
  }
  for (int r = 1; r <= kMostRank; r += r < 10 ? 1 : 9) run<float>({{7, {r}, 0}});
  run<bf16>({{1, {1}, 1}, {7, {3, 2}, 1}, {128, {8, 8, 8}, 0}});
  run<float>({{1, {64}, 0}, {130, {16, 5, 11}, 0}, {259, {8, 8, 8, 1}, 3}});
  run<f16>({{129, {20, 1, 3, 9}, 0}, {16, {4}, 4}, {128, {8}, 1}});
  run<float>({{1000, {8, 16}, 0}, {1000, {3}, 1}, {1000, {40, 24}, 2}});
  run<bf16>({{1100, {8, 8, 24}, 0}, {1030, {64}, 0}, {1000, {5, 1}, 1}});
  run<float>({{17, std::vector<int>(64, 1), 0}});
  run<f16>(std::vector<Group>(330, Group{2, {1, 2}, 0}));  // more than one launch holds
  run<bf16>(std::vector<Group>(12, Group{3, std::vector<int>(60, 1), 0}));
  const std::vector<int64_t> group{4, 3, 0, 1}, matrix{3, 3, 1};
  refuses("kron_accumulat", group, matrix);
  for (const KronOp& op : kKronOps) {
    refuses(op.name, {0, 3, 0, 1}, matrix);
    refuses(op.name, {4, 65, 0, 1}, {65, 65, 1});
    refuses(op.name, {4, 3, 1, 1}, matrix);
    refuses(op.name, {4, 3, 0, 2}, matrix);
    refuses(op.name, {4, 4, 0, 1}, matrix);
    refuses(op.name, {4, 3, 0, 1}, {3, 1, 5});
    refuses(op.name, {4, 3, 0, 1}, {3, 3, 1, 1, 1, 1});
  }
  std::printf("%d cases, %d errors\n", cases, errors);
  return errors != 0;
}
