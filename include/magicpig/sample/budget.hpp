// SPDX-License-Identifier: Apache-2.0
// A budget: how many rows a sampler may read.
#pragma once

#include <math.h>

#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// How many rows of the indexed range to read: a fraction of it, or a number.
struct Budget {
  double fraction = 0.0;  ///< in (0, 1], used when `tokens` is 0
  TokenId tokens = 0;     ///< more than the range means all of it

  /// Rows for a range of n tokens, doubled so often: at least 1 and at most n, 0 for an empty
  /// range.
  [[nodiscard]] TokenId of(TokenId n, int doublings = 0) const {
    const double wanted = ::ldexp(tokens > 0 ? tokens : ::ceil(fraction * n), doublings);
    return wanted >= n ? n : static_cast<TokenId>(wanted);
  }

  [[nodiscard]] Status check() const {
    if (tokens < 0 || (tokens == 0 && !(fraction > 0.0 && fraction <= 1.0))) {
      return Status::error(ErrorCode::kInvalidArgument,
                           "a budget needs tokens >= 1 or a fraction in (0, 1], not %d and %g",
                           tokens, fraction);
    }
    return Status();
  }
};

}  // namespace magicpig::inline MAGICPIG_ABI
