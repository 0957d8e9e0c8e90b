# SPDX-License-Identifier: Apache-2.0
"""How much of the true top 2 % of a capture's logits codes find: learned ones, and random planes."""

import argparse

import numpy as np
from safetensors import safe_open

SINK, LOCAL, TOP = 4, 64, 0.02


def load_capture(path):
    """q [query_heads, n_q, dim] and k [kv_heads, n, dim] in float32."""
    with safe_open(path, "numpy") as file:
        return {name: file.get_tensor(name).astype(np.float32) for name in "qk"}


class Network:
    """The layers `name` of a file of weights, by [networks, out, in]."""

    def __init__(self, file, name):
        words = file.metadata()
        self.layers = []
        while f"{name}.{len(self.layers)}" in words:
            at = f"{name}.{len(self.layers)}"
            weight = file.get_tensor(f"{at}.weight").astype(np.float32)
            bias = file.get_tensor(f"{at}.bias").astype(np.float32)
            self.layers.append((weight, bias, words[at].split()))

    def __call__(self, network, x):
        """Bits of x [n, dim] as -1 and 1, [n, bits]."""
        for weight, bias, words in self.layers:
            y = x @ weight[network].T + bias[network]
            if "silu" in words:
                y = y / (1 + np.exp(-y))
            x = x + y if "residual" in words else y
        return np.where(x > 0, 1.0, -1.0).astype(np.float32)


def top(scores, count):
    """Masks of the largest of each row; ties go to the older token."""
    order = np.argsort(-scores, axis=1, kind="stable")[:, :count]
    chosen = np.zeros(scores.shape, bool)
    np.put_along_axis(chosen, order, True, axis=1)
    return chosen


def overlap(found, wanted):
    """Intersection over union, mean over rows."""
    return np.mean((found & wanted).sum(axis=1) / (found | wanted).sum(axis=1))


class Judge:
    """The middle of a capture, which every query row sees, and the top of its logits."""

    def __init__(self, path):
        capture = load_capture(path)
        self.q, k = capture["q"], capture["k"]
        self.keys = k[:, SINK : k.shape[1] - self.q.shape[1] - LOCAL]
        self.group = len(self.q) // len(k)
        self.count = int(np.ceil(TOP * self.keys.shape[1]))
        self.wanted = [
            top(q.astype(np.float64) @ self.keys[h // self.group].astype(np.float64).T, self.count)
            for h, q in enumerate(self.q)
        ]

    def score(self, hash_key, hash_query):
        """Mean overlap over heads and query rows; hash_key(kv_head, x), hash_query(head, x)."""
        overlaps = []
        for h, q in enumerate(self.q):
            codes = hash_key(h // self.group, self.keys[h // self.group])
            overlaps.append(overlap(top(hash_query(h, q) @ codes.T, self.count), self.wanted[h]))
        return np.mean(overlaps)

    def learned(self, path):
        with safe_open(path, "numpy") as file:
            keys, queries = Network(file, "key"), Network(file, "query")
        if not queries.layers:
            queries = keys
        heads_each = len(self.q) // len(queries.layers[0][0])
        score = self.score(keys, lambda head, x: queries(head // heads_each, x))
        return keys.layers[-1][0].shape[1], score

    def latest(self):
        """The same of the latest tokens, whatever the query."""
        positions = np.arange(self.keys.shape[1])[None].repeat(self.q.shape[1], axis=0)
        return np.mean([overlap(top(positions, self.count), wanted) for wanted in self.wanted])

    def planes(self, bits, centred, seed):
        """The same of as many random planes, through the mean of the keys or through 0."""
        planes = np.random.default_rng(seed).standard_normal((bits, self.q.shape[2]), np.float32)
        means = self.keys.mean(axis=1) if centred else np.zeros((len(self.keys), 1), np.float32)

        def signs(x):
            return np.where(x @ planes.T > 0, 1.0, -1.0).astype(np.float32)

        return self.score(lambda head, x: signs(x - means[head]), lambda head, x: signs(x))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("weights")
    parser.add_argument("capture")
    parser.add_argument("--seeds", type=int, default=20)
    arguments = parser.parse_args()
    judge = Judge(arguments.capture)
    bits, learned = judge.learned(arguments.weights)
    print(f"learned codes, {bits} bits: {learned:.3f}")
    print(f"the latest tokens: {judge.latest():.3f}")
    for name, centred in (("random planes", False), ("random planes, centred keys", True)):
        found = [judge.planes(bits, centred, seed) for seed in range(arguments.seeds)]
        mean, half = np.mean(found), 2 * np.std(found, ddof=1) / len(found) ** 0.5
        print(
            f"{name}: {mean:.3f} +- {half:.3f} (2 standard errors, {len(found)} seeds, "
            f"{min(found):.3f} to {max(found):.3f}); "
            f"learned over this: {learned / mean:.2f}, at least {learned / (mean + half):.2f}"
        )


if __name__ == "__main__":
    main()
