// SPDX-License-Identifier: Apache-2.0
// What a decode step says about each of its outputs: rows read, effective sample, estimated error,
// alarm.
#pragma once

#include <cstdint>

#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// How a promise came to be kept.
enum class PromiseOutcome : std::uint8_t {
  kNone,   ///< none was asked, or there was nothing to draw
  kBound,  ///< the bound of the error is below epsilon
  kDense,  ///< every token was read
};

/// One query head's account of one step. Sums are over this head's drawn tokens, with omega = w /
/// pi their weights.
struct HeadReport {
  std::int64_t exact = 0;      ///< tokens attended to exactly
  std::int64_t drawn = 0;      ///< tokens this head drew
  std::int64_t rows_read = 0;  ///< rows gathered for the whole KV head, exact ones not counted
  /// Bytes read for the whole KV head: of the index what grows with the tokens (codes and norms of
  /// a scan, or offsets and ids of the buckets and the norms of candidates), and keys and values as
  /// stored, of exact tokens and of rows_read; with a promise those of all looks. Each byte of a
  /// draw once, buckets and rows that several heads read, too. Not counted: the rest of their cache
  /// lines, what a report itself reads again, planes, quantisers, centres, curves, scratch; keys
  /// and values that vAttention's pilot reads before they are drawn.
  std::int64_t bytes = 0;
  std::int64_t indexed = 0;  ///< tokens that could have been drawn
  /// (sum omega)^2 / sum omega^2: equally weighted tokens that the drawn ones are worth, those
  /// drawn with certainty (pi = 1) left out.
  float effective_sample_size = 0.0F;
  /// Estimated relative L2 error of the output, sqrt(sum (1 - pi) omega^2 |v - out|^2) / (D |out|)
  /// with D the normaliser. Treats draws as independent, as Poisson draws are. Of draws by hash
  /// collisions, whose tokens come in clusters, it is that of a jackknife over groups of tables,
  /// AttendTotals::error(), which errs upwards in the mean. NaN for an output of zero.
  float relative_error = 0.0F;
  /// Bound of the relative L2 error that 95 % of draws keep, OutputError::normal(.05): 94 to 97 %
  /// of independent draws by signatures and 96 to 98 % of systematic ones (magicpig_promise), fewer
  /// of uniform draws where weights are so uneven that most draws miss the heavy tokens; 95 to 97 %
  /// of draws from tables, 92 to 99 % on single layers and heads. NaN for an output of zero, where
  /// nothing was drawn though it could have been, with a single table, whose draws nothing is to be
  /// compared with, and for selections, which leave tokens out.
  float error_95 = 0.0F;
  /// sum 1 / pi, an unbiased estimate of `indexed`.
  float estimated_tokens = 0.0F;
  /// (estimated_tokens - indexed) / sqrt(sum (1 - pi) / pi^2), about standard normal. Beyond 6 in
  /// size something is wrong: stale codes, a hash that does not match its curve. 0 without draws.
  float alarm = 0.0F;
  PromiseOutcome promise = PromiseOutcome::kNone;
  int looks = 0;                 ///< draws that were bounded, for a promise
  std::int64_t rows_reread = 0;  ///< rows of draws before the last, all of which it reads again
};

}  // namespace magicpig::inline MAGICPIG_ABI
