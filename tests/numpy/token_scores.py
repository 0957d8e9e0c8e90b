# SPDX-License-Identifier: Apache-2.0
"""Recomputes in numpy, from their papers' formulas, the scores that selections rank tokens by."""
import argparse
import functools

from capture import Capture, Dump, np


class Quest:
    """Tang et al. 2024: sum_j max(q_j min_j, q_j max_j) over the keys of a page, for each of its tokens."""

    def __init__(self, capture, dump, page):
        self.capture, self.page = capture, page

    def scores(self, row, head):
        query = self.capture.q[head, row]
        keys = self.capture.k[head // self.capture.group, self.capture.middle]
        scores = np.empty(len(keys))
        for begin in range(0, len(keys), self.page):
            own = keys[begin : begin + self.page]
            scores[begin : begin + self.page] = np.maximum(query * own.min(axis=0), query * own.max(axis=0)).sum()
            assert (own @ query <= scores[begin] + 1e-9).all()
        return scores


class Socket:
    """Joshi et al. 2026: |v| sum_l softmax_r(<tanh(W_l q) / sqrt(d), c_r> / temperature) at the key's bucket."""

    BITS, TABLES, TEMPERATURE = 8, 60, 0.3

    def __init__(self, capture, dump):
        self.capture = capture
        dim = capture.q.shape[2]
        self.planes = dump("socket_planes.f32").astype(np.float64).reshape(self.BITS, self.TABLES, dim)
        self.codes = dump("socket_codes.u16").reshape(len(capture.k), self.TABLES, -1)
        for keys, codes in zip(capture.k[:, capture.middle], self.codes):
            for table, code in enumerate(codes):
                projections = self.planes[:, table] @ keys.T
                own = sum((bits > 0) << b for b, bits in enumerate(projections))
                # Only where a projection is next to 0 may float and double disagree.
                assert (np.abs(projections).min(axis=0)[own != code] < 1e-3).all()
                assert (own != code).sum() <= 5
        signs = (np.arange(2**self.BITS) >> np.arange(self.BITS)[:, None]) & 1
        self.corners = 2.0 * signs - 1  # [bits, buckets]

    def scores(self, row, head):
        kv_head = head // self.capture.group
        margins = np.tanh(self.planes @ self.capture.q[head, row]) / np.sqrt(self.planes.shape[2])
        logits = np.einsum("bl,br->lr", margins, self.corners) / self.TEMPERATURE
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        total = np.take_along_axis(weights, self.codes[kv_head].astype(int), axis=1).sum(axis=0)
        return total * np.linalg.norm(self.capture.v[kv_head, self.capture.middle], axis=1)


def to_bf16(x):
    """Nearest, ties to even; no number is near the end of float32."""
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000).astype(np.uint32).view(np.float32).astype(np.float64)


class DoubleSparsity:
    """Yang et al. 2024: q.k over the channels of largest mean |q_j k_j|, or |k_j|, each key's in 4 bits."""

    def __init__(self, capture, dump, channels, by_queries):
        self.capture = capture
        asked = dump("rows.i32")
        self.labels = []
        for kv_head, keys in enumerate(capture.k[:, capture.middle]):
            importance = np.abs(keys).mean(axis=0)
            if by_queries:
                queries = np.delete(capture.q, asked, axis=1)[kv_head * capture.group :][: capture.group]
                importance = importance * np.abs(queries).mean(axis=(0, 1))
            chosen = np.argsort(-importance)[:channels]
            own = keys[:, chosen]
            least, largest = own.min(axis=1, keepdims=True), own.max(axis=1, keepdims=True)
            least, step = to_bf16(least), to_bf16((largest - least) / 15)
            codes = np.clip(np.floor((own - least) / step + 0.5), 0, 15)
            self.labels.append((chosen, least + step * codes))

    def scores(self, row, head):
        chosen, labels = self.labels[head // self.capture.group]
        return labels @ self.capture.q[head, row, chosen]


class InvertedFile:
    """q.centroid of the list of each key; lists and centroids as good as k-means here finds them."""

    LISTS = 100

    def __init__(self, capture, dump):
        self.capture = capture
        self.centroids = dump("ivf_centroids.f32").astype(np.float64).reshape(len(capture.k), self.LISTS, -1)
        self.lists = dump("ivf_lists.u16").reshape(len(capture.k), -1)
        for keys, centroids, lists in zip(capture.centred, self.centroids, self.lists):
            squares = self.distances(keys, centroids)
            own = np.take_along_axis(squares, lists[:, None].astype(int), axis=1)[:, 0]
            assert (own <= squares.min(axis=1) + 1e-4 * squares.mean()).all()
            errors = [self.k_means(keys, np.random.default_rng(seed)) for seed in range(3)]
            print(f"ivf: mean square distance {own.mean():.4f}, of k-means in numpy {np.mean(errors):.4f}")
            assert abs(own.mean() / np.mean(errors) - 1) < 0.03

    @staticmethod
    def distances(keys, centroids):
        return (keys**2).sum(axis=1)[:, None] - 2 * keys @ centroids.T + (centroids**2).sum(axis=1)

    def k_means(self, keys, random):
        centroids = keys[random.choice(len(keys), self.LISTS, replace=False)]
        for _ in range(10):
            nearest = self.distances(keys, centroids).argmin(axis=1)
            for own in np.unique(nearest):
                centroids[own] = keys[nearest == own].mean(axis=0)
        return self.distances(keys, centroids).min(axis=1).mean()

    def scores(self, row, head):
        kv_head = head // self.capture.group
        return (self.centroids[kv_head] @ self.capture.q[head, row])[self.lists[kv_head]]


METHODS = {
    **{f"quest_{page}": functools.partial(Quest, page=page) for page in (16, 32, 64)},
    "socket": Socket,
    "ivf": InvertedFile,
    "double_sparsity_keys_8": functools.partial(DoubleSparsity, channels=8, by_queries=False),
    "double_sparsity_queries_16": functools.partial(DoubleSparsity, channels=16, by_queries=True),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dump", required=True, help="the program dump_scores")
    parser.add_argument("--capture", required=True)
    parser.add_argument("--queries", type=int, default=8)
    arguments = parser.parse_args()
    capture = Capture(arguments.capture)
    dump = Dump(arguments.dump, arguments.capture, arguments.queries)
    rows = dump.rows(capture, arguments.queries)
    for name, method in METHODS.items():
        formula = method(capture, dump)
        theirs = dump(f"{name}.f32").reshape(len(rows), len(capture.q), -1)
        worst = 0
        for i, row in enumerate(rows):
            for head in range(len(capture.q)):
                ours = formula.scores(row, head)
                worst = max(worst, np.abs(theirs[i, head] - ours).max() / np.abs(ours).max())
        print(f"{name}: {theirs.size} scores, largest difference {worst:.1e} of the largest score")
        assert worst < 1e-5


if __name__ == "__main__":
    main()
