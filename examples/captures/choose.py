# SPDX-License-Identifier: Apache-2.0
"""Prints, per KV head, the attention between sink and window and the error of two samplers."""

import argparse
import sys

import numpy as np
from safetensors import safe_open

SINK, LOCAL = 4, 64
QUERIES, SEEDS = 16, 5


def threshold(weights, budget):
    """The tau for which the inclusion probabilities min(1, weights / tau) sum to budget."""
    ordered = np.sort(weights)[::-1]
    rest = ordered.sum() - np.concatenate(([0.0], np.cumsum(ordered)[:-1]))
    certain = np.arange(len(ordered))
    tau = rest / np.maximum(budget - certain, 1e-300)
    return tau[np.argmax((certain >= budget) | (ordered <= tau))]


def measure_row(weights, value, middle, budget, random):
    """Middle mass, TopK error and mean error of Horvitz-Thompson draws, one row of one head."""
    exact = weights @ value

    def relative(kept):
        return np.linalg.norm(kept @ value / kept.sum() - exact) / np.linalg.norm(exact)

    inside = weights[middle]
    top = weights.copy()
    top[middle][np.argpartition(inside, -budget)[:-budget]] = 0.0
    probability = np.minimum(1.0, inside / threshold(inside, budget))
    drawn = []
    for _ in range(SEEDS):
        kept = weights.copy()
        kept[middle] = np.where(random.random(len(inside)) < probability, inside / probability, 0.0)
        drawn.append(relative(kept))
    return inside.sum(), relative(top), np.mean(drawn)


def measure(tensors, scale, rows):
    """One line of means per KV head: middle mass, TopK error, Horvitz-Thompson error."""
    q, k, v = (tensors[name].astype(np.float64) for name in "qkv")
    n, (heads, n_q, _) = k.shape[1], q.shape
    middle = slice(SINK, n - n_q - LOCAL)
    budget = round(rows * (middle.stop - middle.start))
    random = np.random.default_rng(0)
    lines = [[] for _ in range(k.shape[0])]
    for head in range(heads):
        kv_head = head * k.shape[0] // heads
        for row in np.linspace(0, n_q - 1, QUERIES).astype(int):
            seen = n - n_q + row + 1
            logits = k[kv_head, :seen] @ q[head, row] * scale
            weights = np.exp(logits - logits.max())
            lines[kv_head].append(
                measure_row(weights / weights.sum(), v[kv_head, :seen], middle, budget, random)
            )
    return [np.mean(line, axis=0) for line in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("captures", nargs="+")
    parser.add_argument(
        "--rows", type=float, default=0.02, help="fraction of the middle tokens kept (0.02)"
    )
    arguments = parser.parse_args()
    print("capture layer kv_head middle_mass topk_error ht_error topk/ht")
    for path in arguments.captures:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in "qkv"}
        kv_heads = metadata["kv_heads"].split(",")
        for kv_head, (mass, topk, drawn) in zip(
            kv_heads, measure(tensors, float(metadata["scale"]), arguments.rows)
        ):
            print(
                path,
                metadata["layer"],
                kv_head,
                f"{mass:.3f} {topk:.4f} {drawn:.4f} {topk / drawn:.2f}",
            )
        sys.stdout.flush()


if __name__ == "__main__":
    main()
