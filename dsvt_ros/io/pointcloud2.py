"""sensor_msgs/PointCloud2 to (N, C) float32 and back, without rclpy.

Messages are duck-typed: those of rclpy and those that rosbags deserializes have the same
attributes. Nothing is filtered: row i of the result is point i of the message, NaN and (0, 0, 0)
included.
"""

from __future__ import annotations

import array
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import DTypeLike, NDArray

from dsvt_ros.errors import PointCloudError

# PointField.INT8 ... PointField.FLOAT64 (sensor_msgs/msg/PointField.msg)
DATATYPES: Mapping[int, str] = {
    1: "i1",
    2: "u1",
    3: "i2",
    4: "u2",
    5: "i4",
    6: "u4",
    7: "f4",
    8: "f8",
}
FLOAT32 = 7

REQUIRED_COLUMNS = ("x", "y", "z")

# Field names that mean the same column, most usual first: the first one that a cloud has is taken.
SYNONYMS: tuple[tuple[str, ...], ...] = (
    ("intensity", "intensities", "i", "reflectivity", "reflectance", "signal"),
    ("elongation",),
)

Fill: TypeAlias = Mapping[str, float] | Sequence[float]


class FieldLike(Protocol):
    """What is read of a sensor_msgs/PointField."""

    name: str
    offset: int
    datatype: int
    count: int


class CloudLike(Protocol):
    """What is read of a sensor_msgs/PointCloud2; `data` is anything with a buffer of bytes."""

    height: int
    width: int
    fields: Sequence[FieldLike]
    is_bigendian: bool
    point_step: int
    row_step: int
    data: array.array[int] | NDArray[np.uint8] | bytes | bytearray | memoryview
    is_dense: bool


@dataclass(frozen=True)
class CloudField:
    """One field of a point; offset in bytes from the start of the point, count in elements."""

    name: str
    offset: int
    datatype: int
    count: int = 1


@dataclass(frozen=True)
class CloudLayout:
    """How the bytes of a cloud are arranged: a PointCloud2 without header and data."""

    fields: tuple[CloudField, ...]
    point_step: int
    row_step: int
    height: int
    width: int
    is_bigendian: bool = False
    is_dense: bool = True

    @property
    def num_points(self) -> int:
        """Points, invalid ones included."""
        return self.height * self.width


@dataclass(frozen=True, eq=False)
class RawCloud:
    """A cloud that was checked, but not read: `points` reads it, and so do kernels.

    Attributes:
        data: (height * row_step,) uint8, not copied: it may belong to a message, and may not be written to.
        layout: How they are arranged. Its row_step is the distance of rows also where there is one row only.
        columns: C times the field that holds a column, or the value of a column that the cloud lacks.
    """

    data: NDArray[np.uint8]
    layout: CloudLayout
    columns: tuple[CloudField | float, ...]

    def __len__(self) -> int:
        """Points, invalid ones included."""
        return self.layout.num_points

    @property
    def shape(self) -> tuple[int, ...]:
        """That of `points`: (N, C)."""
        return len(self), len(self.columns)

    def points(self) -> NDArray[np.float32]:
        """(N, C) float32 as `points_from_msg` gives them."""
        points = np.empty(self.shape, dtype=np.float32)
        start = 0
        while start < len(self.columns):
            field = self.columns[start]
            stop = _end_of_run(self.columns, start, self.layout)
            if not isinstance(field, CloudField):
                points[:, start] = field
            elif stop - start == 1:
                view = _view(self.data, self.layout, field.offset, _dtype(field, self.layout))
                with np.errstate(over="ignore", invalid="ignore"):
                    points[:, start] = view.astype(np.float32).reshape(-1)
            else:
                # NumPy moves records many times faster than columns that are not aligned.
                record = np.dtype((np.void, 4 * (stop - start)))
                target = np.ndarray((len(points),), record, points, 4 * start, points.strides[:1])
                rows = target.reshape(self.layout.height, self.layout.width)
                rows[...] = _view(self.data, self.layout, field.offset, record)
            start = stop
        return points


@dataclass(frozen=True, eq=False)
class CloudParts:
    """Parts of a message with one row of points; rclpy takes `data` without a check per byte."""

    fields: tuple[CloudField, ...]
    point_step: int
    data: array.array[int]
    is_bigendian: bool = sys.byteorder == "big"


