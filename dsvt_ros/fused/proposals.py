"""What TransFusion's proposals see of the map, in a kernel."""

from __future__ import annotations

import torch
from torch import Tensor

from dsvt_ros.model.set_attention import MASKED

KEYS = 64
"""Cells that a program looks at at once."""
CHANNELS = 32
"""Channels that it takes, where heads are narrower."""


def attend_around(query: Tensor, projected: Tensor, cells: Tensor, around: Tensor, num_heads: int) -> Tensor:
    """What `model.transfusion_head.attend_around` computes, for heads of a power of two of channels."""
    from dsvt_ros.kernels import proposal_attention as kernels

    clouds, count, channels = query.shape
    heads_of_program = heads_of_a_program(channels, num_heads)
    attended = torch.empty_like(query, memory_format=torch.contiguous_format)
    kernels.attend_around[clouds * count, num_heads // heads_of_program](
        query.contiguous(), projected.contiguous(), cells.contiguous(), around, attended,
        count, projected.shape[1], MASKED,
        AROUND=len(around), HEADS=num_heads, WIDTH=channels // num_heads, HEADS_OF_PROGRAM=heads_of_program, KEYS=KEYS,
    )  # fmt: skip
    return attended


def heads_of_a_program(channels: int, num_heads: int) -> int:
    """Heads that a program takes; 0 where the kernel cannot take heads as wide as these."""
    width = channels // num_heads
    if width & (width - 1):
        return 0
    fitting = max(1, CHANNELS // width)
    while num_heads % fitting:
        fitting //= 2
    return fitting
