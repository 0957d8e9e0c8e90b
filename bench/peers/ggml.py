# SPDX-License-Identifier: Apache-2.0
"""Attention of llama.cpp: graphs of ggml, called in the shared libraries that llama-cpp-python brings."""
import ctypes
import importlib.util
from ctypes import c_bool, c_char_p, c_float, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path

import numpy as np

F32 = 0
TYPES = {"f32": F32, "f16": 1, "q8_0": 8}  # enum ggml_type
GRAPH_BYTES = 1 << 20  # descriptions of the few tensors of a graph, and the graph; no numbers


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", c_size_t), ("mem_buffer", c_void_p), ("no_alloc", c_bool)]


# Result and arguments of each function that is called, by library.
FUNCTIONS = {
    "ggml-base": {
        "ggml_version": (c_char_p, []),
        "ggml_commit": (c_char_p, []),
        "ggml_init": (c_void_p, [InitParams]),
        "ggml_new_tensor_3d": (c_void_p, [c_void_p, c_int, c_int64, c_int64, c_int64]),
        "ggml_permute": (c_void_p, [c_void_p, c_void_p, c_int, c_int, c_int, c_int]),
        "ggml_flash_attn_ext": (c_void_p, [c_void_p] * 5 + [c_float] * 3),
        "ggml_mul_mat": (c_void_p, [c_void_p] * 3),
        "ggml_soft_max_ext": (c_void_p, [c_void_p] * 3 + [c_float] * 2),
        "ggml_new_graph": (c_void_p, [c_void_p]),
        "ggml_build_forward_expand": (None, [c_void_p, c_void_p]),
        "ggml_backend_cpu_buffer_from_ptr": (c_void_p, [c_void_p, c_size_t]),
        "ggml_backend_tensor_alloc": (c_int, [c_void_p] * 3),
        "ggml_backend_alloc_ctx_tensors": (c_void_p, [c_void_p] * 2),
        "ggml_backend_tensor_set": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
        "ggml_backend_tensor_get": (None, [c_void_p, c_void_p, c_size_t, c_size_t]),
        "ggml_backend_graph_compute": (c_int, [c_void_p] * 2),
    },
    "ggml-cpu": {
        "ggml_backend_cpu_init": (c_void_p, []),
        "ggml_backend_cpu_set_n_threads": (None, [c_void_p, c_int]),
    },
    "llama": {
        "llama_print_system_info": (c_char_p, []),
    },
}


def load_functions():
    """All of FUNCTIONS as attributes of one object."""
    package = importlib.util.find_spec("llama_cpp").submodule_search_locations[0]
    functions = type("Functions", (), {})()
    for library, signatures in FUNCTIONS.items():
        loaded = ctypes.CDLL(str(Path(package) / "lib" / f"lib{library}.so"))
        for name, (result, arguments) in signatures.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
            setattr(functions, name, function)
    return functions


class Ggml:
    """ggml's CPU backend, with the number of threads last set."""

    def __init__(self):
        self.functions = load_functions()
        self.backend = self.functions.ggml_backend_cpu_init()

    def set_threads(self, threads):
        self.functions.ggml_backend_cpu_set_n_threads(self.backend, threads)

    def system_info(self):
        return self.functions.llama_print_system_info().decode().strip()

    def version(self):
        parts = self.functions.ggml_version(), self.functions.ggml_commit()
        return "ggml " + " ".join(part.decode() for part in parts)

    def flash_step(self, context, cache, layer):
        """ggml_flash_attn_ext without a mask, which one query after all tokens does not need."""
        step = Step(self, context, cache, layer)
        query, keys, values = step.query(), step.rows(0), step.rows(1)
        call = self.functions.ggml_flash_attn_ext
        step.finish(call(step.context, query, keys, values, None, context.shape.scale, 0.0, 0.0))
        return step

    def matmul_step(self, context, cache, layer):
        """What llama.cpp does without flash attention; its cache holds the values transposed then."""
        step = Step(self, context, cache, layer)
        call = self.functions
        logits = call.ggml_mul_mat(step.context, step.rows(0), step.query())
        weights = call.ggml_soft_max_ext(step.context, logits, None, context.shape.scale, 0.0)
        step.finish(call.ggml_mul_mat(step.context, step.columns(1), weights))
        return step


class Step:
    """One graph over one layer. Shapes are ggml's, innermost first."""

    def __init__(self, ggml, context, cache, layer):
        self._ggml = ggml
        self._call = ggml.functions
        self._shape = context.shape
        self._queries = np.ascontiguousarray(context.queries)
        self._cache = cache
        self._arrays = cache.layers[layer]
        self.context = self._call.ggml_init(InitParams(GRAPH_BYTES, None, True))

    def query(self):
        """[head_dim, 1, query_heads]"""
        shape = self._shape
        self._query = self._call.ggml_new_tensor_3d(
            self.context, F32, shape.head_dim, 1, shape.query_heads
        )
        return self._query

    def rows(self, which):
        """Keys (0) or values (1) as a view [head_dim, tokens, kv_heads] of the cache."""
        shape = self._shape
        if self._cache.layout == "head-major":
            return self._tensor(which, shape.head_dim, shape.tokens, shape.kv_heads)
        tensor = self._tensor(which, shape.head_dim, shape.kv_heads, shape.tokens)
        return self._call.ggml_permute(self.context, tensor, 0, 2, 1, 3)

    def columns(self, which):
        """The same, transposed: [tokens, head_dim, kv_heads]."""
        shape = self._shape
        return self._tensor(which, shape.tokens, shape.head_dim, shape.kv_heads)

    def _tensor(self, which, *shape):
        array = self._arrays[which]
        tensor = self._call.ggml_new_tensor_3d(self.context, TYPES[self._cache.dtype], *shape)
        buffer = self._call.ggml_backend_cpu_buffer_from_ptr(array.ctypes.data, array.nbytes)
        if self._call.ggml_backend_tensor_alloc(buffer, tensor, array.ctypes.data) != 0:
            raise RuntimeError("ggml takes no tensor in memory of NumPy's")
        return tensor

    def finish(self, output):
        """Makes the graph that ends in `output`, and memory for what the cache does not hold."""
        self._output = output
        self._graph = self._call.ggml_new_graph(self.context)
        self._call.ggml_build_forward_expand(self._graph, output)
        if not self._call.ggml_backend_alloc_ctx_tensors(self.context, self._ggml.backend):
            raise MemoryError("ggml has no memory for a graph")
        queries = self._queries
        self._call.ggml_backend_tensor_set(self._query, queries.ctypes.data, 0, queries.nbytes)

    def run(self):
        status = self._call.ggml_backend_graph_compute(self._ggml.backend, self._graph)
        if status != 0:
            raise RuntimeError(f"ggml_backend_graph_compute returned {status}")

    def output(self):
        """[query_heads, head_dim] of the last run."""
        output = np.empty_like(self._queries)
        self._call.ggml_backend_tensor_get(self._output, output.ctypes.data, 0, output.nbytes)
        return output
