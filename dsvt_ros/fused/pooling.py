"""Attention pooling between stages in float16 kernels; see `kernels.pooling`."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dsvt_ros.errors import EngineError
from dsvt_ros.fused.launch import descriptor, num_warps
from dsvt_ros.fused.multiply import multiply
from dsvt_ros.fused.weights import half
from dsvt_ros.model.set_attention import AttentionPooling

MAX_SLOTS = 16
"""Voxels that make one: kernels unroll over them."""
MAXIMUM_ROWS = 16
ATTENTION_ROWS = 16
OUTPUT_ROWS = 64


class FusedPooling:
    """`AttentionPooling` on voxels of fused stages."""

    def __init__(self, pooling: AttentionPooling, chunk: int) -> None:
        """Take over weights.

        Args:
            pooling: Of D channels, `chunk` times 1 to 4.
            chunk: Channels of a block: 16, 32 or 64.

        Raises:
            EngineError: It has more slots than the kernels take, or weights beyond float16.
        """
        slots, channels = pooling.pos_embedding.shape
        if slots > MAX_SLOTS:
            raise EngineError(
                f"backend triton pools up to {MAX_SLOTS} voxels into one; this model has {slots}: use torch or tensorrt"
            )
        self._chunk, self._heads = chunk, pooling.NUM_HEADS
        attention = pooling.self_attn
        # Every block of the projected channels holds as many of each head.
        order = torch.arange(channels, device=pooling.pos_embedding.device)
        order = order.view(self._heads, -1, chunk // self._heads).transpose(0, 1).flatten()
        query, key, value = (weight[order] for weight in attention.in_proj_weight.chunk(3))
        query_bias, _, value_bias = attention.in_proj_bias.chunk(3)
        out = attention.out_proj
        # The softmax's scale, and what makes its exponentials powers of two.
        scale = math.log2(math.e) * (channels // self._heads) ** -0.5
        self._query_weights = half(scale * query.T)
        self._weights = half(torch.cat([key, value]).T)
        self._out_weights = half(out.weight[:, order].T)
        self._positions = pooling.pos_embedding @ key.T
        out_bias = out.bias + out.weight @ value_bias
        self._vectors = torch.stack([scale * query_bias[order], out_bias, pooling.norm.weight, pooling.norm.bias])

    def __call__(self, features: Tensor, num_voxels: Tensor, pooled: Tensor, num_pooled: Tensor) -> Tensor:
        """Pool voxels into those of the next stage.

        Args:
            features: (V, D) float16.
            num_voxels: (1,) int32, rows of it that count.
            pooled: (V', P) int32, as in `FusedStage`.
            num_pooled: (1,) int32, rows of it that count.

        Returns:
            (V', D) float16, of which `num_pooled` rows are written.
        """
        from dsvt_ros.kernels import pooling as kernels

        (count, slots), channels = pooled.shape, features.shape[1]
        blocks = {"CHUNK": self._chunk, "PARTS": channels // self._chunk}
        maximum = features.new_empty(count, channels)
        kernels.find_maximum[(-(-count // MAXIMUM_ROWS),)](
            features, pooled, num_pooled, maximum, SLOTS=slots, ROWS=MAXIMUM_ROWS, **blocks
        )
        queries = multiply(maximum, self._query_weights, num_pooled)
        projected = multiply(features, self._weights, num_voxels)
        attended = torch.empty_like(maximum)
        kernels.attend[(-(-count // ATTENTION_ROWS),)](
            queries, projected, pooled, num_pooled, self._positions, self._vectors, attended,
            SLOTS=slots, HEADS=self._heads, ROWS=ATTENTION_ROWS, **blocks,
        )  # fmt: skip
        output = torch.empty_like(maximum)
        kernels.finish[(-(-count // OUTPUT_ROWS),)](
            descriptor(attended, OUTPUT_ROWS, self._chunk), descriptor(self._out_weights, self._chunk, self._chunk),
            maximum, num_pooled, self._vectors, output,
            ROWS=OUTPUT_ROWS, STAGES=3, num_warps=num_warps(features.device), **blocks,
        )  # fmt: skip
        return output
