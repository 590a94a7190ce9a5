"""The last convolution of CenterHead, from products of cells with its weights to heatmaps."""

from __future__ import annotations

import triton
import triton.language as tl

from dsvt_ros.kernels.tiles import TALL, WIDE


@triton.jit
def sum_taps(
    products,  # (tiles, 9 * CLASSES, TALL * WIDE) float32: what each cell of a tile has for its neighbours, by taps
    bias,  # (CLASSES,) float32
    output,  # (B, CLASSES, H, W) float16
    height,
    width,
    CLASSES: tl.constexpr,
    ROOM: tl.constexpr,  # at least CLASSES
):
    """The rest of a 3 by 3 convolution to few channels: each cell sums what the cells around it have for it."""
    across = tl.cdiv(width + 1, WIDE)
    down = tl.cdiv(height + 1, TALL)
    tile = tl.program_id(0)
    batch = tile // (across * down)
    cell = tl.arange(0, TALL * WIDE)
    y = tile // across % down * TALL + cell // WIDE
    x = tile % across * WIDE + cell % WIDE
    number = tl.arange(0, ROOM)
    real = (number < CLASSES)[:, None]
    sums = tl.load(bias + number, mask=number < CLASSES, other=0.0)[:, None] + tl.zeros((ROOM, TALL * WIDE), tl.float32)
    for tap in tl.static_range(9):
        from_y, from_x = y + tap // 3 - 1, x + tap % 3 - 1
        inside = (from_y >= 0) & (from_y < height) & (from_x >= 0) & (from_x < width)
        tile_of = (batch * down + from_y // TALL) * across + from_x // WIDE
        place = tile_of * (9 * CLASSES * TALL * WIDE) + from_y % TALL * WIDE + from_x % WIDE
        row = (tap * CLASSES + number) * (TALL * WIDE)
        sums += tl.load(products + place[None, :] + row[:, None], mask=real & inside[None, :], other=0.0)
    target = output + ((batch * CLASSES + number[:, None]) * height + y[None, :]) * width + x[None, :]
    tl.store(target, sums.to(tl.float16), mask=real & ((y < height) & (x < width))[None, :])
