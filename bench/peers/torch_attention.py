# SPDX-License-Identifier: Apache-2.0
"""Attention of PyTorch on the CPU, over caches in NumPy's memory."""
import numpy as np
import torch
from torch.nn.attention import SDPBackend
from torch.nn.functional import scaled_dot_product_attention

DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def tensor_of(array, dtype):
    bits = array.view(np.int16) if dtype == "bf16" else array
    return torch.from_numpy(bits).view(DTYPES[dtype])


class Torch:
    def set_threads(self, threads):
        torch.set_num_threads(threads)

    def version(self):
        return f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}"

    def gqa_step(self, context, cache, layer):
        """Query heads as they are; PyTorch is told that they share KV heads."""
        shape = context.shape
        queries = (1, shape.query_heads, 1, shape.head_dim)
        return AttentionStep(context, cache, layer, queries, enable_gqa=True)

    def rows_step(self, context, cache, layer):
        """The query heads of a group as rows of one query: the same numbers, without a causal mask."""
        shape = context.shape
        queries = (1, shape.kv_heads, shape.group, shape.head_dim)
        return AttentionStep(context, cache, layer, queries, enable_gqa=False)

    def matmul_step(self, context, cache, layer):
        return MatmulStep(context, cache, layer)


class Step:
    def __init__(self, context, cache, layer, query_shape):
        self._shape = context.shape
        self._queries = torch.from_numpy(context.queries).to(DTYPES[cache.dtype]).view(query_shape)
        self._keys, self._values = (tensor_of(a, cache.dtype) for a in cache.layers[layer])

    def output(self):
        """[query_heads, head_dim] of the last run."""
        return self._output.float().reshape(self._shape.query_heads, -1).numpy()


class AttentionStep(Step):
    """scaled_dot_product_attention, with the kernel that PyTorch chooses."""

    def __init__(self, context, cache, layer, query_shape, enable_gqa):
        super().__init__(context, cache, layer, query_shape)
        self._arguments = self._queries, self._keys[None], self._values[None]
        self._enable_gqa = enable_gqa

    @torch.inference_mode()
    def run(self):
        self._output = scaled_dot_product_attention(
            *self._arguments, scale=self._shape.scale, enable_gqa=self._enable_gqa
        )

    def kernel(self):
        choice = torch._fused_sdp_choice(
            *self._arguments, scale=self._shape.scale, enable_gqa=self._enable_gqa
        )
        return SDPBackend(choice).name


class MatmulStep(Step):
    """Two products per KV head, and a softmax in float32 between them."""

    def __init__(self, context, cache, layer):
        shape = context.shape
        super().__init__(context, cache, layer, (shape.kv_heads, shape.group, shape.head_dim))

    @torch.inference_mode()
    def run(self):
        logits = self._queries @ self._keys.transpose(1, 2)
        weights = torch.softmax(logits.float() * self._shape.scale, dim=-1)
        self._output = weights.to(self._values.dtype) @ self._values
