# SPDX-License-Identifier: Apache-2.0
"""The machine that the peers run on: its caches, its memory, its instruction sets, its read bandwidth."""
import os
import re
import time
from pathlib import Path

import numpy as np
import torch

COLUMNS = 16384  # of the matrix that a Reader reads: the fastest of 128 to 16,384
# As /proc/cpuinfo names an instruction set, and as llama.cpp does.
INSTRUCTION_SETS = {
    "avx2": "AVX2",
    "fma": "FMA",
    "f16c": "F16C",
    "avx_vnni": "AVX_VNNI",
    "avx512f": "AVX512",
    "avx512vbmi": "AVX512_VBMI",
    "avx512_vnni": "AVX512_VNNI",
    "avx512_bf16": "AVX512_BF16",
    "amx_int8": "AMX_INT8",
}


def cpu_line(name):
    match = re.search(rf"^{name}\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return match[1] if match else ""


def last_level_cache():
    """Bytes, 32 MiB where the system does not say."""
    return max(cache_sizes(), default=32 << 20)


def cache_sizes():
    for index in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*"):
        if int((index / "level").read_text()) >= 3:
            yield int((index / "size").read_text().strip().removesuffix("K")) << 10


def free_memory():
    """Bytes."""
    available = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
    return int(available[1]) << 10


def bytes_in_huge_pages():
    """Of this process."""
    pages = re.search(r"AnonHugePages:\s+(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    return int(pages[1]) << 10


def load():
    return os.getloadavg()[0]


def missing_instruction_sets(system_info):
    """What this CPU has and the llama.cpp that says so of itself was compiled without."""
    flags = cpu_line("flags").split()
    wanted = [name for flag, name in INSTRUCTION_SETS.items() if flag in flags]
    return [name for name in wanted if f" {name} = 1 " not in f" {system_info} "]


class Reader:
    """Reads memory that is in no cache: a matrix times a vector, in float32, by PyTorch."""

    def __init__(self):
        # NumPy's memory, for the same pages as those of the caches.
        rows = 4 * last_level_cache() // (4 * COLUMNS) + 1
        self._matrix = torch.from_numpy(np.ones((rows, COLUMNS), np.float32))
        self._vector = torch.ones(COLUMNS)

    def bytes_per_second(self, threads):
        """Of one product, after one that wakes the threads."""
        torch.set_num_threads(threads)
        torch.mv(self._matrix, self._vector)
        start = time.perf_counter()
        torch.mv(self._matrix, self._vector)
        return self._matrix.nbytes / (time.perf_counter() - start)
