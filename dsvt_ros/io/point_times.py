"""When each point of a PointCloud2 was measured.

Drivers agree on neither name, type nor origin of the field:

| field | type | means | drivers |
|---|---|---|---|
| ``time`` | float32 | seconds after the header's stamp, often negative | Velodyne |
| ``t``, ``time_stamp``, ``offset_time`` | uint32 | nanoseconds after the stamp | Ouster, Autoware, Livox |
| ``timestamp`` | float64 | seconds since 1970 | Hesai, RoboSense |
| ``timestamp`` | float64 | nanoseconds since 1970 | Livox |

So the name only finds the field; type and size of the numbers say the rest.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dsvt_ros.errors import PointCloudError
from dsvt_ros.io.pointcloud2 import CloudLike, column_from_msg

FIELD_NAMES = ("time", "t", "timestamp", "time_offset", "offset_time", "time_stamp", "timestamps")
"""What drivers call the field, in lower case."""

MAX_OFFSET_S = 1.0
"""A point further than this from its cloud's stamp was not measured with that cloud."""

_UNITS_S = (1.0, 1e-9, 1e-6)  # of times since 1970


def offsets_from_msg(msg: CloudLike, stamp_ns: int) -> NDArray[np.float32]:
    """Time of each point after the header's stamp.

    Args:
        msg: A PointCloud2 of rclpy or rosbags.
        stamp_ns: Its stamp, to which times since 1970 are compared.

    Returns:
        (N,) float32, s; NaN for points further from the stamp than `MAX_OFFSET_S`, as missing returns often are.

    Raises:
        PointCloudError: There is no such field, or its numbers fit no known convention.
    """
    names = [field.name for field in msg.fields]
    name = next((name for name in names if name.lower() in FIELD_NAMES), None)
    if name is None:
        raise PointCloudError(f"the cloud has no time of each point, only the fields {', '.join(names) or 'none'}")
    column = column_from_msg(msg, name)
    values = column.astype(np.float64)
    # Any point tells the convention, but some are missing returns with time 0 or NaN.
    sample = values[:: max(len(values) // 1000, 1)]
    sample = sample[np.isfinite(sample) & (sample != 0)]
    if not len(sample):
        return np.where(np.isfinite(values), 0.0, np.nan).astype(np.float32)
    typical = float(np.median(sample))
    offsets = _offsets(values, typical, stamp_ns, integers=np.issubdtype(column.dtype, np.integer))
    if offsets is None:
        raise PointCloudError(
            f"field {name!r} ({column.dtype}) holds numbers like {typical:.12g}: neither seconds (floats) or "
            f"nanoseconds (integers) after the cloud's stamp, nor a time since 1970 within {MAX_OFFSET_S:g} s of it "
            f"({stamp_ns / 1e9:.3f} s)"
        )
    return np.where(np.abs(offsets) <= MAX_OFFSET_S, offsets, np.nan).astype(np.float32)


def _offsets(
    values: NDArray[np.float64], typical: float, stamp_ns: int, *, integers: bool
) -> NDArray[np.float64] | None:
    """Offsets in seconds by the convention that the typical value fits; None if it fits none."""
    if integers:
        return values * 1e-9 if abs(typical) <= MAX_OFFSET_S * 1e9 else None
    if abs(typical) <= MAX_OFFSET_S:
        return values
    for unit_s in _UNITS_S:
        if abs(typical * unit_s - stamp_ns * 1e-9) <= MAX_OFFSET_S:
            # A double of seconds since 1970 is good to 0.2 us, one of nanoseconds too.
            return values * unit_s - stamp_ns * 1e-9
    return None
