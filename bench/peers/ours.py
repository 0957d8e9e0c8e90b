# SPDX-License-Identifier: Apache-2.0
"""magicpig's exact attention, in the library that ours.cpp is compiled to."""
import ctypes
import weakref
from ctypes import POINTER, c_char_p, c_int32, c_void_p

import numpy as np

import environment

DTYPES = ("f32", "f16", "bf16", "q8_0")  # as ours.cpp numbers them


class Layer(ctypes.Structure):
    """As in ours.cpp."""

    _fields_ = [
        *((name, c_void_p) for name in ("keys", "values", "queries", "out")),
        *((name, c_int32) for name in ("query_heads", "kv_heads", "head_dim", "tokens")),
        *((name, c_int32) for name in ("dtype", "token_major")),
    ]


# Result and arguments of each function.
FUNCTIONS = {
    "exact_version": (c_char_p, []),
    "exact_target": (c_char_p, []),
    "exact_create": (c_void_p, [c_int32]),
    "exact_step": (c_char_p, [c_void_p, POINTER(Layer)]),
    "exact_destroy": (None, [c_void_p]),
}


def load_functions():
    library = ctypes.CDLL(str(environment.LIBRARY))
    for name, (result, arguments) in FUNCTIONS.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


class Magicpig:
    """A decoder for each number of threads, each with a pool of its own; threads without work sleep."""

    def __init__(self):
        self._functions = load_functions()
        self._decoders = {}
        self._threads = 1

    def set_threads(self, threads):
        self._threads = threads
        if threads not in self._decoders:
            self._decoders[threads] = self._functions.exact_create(threads)
            weakref.finalize(self, self._functions.exact_destroy, self._decoders[threads])

    def version(self):
        parts = self._functions.exact_version(), self._functions.exact_target()
        return "magicpig " + ", ".join(part.decode() for part in parts)

    def exact_step(self, context, cache, layer):
        return Step(self, context, cache, layer)

    def run(self, layer):
        """Attention over a Layer, on the threads last set."""
        error = self._functions.exact_step(self._decoders[self._threads], layer)
        if error is not None:
            raise RuntimeError(f"magicpig: {error.decode()}")


class Step:
    """decode() with DecodePlan<Exact> over one layer."""

    def __init__(self, magicpig, context, cache, layer):
        shape = context.shape
        self._magicpig = magicpig
        self._arrays = cache.layers[layer]
        self._queries = np.ascontiguousarray(context.queries)
        self._output = np.empty_like(self._queries)
        pointers = (array.ctypes.data for array in (*self._arrays, self._queries, self._output))
        sizes = shape.query_heads, shape.kv_heads, shape.head_dim, shape.tokens
        is_token_major = {"token-major": 1, "head-major": 0}[cache.layout]
        self._layer = Layer(*pointers, *sizes, DTYPES.index(cache.dtype), is_token_major)

    def run(self):
        self._magicpig.run(self._layer)

    def output(self):
        """[query_heads, head_dim] of the last run."""
        return self._output
