"""How kernels are launched, on whatever GPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dsvt_ros.errors import EngineError

ROWS = 128
"""Rows of a product that a program computes,"""
MAX_COLUMNS = 128
"""the most columns of it,"""
MAX_CHUNK = 64
"""and the most channels that it multiplies in a step."""
WARPGROUPS_FROM = 9
"""Compute capability of GPUs that keep sums of products in fewer registers."""
HOPPER = 9
"""Compute capability of GPUs that have kernels of their own."""
MAX_ELEMENTS = 2**31 - 1
"""Of a matrix: kernels count in 32 bits."""


def is_hopper(device: torch.device) -> bool:
    """Whether a device is a Hopper GPU."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == HOPPER


def num_warps(device: torch.device) -> int:
    """Warps for blocks of ROWS by MAX_COLUMNS sums."""
    older = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < WARPGROUPS_FROM
    return 8 if older else 4


def blocks_of(channels_in: int, channels_out: int, device: torch.device) -> dict[str, int]:
    """How a product is divided among programs and steps, as keywords of a kernel's launch.

    Args:
        channels_in: Columns of what is multiplied, a multiple of 16.
        channels_out: Columns of the weights, likewise.
        device: That of the weights.

    Returns:
        CHUNK, channels of a step, and COLUMNS of a program, powers of two that divide `channels_in` and `channels_out`;
        STAGES, steps whose blocks are on their way to shared memory; num_warps.
    """
    chunk = min(channels_in & -channels_in, MAX_CHUNK)
    columns = min(channels_out & -channels_out, MAX_COLUMNS)
    stages = 3 if columns == MAX_COLUMNS else 4
    return {"CHUNK": chunk, "COLUMNS": columns, "STAGES": stages, "num_warps": num_warps(device)}


def descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    """A matrix that kernels read and write in blocks of rows by columns.

    Raises:
        EngineError: See `check_size`.
    """
    from triton.tools.tensor_descriptor import TensorDescriptor

    check_size(matrix)
    return TensorDescriptor.from_tensor(matrix, [rows, columns])


def check_size(matrix: Tensor) -> None:
    """Check a matrix for what the kernels take.

    Raises:
        EngineError: It has more elements than they can number.
    """
    if matrix.shape[0] * matrix.stride(0) > MAX_ELEMENTS:
        raise EngineError(f"{matrix.shape[0]} rows are more than the kernels can number; use torch or tensorrt")
