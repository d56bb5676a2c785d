// Element-wise arithmetic of the averaging ops, shared by the C++ and the CUDA layer.
//
// A rule reads x[0 .. operands), writes its results to x[0 .. outputs), and its statistics to s[0 .. columns); kind(k)
// is the reduction of column k (reductions.h). It is constructed from scalars[0 .. scalars) of a call and row[0 ..
// row_width) of the tensor, and reads no further. The table of ops, cnext/ops/averaging_table.py, declares the same.
// Internal linkage, as the C++ layer compiles this file once per instruction set.
#pragma once

#include <math.h>

#include "floats.h"

namespace {

// By the exponent bits, which no compiler option can optimize away.
CNEXT_HD bool finite(float x) { return (bits_of(x) & 0x7f800000u) != 0x7f800000u; }

// fisher += scale * grad^2; an element whose square is not finite is skipped.
struct FisherAccumulate {
  static constexpr int operands = 2, outputs = 1, columns = 0;
  static constexpr int scalars = 1, row_width = 0;
  CNEXT_HD static constexpr char kind(int) { return '+'; }
  float scale;
  CNEXT_HD FisherAccumulate(const double* scalars, const double*) : scale(float(scalars[0])) {}
  CNEXT_HD void operator()(float* x, float*) const {
    const float square = x[1] * x[1] * scale;
    x[0] = finite(square) ? x[0] + square : x[0];
  }
};

// The sum of one operand.
struct Sum {
  static constexpr int operands = 1, outputs = 0, columns = 1;
  static constexpr int scalars = 0, row_width = 0;
  CNEXT_HD static constexpr char kind(int) { return '+'; }
  CNEXT_HD Sum(const double*, const double*) {}
  CNEXT_HD void operator()(float* x, float* s) const { s[0] = x[0]; }
};

// theta += beta * (theta_old - theta), beta = mu / (f + mu + damping), mu = fisher_old / c, f = new_scale * fisher_new;
// fisher_old += f. Operands: theta, fisher_old, theta_old, fisher_new. Statistics of beta: count, sum, squares,
// minimum, maximum.
struct PemaMerge {
  static constexpr int operands = 4, outputs = 2, columns = 5;
  static constexpr int scalars = 3, row_width = 0;
  CNEXT_HD static constexpr char kind(int k) { return "+++<>"[k]; }
  float new_scale, c, damping;
  CNEXT_HD PemaMerge(const double* scalars, const double*)
      : new_scale(float(scalars[0])), c(float(scalars[1])), damping(float(scalars[2])) {}
  CNEXT_HD void operator()(float* x, float* s) const {
    const float raw = x[3] * new_scale;
    const float f = finite(raw) ? raw : 0.0f;
    const float mu = x[1] / c;
    const float beta = mu > 0.0f ? mu / (f + mu + damping) : 0.0f;
    x[0] = x[0] + beta * (x[2] - x[0]);
    x[1] = x[1] + f;
    s[0] = 1.0f;
    s[1] = beta;
    s[2] = beta * beta;
    s[3] = beta;
    s[4] = beta;
  }
};

// ema <- beta * ema + (1 - beta) * theta, as theta + beta * (ema - theta): exact where they are equal.
CNEXT_HD float mix(float ema, float theta, float beta) { return theta + beta * (ema - theta); }

// Operands: ema, theta. A theta that is not finite leaves ema alone.
struct EmaStep {
  static constexpr int operands = 2, outputs = 1, columns = 0;
  static constexpr int scalars = 1, row_width = 0;
  CNEXT_HD static constexpr char kind(int) { return '+'; }
  float beta;
  CNEXT_HD EmaStep(const double* scalars, const double*) : beta(float(scalars[0])) {}
  CNEXT_HD void operator()(float* x, float*) const { x[0] = finite(x[1]) ? mix(x[0], x[1], beta) : x[0]; }
};

// fisher <- decay * fisher + scale * grad^2; beta = level / (fisher + level), 1 where both are 0; ema <- mix.
// Operands: ema, fisher, theta, grad. row: level. Statistics: elements used, sums of fisher, beta and beta^2.
struct PemaStep {
  static constexpr int operands = 4, outputs = 2, columns = 4;
  static constexpr int scalars = 2, row_width = 1;
  CNEXT_HD static constexpr char kind(int) { return '+'; }
  float decay, scale, level;
  CNEXT_HD PemaStep(const double* scalars, const double* row)
      : decay(float(scalars[0])), scale(float(scalars[1])), level(float(row[0])) {}
  CNEXT_HD void operator()(float* x, float* s) const {
    const float square = x[3] * x[3] * scale;
    const bool use = finite(square) & finite(x[2]);
    const float fisher = x[1] * decay + square;
    const float denominator = fisher + level;
    const float beta = denominator > 0.0f ? level / denominator : 1.0f;
    s[0] = use ? 1.0f : 0.0f;
    s[1] = use ? fisher : x[1];
    s[2] = use ? beta : 0.0f;
    s[3] = use ? beta * beta : 0.0f;
    x[0] = use ? mix(x[0], x[2], beta) : x[0];
    x[1] = use ? fisher : x[1];
  }
};

// The paper's equation element by element: beta = (grad + 1) / ((theta - ema) * fisher + damping), guarded where it is
// not inside (0, 1): by the constant `fallback`, or (clamp) by the nearer end. Operands as PemaStep.
// Statistics: elements used, beta inside, beta at or below 0, beta at or above 1 (or NaN).
struct PemaLiteral {
  static constexpr int operands = 4, outputs = 2, columns = 4;
  static constexpr int scalars = 5, row_width = 0;
  CNEXT_HD static constexpr char kind(int) { return '+'; }
  float decay, scale, damping, below, above;  // beta where the equation gives 0 or less, and 1 or more
  CNEXT_HD PemaLiteral(const double* scalars, const double*)
      : decay(float(scalars[0])), scale(float(scalars[1])), damping(float(scalars[2])),
        below(scalars[4] != 0.0 ? 0.0f : float(scalars[3])), above(scalars[4] != 0.0 ? 1.0f : float(scalars[3])) {}
  CNEXT_HD void operator()(float* x, float* s) const {
    const float square = x[3] * x[3] * scale;
    const bool use = finite(square) & finite(x[2]);
    const float fisher = x[1] * decay + square;
    const float raw = (x[3] + 1.0f) / ((x[2] - x[0]) * fisher + damping);
    const bool low = raw <= 0.0f;
    const float beta = low ? below : raw < 1.0f ? raw : above;
    s[0] = use ? 1.0f : 0.0f;
    s[2] = low ? s[0] : 0.0f;
    s[3] = low || raw < 1.0f ? 0.0f : s[0];
    s[1] = s[0] - s[2] - s[3];
    x[0] = use ? mix(x[0], x[2], beta) : x[0];
    x[1] = use ? fisher : x[1];
  }
};

// The three norms of DEMA: |theta - ema|, |grad|, |grad - grad_prev|. Operands: ema, grad_prev, theta, grad.
struct DemaNorms {
  static constexpr int operands = 4, outputs = 0, columns = 3;
  static constexpr int scalars = 2, row_width = 0;  // of one op with DemaStep, and so given its scalars
  CNEXT_HD static constexpr char kind(int) { return '+'; }
  CNEXT_HD DemaNorms(const double*, const double*) {}
  CNEXT_HD void operator()(float* x, float* s) const {
    s[0] = magnitude(x[2] - x[0]);
    s[1] = magnitude(x[3]);
    s[2] = magnitude(x[3] - x[1]);
  }
  CNEXT_HD static float magnitude(float x) { return x < 0.0f ? -x : x; }
};

// alpha = factor * (1 + b) / (a * c) from the tensor's norms, `fallback` where it is not inside (0, 1); ema is moved by
// alpha towards theta, and grad_prev becomes grad. Operands as DemaNorms.
struct DemaStep {
  static constexpr int operands = 4, outputs = 2, columns = 0;
  static constexpr int scalars = 2, row_width = 3;
  CNEXT_HD static constexpr char kind(int) { return '+'; }
  float beta;
  CNEXT_HD DemaStep(const double* scalars, const double* row) {
    const double alpha = scalars[0] * (1.0 + row[1]) / (row[0] * row[2]);
    beta = float(1.0 - (alpha > 0.0 && alpha < 1.0 ? alpha : scalars[1]));
  }
  CNEXT_HD void operator()(float* x, float*) const {
    x[0] = finite(x[2]) ? mix(x[0], x[2], beta) : x[0];
    x[1] = x[3];
  }
};

// One AdamW step, then PemaStep on its result. Operands: theta, exp_avg, exp_avg_sq, ema, fisher, grad. row: level,
// 1 - rate * weight_decay, rate / correction1, sqrt(correction2). With `Own` false there is no fisher operand, and
// exp_avg_sq takes its place.
template <bool Own>
struct AdamwPemaStep {
  static constexpr int operands = Own ? 6 : 5, outputs = Own ? 5 : 4, columns = 4;
  static constexpr int scalars = Own ? 5 : 3, row_width = 4;
  CNEXT_HD static constexpr char kind(int) { return '+'; }
  float weight1, beta2, weight2, eps, decay, scale, level, shrink, size, correction;
  CNEXT_HD AdamwPemaStep(const double* scalars, const double* row)
      : weight1(float(1.0 - scalars[0])), beta2(float(scalars[1])), weight2(float(1.0 - scalars[1])),
        eps(float(scalars[2])), decay(Own ? float(scalars[3]) : 1.0f), scale(Own ? float(scalars[4]) : 1.0f),
        level(float(row[0])), shrink(float(row[1])), size(float(row[2])), correction(float(row[3])) {}
  CNEXT_HD void operator()(float* x, float* s) const {
    const float grad = x[operands - 1];
    const bool use = finite(grad * grad) & finite(x[0]);
    const float average = x[1] + weight1 * (grad - x[1]);
    const float square = x[2] * beta2 + weight2 * grad * grad;
    const float theta = x[0] * shrink - size * average / (sqrtf(square) / correction + eps);
    const float fisher = Own ? x[4] * decay + grad * grad * scale : square;
    const float denominator = fisher + level;
    const float beta = denominator > 0.0f ? level / denominator : 1.0f;
    s[0] = use ? 1.0f : 0.0f;
    s[1] = use ? fisher : x[Own ? 4 : 2];
    s[2] = use ? beta : 0.0f;
    s[3] = use ? beta * beta : 0.0f;
    x[0] = use ? theta : x[0];
    x[1] = use ? average : x[1];
    x[2] = use ? square : x[2];
    x[3] = use ? mix(x[3], theta, beta) : x[3];
    if (Own) x[4] = use ? fisher : x[4];
  }
};

}  // namespace
