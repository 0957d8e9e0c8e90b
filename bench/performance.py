# SPDX-License-Identifier: Apache-2.0
"""Measures a decode step by tokens, head_dim, group and dtype, whole and by stage, and writes docs/performance.

    python3 bench/performance.py --decode build/release/bench/decode --output docs/performance    measure and write
    python3 bench/performance.py --output docs/performance                                        write anew

Figures are kept in OUTPUT/figures.json; tables go between the marks of OUTPUT/README.md, plots beside it. One shape is
one process: its methods run in turn, in random order, and the least time of each counts. The machine should be idle; it
takes half an hour.
"""

import argparse
import json
import pathlib
import re
import subprocess
import sys
import tempfile

TOKENS = (1024, 2048, 4096, 8192, 32768, 98304, 131072, 1048576)
LONG = 98304
METHODS = ("exact", "tables", "published", "probing", "signatures_1bit", "signatures_2bit")
SIGNATURE_STAGES = [f"{stage}/bits:{bits}" for bits in (1, 2) for stage in ("draw_signatures", "attend/signatures")]
PEAK = "G_multiply_adds_per_s_1_thread"
READ = {1: "read_GB_per_s_1_thread", 2: "read_GB_per_s_2_threads"}


def shape(n, dim=128, group=4, dtype="bf16"):
    return f"n:{n}/dim:{dim}/group:{group}/{dtype}"


def runs():
    """Filters, each for one process."""
    for n in TOKENS:
        yield f"^decode/(exact|signatures_[12]bit)/{shape(n)}/threads:[12]/"
    for n in TOKENS[:-1]:  # tables of a million tokens take minutes to build
        yield f"^decode/(exact|tables|published)/{shape(n)}/threads:[12]/"
        yield f"^decode/(exact|probing)/{shape(n)}/threads:[12]/"
    for dim, group in ((128, 1), (128, 8), (64, 1), (64, 4), (64, 8)):
        yield f"^decode/(exact|tables|published)/{shape(LONG, dim, group)}/threads:1/"
    for dtype in ("fp16", "f32", "q8_0"):
        yield f"^decode/(exact|tables)/{shape(32768, dtype=dtype)}/threads:1/"
    yield f"^stage/(retrieve|attend/(candidates|exact))/{shape(LONG)}/"
    yield f"^stage/(draw_signatures|attend/signatures)/bits:[12]/{shape(LONG)}/"
    yield f"^stage/(build|append/tokens:1024)/n:{LONG}/dim:128/bf16/threads:[12]"
    yield f"^stage/build_(signatures|trained)/bits:[12]/{shape(LONG)}/threads:[12]"


