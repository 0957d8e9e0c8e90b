// SPDX-License-Identifier: Apache-2.0
// Which tokens of a capture are drawn from, and which of its query rows are asked.
#pragma once

#include <cstdint>
#include <vector>

#include "capture.hpp"
#include "magicpig/core/error.hpp"
#include "magicpig/core/types.hpp"

namespace magicpig::bench {

/// Which query rows of a capture may be asked: what is tuned on some is to be judged on others.
enum class RowSet { kAll, kEven, kOdd };

/// `queries` rows of the set, ascending and evenly spread: floor(linspace(0, last, queries)).
[[nodiscard]] inline std::vector<int> choose_rows(const Capture& capture, int queries, RowSet set) {
  const int first = set == RowSet::kOdd && capture.query_rows() > 1 ? 1 : 0;
  const int stride = set == RowSet::kAll ? 1 : 2;
  const std::int64_t last = (capture.query_rows() - 1 - first) / stride;
  const std::int64_t steps = queries > 1 ? queries - 1 : 1;
  std::vector<int> rows;
  for (std::int64_t i = 0; i < queries; ++i) {
    rows.push_back(first + stride * static_cast<int>(i * last / steps));
  }
  return rows;
}

/// The tokens between the first `sink` and the `local` before the query rows. Error: there is none.
[[nodiscard]] inline Result<TokenRange> middle_of(const Capture& capture, TokenId sink,
                                                  TokenId local) {
  const TokenId end = capture.tokens() - capture.query_rows() - local;
  if (end > sink) return TokenRange{.begin = sink, .end = end};
  return Status::error(ErrorCode::kInvalidArgument,
                       "no token lies between the %d of --sink and the %d of --local: the capture "
                       "has %d, %d of them query rows",
                       sink, local, capture.tokens(), capture.query_rows());
}

}  // namespace magicpig::bench
