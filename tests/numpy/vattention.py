# SPDX-License-Identifier: Apache-2.0
"""Recomputes in numpy, from lemma 4.1, how many tokens vAttention draws, and attention over them."""
import argparse
import math
import statistics

from capture import Capture, Dump, np

HEAVY, BASE, EPSILON, DELTA = 0.02, 0.01, 0.1, 0.05
CASES = {"denominator": True, "numerator": True, "both": False}  # whether the quantile is two-sided


def heavy_tokens(logits, budget):
    """Rank by rank in turn with the other heads of the group, until the union holds `budget`."""
    ranked = np.argsort(-logits, axis=1, kind="stable")
    union = set()
    for rank in range(budget):
        for head in ranked:
            if head[rank] not in union and len(union) == budget:
                return union
            union.add(head[rank])
    return union


def needed(case, weights, values, exact, pilot, rest):
    """b of one head: (Phi^-1(1 - delta / 2) rest sqrt(tr Sigma) / (epsilon |sum|))^2, of a finite population."""
    tail = DELTA / 2 if CASES[case] else DELTA
    quantile = statistics.NormalDist().inv_cdf(1 - tail)

    def tokens(terms):  # [tokens, dimensions]
        total = terms[exact].sum(axis=0) + rest * terms[pilot].mean(axis=0)
        trace = terms[pilot].var(axis=0, ddof=1).sum()
        b = (quantile * rest * math.sqrt(trace) / (EPSILON * np.linalg.norm(total))) ** 2
        return b / (1 + b / rest)

    of = {"denominator": tokens(weights[:, None]), "numerator": tokens(weights[:, None] * values)}
    return of.get(case, max(of.values()))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dump", required=True, help="the program dump_vattention")
    parser.add_argument("--capture", required=True)
    parser.add_argument("--queries", type=int, default=8)
    arguments = parser.parse_args()
    capture = Capture(arguments.capture)
    dump = Dump(arguments.dump, arguments.capture, arguments.queries)
    rows = dump.rows(capture, arguments.queries)
    begin, end = capture.middle.start, capture.middle.stop
    group = capture.group
    for case in CASES:
        ends = np.cumsum(dump(f"{case}_counts.i32"))
        draws = zip(
            np.split(dump(f"{case}_tokens.i32"), ends[:-1]), np.split(dump(f"{case}_log_pi.f32"), ends[:-1])
        )
        outputs = dump(f"{case}_outputs.f32").reshape(len(rows), len(capture.q), -1)
        worst = furthest = 0
        total = 0
        for i, row in enumerate(rows):
            for kv_head in range(len(capture.k)):
                drawn, log_pi = next(draws)
                visible = capture.visible(row)
                values = capture.v[kv_head, :visible]
                heads = range(kv_head * group, (kv_head + 1) * group)
                logits = np.array([capture.logits(row, head) for head in heads])
                weights = np.exp(logits - logits.max(axis=1, keepdims=True))
                middle = end - begin
                heavy = {begin + t for t in heavy_tokens(logits[:, begin:end], math.ceil(HEAVY * middle))}
                certain = set(drawn[log_pi == 0])
                # A rank may differ only where float and double disagree about two logits.
                assert len(heavy - certain) <= 1
                pilot = sorted(certain - heavy)
                rest = middle - len(certain)
                sample = drawn[log_pi < 0]
                assert abs(len(pilot) - math.ceil(BASE * middle)) <= 1
                window = [*range(begin), *range(end, visible)]
                exact = [*window, *certain]
                b = max(needed(case, w, values, exact, pilot, rest) for w in weights)
                furthest = max(furthest, abs(len(sample) - math.ceil(b)))
                probability = len(sample) / rest
                worst = max(worst, np.abs(np.exp(log_pi[log_pi < 0]) - probability).max() / probability)
                total += len(sample)
                for g, head in enumerate(heads):
                    w = np.concatenate([weights[g, exact], weights[g, sample] / probability])
                    v = np.concatenate([values[exact], values[sample]])
                    ours = w @ v / w.sum()
                    worst = max(worst, np.linalg.norm(outputs[i, head] - ours) / np.linalg.norm(ours))
        print(f"{case}: {total} tokens sampled, b off by at most {furthest}, outputs by {worst:.1e}")
        assert furthest <= 1
        assert worst < 1e-5


if __name__ == "__main__":
    main()
