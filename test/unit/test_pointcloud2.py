"""Layouts of PointCloud2, from usual drivers to random ones."""

import array
import base64
import json
import struct
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsvt_ros.errors import PointCloudError
from dsvt_ros.io.pointcloud2 import (
    DATATYPES,
    CloudField,
    cloud_parts_from_points,
    column_from_msg,
    layout_from_msg,
    match_column,
    points_from_msg,
    raw_from_msg,
    raw_from_points,
)

INT8, UINT8, INT16, UINT16, INT32, UINT32, FLOAT32, FLOAT64 = range(1, 9)
STRUCT_LETTERS = dict(zip(range(1, 9), "bBhHiIfd", strict=True))
XYZI = ("x", "y", "z", "intensity")

# Written by sensor_msgs_py.point_cloud2.read_points (ros2/common_interfaces, rolling, c0c0bc5) from
# these bytes, first elements only, then rounded to float32. NaN is null. Rows with padding between
# them are not in it: sensor_msgs_py ignores row_step.
REFERENCE = json.loads((Path(__file__).parents[1] / "data" / "pointcloud2_layouts.json").read_text(encoding="utf-8"))


@dataclass
class Cloud:
    """Stands for a message."""

    fields: list
    point_step: int
    row_step: int
    height: int
    width: int
    data: object
    is_bigendian: bool = False
    is_dense: bool = False


@dataclass
class Packer:
    """Lays values out byte by byte with struct: slow, and nothing in common with the decoder."""

    fields: list
    point_step: int
    is_bigendian: bool = False
    row_padding: int = 0
    filler: int = 0xA5
    rows: list = field(default_factory=list)

    def cloud(self, values):
        """Cloud of values[row][column][field]."""
        order = ">" if self.is_bigendian else "<"
        data = bytearray()
        for row in values:
            for point in row:
                record = bytearray([self.filler]) * self.point_step
                for layout, value in zip(self.fields, point, strict=True):
                    code = order + STRUCT_LETTERS[layout.datatype]
                    struct.pack_into(code, record, layout.offset, value)
                data += record
            data += bytes([self.filler]) * self.row_padding
        height, width = len(values), len(values[0]) if values else 0
        row_step = width * self.point_step + self.row_padding
        bytes_of_message = array.array("B", bytes(data))
        return Cloud(
            self.fields, self.point_step, row_step, height, width, bytes_of_message,
            self.is_bigendian,
        )  # fmt: skip


def velodyne_cloud(num_points=3):
    names = (("x", 0), ("y", 4), ("z", 8), ("intensity", 12))
    fields = [CloudField(name, offset, FLOAT32) for name, offset in names]
    fields += [CloudField("ring", 16, UINT16), CloudField("time", 18, FLOAT32)]
    row = [(i + 0.5, -i, 0.25 * i, 10 * i, i, 1e-3 * i) for i in range(num_points)]
    return Packer(fields, 22).cloud([row])


def cloud_of_reference(case):
    return Cloud(
        [CloudField(**f) for f in case["fields"]],
        case["point_step"], case["row_step"], case["height"], case["width"],
        array.array("B", base64.b64decode(case["data"])), case["is_bigendian"],
    )  # fmt: skip


def expected_of_reference(case):
    return np.array(case["expected"], dtype=np.float64).astype(np.float32)


@pytest.mark.parametrize("case", REFERENCE, ids=lambda case: case["name"])
def test_agrees_with_sensor_msgs_py(case):
    columns = [f["name"] for f in case["fields"]]
    points = points_from_msg(cloud_of_reference(case), columns)
    np.testing.assert_array_equal(points, expected_of_reference(case))


@pytest.mark.parametrize("case", REFERENCE, ids=lambda case: case["name"])
def test_agrees_with_installed_sensor_msgs_py(case):
    theirs = pytest.importorskip("sensor_msgs_py.point_cloud2", reason="sensor_msgs_py comes with a ROS installation")
    from sensor_msgs.msg import PointCloud2, PointField

    message = PointCloud2(
        height=case["height"], width=case["width"], is_bigendian=case["is_bigendian"],
        point_step=case["point_step"], row_step=case["row_step"],
        fields=[PointField(**f) for f in case["fields"]],
    )  # fmt: skip
    message.data = array.array("B", base64.b64decode(case["data"]))
    columns = [f["name"] for f in case["fields"]]
    ours = points_from_msg(message, columns)  # theirs may swap the bytes of the message in place
    names = [f["name"] + ("_0" if f["count"] > 1 else "") for f in case["fields"]]
    table = theirs.read_points(message, field_names=names)
    expected = np.stack([table[name].astype(np.float32) for name in names], axis=1)
    np.testing.assert_array_equal(ours, expected)


