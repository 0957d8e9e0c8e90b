// SPDX-License-Identifier: Apache-2.0
// Promises at work: draws are doubled until a bound of the error is met, or everything is read.
#pragma once

#include <cstdint>

#include "magicpig/core/state.hpp"
#include "magicpig/core/types.hpp"
#include "magicpig/cpu/attend_totals.hpp"
#include "magicpig/estimate/promise.hpp"
#include "magicpig/estimate/report.hpp"
#include "magicpig/version.hpp"

namespace magicpig::inline MAGICPIG_ABI {

/// Draws until the error's bound keeps the plan's promise for all heads of the group, or reads
/// all of `range`, the tokens that are drawn from. `outputs` [group], their `out` is written to.
/// `attend` has had the exact tokens.
template <class Ops, class Plan, class Input, class Scratch, class Attention>
void keep_promise(const Plan& plan, Input input, Scratch& scratch, Attention& attend,
                  const AttendTotals& totals, TokenRange range, AttentionState* outputs) {
  const Promise& promise = plan.promise;
  attend.finish();
  scratch.exact.assign(totals);
  Looks looks;
  for (;;) {
    const auto candidates = plan.sampler->template draw<Ops>(input, scratch.sampler);
    const auto rows = static_cast<std::int64_t>(candidates.tokens.size());
    if (static_cast<double>(rows) >= promise.dense_above * input.present()) {
      looks.bytes += candidates.index_bytes;
      break;
    }
    attend.add_candidates(candidates, plan.estimator);
    attend.finish();
    ++looks.count;
    double worst = 0.0;
    bool kept = true;
    for (int g = 0; g < input.queries.count; ++g) {
      totals.write_output(g, outputs[g].out);
      const double bound = totals.error(g, outputs[g].out, &scratch.attend.sketch)
                               .bound(promise.bound, promise.delta_of(input.doublings));
      worst = bound > worst ? bound : worst;
      kept = kept && bound <= promise.epsilon;  // NaN, of an output of zero, is not
    }
    if (kept) {
      looks.outcome = PromiseOutcome::kBound;
      *totals.looks = looks;
      return;
    }
    looks.reread += rows;
    looks.bytes += *totals.bytes - *scratch.exact.bytes;
    attend.restart(scratch.exact);
    // The error falls like the inverse of the rows at best: doublings that would fall short of that
    // are not tried.
    ++input.doublings;
    for (double left = worst / 2; left >= 2 * promise.epsilon && input.doublings < 30; left /= 2) {
      ++input.doublings;
    }
  }
  attend.add_exact(range);
  looks.outcome = PromiseOutcome::kDense;
  *totals.looks = looks;
}

}  // namespace magicpig::inline MAGICPIG_ABI
