# SPDX-License-Identifier: Apache-2.0
"""Recomputes the published rule, (K, L) = (10, 150) and at least 2 collisions, in numpy.

Nothing is taken from the library but its codes, and those only in the first check:
1. from the same codes the same tokens are drawn, and the outputs agree within 1e-4;
2. from numpy's own planes the mean error over seeds agrees within 5 %.
"""
import argparse

from capture import Capture, Dump, np

BITS, TABLES = 10, 150


def inclusion(cosine):
    """P(at least 2 of L tables collide), SimHash with K bits."""
    agree = 1 - np.arccos(np.clip(cosine, -1, 1)) / np.pi
    a = agree**BITS
    miss = np.log1p(-a)
    return -np.expm1(TABLES * miss) - TABLES * a * np.exp((TABLES - 1) * miss)


def drawn_tokens(capture, key_codes, query_codes):
    """Tokens that share the code of at least 2 tables; codes [tables, tokens] and [tables]."""
    collisions = (key_codes == query_codes[:, None]).view(np.uint8).sum(axis=0, dtype=np.uint8)
    return capture.middle.start + np.flatnonzero(collisions >= 2)


def estimate(capture, row, head, drawn):
    """Drawn tokens weigh 1 / u; those outside the middle are exact and in the same softmax."""
    logits = capture.logits(row, head)
    query = capture.q[head, row]
    centred = capture.centred[head // capture.group, drawn - capture.middle.start]
    norms = np.linalg.norm(centred, axis=1) * np.linalg.norm(query)
    corrected = logits[drawn] - np.log(inclusion(centred @ query / norms))
    window = np.r_[0 : capture.middle.start, capture.middle.stop : len(logits)]
    tokens = np.concatenate([window, drawn])
    return capture.attend(row, head, tokens, np.concatenate([logits[window], corrected]))


def relative_error(output, exact):
    return np.linalg.norm(output - exact) / np.linalg.norm(exact)


def check_same_codes(capture, dump, rows):
    heads = len(capture.q)
    key_codes = dump("key_codes.u16").reshape(len(capture.k), -1, TABLES).transpose(0, 2, 1)
    query_codes = dump("query_codes.u16").reshape(len(rows), heads, TABLES)
    counts = dump("drawn_counts.i32")
    drawn = np.split(dump("drawn.i32"), np.cumsum(counts)[:-1])
    outputs = dump("outputs.f32").reshape(-1, len(rows), heads, capture.v.shape[2])[0]
    lses = dump("lse.f32").reshape(-1, len(rows), heads)[0]
    worst, worst_lse = 0, 0
    for i, row in enumerate(rows):
        for head in range(heads):
            tokens = drawn_tokens(capture, key_codes[head // capture.group], query_codes[i, head])
            assert np.array_equal(tokens, drawn[i * heads + head]), f"row {row}, head {head}"
            output, lse = estimate(capture, row, head, tokens)
            worst = max(worst, relative_error(outputs[i, head], output))
            worst_lse = max(worst_lse, abs(lses[i, head] - lse))
    print(f"same codes: {counts.sum()} tokens drawn in {len(counts)} draws, all identical")
    print(f"            largest difference of outputs {worst:.1e} relative, of lse {worst_lse:.1e}")
    assert worst < 1e-4 and worst_lse < 1e-4


def codes(vectors, planes):
    """[n, dim] -> [tables, n]; planes [bits * tables, dim]."""
    bits = (planes @ vectors.astype(np.float32).T > 0).reshape(BITS, TABLES, len(vectors))
    return sum(bit.astype(np.uint16) << b for b, bit in enumerate(bits))


def own_mean_error(capture, rows, exact, seed):
    planes = np.random.default_rng(seed).standard_normal(
        (BITS * TABLES, capture.q.shape[2]), dtype=np.float32
    )
    errors = []
    for head in range(len(capture.q)):
        if head % capture.group == 0:
            key_codes = codes(capture.centred[head // capture.group], planes)
        query_codes = codes(capture.q[head, rows], planes)
        for i, row in enumerate(rows):
            tokens = drawn_tokens(capture, key_codes, query_codes[:, i])
            errors.append(relative_error(estimate(capture, row, head, tokens)[0], exact[i][head]))
    return np.mean(errors)


def check_own_planes(capture, dump, rows, seeds):
    heads = range(len(capture.q))
    exact = [[capture.exact(row, head)[0] for head in heads] for row in rows]
    outputs = dump("outputs.f32").reshape(seeds, len(rows), len(heads), -1)
    theirs = [
        np.mean([relative_error(seed[i, h], exact[i][h]) for i in range(len(rows)) for h in heads])
        for seed in outputs
    ]
    ours = [own_mean_error(capture, rows, exact, seed) for seed in range(seeds)]
    ratio = np.mean(theirs) / np.mean(ours)
    standard_error = np.hypot(
        np.std(theirs, ddof=1) / np.mean(theirs), np.std(ours, ddof=1) / np.mean(ours)
    ) / np.sqrt(seeds)
    print(f"own planes: mean error of the library {np.mean(theirs):.5f}, of numpy {np.mean(ours):.5f}")
    print(f"            ratio {ratio:.4f}, its standard error {standard_error:.4f}, {seeds} seeds each")
    assert standard_error < 0.05 / 3, "too few seeds to tell 5 %"
    assert abs(ratio - 1) < 0.05


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dump", required=True, help="the program dump_published")
    parser.add_argument("--capture", required=True)
    parser.add_argument("--seeds", type=int, default=60)
    parser.add_argument("--queries", type=int, default=32)
    arguments = parser.parse_args()
    capture = Capture(arguments.capture)
    dump = Dump(arguments.dump, arguments.capture, arguments.seeds, arguments.queries)
    rows = dump.rows(capture, arguments.queries)
    check_same_codes(capture, dump, rows)
    check_own_planes(capture, dump, rows, arguments.seeds)


if __name__ == "__main__":
    main()
