"""PointCloud2 read by a kernel against NumPy, bit by bit."""

import struct

import numpy as np
import pytest
import torch
from fused_fixtures import DEVICE, interpreted, needs_triton
from hypothesis import given, settings
from test_pointcloud2 import FLOAT32, FLOAT64, UINT32, XYZI, Packer, packed_clouds, velodyne_cloud

from dsvt_ros.fused import decode
from dsvt_ros.fused.decode import CloudDecoder
from dsvt_ros.io.pointcloud2 import DATATYPES, CloudField, points_from_msg, raw_from_msg

_interpreter = interpreted("decode_points")
pytestmark = needs_triton


def decoded(*messages, columns=XYZI, fill=None, decoder=None):
    """(N, C) points of the messages, one after the other."""
    clouds = [raw_from_msg(message, columns, fill) for message in messages]
    count = sum(map(len, clouds))
    points = torch.full((count + 3, len(columns)), -7.0, device=DEVICE)
    rows, row = [], 0
    for cloud in clouds:
        rows.append((cloud, row))
        row += len(cloud)
    (decoder or CloudDecoder(DEVICE, len(columns)))(rows, points, own_stream=False)
    assert (points[count:] == -7).all()
    return points[:count].cpu().numpy()


def assert_same_bits(found, expected):
    assert found.shape == expected.shape
    differ = found.view(np.int32) != expected.view(np.int32)
    assert (np.isnan(found) & np.isnan(expected))[differ].all()


@settings(max_examples=60, deadline=None)
@given(packed_clouds())
def test_any_layout(case):
    cloud, _ = case
    columns = sorted(f.name for f in cloud.fields)
    assert_same_bits(decoded(cloud, columns=columns), points_from_msg(cloud, columns))


@pytest.mark.parametrize("big_endian", [False, True])
@pytest.mark.parametrize("offset", [0, 1, 2, 3])
def test_every_type_at_any_place(offset, big_endian):
    """Extreme numbers, and such as float32 has to round."""
    fields, end, rows = [], offset, [[], [], [], []]
    for datatype, code in DATATYPES.items():
        fields.append(CloudField(f"f{datatype}", end, datatype))
        dtype = np.dtype(code)
        end += dtype.itemsize
        if dtype.kind == "f":
            values = [np.finfo(dtype).max, -np.finfo(dtype).tiny / 8, 1 / 3, -np.inf]
        else:
            info = np.iinfo(dtype)
            values = [info.max, info.min, info.max // 2 + 1, info.max // 3 * 2]
        for row, value in zip(rows, values, strict=True):
            row.append(value)
    cloud = Packer(fields, end + 1, big_endian).cloud([rows])
    columns = [field.name for field in fields]
    assert_same_bits(decoded(cloud, columns=columns), points_from_msg(cloud, columns))


def test_halves_are_rounded_to_even():
    numbers = [2**24 + 1, 2**24 + 3, 2**32 - 1, 2**32 - 129]
    fields = [CloudField("x", 0, UINT32), CloudField("y", 4, FLOAT64), CloudField("z", 12, FLOAT64)]
    rows = [(number, float(number), 1 + number * 2.0**-53) for number in numbers]
    cloud = Packer(fields, 20).cloud([rows])
    assert_same_bits(decoded(cloud, columns="xyz"), points_from_msg(cloud, "xyz"))


def test_numbers_that_are_none_keep_their_bits():
    fields = [CloudField(name, 4 * i, FLOAT32) for i, name in enumerate("xyz")]
    cloud = Packer(fields, 12).cloud([[(0, 0, 0), (0, 0, 0)]])
    bits = (0x7F800001, 0xFFC12345, 0x80000000, 0x00000001, 0xFF800000, 0x7FC00000)
    cloud.data = bytearray(struct.pack("<6I", *bits))
    assert decoded(cloud, columns="xyz").view(np.uint32).flatten().tolist() == list(bits)


def test_organized_cloud_with_padding():
    fields = [CloudField(name, 4 * i, FLOAT32) for i, name in enumerate(XYZI)]
    rows = [[(r, c, 0, 10 * r + c) for c in range(37)] for r in range(13)]
    cloud = Packer(fields, 17, row_padding=5).cloud(rows)
    assert_same_bits(decoded(cloud), points_from_msg(cloud, XYZI))


def test_columns_that_are_missing_or_repeated():
    columns = ("ring", "elongation", "y", "x", "range", "x", "z")
    fill = {"elongation": -0.1, "range": np.nan}
    cloud = velodyne_cloud(5)
    assert_same_bits(decoded(cloud, columns=columns, fill=fill), points_from_msg(cloud, columns, fill))


@pytest.mark.filterwarnings("error:The given NumPy array is not writable")
def test_several_clouds_of_any_size(monkeypatch):
    """Also larger ones than before, in parts, and from memory that may not be written to."""
    monkeypatch.setattr(decode, "PART_BYTES", 1000)
    decoder = CloudDecoder(DEVICE, 4)
    for counts in ((1,), (0,), (300, 0, 21), (), (5, 1), (900, 700)):
        messages = [velodyne_cloud(count) if count else velodyne_cloud(1) for count in counts]
        for message, count in zip(messages, counts, strict=True):
            message.width = count
        for kind in (bytes, bytearray):
            for message in messages:
                message.data = kind(message.data)
            found = decoded(*messages, decoder=decoder)
            expected = [points_from_msg(message, XYZI) for message in messages]
            assert_same_bits(found, np.concatenate([np.empty((0, 4), np.float32), *expected]))


def test_slightly_larger_clouds_find_room():
    """Memory that the device can fetch from takes long to get."""
    decoder, used = CloudDecoder(DEVICE, 4), []
    for count in (40, 60, 99, 1):
        decoded(velodyne_cloud(count), decoder=decoder)
        used.append(decoder._staging)
    assert used[0] is used[1]
    assert used[1] is not used[2] is used[3]