def layout_from_msg(msg: CloudLike) -> CloudLayout:
    """Layout of a PointCloud2; nothing is checked."""
    return CloudLayout(
        fields=tuple(CloudField(f.name, f.offset, f.datatype, f.count) for f in msg.fields),
        point_step=msg.point_step,
        row_step=msg.row_step,
        height=msg.height,
        width=msg.width,
        is_bigendian=bool(msg.is_bigendian),
        is_dense=bool(msg.is_dense),
    )


def match_column(column: str, names: Sequence[str]) -> int | None:
    """Index of the name that holds a column, None where no name does.

    The column's own name wins, then its synonyms in the order of `SYNONYMS`; where none of them
    occurs, the same again without regard to case. The first of several equal names is taken.
    """
    group = next((group for group in SYNONYMS if column in group), ())
    for spelling in (str, str.lower):
        spelled = [spelling(name) for name in names]
        for candidate in (column, *group):
            if spelling(candidate) in spelled:
                return spelled.index(spelling(candidate))
    return None


def fill_of_columns(columns: Sequence[str], fill: Fill | None) -> dict[str, float]:
    """Value of each column that may be missing; x, y and z never may.

    Args:
        columns: Wanted columns.
        fill: By name, or one value for each of `columns`. Columns without a value are required.

    Raises:
        PointCloudError: A sequence of another length than `columns`.
    """
    if fill is None:
        return {}
    if not isinstance(fill, Mapping):
        if len(fill) != len(columns):
            raise PointCloudError(
                f"got {len(fill)} fill values for {len(columns)} columns ({', '.join(columns)}); "
                "give one for each column, or a mapping from column name to value"
            )
        fill = dict(zip(columns, fill, strict=True))
    return {name: float(fill[name]) for name in fill if name not in REQUIRED_COLUMNS}


def points_from_msg(msg: CloudLike, columns: Sequence[str], fill: Fill | None = None) -> NDArray[np.float32]:
    """Columns of a PointCloud2; the values are those of the message, unscaled.

    Args:
        msg: A sensor_msgs/PointCloud2 of rclpy or rosbags, or anything with its attributes.
        columns: Wanted columns, in the order of the result; synonyms are found (`match_column`).
        fill: Value of the columns that the cloud may lack, by name or one for each of `columns`.

    Returns:
        (N, C) float32, owned by the caller; organised clouds row by row. (0, C) for a cloud
        without points, whatever its fields. Integers and doubles are rounded to the nearest
        float32; doubles beyond its range become ±Inf.

    Raises:
        PointCloudError: A column without fill value is missing, or the sizes in the message
            contradict each other.
    """
    return raw_from_msg(msg, columns, fill).points()


def raw_from_msg(msg: CloudLike, columns: Sequence[str], fill: Fill | None = None) -> RawCloud:
    """As `points_from_msg`, with the same errors, but nothing is read yet: the bytes stay those of the message."""
    defaults = fill_of_columns(columns, fill)
    layout = layout_from_msg(msg)
    if layout.num_points == 0:
        return RawCloud(np.empty(0, np.uint8), replace(layout, height=0, width=0), (0.0,) * len(columns))
    data = np.frombuffer(msg.data, dtype=np.uint8)
    layout = _checked(layout, len(data))
    fields = tuple(_find_field(name, layout, defaults.get(name)) for name in columns)
    return RawCloud(data[: layout.height * layout.row_step], layout, fields)


def raw_from_points(points: NDArray[np.float32], columns: Sequence[str]) -> RawCloud:
    """(N, C) points as a cloud that was received; raises as `cloud_parts_from_points`."""
    parts = cloud_parts_from_points(points, columns)
    num_bytes, width = len(parts.data), len(points)
    layout = CloudLayout(parts.fields, parts.point_step, num_bytes, 1, width, parts.is_bigendian)
    return RawCloud(np.frombuffer(parts.data, np.uint8), layout, parts.fields)


def column_from_msg(msg: CloudLike, column: str) -> NDArray[np.generic]:
    """One column in the message's own number type: float32 cannot hold absolute times.

    Returns:
        (N,) copy in native byte order; empty for a cloud without points.

    Raises:
        PointCloudError: As `points_from_msg`.
    """
    layout = layout_from_msg(msg)
    if layout.num_points == 0:
        return np.empty(0, dtype=np.float32)
    field = _required_field(column, layout)
    buffer = np.frombuffer(msg.data, dtype=np.uint8)
    layout = _checked(layout, len(buffer))
    dtype = _dtype(field, layout)
    view = _view(buffer, layout, field.offset, dtype)
    return view.astype(dtype.newbyteorder("=")).reshape(-1)


