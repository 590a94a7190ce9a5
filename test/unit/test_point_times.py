"""Times of points by every convention of drivers."""

import numpy as np
import pytest

from dsvt_ros.errors import PointCloudError
from dsvt_ros.io.point_times import offsets_from_msg
from dsvt_ros.io.pointcloud2 import CloudField

STAMP_NS = 1_700_000_000_250_000_000
OFFSETS = np.linspace(0, 0.0999, 1500)
NUMBERS = {"u4": 6, "i4": 5, "f4": 7, "f8": 8}


class Cloud:
    """A cloud with nothing but times."""

    def __init__(self, name, dtype, values):
        data = np.asarray(values).astype(f"<{dtype}")
        self.height, self.width, self.is_bigendian, self.is_dense = 1, len(data), False, True
        self.point_step = self.row_step = data.itemsize
        self.fields = [CloudField(name, 0, NUMBERS[dtype])]
        self.data = data.tobytes()


@pytest.mark.parametrize(
    ("name", "dtype", "values", "expected"),
    [
        ("time", "f4", OFFSETS - 0.1, OFFSETS - 0.1),
        ("t", "u4", OFFSETS * 1e9, OFFSETS),
        ("time_stamp", "u4", OFFSETS * 1e9, OFFSETS),
        ("offset_time", "u4", OFFSETS * 1e9, OFFSETS),
        ("timestamp", "f8", STAMP_NS / 1e9 + OFFSETS, OFFSETS),
        ("timestamp", "f8", STAMP_NS + OFFSETS * 1e9, OFFSETS),
        ("timestamp", "f8", STAMP_NS / 1e3 + OFFSETS * 1e6, OFFSETS),
        ("t", "u4", np.zeros(3), np.zeros(3)),
        ("t", "f4", np.zeros(0), np.zeros(0)),
    ],
)
def test_conventions(name, dtype, values, expected):
    found = offsets_from_msg(Cloud(name, dtype, values), STAMP_NS)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_times_of_missing_returns_are_unknown():
    values = STAMP_NS / 1e9 + OFFSETS
    values[::3] = 0.0
    values[1] = np.nan
    found = offsets_from_msg(Cloud("timestamp", "f8", values), STAMP_NS)
    assert np.isnan(found[::3]).all()
    assert np.isnan(found[1])
    assert np.isfinite(found).sum() == 1500 - 500 - 1


@pytest.mark.parametrize(
    ("name", "dtype", "value", "message"),
    [
        ("timestamp", "f8", 1_600_000_000.0, r"field 'timestamp' \(float64\) holds numbers like 1600000000: neither"),
        ("t", "f4", 5e7, "neither seconds"),
        ("t", "u4", 2_000_000_000, "neither seconds"),
        ("ring", "u4", 5, "has no time of each point, only the fields ring"),
    ],
)
def test_what_fits_no_convention_is_refused(name, dtype, value, message):
    with pytest.raises(PointCloudError, match=message):
        offsets_from_msg(Cloud(name, dtype, np.full(4, value)), STAMP_NS)