def test_velodyne_layout():
    points = points_from_msg(velodyne_cloud(), XYZI)
    assert points.dtype == np.float32
    assert points.flags.c_contiguous
    assert points.flags.owndata
    assert points.tolist() == [[0.5, 0, 0, 0], [1.5, -1, 0.25, 10], [2.5, -2, 0.5, 20]]


def test_columns_come_in_the_order_asked_for():
    points = points_from_msg(velodyne_cloud(2), ("ring", "z", "x", "y", "x"))
    assert points.tolist() == [[0, 0, 0.5, 0, 0.5], [1, 0.25, 1.5, -1, 1.5]]


def test_result_does_not_share_memory_with_the_message():
    cloud = velodyne_cloud()
    points = points_from_msg(cloud, XYZI)
    cloud.data[:] = array.array("B", bytes(len(cloud.data)))
    assert points[1].tolist() == [1.5, -1, 0.25, 10]


def test_a_cloud_that_is_not_read_yet_shares_memory_with_the_message():
    cloud = velodyne_cloud()
    cloud.row_step = 0
    raw = raw_from_msg(cloud, XYZI)
    assert (len(raw), raw.shape, len(raw.data), raw.layout.row_step) == (3, (3, 4), 66, 66)
    cloud.data[:] = velodyne_cloud(1).data * 3
    assert raw.points().tolist() == [[0.5, 0, 0, 0]] * 3


@pytest.mark.parametrize("kind", [bytes, bytearray, memoryview, lambda d: np.array(d, np.uint8)])
def test_any_buffer_of_bytes(kind):
    cloud = velodyne_cloud()
    other = replace(cloud, data=kind(cloud.data))
    np.testing.assert_array_equal(points_from_msg(other, XYZI), points_from_msg(cloud, XYZI))


def test_invalid_points_stay():
    fields = [CloudField(name, 4 * i, FLOAT32) for i, name in enumerate("xyz")]
    rows = [[(np.nan, 0, 0), (0, 0, 0)], [(1, np.inf, 2), (-np.inf, 3, np.nan)]]
    points = points_from_msg(Packer(fields, 12).cloud(rows), "xyz")
    np.testing.assert_array_equal(points, [[np.nan, 0, 0], [0, 0, 0], [1, np.inf, 2], [-np.inf, 3, np.nan]])


def test_rows_with_padding():
    fields = [CloudField(name, 4 * i, FLOAT32) for i, name in enumerate(XYZI)]
    rows = [[(r, c, 0, 10 * r + c) for c in range(3)] for r in range(2)]
    cloud = Packer(fields, 16, row_padding=5).cloud(rows)
    assert cloud.row_step == 53
    points = points_from_msg(cloud, XYZI)
    assert points[:, 3].tolist() == [0, 1, 2, 10, 11, 12]
    assert points_from_msg(cloud, ("intensity", "x"))[:, 0].tolist() == [0, 1, 2, 10, 11, 12]


def test_doubles_beyond_float32_become_infinite_without_a_warning():
    fields = [CloudField(name, 8 * i, FLOAT64) for i, name in enumerate("xyz")]
    points = points_from_msg(Packer(fields, 24).cloud([[(1e300, -1e300, 0.1)]]), "xyz")
    np.testing.assert_array_equal(points, np.array([[np.inf, -np.inf, 0.1]], np.float32))


@st.composite
def packed_clouds(draw):
    """A cloud of random layout and the values in it."""
    names = draw(st.permutations(["x", "y", "z", "intensity", "ring", "time"]))
    names = names[: draw(st.integers(1, len(names)))]
    fields, offset = [], 0
    for name in names:
        datatype = draw(st.sampled_from([FLOAT32, FLOAT32, *DATATYPES]))
        offset += draw(st.sampled_from([0, 0, 0, 1, 2, 4]))
        count = draw(st.sampled_from([1, 1, 1, 0, 3]))
        fields.append(CloudField(name, offset, datatype, count))
        offset += np.dtype(DATATYPES[datatype]).itemsize * max(count, 1)
    fields = list(draw(st.permutations(fields)))
    height, width = draw(st.integers(1, 3)), draw(st.integers(1, 4))

    def value(datatype):
        kind = np.dtype(DATATYPES[datatype])
        if kind.kind == "f":
            return st.floats(width=32)
        return st.integers(int(np.iinfo(kind).min), int(np.iinfo(kind).max))

    point = st.tuples(*(value(f.datatype) for f in fields))
    row = st.lists(point, min_size=width, max_size=width)
    values = draw(st.lists(row, min_size=height, max_size=height))
    packer = Packer(fields, offset + draw(st.integers(0, 5)), draw(st.booleans()), draw(st.integers(0, 9)))
    return packer.cloud(values), values


