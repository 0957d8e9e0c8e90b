# SPDX-License-Identifier: Apache-2.0
"""A decode step on the device beside PyTorch's attention on the same shapes, in turns, as a table.

  decode_cuda.py PROGRAM [TOKENS...]      PROGRAM is build/cuda/bench/cuda/decode_cuda
"""

import json
import statistics
import subprocess
import sys

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

QUERY_HEADS, KV_HEADS, DIM = 32, 8, 128


def attention_us(tokens, requests, repetitions=51):
    """Median time of flash attention of one query token per request over the whole cache, caches emptied before each."""
    options = {"device": "cuda", "dtype": torch.bfloat16}
    query = torch.randn(requests, QUERY_HEADS, 1, DIM, **options)
    keys, values = (torch.randn(requests, KV_HEADS, tokens, DIM, **options) for _ in range(2))
    flushed = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    times = []
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        for i in range(repetitions + 3):
            flushed.fill_(i % 256)
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
            end.record()
            end.synchronize()
            times.append(1000 * begin.elapsed_time(end))
    return statistics.median(times[3:])


def main():
    program, *lengths = sys.argv[1:]
    print(f"{torch.cuda.get_device_name()}, PyTorch {torch.__version__}")
    print("| tokens | requests | method | rows | PyTorch, us | step, us | in a graph | its scan | bound | speed-up | build, ms |")
    print("|--:|--:|:--|--:|--:|--:|--:|--:|--:|--:|--:|")
    for length in lengths or ["32768", "98304", "524288"]:
        exact = {}
        for line in subprocess.run([program, length], check=True, capture_output=True, text=True).stdout.splitlines():
            own = json.loads(line)
            shape = own["tokens"], own["requests"]
            if shape not in exact:
                exact[shape] = attention_us(*shape)
                torch.cuda.empty_cache()
            print(
                f"| {own['tokens']:,} | {own['requests']} | {own['method']} | {100 * own['rows']:.2f} % | {exact[shape]:.1f} | {own['step_us']:.1f} "
                f"| {own['graph_us']:.1f} | {own['scan_us']:.1f} | {own['bound_us']:.1f} | {exact[shape] / own['graph_us']:.1f} | {own['build_us'] / 1000:.1f} |",
                flush=True,
            )
            print(f"  copies: {own['copy_gb_s']} GB/s", file=sys.stderr)


if __name__ == "__main__":
    main()
