# SPDX-License-Identifier: Apache-2.0
"""Draws the results of magicpig_compare: output error against rows read per KV head, as SVG and PNG."""
import argparse
import json
import math

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402
from matplotlib.lines import Line2D  # noqa: E402
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator  # noqa: E402

# Okabe and Ito's colours, told apart with any colour vision; markers say the same in grey.
STYLES = {
    "topk": ("TopK, exact logits", "#000000", "s", "-"),
    "top_p": ("top p, exact logits", "#000000", ">", "--"),
    "uniform": ("uniform", "#999999", "v", "-"),
    "oracle_multinomial": ("oracle, multinomial", "#56B4E9", "<", "--"),
    "oracle_ht": ("oracle, Horvitz-Thompson", "#0072B2", "o", "-"),
    "magicpig": ("MagicPIG, published rule", "#D55E00", "*", "none"),
    "tables": ("tables, other (K, L, t, r, ρ)", "#E69F00", "D", "none"),
    "signatures": ("signatures, 1 to 4 bits", "#009E73", "^", "none"),
    "trained_signatures": ("signatures, trained on keys", "#F0E442", "P", "none"),
    "top_p_estimated": ("top p, logits by 4-bit codes", "#999999", "d", "--"),
    "quest": ("Quest, pages of 16, 32, 64", "#8C510A", "h", "none"),
    "socket": ("SOCKET, 60 tables", "#5E3C99", "p", "none"),
    "cross_polytope": ("cross-polytope tables", "#DDCC77", "D", "none"),
    "pq": ("PQ, trained codes", "#332288", "v", "none"),
    "double_sparsity": ("Double Sparsity, 8 to 32 channels", "#882255", "<", "none"),
    "ivf": ("IVF", "#117733", ">", "none"),
    "learned": ("learned codes", "#AA4499", "d", "none"),
    "profile": ("profile per KV head", "#000000", "*", "none"),
    "vattention": ("vAttention, 2-bit codes", "#44AA99", "8", "none"),
    "uniform_tail": ("half top, half uniform", "#44AA99", "H", "--"),
    "signature_draws": ("signatures, other draws", "#CC79A7", "X", "none"),
}
# For methods that this file does not know yet.
SPARE = [("#332288", "8"), ("#882255", "H")]
EXACT = "exact"
FIGURES = ("rows", "bytes_read_per_token", "error_mean", "bias_mean")
COLUMNS = (4, 3)
X_TITLE = "rows read per KV head, % of the tokens between sink and window"
Y_TITLE = "error of the output, relative L2"
TICKS = (0.5, 1, 2, 5, 10, 20, 50)


def style_of(method, methods):
    """(label, colour, marker, line) of a method."""
    if method in STYLES:
        return STYLES[method]
    unknown = [m for m in methods if m not in STYLES]
    colour, marker = SPARE[unknown.index(method) % len(SPARE)]
    return method, colour, marker, "-"


def mean_over_captures(results):
    """One result per method and setting, each figure the mean over captures."""
    groups = {}
    for result in results:
        groups.setdefault((result["method"], result["setting"]), []).append(result)
    return [
        {
            "method": method,
            "setting": setting,
            **{name: sum(r[name] for r in group) / len(group) for name in FIGURES},
        }
        for (method, setting), group in groups.items()
    ]


def draw_panel(axes, title, results, methods):
    for order, method in enumerate(methods):
        points = sorted((100 * r["rows"], r["error_mean"]) for r in results if r["method"] == method)
        points = [(x, y) for x, y in points if x > 0 and y > 0]
        if not points:
            continue
        _, colour, marker, line = style_of(method, methods)
        axes.plot(
            *zip(*points),
            color=colour,
            marker=marker,
            markersize=9 if marker == "*" else 5,
            markeredgecolor="white",
            markeredgewidth=0.5,
            linestyle=line,
            linewidth=1.4,
            zorder=20 if marker == "*" else 3 + order,
        )
    axes.set_title(title, fontsize=10)
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.xaxis.set_major_locator(FixedLocator(TICKS))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.grid(which="major", color="#dddddd", linewidth=0.7)
    axes.grid(which="minor", axis="y", color="#f0f0f0", linewidth=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9)


def draw(results):
    captures = list(dict.fromkeys(r["capture"] for r in results))
    methods = list(dict.fromkeys(r["method"] for r in results))
    panels = [(c, [r for r in results if r["capture"] == c]) for c in captures]
    if len(captures) > 1:
        panels.insert(0, (f"mean of {len(captures)} captures", mean_over_captures(results)))
    # As many columns as leave the fewest empty places.
    columns = min(COLUMNS, key=lambda n: -len(panels) % n)
    columns = min(columns, len(panels))
    lines = math.ceil(len(panels) / columns)
    legend_rows = math.ceil(len(methods) / min(columns + 1, 3))
    left, right, bottom = 0.75, 0.15, 0.6  # inches, as all that follows
    top = 0.45 + 0.2 * legend_rows
    width, height = left + right + 2.7 * columns, top + bottom + 2.5 * lines
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(width, height), sharex=True, sharey=True, squeeze=False
    )
    figure.subplots_adjust(
        left=left / width,
        right=1 - right / width,
        bottom=bottom / height,
        top=1 - top / height,
        wspace=0.08,
        hspace=0.22,
    )
    for axes, (title, part) in zip(grid.flat, panels):
        draw_panel(axes, title, part, methods)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_visible(False)
    for axes in list(grid.flat)[len(panels) - columns : len(panels)]:
        axes.tick_params(labelbottom=True)
    middle = (left + width - right) / 2 / width
    figure.text(middle, 0.12 / height, X_TITLE, ha="center", fontsize=10)
    figure.text(
        0.1 / width, (bottom + height - top) / 2 / height, Y_TITLE, va="center", rotation=90, fontsize=10
    )
    handles = []
    for method in methods:
        label, colour, marker, line = style_of(method, methods)
        handles.append(
            Line2D(
                [],
                [],
                color=colour,
                marker=marker,
                markersize=9 if marker == "*" else 5,
                linestyle=line,
                linewidth=1.4,
                label=label,
            )
        )
    figure.legend(
        handles=handles,
        loc="upper center",
        bbox_to_anchor=(middle, 1 - 0.05 / height),
        ncol=min(columns + 1, 3),
        frameon=False,
        fontsize=9,
    )
    return figure


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", help="JSON written by magicpig_compare --json")
    parser.add_argument("--output", default="compare", help="path without .svg and .png")
    arguments = parser.parse_args()
    with open(arguments.results, encoding="utf-8") as file:
        results = [r for r in json.load(file)["results"] if r["method"] != EXACT]
    if not results:
        parser.error(f"{arguments.results} holds no method but {EXACT}")
    figure = draw(results)
    # Nothing but the results decides the bytes: no dates, no random identifiers.
    matplotlib.rcParams["svg.hashsalt"] = "magicpig"
    figure.savefig(arguments.output + ".svg", metadata={"Date": None})
    figure.savefig(arguments.output + ".png", dpi=150, metadata={"Software": None})


if __name__ == "__main__":
    main()
