"""A product of as many rows as the device counts."""

from __future__ import annotations

from torch import Tensor

from dsvt_ros.fused.launch import ROWS, blocks_of, descriptor


def multiply(features: Tensor, matrix: Tensor, num_rows: Tensor) -> Tensor:
    """Multiply as many rows as the device counts.

    Args:
        features: (V, K) float16.
        matrix: (at least K, N) float16; K and N are multiples of 16.
        num_rows: (1,) int32, rows of `features` that count.

    Returns:
        (V, N) float16, of which the first `num_rows` rows count.

    Raises:
        EngineError: There are more rows than the kernels can number.
    """
    from dsvt_ros.kernels import multiply as kernels

    count, channels = features.shape
    blocks = blocks_of(channels, matrix.shape[1], matrix.device)
    output = features.new_empty(count, matrix.shape[1])
    # Faster than with three stages (measured on an H200).
    kernels.multiply[(matrix.shape[1] // blocks["COLUMNS"], -(-count // ROWS))](
        descriptor(features, ROWS, blocks["CHUNK"]), descriptor(matrix, blocks["CHUNK"], blocks["COLUMNS"]),
        descriptor(output, ROWS, blocks["COLUMNS"]), num_rows, CIN=channels, ROWS=ROWS, **(blocks | {"STAGES": 2}),
    )  # fmt: skip
    return output
