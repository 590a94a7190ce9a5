"""Weights in half precision."""

from __future__ import annotations

import torch
from torch import Tensor

from dsvt_ros.errors import EngineError


def half(values: Tensor) -> Tensor:
    """`values` in float16; `EngineError` if they are beyond its range."""
    result = values.detach().half().contiguous()
    if not torch.isfinite(result).all():
        raise EngineError(
            f"weights of up to {values.abs().max():.3g} are beyond the range of float16 (65504): use torch in fp32"
        )
    return result