@settings(max_examples=150, deadline=None)
@given(packed_clouds())
def test_any_layout(case):
    cloud, values = case
    names = [f.name for f in cloud.fields]
    expected = np.array([point for row in values for point in row], dtype=np.float64)
    columns = sorted(names)
    points = points_from_msg(cloud, columns)
    order = [names.index(name) for name in columns]
    np.testing.assert_array_equal(points, expected[:, order].astype(np.float32))
    for index, name in enumerate(names):
        exact = column_from_msg(cloud, name)
        np.testing.assert_array_equal(exact.astype(np.float64), expected[:, index])


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(*[st.floats(width=32)] * 5), max_size=20),
    st.permutations(["x", "y", "z", "intensity", "time"]),
)
def test_parts_of_a_cloud_round_trip(rows, columns):
    points = np.array(rows, dtype=np.float32).reshape(-1, 5)
    parts = cloud_parts_from_points(points, columns)
    assert isinstance(parts.data, array.array)
    assert parts.data.typecode == "B"
    cloud = Cloud(
        list(parts.fields), parts.point_step, parts.point_step * len(points), 1, len(points),
        parts.data, parts.is_bigendian,
    )  # fmt: skip
    np.testing.assert_array_equal(points_from_msg(cloud, columns), points)
    np.testing.assert_array_equal(raw_from_points(points, columns).points(), points)


def test_parts_accept_other_types_and_strides():
    points = np.arange(12.0).reshape(4, 3).T
    parts = cloud_parts_from_points(points, ("x", "y", "z", "i"))
    assert np.frombuffer(parts.data, np.float32).tolist() == points.reshape(-1).tolist()


def test_parts_refuse_other_shapes():
    with pytest.raises(PointCloudError, match=r"shape \(2, 3\).*expected \(N, 4\)"):
        cloud_parts_from_points(np.zeros((2, 3), np.float32), XYZI)


class TestColumns:
    @pytest.mark.parametrize("name", ["intensity", "intensities", "i", "reflectivity", "reflectance", "signal"])
    def test_intensity_by_its_usual_names(self, name):
        cloud = velodyne_cloud(2)
        cloud.fields[3] = CloudField(name, 12, FLOAT32)
        assert points_from_msg(cloud, XYZI)[1].tolist() == [1.5, -1, 0.25, 10]

    def test_own_name_wins_then_the_order_of_synonyms(self):
        assert match_column("intensity", ["reflectivity", "i", "intensity"]) == 2
        assert match_column("intensity", ["signal", "reflectivity", "i"]) == 2
        assert match_column("reflectivity", ["intensity", "reflectivity"]) == 1
        assert match_column("reflectivity", ["range", "intensity"]) == 1
        assert match_column("time", ["t", "timestamp"]) is None, "drivers do not agree on their units"
        assert match_column("elongation", ["x", "intensity"]) is None

    def test_case_matters_only_while_an_exact_name_exists(self):
        assert match_column("x", ["X", "x"]) == 1
        assert match_column("x", ["Y", "X"]) == 1
        assert match_column("intensity", ["Intensity", "i"]) == 1

    def test_the_first_of_equal_names_is_taken(self):
        assert match_column("x", ["x", "y", "x"]) == 0

    def test_optional_columns_are_filled(self):
        columns = ("x", "elongation", "y", "z", "range")
        points = points_from_msg(velodyne_cloud(2), columns, {"elongation": -1, "range": np.nan})
        np.testing.assert_array_equal(points[1], [1.5, -1, -1, 0.25, np.nan])

    def test_fill_values_in_the_order_of_the_columns(self):
        points = points_from_msg(velodyne_cloud(1), (*XYZI, "elongation"), (9, 9, 9, 9, 7))
        assert points.tolist() == [[0.5, 0, 0, 0, 7]]

    def test_number_of_fill_values_is_checked(self):
        with pytest.raises(PointCloudError, match="2 fill values for 4 columns"):
            points_from_msg(velodyne_cloud(1), XYZI, (0, 0))

    def test_missing_column_without_fill(self):
        with pytest.raises(PointCloudError, match="'elongation', only x, y, z, intensity, ring"):
            points_from_msg(velodyne_cloud(), (*XYZI, "elongation"))

    @pytest.mark.parametrize("name", ["x", "y", "z"])
    def test_coordinates_are_never_filled(self, name):
        cloud = velodyne_cloud()
        cloud.fields = [f for f in cloud.fields if f.name != name]
        with pytest.raises(PointCloudError, match=f"no field for column '{name}'"):
            points_from_msg(cloud, XYZI, {name: 0.0, "intensity": 0.0})


