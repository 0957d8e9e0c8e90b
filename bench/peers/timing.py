# SPDX-License-Identifier: Apache-2.0
"""The variants of peers.py: checked against float64 first, then timed in turn."""
import re
import statistics
import sys
import time
from dataclasses import dataclass

import machine
import report
from caches import Cache, Shape, make_context
from ggml import Ggml
from ours import Magicpig
from torch_attention import Torch

# Relative L2 errors that are allowed over 1,024 tokens, against float64 over the same stored numbers.
# f16 sums that many roundings, bf16 rounds logits, q8_0 rounds queries; a wrong row is an error of 1.
CHECKED_TOKENS = 1024
TOLERANCES = {"f32": 1e-5, "f16": 1e-2, "bf16": 2e-2, "q8_0": 2e-2}
MEMORY = 12 << 30  # bytes that all layers may take, or half of what is free
IDLE = 0.03  # seconds, in which the threads of the peer before stop to spin


@dataclass(frozen=True)
class Variant:
    name: str
    dtype: str
    layout: str
    peer: object  # with set_threads()
    make_step: object  # (context, cache, layer) -> step with run() and output()

    def __str__(self):
        return f"{self.name}/{self.dtype}/{self.layout}"


@dataclass
class Row:
    """A variant with a number of threads."""

    variant: Variant
    cache: Cache
    steps: list  # one for each layer of the cache
    threads: int
    ms: list

    def time_step(self):
        """One step, after one that wakes the threads; each on a layer of its own."""
        self.variant.peer.set_threads(self.threads)
        time.sleep(IDLE)
        self.steps[self.cache.next_layer()].run()
        step = self.steps[self.cache.next_layer()]
        start = time.perf_counter()
        step.run()
        self.ms.append((time.perf_counter() - start) * 1e3)

    def error(self):
        self.variant.peer.set_threads(self.threads)
        self.steps[0].run()
        return self.cache.error_of(self.steps[0].output())

    def result(self):
        return report.Result(
            variant=self.variant.name,
            dtype=self.variant.dtype,
            layout=self.variant.layout,
            threads=self.threads,
            bytes=self.cache.bytes,
            ms=self.ms,
            ms_min=min(self.ms),
            ms_median=statistics.median(self.ms),
            error=self.error(),
        )


def all_variants(ours, ggml, torch):
    exact, flash = "magicpig/exact", "llama.cpp/flash_attn_ext"
    variants = [
        Variant(exact, "f16", "token-major", ours, ours.exact_step),
        Variant(exact, "f16", "head-major", ours, ours.exact_step),
        Variant(exact, "bf16", "token-major", ours, ours.exact_step),
        Variant(exact, "bf16", "head-major", ours, ours.exact_step),
        Variant(exact, "f32", "head-major", ours, ours.exact_step),
        Variant(exact, "q8_0", "token-major", ours, ours.exact_step),
        Variant(flash, "f16", "token-major", ggml, ggml.flash_step),
        Variant(flash, "f16", "head-major", ggml, ggml.flash_step),
        Variant(flash, "q8_0", "token-major", ggml, ggml.flash_step),
        Variant("llama.cpp/mul_mat", "f16", "values transposed", ggml, ggml.matmul_step),
    ]
    for dtype in ("bf16", "f32"):
        variants += [
            Variant("torch/sdpa_gqa", dtype, "head-major", torch, torch.gqa_step),
            Variant("torch/sdpa_rows", dtype, "head-major", torch, torch.rows_step),
            Variant("torch/matmul", dtype, "head-major", torch, torch.matmul_step),
        ]
    return variants


def make_caches(context, variants):
    """One for each dtype and layout: variants share them."""
    wanted = dict.fromkeys((variant.dtype, variant.layout) for variant in variants)
    return {key: Cache(context, *key) for key in wanted}


def make_rows(context, caches, variants, thread_counts):
    rows = []
    for variant in variants:
        cache = caches[variant.dtype, variant.layout]
        steps = [variant.make_step(context, cache, i) for i in range(len(cache.layers))]
        rows += [Row(variant, cache, steps, threads, []) for threads in thread_counts]
    return rows


def check(variants, thread_counts):
    """Ends the program unless each variant computes attention."""
    context = make_context(Shape(CHECKED_TOKENS))
    for row in make_rows(context, make_caches(context, variants), variants, thread_counts):
        error = row.error()
        report.note(f"check {row.variant}, threads {row.threads}: error {error:.1e}")
        tolerance = TOLERANCES[row.variant.dtype]
        if not error <= tolerance:
            sys.exit(f"error: {row.variant} is off by {error}, more than {tolerance}")


def add_layers(caches, between):
    """So many that more than `between` bytes are read between two uses of a layer, memory allowing."""
    wanted = {key: int(between // cache.bytes) + 2 for key, cache in caches.items()}
    total = sum(count * caches[key].bytes for key, count in wanted.items())
    held = sum(cache.bytes for cache in caches.values())
    share = min(1.0, min(MEMORY, (machine.free_memory() + held) // 2) / total)
    for key, cache in caches.items():
        cache.make_layers(max(1, int(wanted[key] * share)))
        short = "" if len(cache.layers) == wanted[key] else f", not {wanted[key]}: memory is short"
        report.note(f"{'/'.join(key)}: {len(cache.layers)} x {cache.bytes / 1e6:.0f} MB{short}")


def measure(rows, options):
    """Times all rows in turn, again and again, so that noise falls on all of them. Returns the read
    bandwidth, measured in between: GB/s by number of threads."""
    reader = machine.Reader()
    speeds = dict.fromkeys(options.threads, 0.0)
    for repeat in range(options.repeats):
        report.note(f"round {repeat + 1} of {options.repeats}, load {machine.load():.2f}")
        for threads in options.threads:
            time.sleep(IDLE)
            speeds[threads] = max(speeds[threads], reader.bytes_per_second(threads) * 1e-9)
        for row in rows:
            row.time_step()
    return speeds


def describe(ours, ggml, torch, options):
    """What the figures depend on, before anything is done."""
    info = ggml.system_info()
    return {
        "load_before": machine.load(),
        "cpu": machine.cpu_line("model name"),
        "last_level_cache_MiB": machine.last_level_cache() / 2**20,
        "tokens": options.tokens,
        "versions": [ours.version(), ggml.version(), torch.version()],
        "llama_system_info": info,
        "llama_lacks": machine.missing_instruction_sets(info),
        "pages": options.pages,
    }


def sdpa_kernels(rows):
    """Which kernel PyTorch chooses for each variant that leaves it the choice."""
    chosen = [row for row in rows if row.variant.name.startswith("torch/sdpa")]
    return {str(row.variant): row.steps[0].kernel() for row in chosen}


def run(options):
    peers = Magicpig(), Ggml(), Torch()
    facts = describe(*peers, options)
    variants = [v for v in all_variants(*peers) if re.search(options.only, str(v))]
    if not variants:
        sys.exit(f"error: no variant matches {options.only}")
    check(variants, options.threads)
    context = make_context(Shape(options.tokens))
    caches = make_caches(context, variants)
    add_layers(caches, 4 * machine.last_level_cache())
    rows = make_rows(context, caches, variants, options.threads)
    facts["torch_sdpa_kernels"] = sdpa_kernels(rows)
    facts["read_GB_per_s"] = measure(rows, options)
    facts["load_after"] = machine.load()
    facts["GiB_in_huge_pages"] = machine.bytes_in_huge_pages() / 2**30
    results = [row.result() for row in rows]
    report.print_report(facts, results)
    report.write(options.json, facts, results)
