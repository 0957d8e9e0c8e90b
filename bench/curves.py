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
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator  # noqa: E402
from plot import STYLES, mean_over_captures  # noqa: E402

SINK, LOCAL = 4, 64
ROWS = (0.01, 0.02, 0.04, 0.08)
CONTEXTS = (1024, 2048, 4096, 8192, 16384, 32768)
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


def style(method, label=None):
    usual, colour, marker, _ = STYLES[method]
    return {"color": colour, "marker": marker, "label": label or usual, "markersize": 5, "linewidth": 1.2}


def labels_of_two_bits(method):
    return "signatures, 2 bits" if method == "signatures" else None


def plain_ticks(axis, ticks):
    axis.set_major_locator(FixedLocator(ticks))
    axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axis.set_minor_locator(NullLocator())


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
    """One line for each setting over its budgets; tables have no budget and are points."""
    for method in methods:
        lines = {}
        for r in results:
            if r["method"] == method and r["error_mean"] > 0:
                setting = " ".join(part for part in r["setting"].split() if not part.startswith(("rows=", "p=")))
                lines.setdefault(setting, []).append((r["bytes_read_per_token"], r["error_mean"]))
        label = STYLES[method][0]
        for points in lines.values():
            axes.plot(*zip(*sorted(points)), markeredgecolor="white", markeredgewidth=0.5, **style(method, label))
            label = "_"  # once
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="bytes read per token and KV head, index and rows",
        ylabel="error of the output, relative L2",
        title="Error by bytes, mean of all captures",
    )
    plain_ticks(axes.xaxis, (5, 10, 20, 50, 100, 200))


def draw_bias(axes, results, methods, seeds):
    for method in methods:
        own = [r for r in results if r["method"] == method and (method != "signatures" or "bits=2" in r["setting"])]
        points = sorted((100 * r["rows"], r["error_mean"], r["bias_mean"]) for r in own)
        look = style(method, labels_of_two_bits(method))
        axes.plot([x for x, _, _ in points], [e for _, e, _ in points], **look)
        look.update(linestyle=":", label="_", markerfacecolor="white")
        axes.plot([x for x, _, _ in points], [b for _, _, b in points], **look)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="rows read per KV head, %",
        ylabel="relative L2",
        title=f"Common words: error (solid), and of the mean of {seeds} seeds (dotted)",
    )
    plain_ticks(axes.xaxis, (1, 2, 4, 8))


def draw_context(axes, program, captures, seeds):
    by_method = {method: [] for method in BY_CONTEXT}
    longest = max(read_capture(path)[1].shape[1] for path in captures)
    contexts = [context for context in CONTEXTS if context < 1.2 * longest]
    for context in contexts:
        results = run(
            program, captures, "--context", context, "--methods", ",".join(BY_CONTEXT), "--rows", 0.04, "--seeds", seeds
        )
        for method, setting in BY_CONTEXT.items():
            own = [r["error_mean"] for r in results if (r["method"], r["setting"]) == (method, setting)]
            by_method[method].append(sum(own) / len(own))
    for method, errors in by_method.items():
        axes.plot(contexts, errors, **style(method, labels_of_two_bits(method)))
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="tokens of context",
        ylabel="error of the output, relative L2",
        title="Error by context, 4 % of the rows",
    )
    plain_ticks(axes.xaxis, contexts)
    plain_ticks(axes.yaxis, (0.02, 0.05, 0.1, 0.2, 0.5))


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

    figure, grid = pyplot.subplots(2, 2, figsize=(12.5, 8.5))
    draw_coverage(grid[0, 0], arguments.captures)
    draw_bytes(grid[0, 1], mean_over_captures(results), methods)
    if common:
        draw_bias(grid[1, 0], mean_over_captures(common_results), ("topk", "signatures", "oracle_ht"), seeds)
    draw_context(grid[1, 1], arguments.compare, arguments.captures, seeds)
    for axes in grid.flat:
        axes.title.set_size(10)
        axes.grid(which="major", color="#dddddd", linewidth=0.7)
        axes.spines[["top", "right"]].set_visible(False)
        beside = {"loc": "upper left", "bbox_to_anchor": (1.0, 1.0)} if axes is grid[0, 1] else {}
        axes.legend(frameon=False, fontsize=7, **beside)
    figure.tight_layout()
    # Nothing but the results decides the bytes: no dates, no random identifiers.
    matplotlib.rcParams["svg.hashsalt"] = "magicpig"
    figure.savefig(arguments.output + ".svg", metadata={"Date": None})
    figure.savefig(arguments.output + ".png", dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
