"""The bytes of a sensor_msgs/PointCloud2 to columns, as `io.pointcloud2.RawCloud.points` reads them.

What the bytes mean is read from memory, so that a cloud of another layout needs no other kernel: in front of them lie
`CLOUD_WORDS` numbers about the cloud, then `COLUMN_WORDS` about each column, in int32.
"""

from __future__ import annotations

import triton
import triton.language as tl

# About a cloud.
POINTS: tl.constexpr = tl.constexpr(0)
FIRST_ROW: tl.constexpr = tl.constexpr(1)  # that the cloud takes in the tensor of all points
WIDTH: tl.constexpr = tl.constexpr(2)  # points of a row of the message
ROW_STEP: tl.constexpr = tl.constexpr(3)
POINT_STEP: tl.constexpr = tl.constexpr(4)
BIG_ENDIAN: tl.constexpr = tl.constexpr(5)
CLOUD_WORDS: tl.constexpr = tl.constexpr(6)
# About a column.
KIND: tl.constexpr = tl.constexpr(0)
OFFSET: tl.constexpr = tl.constexpr(1)
SIZE: tl.constexpr = tl.constexpr(2)  # bytes; none where the value is that of all points
VALUE: tl.constexpr = tl.constexpr(3)  # bits of that value; else 0
COLUMN_WORDS: tl.constexpr = tl.constexpr(4)
# Kinds.
SIGNED: tl.constexpr = tl.constexpr(0)
UNSIGNED: tl.constexpr = tl.constexpr(1)
FLOAT: tl.constexpr = tl.constexpr(2)
DOUBLE: tl.constexpr = tl.constexpr(3)


@triton.jit
def decode_points(
    data,  # uint8
    begin,  # byte where the cloud's first point begins
    points,  # (N, COLUMNS) float32
    HEADER: tl.constexpr,  # bytes from the words about the cloud to there
    COLUMNS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Read the columns of the points, whatever their types and wherever they lie."""
    about = (data + begin - HEADER).to(tl.pointer_type(tl.int32))
    count = tl.load(about + POINTS)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    valid = row < count
    width = tl.load(about + WIDTH)
    place = (row // width).to(tl.int64) * tl.load(about + ROW_STEP) + row % width * tl.load(about + POINT_STEP)
    source = data + begin + place
    target = points + (tl.load(about + FIRST_ROW) + row) * COLUMNS
    big_endian = tl.load(about + BIG_ENDIAN)
    for column in tl.static_range(COLUMNS):
        field = about + CLOUD_WORDS + column * COLUMN_WORDS
        kind = tl.load(field + KIND)
        size = tl.load(field + SIZE)
        at = source + tl.load(field + OFFSET)
        low = _word(at, 0, size, big_endian, valid) + tl.load(field + VALUE)
        if kind == SIGNED:
            unused = 32 - 8 * size
            value = ((low << unused) >> unused).to(tl.float32)
        elif kind == UNSIGNED:
            value = low.to(tl.uint32, bitcast=True).to(tl.float32)
        elif kind == DOUBLE:
            high = _word(at, 4, size, big_endian, valid)
            both = (high.to(tl.int64) << 32) | (low.to(tl.int64) & 0xFFFFFFFF)
            value = both.to(tl.float64, bitcast=True).to(tl.float32)
        else:
            value = low.to(tl.float32, bitcast=True)
        tl.store(target + column, value, mask=valid)


@triton.jit
def _word(at, first: tl.constexpr, size, big_endian, valid):
    """Four bytes of a number from `first` on, the least first; 0 where it has none. Nothing needs to be aligned."""
    word = tl.zeros(valid.shape, tl.int32)
    for i in tl.static_range(4):
        byte = first + i
        place = tl.where(big_endian != 0, size - 1 - byte, byte)
        word |= tl.load(at + place, mask=valid & (byte < size), other=0).to(tl.int32) << (8 * i)
    return word
