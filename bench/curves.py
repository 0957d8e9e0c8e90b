# SPDX-License-Identifier: Apache-2.0
"""Draws what sampling is about, on captures: coverage of the softmax, error by bytes, bias, and error by context."""
import argparse
import json
import pathlib
import struct
import subprocess
import tempfile

import matplotlib

matplotlib.use("Agg")
import numpy  # noqa: E402
from matplotlib import pyplot  # noqa: E402
from plot import STYLES, mean_over_captures  # noqa: E402

SINK, LOCAL = 4, 64
ROWS = (0.01, 0.02, 0.04, 0.08)
CONTEXTS = (1024, 2048, 4096, 8192, 16384)
BY_CONTEXT = {  # method, setting at 4 % of the rows
    "topk": "rows=0.04",
    "uniform": "rows=0.04",
    "signatures": "bits=2 rows=0.04",
    "oracle_ht": "rows=0.04",
}


def read_capture(path):
    """q [query_heads, n_q, dim] and k [kv_heads, n, dim] in float, of fp16 files."""
    raw = pathlib.Path(path).read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])

    def tensor(name):
        begin, end = (8 + length + offset for offset in header[name]["data_offsets"])
        return numpy.frombuffer(raw[begin:end], "<f2").reshape(header[name]["shape"]).astype(numpy.float32)

    return tensor("q"), tensor("k")


def coverage(path, shares):
    """Mass of the softmax in the top `shares` of the tokens that are drawn from, [query heads and rows, shares]."""
    q, k = read_capture(path)
    group = len(q) // len(k)
    end = k.shape[1] - q.shape[1]
    masses = []
    for head, rows in enumerate(q):
        logits = rows @ k[head // group, :end].T / numpy.sqrt(q.shape[2])
        middle = numpy.exp(logits - logits.max(axis=1, keepdims=True))[:, SINK : end - LOCAL]
        masses.append(numpy.cumsum(-numpy.sort(-middle, axis=1), axis=1))
    masses = numpy.concatenate(masses)
    places = numpy.ceil(shares * masses.shape[1]).astype(int) - 1
    return masses[:, places] / masses[:, -1:]


def run(program, captures, *options):
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder, "out.json")
        subprocess.run(
            [program, *captures, *map(str, options), "--json", output], check=True, stdout=subprocess.DEVNULL
        )
        return json.loads(output.read_text())["results"]


def style(method):
    label, colour, marker, line = STYLES[method]
    return {"color": colour, "marker": marker, "linestyle": line, "label": label, "markersize": 5, "linewidth": 1.4}


def draw_coverage(axes, captures):
    shares = numpy.logspace(-3, 0, 60)
    for path in captures:
        mass = coverage(path, shares)
        (line,) = axes.plot(100 * shares, 100 * mass.mean(axis=0), linewidth=1.4, label=pathlib.Path(path).stem)
        low, high = numpy.quantile(mass, (0.1, 0.9), axis=0)
        axes.fill_between(100 * shares, 100 * low, 100 * high, color=line.get_color(), alpha=0.12, linewidth=0)
    axes.set(
        xscale="log",
        xlabel="tokens of largest weight, %",
        ylabel="mass of the softmax, %",
        title="Coverage: mean, and 80 % of the heads",
    )


def draw_bytes(axes, results, methods):
    for method in methods:
        points = sorted((r["bytes_read_per_token"], r["error_mean"]) for r in results if r["method"] == method)
        points = [(x, y) for x, y in points if x > 0 and y > 0]
        if points and method in STYLES:
            axes.plot(*zip(*points), markeredgecolor="white", markeredgewidth=0.5, **style(method))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="bytes read per token and KV head, index and rows",
        ylabel="error of the output, relative L2",
        title="Error by bytes, mean of all captures",
    )


def draw_bias(axes, results, methods, seeds):
    for method in methods:
        own = [r for r in results if r["method"] == method and "bits=2" in r["setting"] + "bits=2" * (method != "signatures")]
        points = sorted((100 * r["rows"], r["error_mean"], r["bias_mean"]) for r in own)
        look = style(method)
        axes.plot([x for x, _, _ in points], [e for _, e, _ in points], **look)
        look.update(linestyle=":", label=None, markerfacecolor="white")
        axes.plot([x for x, _, _ in points], [b for _, _, b in points], **look)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="rows read per KV head, %",
        ylabel="relative L2",
        title=f"Common words: error (solid), and of the mean of {seeds} seeds (dotted)",
    )


def draw_context(axes, program, captures, seeds):
    by_method = {method: [] for method in BY_CONTEXT}
    for context in CONTEXTS:
        results = run(
            program, captures, "--context", context, "--methods", ",".join(BY_CONTEXT), "--rows", 0.04, "--seeds", seeds
        )
        for method, setting in BY_CONTEXT.items():
            own = [r["error_mean"] for r in results if (r["method"], r["setting"]) == (method, setting)]
            by_method[method].append(sum(own) / len(own))
    for method, errors in by_method.items():
        axes.plot(CONTEXTS, errors, **style(method))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens of context",
        ylabel="error of the output, relative L2",
        title="Error by context, 4 % of the rows",
        xticks=CONTEXTS,
        xticklabels=[f"{c // 1024}k" for c in CONTEXTS],
    )
    axes.minorticks_off()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("captures", nargs="+")
    parser.add_argument("--compare", default="build/release/bench/magicpig_compare")
    parser.add_argument("--seeds", type=int, default=12)
    parser.add_argument("--output", default="curves", help="path without .svg and .png")
    arguments = parser.parse_args()
    seeds = arguments.seeds
    options = ("--rows", ",".join(map(str, ROWS)), "--seeds", seeds)
    results = run(arguments.compare, arguments.captures, *options)
    methods = [m for m in dict.fromkeys(r["method"] for r in results) if m != "exact"]
    common = [path for path in arguments.captures if "common-words" in pathlib.Path(path).stem]
    common_results = [r for r in results if r["capture"] in {pathlib.Path(path).stem for path in common}]

    figure, grid = pyplot.subplots(2, 2, figsize=(10.5, 8.5))
    draw_coverage(grid[0, 0], arguments.captures)
    draw_bytes(grid[0, 1], mean_over_captures(results), methods)
    if common:
        draw_bias(grid[1, 0], mean_over_captures(common_results), ("topk", "signatures", "oracle_ht"), seeds)
    draw_context(grid[1, 1], arguments.compare, arguments.captures, seeds)
    for axes in grid.flat:
        axes.title.set_size(10)
        axes.grid(which="major", color="#dddddd", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, fontsize=7)
    figure.tight_layout()
    # Nothing but the results decides the bytes: no dates, no random identifiers.
    matplotlib.rcParams["svg.hashsalt"] = "magicpig"
    figure.savefig(arguments.output + ".svg", metadata={"Date": None})
    figure.savefig(arguments.output + ".png", dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
