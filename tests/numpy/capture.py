# SPDX-License-Identifier: Apache-2.0
"""A capture as numpy sees it, and what a program dumped about it."""
import functools
import json
import pathlib
import struct
import subprocess
import sys
import tempfile

try:
    import numpy as np
except ImportError:
    print("SKIPPED: nothing was recomputed, for python3-numpy is missing")
    sys.exit(77)

SINK, LOCAL = 4, 64


class Capture:
    """q [query_heads, n_q, dim], k and v [kv_heads, n, dim] in double, and the range of the middle."""

    def __init__(self, path):
        raw = pathlib.Path(path).read_bytes()
        (length,) = struct.unpack("<Q", raw[:8])
        header = json.loads(raw[8 : 8 + length])
        for name in "qkv":
            tensor = header[name]
            assert tensor["dtype"] == "F16"
            begin, end = (8 + length + offset for offset in tensor["data_offsets"])
            values = np.frombuffer(raw[begin:end], np.float16).reshape(tensor["shape"])
            setattr(self, name, values.astype(np.float64))
        self.tokens = self.k.shape[1]
        self.group = len(self.q) // len(self.k)
        self.middle = slice(SINK, self.tokens - self.q.shape[1] - LOCAL)
        self.centres = self.k[:, self.middle].mean(axis=1)
        self.centred = self.k[:, self.middle] - self.centres[:, None]

    def visible(self, row):
        return self.tokens - self.q.shape[1] + row + 1

    @functools.cache
    def logits(self, row, head):
        keys = self.k[head // self.group, : self.visible(row)]
        return keys @ self.q[head, row] / np.sqrt(self.q.shape[2])

    def attend(self, row, head, tokens, logits):
        """Output and lse of a softmax over some tokens."""
        weights = np.exp(logits - logits.max())
        output = weights @ self.v[head // self.group, tokens] / weights.sum()
        return output, np.log(weights.sum()) + logits.max()

    def exact(self, row, head):
        return self.attend(row, head, np.arange(self.visible(row)), self.logits(row, head))


class Dump:
    """Arrays that a program wrote: dump("name.f32")."""

    TYPES = {".u16": "<u2", ".i32": "<i4", ".f32": "<f4"}

    def __init__(self, program, capture, *arguments):
        self._folder = tempfile.TemporaryDirectory()
        subprocess.run([program, capture, self._folder.name, *map(str, arguments)], check=True)

    def __call__(self, name):
        return np.fromfile(pathlib.Path(self._folder.name, name), self.TYPES[pathlib.Path(name).suffix])

    def rows(self, capture, queries):
        """Rows of the queries that were asked, which are spread evenly."""
        rows = self("rows.i32")
        expected = np.floor(np.linspace(0, capture.q.shape[1] - 1, queries))
        assert np.array_equal(rows, expected.astype(int))
        return rows
