# SPDX-License-Identifier: Apache-2.0
"""What peers.py tells: a Markdown table, JSON, and the rows of bench/decode beside its own."""
import json
import statistics
import sys
from dataclasses import asdict, dataclass, field

COLUMNS = ("variant", "dtype", "layout", "threads", "ms min", "ms median", "GB/s", "error")
QUIET = 0.7  # load, before a run


@dataclass(frozen=True)
class Result:
    variant: str
    dtype: str
    layout: str
    threads: int
    bytes: float
    ms: list
    ms_min: float
    ms_median: float
    error: float | None = None

    def line(self):
        speed = self.bytes / self.ms_min * 1e-6
        error = "" if self.error is None else f"{self.error:.1e}"
        times = (f"{self.ms_min:.2f}", f"{self.ms_median:.2f}", f"{speed:.2f}")
        return (f"`{self.variant}`", self.dtype, self.layout, str(self.threads), *times, error)


@dataclass(frozen=True)
class Ours:
    """What bench/decode measured, and its context; nothing, where there is no file."""

    results: list = field(default_factory=list)
    context: dict = field(default_factory=dict)


def read_ours(path, shape):
    """Runs of decode/exact for that shape in Google Benchmark's JSON; repetitions make one result."""
    if path is None:
        return Ours()
    with open(path, encoding="utf-8") as file:
        content = json.load(file)
    prefix = f"decode/exact/n:{shape.tokens}/dim:{shape.head_dim}/group:{shape.group}/"
    runs = {}
    for run in content["benchmarks"]:
        if run["name"].startswith(prefix) and run["run_type"] != "aggregate":
            runs.setdefault(run["name"].removeprefix(prefix), []).append(run)
    if not runs:
        sys.exit(f"error: {path} has no {prefix}...")
    results = [our_result(name, group) for name, group in runs.items()]
    results.sort(key=lambda result: (result.dtype, result.layout, result.threads))
    return Ours(results, content["context"])


def our_result(name, runs):
    """Of a name such as bf16/threads:1. Times are in microseconds."""
    dtype, *layout, threads = name.split("/")
    means = [run["real_time"] / 1e3 for run in runs]
    return Result(
        variant="magicpig/exact",
        dtype=dtype,
        layout="/".join(layout) or "head-major",
        threads=int(threads.removeprefix("threads:")),
        bytes=runs[0]["bytes"],
        ms=means,
        ms_min=min(run["fastest_us"] for run in runs) / 1e3,
        ms_median=statistics.median(means),
    )


def note(text):
    print(text, file=sys.stderr, flush=True)


def table(results):
    lines = [COLUMNS, ["---"] * 3 + ["--:"] * 5, *(result.line() for result in results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def print_report(facts, results):
    print(f"{facts['cpu']}, last-level cache {facts['last_level_cache_MiB']:.0f} MiB")
    print(f"{', '.join(facts['versions'])}; {facts['tokens']} tokens")
    print(f"llama.cpp: {facts['llama_system_info']}")
    if facts["llama_lacks"]:
        print(f"llama.cpp WAS COMPILED WITHOUT {', '.join(facts['llama_lacks'])}, which this CPU has")
    for name, kernel in facts["torch_sdpa_kernels"].items():
        print(f"{name}: {kernel}")
    print(f"{facts['pages']} pages: {facts['GiB_in_huge_pages']:.1f} GiB of this process in huge pages")
    busy = "" if facts["load_before"] < QUIET else ": THE MACHINE WAS NOT QUIET"
    print(f"load {facts['load_before']:.2f} before, {facts['load_after']:.2f} after{busy}")
    for threads, speed in facts["read_GB_per_s"].items():
        print(f"read bandwidth, threads {threads}: {speed:.1f} GB/s")
    for name, speed in facts["bench_decode"].items():
        if name.startswith("read_GB_per_s"):
            print(f"bench/decode in its own run: {name} {speed}")
    print(f"\n{table(results)}")


def write(path, facts, results):
    if path is None:
        return
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"context": facts, "results": [asdict(r) for r in results]}, file, indent=1)
