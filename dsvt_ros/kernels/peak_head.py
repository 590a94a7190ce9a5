"""The branches of CenterHead at peaks of the heatmap only: two 3x3 convolutions around each of them.

A peak's result needs the hidden features of the 9 cells around it, so a program takes ROWS // 9 peaks of a group and
one branch, multiplies ROWS cells' neighbourhoods by the first convolution's weights and sums up what the second one
makes of them.
"""

from __future__ import annotations

import triton
import triton.language as tl

AREA: tl.constexpr = tl.constexpr(9)  # cells of a neighbourhood
MAX_OUTPUTS: tl.constexpr = tl.constexpr(3)  # channels of a branch


@triton.jit
def branches_at_peaks(
    shared,  # (B, WIDTH, H, W), a cell's channels side by side
    index,  # (B G, K) (class * H + row) * W + column; -1 in rows without a peak, which are the last ones
    hidden_weights,  # (G, branches, AREA, PADDED, PADDED): from a neighbour's channels to hidden ones
    hidden_bias,  # (G, branches, PADDED)
    output_weights,  # (G, branches, MAX_OUTPUTS, AREA, PADDED)
    output_bias,  # (G, branches, MAX_OUTPUTS)
    first_column,  # (branches + 1,) of each branch's channels among all
    values,  # (B G, K, columns) float32; rows without a peak are not written
    num_groups,
    height,
    width,
    map_stride,
    row_stride,
    cell_stride,
    K: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Evaluate one branch at some peaks of one group in one cloud."""
    peaks: tl.constexpr = ROWS // AREA
    first_peak, branch, row_of_group = tl.program_id(0) * peaks, tl.program_id(1), tl.program_id(2)
    cloud, group = row_of_group // num_groups, row_of_group % num_groups
    index += row_of_group * K
    if tl.load(index + first_peak) < 0:
        return
    row = tl.arange(0, ROWS)
    channel = tl.arange(0, PADDED)
    peak, place = first_peak + row // AREA, row % AREA
    wanted = (row < peaks * AREA) & (peak < K)
    at = tl.load(index + peak, mask=wanted, other=-1)
    cell = tl.maximum(at, 0) % (height * width)
    y, x = cell // width + place // 3 - 1, cell % width + place % 3 - 1
    # Beyond the map's border the second convolution sees zeros, not what the first one would give there.
    in_map = wanted & (at >= 0) & (y >= 0) & (y < height) & (x >= 0) & (x < width)

    weights = tl.program_id(1) + group * tl.num_programs(1)
    tile = channel[:, None] * PADDED + channel[None, :]
    hidden = tl.zeros((ROWS, PADDED), tl.float32)
    for tap in tl.range(AREA, num_stages=STAGES):
        there_y, there_x = y + tap // 3 - 1, x + tap % 3 - 1
        there = in_map & (there_y >= 0) & (there_y < height) & (there_x >= 0) & (there_x < width)
        source = cloud * map_stride + there_y * row_stride + there_x * cell_stride
        features = tl.load(
            shared + source[:, None] + channel[None, :], mask=there[:, None] & (channel < WIDTH)[None, :], other=0.0
        )
        weight = tl.load(hidden_weights + (weights * AREA + tap) * (PADDED * PADDED) + tile)
        hidden = tl.dot(features, weight, hidden, input_precision="ieee")
    bias = tl.load(hidden_bias + weights * PADDED + channel).to(tl.float32)
    hidden = tl.where(in_map[:, None], tl.maximum(hidden + bias[None, :], 0.0), 0.0)

    slot = tl.arange(0, triton.next_power_of_2(peaks))
    own = (row // AREA)[None, :] == slot[:, None]
    column, next_column = tl.load(first_column + branch), tl.load(first_column + branch + 1)
    columns = tl.load(first_column + tl.num_programs(1))
    target = values + (row_of_group * K + first_peak + slot) * columns + column
    written = (slot < peaks) & (first_peak + slot < K)
    for output in tl.static_range(MAX_OUTPUTS):
        start = (weights * MAX_OUTPUTS + output) * AREA * PADDED
        weight = tl.load(output_weights + start + place[:, None] * PADDED + channel[None, :]).to(tl.float32)
        product = tl.sum(hidden * weight, 1)
        total = tl.sum(tl.where(own, product[None, :], 0.0), 1)
        total += tl.load(output_bias + weights * MAX_OUTPUTS + output).to(tl.float32)
        tl.store(target + output, total, mask=written & (column + output < next_column))
