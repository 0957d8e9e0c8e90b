# SPDX-License-Identifier: Apache-2.0
"""Keys and values as the peers store them, and what attention over the stored numbers is in float64."""
from dataclasses import dataclass

import numpy as np

ALIGNMENT = 64  # bytes: a cache line
Q8_0 = np.dtype([("scale", np.float16), ("codes", np.int8, 32)])  # 32 numbers of ggml's type

# Where (head, token, dim) go, for keys and for values.
LAYOUTS = {
    "head-major": ((0, 1, 2), (0, 1, 2)),
    "token-major": ((1, 0, 2), (1, 0, 2)),
    "values transposed": ((1, 0, 2), (0, 2, 1)),
}


@dataclass(frozen=True)
class Shape:
    tokens: int
    head_dim: int = 128
    query_heads: int = 32
    kv_heads: int = 8

    @property
    def group(self):
        return self.query_heads // self.kv_heads

    @property
    def scale(self):
        return self.head_dim**-0.5


@dataclass(frozen=True)
class Context:
    """A decode step in float32: queries [query_heads, head_dim], the others [kv_heads, tokens, head_dim]."""

    shape: Shape
    queries: np.ndarray
    keys: np.ndarray
    values: np.ndarray


def make_context(shape, seed=1):
    """Normal numbers; logits have a standard deviation of 1.5. Queries are exact in each dtype."""
    random = np.random.default_rng(seed)
    queries = 1.5 * random.standard_normal((shape.query_heads, shape.head_dim), np.float32)
    queries = decode(encode(queries, "bf16"), "bf16").astype(np.float32)
    rows = (shape.kv_heads, shape.tokens, shape.head_dim)
    keys, values = (random.standard_normal(rows, np.float32) for _ in range(2))
    return Context(shape, queries, keys, values)


def encode(numbers, dtype):
    """Float32 numbers [..., dim] as a cache of that dtype stores them."""
    if dtype == "f32":
        return numbers
    if dtype == "f16":
        return numbers.astype(np.float16)
    if dtype == "bf16":
        bits = numbers.view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    blocks = numbers.reshape(*numbers.shape[:-1], -1, 32)
    scales = np.maximum(np.abs(blocks).max(-1) / 127, np.float32(1e-7))
    stored = np.empty(scales.shape, Q8_0)
    stored["scale"] = scales
    stored["codes"] = np.rint(blocks / scales[..., None])
    return stored


def decode(stored, dtype):
    """The numbers that encode() left, as float64."""
    if dtype == "bf16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    if dtype == "q8_0":
        numbers = stored["scale"].astype(np.float64)[..., None] * stored["codes"]
        return numbers.reshape(*stored.shape[:-1], -1)
    return stored.astype(np.float64)


def aligned_empty(shape, dtype):
    size = int(np.prod(shape)) * dtype.itemsize
    memory = np.empty(size + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + size].view(dtype).reshape(shape)


def copy_of(array):
    copy = aligned_empty(array.shape, array.dtype)
    copy[...] = array
    return copy


def store(numbers, dtype, axes):
    """[kv_heads, tokens, head_dim] in float32 as that dtype, with the axes in that order."""
    first = encode(numbers[0, :1], dtype)
    head_major = (*numbers.shape[:2], first.shape[-1])
    stored = aligned_empty([head_major[axis] for axis in axes], first.dtype)
    by_head = np.transpose(stored, np.argsort(axes))
    for head, rows in enumerate(numbers):  # one at a time, for the memory in between
        by_head[head] = encode(rows, dtype)
    return stored


class Cache:
    """Layers of one dtype and layout, all with the same numbers, each in memory of its own."""

    def __init__(self, context, dtype, layout):
        self.dtype = dtype
        self.layout = layout
        self._context = context
        arrays = zip((context.keys, context.values), LAYOUTS[layout])
        self.layers = [tuple(store(numbers, dtype, axes) for numbers, axes in arrays)]
        self._turn = 0
        self._reference = None

    @property
    def bytes(self):
        """Of one layer: what a step must read at least."""
        return sum(array.nbytes for array in self.layers[0])

    def make_layers(self, count):
        while len(self.layers) < count:
            self.layers.append(tuple(copy_of(array) for array in self.layers[0]))

    def next_layer(self):
        """Round all layers, whoever asks."""
        self._turn = (self._turn + 1) % len(self.layers)
        return self._turn

    def reference(self):
        """Attention over the stored numbers in float64: [query_heads, head_dim]."""
        if self._reference is None:
            heads = range(self._context.shape.kv_heads)
            self._reference = np.concatenate([self._head_reference(head) for head in heads])
        return self._reference

    def _head_reference(self, head):
        shape = self._context.shape
        keys, values = (
            decode(np.transpose(array, np.argsort(axes))[head], self.dtype)
            for array, axes in zip(self.layers[0], LAYOUTS[self.layout])
        )
        group = slice(head * shape.group, (head + 1) * shape.group)
        logits = self._context.queries[group].astype(np.float64) @ keys.T * shape.scale
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        return weights @ values / weights.sum(axis=1, keepdims=True)

    def error_of(self, output):
        """Relative L2 error of an output [query_heads, head_dim]."""
        difference = output.astype(np.float64) - self.reference()
        return float(np.linalg.norm(difference) / np.linalg.norm(self.reference()))
