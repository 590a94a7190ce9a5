"""Constants of a model or a configuration as tensors on the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor


def constant(values: Sequence[float], like: Tensor) -> Tensor:
    """`values` in the type and on the device of `like`; made once, for the host waits when it copies to a GPU.

    The tensor is shared: nobody may write to it.
    """
    return _make(tuple(values), like.dtype, like.device)


@cache  # nothing is ever forgotten, as captured CUDA graphs read these tensors where they are
def _make(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # so that training may use it too
        return torch.tensor(values, dtype=dtype, device=device)