class TestSizes:
    @pytest.mark.parametrize(("height", "width"), [(0, 0), (1, 0), (0, 5)])
    def test_empty_cloud(self, height, width):
        cloud = Cloud([], 0, 0, height, width, array.array("B"))
        assert points_from_msg(cloud, XYZI).shape == (0, 4)
        assert column_from_msg(cloud, "x").shape == (0,)

    def test_one_point(self):
        assert points_from_msg(velodyne_cloud(1), XYZI).shape == (1, 4)

    def test_data_cut_short(self):
        cloud = velodyne_cloud()
        cloud.data = cloud.data[:-1]
        with pytest.raises(PointCloudError, match=r"got 65 bytes.*expected at least 66"):
            points_from_msg(cloud, XYZI)

    def test_data_longer_than_needed(self):
        cloud = velodyne_cloud()
        expected = points_from_msg(cloud, XYZI)
        cloud.data.frombytes(bytes(100))
        np.testing.assert_array_equal(points_from_msg(cloud, XYZI), expected)

    def test_impossible_size_is_refused_before_memory_is_taken(self):
        cloud = replace(velodyne_cloud(), width=2**32 - 1, height=2**31)
        with pytest.raises(PointCloudError, match=r"row_step 66 for rows of 4294967295 points"):
            points_from_msg(cloud, XYZI)

    def test_point_step_of_zero(self):
        with pytest.raises(PointCloudError, match="point_step 0 for 3 points"):
            points_from_msg(replace(velodyne_cloud(), point_step=0), XYZI)

    def test_field_ends_behind_the_point(self):
        with pytest.raises(PointCloudError, match=r"'intensity' lies at bytes 12 to 16.*is 15"):
            points_from_msg(replace(velodyne_cloud(), point_step=15), XYZI)

    def test_all_elements_of_a_field_must_fit(self):
        cloud = velodyne_cloud()
        cloud.fields[0] = CloudField("x", 0, FLOAT32, 6)
        with pytest.raises(PointCloudError, match="'x' lies at bytes 0 to 24"):
            points_from_msg(cloud, XYZI)

    @pytest.mark.parametrize("datatype", [0, 9, 255])
    def test_unknown_datatype(self, datatype):
        cloud = velodyne_cloud()
        cloud.fields[2] = CloudField("z", 8, datatype)
        with pytest.raises(PointCloudError, match=f"'z' has datatype {datatype}; expected 1"):
            points_from_msg(cloud, XYZI)

    def test_fields_that_nobody_reads_may_be_odd(self):
        cloud = velodyne_cloud()
        cloud.fields += [CloudField("blob", 90, 77)]
        assert points_from_msg(cloud, XYZI).shape == (3, 4)

    def test_rows_shorter_than_their_points(self):
        cloud = replace(velodyne_cloud(4), height=2, width=2, row_step=43)
        with pytest.raises(PointCloudError, match="row_step 43 for rows of 2 points x 22 bytes"):
            points_from_msg(cloud, XYZI)

    @pytest.mark.parametrize("row_step", [0, 1, 10**6])
    def test_row_step_of_a_single_row_does_not_matter(self, row_step):
        cloud = velodyne_cloud()
        expected = points_from_msg(cloud, XYZI)
        wrong = replace(cloud, row_step=row_step)
        np.testing.assert_array_equal(points_from_msg(wrong, XYZI), expected)


def test_exact_column_keeps_what_float32_cannot_hold():
    fields = [CloudField("timestamp", 0, FLOAT64)]
    stamps = [1_700_000_000.000001, 1_700_000_000.100001]
    cloud = Packer(fields, 8, is_bigendian=True).cloud([[(s,) for s in stamps]])
    column = column_from_msg(cloud, "timestamp")
    assert column.dtype == np.float64
    assert column.tolist() == stamps


def test_layout_of_a_message():
    layout = layout_from_msg(velodyne_cloud())
    assert layout.num_points == 3
    assert layout.fields[4] == CloudField("ring", 16, UINT16, 1)
    assert (layout.point_step, layout.row_step) == (22, 66)
    assert hash(layout) == hash(layout_from_msg(velodyne_cloud()))
