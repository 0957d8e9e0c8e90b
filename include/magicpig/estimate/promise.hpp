// SPDX-License-Identifier: Apache-2.0
// How far an output may be off: bounds from what was drawn, and the promise that they stay below.
#pragma once

#include <math.h>

#include "magicpig/core/error.hpp"
#include "magicpig/estimate/normal.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Which inequality bounds the error of an output.
enum class ErrorBound {
  /// The central limit theorem: the error is taken for normal, see OutputError::normal().
  kNormal,
  /// Bernstein's inequality in any number of dimensions, with the variance and the range of what
  /// was drawn: holds for few tokens, too, and asks for about two to five times the rows.
  kBernstein,
};

/// What is known about the error of one head's output, a vector: moments of its normaliser's and
/// values' draws, linear in the ratio of the two, relative to D |out|.
struct OutputError {
  /// sum (1 - pi) omega^2 |v - out|^2 / (D |out|)^2, omega = w / pi: an estimate of the trace of
  /// the covariance, unbiased but for the ratio, for draws that are independent.
  double trace = 0.0;
  /// Of the covariance's Frobenius norm, at most `trace`, which it is where all errors lie in one
  /// direction. Of d equal directions it is trace / sqrt(d).
  double frobenius = 0.0;
  /// Equal terms that the trace, a sum over the tokens drawn, is worth: it is as sure as a variance
  /// of so many degrees of freedom.
  double terms = 0.0;
  /// At least the largest omega |v - out| / (D |out|) of a token that was drawn.
  double range = 0.0;
  /// Added to the trace in bounds, in the same directions: for what a draw has not shown.
  double allowance = 0.0;

  /// What a normal error of this covariance exceeds with a probability of at most delta: the error
  /// of one direction of variance F, the others so many and small that their squares are their
  /// mean,
  ///   sqrt(trace + F (z^2 - 1)),   z = Phi^-1(1 - delta / 2),
  /// with both grown by the allowance.
  /// It is exact for one direction and for very many; of two equal ones at delta = .05 too, and
  /// above the truth between and below; for delta above .1 it may be short by a few percent.
  [[nodiscard]] double normal(double delta) const {
    const double z = normal_quantile(delta / 2);
    const double square = trace == 0.0
                              ? allowance * z * z
                              : (trace + frobenius * (z * z - 1.0)) * (1.0 + allowance / trace);
    const double student = terms > 0.0 ? 1.0 + (z * z + 1.0) / (4.0 * terms) : 1.0;
    return student * ::sqrt(square < 0.0 ? 0.0 : square);
  }

  /// t with 2 exp(-t^2 / (2 trace + 2 t range / 3)) = delta.
  /// Source: Pinelis 1994, theorem 3.3 in a Hilbert space; the variance and the range are those of
  /// what was drawn, as in empirical Bernstein bounds, so that what no draw has shown is not
  /// covered.
  [[nodiscard]] double bernstein(double delta) const {
    const double log_delta = ::log(2.0 / delta);
    const double linear = range * log_delta / 3.0;
    return linear + ::sqrt(linear * linear + 2.0 * (trace + allowance) * log_delta);
  }

  [[nodiscard]] double bound(ErrorBound kind, double delta) const {
    return kind == ErrorBound::kNormal ? normal(delta) : bernstein(delta);
  }
};

/// Asked of a plan: with a probability of at least 1 - delta the relative L2 error of an output is
/// at most epsilon. Tokens are drawn, the error is bounded; as long as the bound of a head of the
/// group is above epsilon, twice as many or more are drawn, among them all that were; where more
/// than `dense_above` of the indexed tokens would be read, all are, and nothing is estimated.
///
/// Look number k, at 2^k times the sampler's budget, spends delta / 2^(k+1) whether it is taken or
/// not: an error above epsilon is accepted with a probability of at most delta, as far as bounds
/// hold, however the looks are chosen.
struct Promise {
  double epsilon = 0.0;  ///< of |out - exact| / |exact|, above 0; 0 for no promise
  double delta = 0.05;   ///< in (0, 1)
  ErrorBound bound = ErrorBound::kNormal;
  double dense_above = 0.5;  ///< share of the indexed tokens, in (0, 1]

  [[nodiscard]] bool asked() const { return epsilon != 0.0; }
  [[nodiscard]] double delta_of(int look) const { return ::ldexp(delta, -look - 1); }

  [[nodiscard]] Status check() const {
    if (!(epsilon >= 0.0 && epsilon <= 1e30)) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "promise: epsilon %g must lie in (0, 1e30], or be 0 for none", epsilon);
    }
    if (!(delta > 0.0 && delta < 1.0)) {
      return Status::error(ErrorCode::kInvalidArgument, "promise: delta %g must lie in (0, 1)",
                           delta);
    }
    if (!(dense_above > 0.0 && dense_above <= 1.0)) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "promise: dense_above %g must lie in (0, 1]", dense_above);
    }
    return Status();
  }
};

}  // namespace magicpig::inline MAGICPIG_ABI