def measure(decode, repetitions, chosen_runs, figures):
    """Least microseconds, bytes and rows of each run, and the machine as every process saw it at its best."""
    machine, seen = {}, set()
    for number, chosen in enumerate(chosen_runs):
        print(f"{number + 1} of {len(chosen_runs)}: {chosen}", file=sys.stderr, flush=True)
        with tempfile.NamedTemporaryFile(suffix=".json") as out:
            subprocess.run(
                [
                    decode,
                    f"--benchmark_filter={chosen}",
                    f"--benchmark_repetitions={repetitions}",
                    "--benchmark_enable_random_interleaving",
                    "--benchmark_min_time=0.1",
                    f"--benchmark_out={out.name}",
                    "--benchmark_out_format=json",
                ],
                check=True,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            report = json.load(out)
        note_machine(machine, report["context"])
        fresh = {}
        for run in report["benchmarks"]:
            if run.get("run_type") == "iteration":
                note_run(fresh, run)
        figures.update(
            {name: fresh[name] for name in fresh if name not in seen or fresh[name]["us"] < figures[name]["us"]}
        )
        seen.update(fresh)
    return {"machine": machine, "runs": figures}


def note_machine(machine, context):
    for key in (PEAK, *READ.values()):
        machine[key] = max(machine.get(key, 0.0), float(context[key]))
    for key in ("cpu", "highway_target", "last_level_cache_MiB", "huge_pages", "num_cpus"):
        machine[key] = context[key]
    machine["date"] = context["date"][:10]


def note_run(figures, run):
    name = re.sub("/(manual_time|iterations:[0-9]+)", "", run["run_name"])
    known = figures.get(name)
    if known is None or run["fastest_us"] < known["us"]:
        figures[name] = {
            "us": run["fastest_us"],
            **{key: run[key] for key in ("bytes", "rows") if key in run},
        }


class Report:
    def __init__(self, figures):
        self.machine = figures["machine"]
        self.runs = figures["runs"]

    def run(self, method, threads=1, **which):
        return self.runs.get(f"decode/{method}/{shape(**which)}/threads:{threads}")

    def bound_us(self, run, threads=1):
        """Time that reading the bytes of a run takes at the machine's bandwidth."""
        return run["bytes"] / self.machine[READ[threads]] * 1e-3

    def tables(self):
        return {
            "machine": self.machine_table(),
            "tokens": self.tokens_table(),
            "speedup": self.speedup_table(),
            "shapes": self.shapes_table(),
            "dtypes": self.dtypes_table(),
            "stages": self.stages_table(),
            "index": self.index_table(),
        }

    def machine_table(self):
        m = self.machine
        return [
            [
                "processor",
                "instructions",
                "last-level cache",
                "read, 1 thread",
                "read, 2 threads",
                "multiply-adds, 1 thread",
                "date",
            ],
            [
                m["cpu"],
                m["highway_target"],
                f"{float(m['last_level_cache_MiB']):.0f} MiB",
                f"{m[READ[1]]:.1f} GB/s",
                f"{m[READ[2]]:.1f} GB/s",
                f"{m[PEAK]:.0f} G/s",
                m["date"],
            ],
        ]

    def row(self, label, method, threads=1, **which):
        run = self.run(method, threads, **which)
        if run is None:
            return None
        bound = self.bound_us(run, threads)
        return [
            *label,
            f"{run['us'] / 1e3:.3f}",
            f"{run['bytes'] / 1e6:.1f}",
            f"{100 * run['rows']:.1f}",
            f"{bound / 1e3:.3f}",
            f"{run['us'] / bound:.2f}",
        ]

    HEAD = ("ms", "MB read", "rows read, %", "bound, ms", "time / bound")

    def tokens_table(self):
        rows = [
            self.row([f"{n:,}", method, str(threads)], method, threads, n=n)
            for n in TOKENS
            for method in METHODS
            for threads in (1, 2)
        ]
        return [["n", "method", "threads", *self.HEAD], *filter(None, rows)]

    SPEEDUPS = (
        ("exact", "tables"),
        ("exact", "probing"),
        ("exact", "signatures_1bit"),
        ("exact", "signatures_2bit"),
        ("published", "exact"),
        ("published", "tables"),
        ("published", "signatures_1bit"),
    )

    def speedup_table(self):
        rows = []
        for n in TOKENS:
            for threads in (1, 2):
                runs = [[self.run(method, threads, n=n) for method in pair] for pair in self.SPEEDUPS]
                if any(None not in pair for pair in runs):
                    ratios = ("" if None in pair else f"{pair[0]['us'] / pair[1]['us']:.2f}" for pair in runs)
                    rows.append([f"{n:,}", str(threads), *ratios])
        return [["n", "threads", *(f"{slow} / {fast}" for slow, fast in self.SPEEDUPS)], *rows]

    def shapes_table(self):
        rows = [
            self.row([str(dim), str(group), method], method, n=LONG, dim=dim, group=group)
            for dim in (64, 128)
            for group in (1, 4, 8)
            for method in METHODS[:3]
        ]
        return [["head_dim", "group", "method", *self.HEAD], *filter(None, rows)]

    def dtypes_table(self):
        rows = [
            self.row([dtype, method], method, n=32768, dtype=dtype)
            for dtype in ("f32", "fp16", "bf16", "q8_0")
            for method in METHODS[:2]
        ]
        return [["dtype", "method", *self.HEAD], *filter(None, rows)]

    def stages_table(self):
        rows = []
        for stage in ("retrieve", "attend/candidates", "attend/exact", *SIGNATURE_STAGES):
            run = self.runs.get(f"stage/{stage}/{shape(LONG)}")
            if run is None:
                continue
            bound = self.bound_us(run)
            rows.append(
                [
                    stage,
                    f"{run['us'] / 1e3:.3f}",
                    f"{run['bytes'] / 1e6:.1f}",
                    f"{bound / 1e3:.3f}",
                    f"{run['us'] / bound:.2f}",
                ]
            )
        return [["stage", "ms", "MB read", "bound, ms", "time / bound"], *rows]

    def index_table(self):
        rows = []
        for name, stage in (
            ("tables: build", f"build/n:{LONG}/dim:128/bf16"),
            ("tables: append 1,024 tokens", f"append/tokens:1024/n:{LONG}/dim:128/bf16"),
            ("signatures, 1 bit: build", f"build_signatures/bits:1/{shape(LONG)}"),
            ("signatures, 2 bits: build", f"build_signatures/bits:2/{shape(LONG)}"),
            ("signatures, 1 bit, trained: build", f"build_trained/bits:1/{shape(LONG)}"),
            ("signatures, 2 bits, trained: build", f"build_trained/bits:2/{shape(LONG)}"),
        ):
            for threads in (1, 2):
                run = self.runs.get(f"stage/{stage}/threads:{threads}")
                if run:
                    rows.append([name, str(threads), f"{run['us'] / 1e3:.1f}", f"{run['bytes'] / 1e6:.1f}"])
        return [["stage", "threads", "ms", "MB of index"], *rows]


def markdown(table):
    head, *rows = table
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def write_tables(page, tables):
    """Replaces what stands between `<!-- NAME -->` and `<!-- end -->`."""
    text = page.read_text()
    for name, table in tables.items():
        begin = text.index(f"<!-- {name} -->") + len(f"<!-- {name} -->")
        end = text.index("<!-- end -->", begin)
        text = text[:begin] + "\n" + markdown(table) + "\n" + text[end:]
    page.write_text(text)


COLOURS = {
    "exact": "#000000",
    "tables": "#D55E00",
    "published": "#999999",
    "probing": "#0072B2",
    "signatures_1bit": "#009E73",
    "signatures_2bit": "#CC79A7",
}
LABELS = {
    "exact": "exact",
    "tables": "tables (10, 150)",
    "published": "published algorithm (10, 150)",
    "probing": "tables (12, 48), r = 1",
    "signatures_1bit": "signatures, 1 bit, 2 % of the rows",
    "signatures_2bit": "signatures, 2 bits, 1 % of the rows",
}
MARKERS = {
    "exact": "s",
    "tables": "D",
    "published": "v",
    "probing": "o",
    "signatures_1bit": "^",
    "signatures_2bit": "P",
}


def draw_tokens(pyplot, report, path):
    """Time of a step by n, one panel for each number of threads; dotted: the bound of exact."""
    figure, panels = pyplot.subplots(1, 2, figsize=(9.5, 4), sharey=True, layout="constrained")
    for threads, axes in zip((1, 2), panels):
        for method in METHODS:
            found = [(n, report.run(method, threads, n=n)) for n in TOKENS]
            points = [(n, run["us"] / 1e3) for n, run in found if run]
            if not points:
                continue
            axes.plot(*zip(*points), color=COLOURS[method], marker=MARKERS[method], markersize=5, label=LABELS[method])
        found = [(n, report.run("exact", threads, n=n)) for n in TOKENS]
        bounds = [(n, report.bound_us(run, threads) / 1e3) for n, run in found if run]
        axes.plot(*zip(*bounds), color=COLOURS["exact"], linestyle=":", label="exact at the read bandwidth")
        axes.set(
            xscale="log", yscale="log", xlabel="tokens in the cache", title=f"{threads} thread" + "s" * (threads > 1)
        )
        axes.set_xticks(TOKENS, [f"{n // 1024}k" for n in TOKENS])
        axes.minorticks_off()
        axes.grid(color="#dddddd", linewidth=0.7)
    panels[0].set_ylabel("ms per step of one layer")
    panels[0].legend(fontsize=8, frameon=False)
    figure.savefig(path)


def work(name, run):
    """Multiply-adds of a stage: two products for each row and head. Of candidates, as if each head had drawn the whole
    union of its group, for that is what is computed for K; an upper bound for V."""
    if name == "attend/exact":
        return 2 * 8 * 4 * LONG * 128
    if name == "attend/candidates":
        return 2 * 8 * 4 * run["rows"] * (LONG - 68) * 128
    return 8 * 4 * 1500 * 128


def draw_roofline(pyplot, report, path):
    """Multiply-adds per second against multiply-adds per byte, under what the machine can do with one thread."""
    read, peak = report.machine[READ[1]], report.machine[PEAK]
    figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
    xs = [0.05, peak / read, 200]
    axes.plot(xs, [min(peak, x * read) for x in xs], color="#000000")
    axes.annotate(f"{read:.1f} GB/s", (0.07, 0.07 * read), rotation=35, va="bottom", fontsize=8)
    axes.annotate(f"{peak:.0f} G multiply-adds/s", (25, peak), va="bottom", fontsize=8)
    points = []
    for name in ("retrieve", "attend/candidates", "attend/exact"):
        run = report.runs.get(f"stage/{name}/{shape(LONG)}")
        points += [(name, run, work(name, run))] if run else []
    for group in (1, 8):
        run = report.run("exact", n=LONG, group=group)
        points += [(f"attend/exact, group {group}", run, 2 * 8 * group * LONG * 128)] if run else []
    for (name, run, done), marker in zip(points, "oDs<>"):
        colour = "#0072B2" if "exact" in name else "#D55E00"
        axes.plot(done / run["bytes"], done / run["us"] * 1e-3, marker=marker, color=colour, linestyle="", label=name)
    axes.set(xscale="log", yscale="log", xlabel="multiply-adds per byte read", ylabel="G multiply-adds per second")
    axes.grid(color="#dddddd", linewidth=0.7)
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    figure.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--decode", help="the program; without it figures.json is taken as it is")
    parser.add_argument(
        "--output", type=pathlib.Path, required=True, help="folder of README.md, figures.json and the plots"
    )
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--only", default="", help="of the filters only those that match; other figures stay")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    kept = options.output / "figures.json"
    if options.decode:
        figures = json.loads(kept.read_text())["runs"] if options.only and kept.exists() else {}
        chosen = [run for run in runs() if re.search(options.only, run)]
        kept.write_text(json.dumps(measure(options.decode, options.repetitions, chosen, figures), indent=1) + "\n")
    report = Report(json.loads(kept.read_text()))
    write_tables(options.output / "README.md", report.tables())
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "magicpig"  # the same picture for the same figures
    from matplotlib import pyplot

    draw_tokens(pyplot, report, options.output / "tokens.svg")
    draw_roofline(pyplot, report, options.output / "roofline.svg")


if __name__ == "__main__":
    main()
