# SPDX-License-Identifier: Apache-2.0
"""What peers.py tells: a Markdown table, and JSON."""
import json
import sys
from dataclasses import asdict, dataclass

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
    error: float

    def line(self):
        speed = self.bytes / self.ms_min * 1e-6
        figures = (f"{self.ms_min:.2f}", f"{self.ms_median:.2f}", f"{speed:.2f}", f"{self.error:.1e}")
        return (f"`{self.variant}`", self.dtype, self.layout, str(self.threads), *figures)


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
    print(f"\n{table(results)}")


def write(path, facts, results):
    if path is None:
        return
    with open(path, "w", encoding="utf-8") as file:
        json.dump({"context": facts, "results": [asdict(r) for r in results]}, file, indent=1)