def cloud_parts_from_points(points: NDArray[np.float32], columns: Sequence[str]) -> CloudParts:
    """Fields and bytes of a cloud with these float32 columns, in this machine's byte order.

    Args:
        points: (N, C); converted to float32.
        columns: C names.

    Raises:
        PointCloudError: The shape does not fit the names.
    """
    points = np.ascontiguousarray(points, dtype=np.float32)
    if points.ndim != 2 or points.shape[1] != len(columns):
        raise PointCloudError(
            f"got points of shape {points.shape} for the columns {', '.join(columns)}; expected (N, {len(columns)})"
        )
    data = array.array("B")
    if points.size:
        data.frombytes(points.reshape(-1).view(np.uint8).data)
    fields = tuple(CloudField(name, 4 * i, FLOAT32) for i, name in enumerate(columns))
    return CloudParts(fields, point_step=4 * len(columns), data=data)


def _checked(layout: CloudLayout, num_bytes: int) -> CloudLayout:
    """The layout after its sizes were found to agree.

    The row_step of a single row adds nothing to width and point_step, and some drivers leave it
    wrong: it is not looked at, but mended.
    """
    height, width, point_step = layout.height, layout.width, layout.point_step
    shape = f"height {height} x width {width}"
    if height < 0 or width < 0:
        raise PointCloudError(f"got a cloud of {shape}; neither can be negative")
    if point_step <= 0:
        raise PointCloudError(
            f"got point_step {point_step} for {layout.num_points} points ({shape}); expected the bytes of one point"
        )
    row_step = layout.row_step if height > 1 else width * point_step
    if row_step < width * point_step:
        raise PointCloudError(
            f"got row_step {row_step} for rows of {width} points x {point_step} bytes; "
            f"expected at least {width * point_step}"
        )
    if num_bytes < row_step * height:
        raise PointCloudError(
            f"got {num_bytes} bytes of data for {shape}, point_step {point_step} and row_step "
            f"{row_step}; expected at least {row_step * height}: "
            "the cloud is cut short or its sizes are wrong"
        )
    return replace(layout, row_step=row_step)


def _find_field(column: str, layout: CloudLayout, default: float | None) -> CloudField | float:
    """The checked field that holds a column; the default, if there is one, where the column is missing."""
    if default is not None and match_column(column, [field.name for field in layout.fields]) is None:
        return default
    return _required_field(column, layout)


def _required_field(column: str, layout: CloudLayout) -> CloudField:
    """The checked field that holds a column. A count of 0, as old files have it, means 1."""
    names = [field.name for field in layout.fields]
    index = match_column(column, names)
    if index is None:
        raise PointCloudError(
            f"the cloud has no field for column {column!r}, only {', '.join(names) or 'none'}"
            + ("" if column in REQUIRED_COLUMNS else "; give a fill value to do without it")
        )
    field = layout.fields[index]
    if field.datatype not in DATATYPES:
        raise PointCloudError(f"field {field.name!r} has datatype {field.datatype}; expected 1 (INT8) to 8 (FLOAT64)")
    end = field.offset + _dtype(field, layout).itemsize * max(field.count, 1)
    if field.offset < 0 or end > layout.point_step:
        raise PointCloudError(
            f"field {field.name!r} lies at bytes {field.offset} to {end} of a point, "
            f"but point_step is {layout.point_step}"
        )
    return field


def _dtype(field: CloudField, layout: CloudLayout) -> np.dtype[np.generic]:
    """Type of one element of a field; of several elements the first one counts."""
    return np.dtype((">" if layout.is_bigendian else "<") + DATATYPES[field.datatype])


def _end_of_run(fields: Sequence[CloudField | float], start: int, layout: CloudLayout) -> int:
    """End of the columns from `start` on that are neighbouring float32 of native byte order."""
    first = fields[start]
    if not isinstance(first, CloudField) or layout.is_bigendian != (sys.byteorder == "big"):
        return start + 1
    stop = start
    for field in fields[start:]:
        offset = first.offset + 4 * (stop - start)
        if not isinstance(field, CloudField) or field.datatype != FLOAT32 or field.offset != offset:
            break
        stop += 1
    return max(stop, start + 1)


def _view(buffer: NDArray[np.uint8], layout: CloudLayout, offset: int, dtype: DTypeLike) -> NDArray[np.generic]:
    """(height, width) view of what lies `offset` bytes into each point."""
    shape = (layout.height, layout.width)
    view: NDArray[np.generic] = np.ndarray(shape, dtype, buffer, offset, (layout.row_step, layout.point_step))
    return view
