"""A matrix product of as many rows as the device counts."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def multiply(
    x,  # descriptor of (rows, CIN), blocks [ROWS, CHUNK]
    weights,  # descriptor of (CIN, channels out), blocks [CHUNK, COLUMNS]
    output,  # descriptor of (rows, channels out), blocks [ROWS, COLUMNS]
    num_rows,  # (1,) int32
    CIN: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    CHUNK: tl.constexpr,
    STAGES: tl.constexpr,
):
    """The first `num_rows` rows of a matrix product; others hold anything."""
    first = tl.program_id(1) * ROWS
    if first >= tl.load(num_rows):
        return
    first_column = tl.program_id(0) * COLUMNS
    sums = tl.zeros((ROWS, COLUMNS), tl.float32)
    for step in tl.range(CIN // CHUNK, num_stages=STAGES):
        sums = tl.dot(x.load([first, step * CHUNK]), weights.load([step * CHUNK, first_column]), sums)
    output.store([first, first_column], sums.to(tl.float16))
