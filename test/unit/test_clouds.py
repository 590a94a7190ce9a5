"""Every kind of cloud through one function."""

import numpy as np
import pytest

from dsvt_ros.errors import DataError, PointCloudError
from dsvt_ros.io.bags import BagWriter
from dsvt_ros.io.clouds import Scan, open_clouds, select_columns

XYZI = ("x", "y", "z", "intensity")
STAMP = 1_700_000_000_000_000_001
POINTS = np.array([[1, 2, 3, 4], [np.nan, 0, 0, 0], [0, 0, 0, 0]], dtype=np.float32)


@pytest.fixture
def bag(tmp_path):
    pytest.importorskip("rosbags", reason="bags need rosbags")
    with BagWriter(tmp_path / "drive") as writer:
        writer.write_points("/points", POINTS, XYZI, STAMP, "lidar")
        writer.write_points("/points", POINTS[:0], XYZI, STAMP + 1, "lidar")
    return tmp_path / "drive"


class TestOpen:
    def test_npy(self, tmp_path):
        np.save(tmp_path / "a.npy", POINTS)
        (scan,) = open_clouds(tmp_path / "a.npy")
        np.testing.assert_array_equal(scan.points, POINTS)
        assert scan.columns == XYZI
        assert (scan.stamp_ns, scan.frame_id) == (None, "")
        assert scan.source == str(tmp_path / "a.npy")

    def test_npy_of_coordinates_only(self, tmp_path):
        np.save(tmp_path / "a.npy", POINTS[:, :3])
        (scan,) = open_clouds(str(tmp_path / "a.npy"))
        assert scan.columns == ("x", "y", "z")

    def test_npy_with_unnamed_columns(self, tmp_path):
        np.save(tmp_path / "a.npy", np.zeros((2, 5)))
        with pytest.raises(DataError, match="has 5 columns, but 4 names were expected"):
            list(open_clouds(tmp_path / "a.npy"))
        (scan,) = open_clouds(tmp_path / "a.npy", (*XYZI, "time"))
        assert scan.columns[-1] == "time"

    def test_bin(self, tmp_path):
        (tmp_path / "a.bin").write_bytes(POINTS.tobytes())
        (scan,) = open_clouds(tmp_path / "a.bin")
        np.testing.assert_array_equal(scan.points, POINTS)
        (scan,) = open_clouds(tmp_path / "a.bin", ("x", "y", "z"))
        assert (scan.columns, scan.points.shape) == (("x", "y", "z"), (4, 3))

    def test_pcd_names_its_own_columns(self, tmp_path):
        header = "FIELDS z y x\nSIZE 4 4 4\nTYPE F F F\nWIDTH 1\nHEIGHT 1\nDATA ascii\n"
        (tmp_path / "a.PCD").write_text(header + "3 2 1\n", encoding="ascii")
        (scan,) = open_clouds(tmp_path / "a.PCD", XYZI)
        assert scan.columns == ("z", "y", "x")
        assert select_columns(scan, ("x", "y", "z")).tolist() == [[1, 2, 3]]

    def test_bag(self, bag):
        first, second = open_clouds(bag, topic="/points")
        np.testing.assert_array_equal(first.points, POINTS)
        assert first.columns == XYZI
        assert (first.stamp_ns, first.frame_id) == (STAMP, "lidar")
        assert (first.source, second.source) == (f"{bag}#0", f"{bag}#1")
        assert second.points.shape == (0, 4)
        (storage,) = bag.glob("*.mcap")
        assert len(list(open_clouds(storage))) == 2

    @pytest.mark.parametrize("name", ["none.npy", "none.mcap", "none"])
    def test_missing(self, tmp_path, name):
        with pytest.raises(DataError, match=r"does not exist; expected a \.npy, \.bin, \.pcd"):
            open_clouds(tmp_path / name)

    @pytest.mark.parametrize("name", ["a.las", "a"])
    def test_other_kinds(self, tmp_path, name):
        (tmp_path / name).touch()
        with pytest.raises(DataError, match=r"is of kind '.*'; expected a \.npy.* or a bag folder"):
            open_clouds(tmp_path / name)

    def test_folder_that_is_no_bag(self, tmp_path):
        with pytest.raises(DataError, match=r"a folder without metadata\.yaml; expected"):
            open_clouds(tmp_path)

    def test_empty_bag(self, tmp_path):
        pytest.importorskip("rosbags", reason="bags need rosbags")
        with BagWriter(tmp_path / "empty"):
            pass
        with pytest.raises(DataError, match="has no sensor_msgs/msg/PointCloud2"):
            open_clouds(tmp_path / "empty")

    def test_topic_of_a_file(self, tmp_path):
        (tmp_path / "a.bin").touch()
        with pytest.raises(DataError, match="only bags have topics"):
            open_clouds(tmp_path / "a.bin", topic="/points")


class TestSelect:
    scan = Scan("a.bin", POINTS, ("x", "y", "z", "reflectivity"))

    def test_same_columns_are_not_copied(self):
        assert select_columns(self.scan, self.scan.columns) is POINTS

    def test_synonyms(self):
        np.testing.assert_array_equal(select_columns(self.scan, XYZI), POINTS)

    def test_order_and_fill(self):
        points = select_columns(self.scan, ("intensity", "x", "time"), {"time": -1})
        np.testing.assert_array_equal(points[0], [4, 1, -1])
        assert points.dtype == np.float32

    def test_fill_by_position(self):
        points = select_columns(self.scan, (*XYZI, "elongation"), (0, 0, 0, 0, 7))
        assert points[:, 4].tolist() == [7, 7, 7]

    def test_missing_column(self):
        with pytest.raises(PointCloudError, match=r"a\.bin has no column 'time', only x, y, z, r"):
            select_columns(self.scan, (*XYZI, "time"))

    def test_coordinates_are_never_filled(self):
        scan = Scan("a.npy", POINTS[:, :2], ("x", "y"))
        with pytest.raises(PointCloudError, match=r"no column 'z', only x, y$"):
            select_columns(scan, ("x", "y", "z"), {"z": 0})
