"""The motion of a bag's sensor."""

import math

import numpy as np
import pytest
from moving import SECOND, Drive, write_odometry

from dsvt_ros.config import PreprocessConfig
from dsvt_ros.errors import DataError
from dsvt_ros.motion import MotionError
from dsvt_ros.poses import pose_matrix

pytest.importorskip("rosbags", reason="bags need rosbags")

from dsvt_ros.io.bag_motion import StaticTransforms, motion_from_bag
from dsvt_ros.io.bags import BagWriter, StaticTransform

START = 1_700_000_000 * SECOND
PERIOD = SECOND // 50


@pytest.fixture
def drive():
    return Drive((4e5, 5e6, 30.0), start_ns=START)


@pytest.fixture
def bag(tmp_path, drive):
    up = StaticTransform("base_link", "mast", (0.5, 0.0, 1.0), (0.0, 0.0, math.sin(0.2), math.cos(0.2)))
    with BagWriter(tmp_path / "drive") as writer:
        writer.write_static_transforms([up, StaticTransform("mast", "lidar", (0.0, 0.0, 1.0))], START)
        write_odometry(writer, drive, START, PERIOD)
        writer.write_points("/points", np.zeros((1, 4), np.float32), ("x", "y", "z", "intensity"), START, "lidar")
    return tmp_path / "drive"


@pytest.mark.parametrize(
    ("mounting", "expected"),
    [((), (0.5, 0.0, 2.0, 0.0, 0.0, 0.4)), ((1, 2, 3, 0, 0, 0.1), (1, 2, 3, 0, 0, 0.1))],
)
def test_sensor_of_a_bag(bag, drive, mounting, expected):
    motion = motion_from_bag(bag, "odom", PreprocessConfig(mounting=mounting))
    stamp_ns = START + 7 * PERIOD + 1_234_567
    truth = drive.vehicle(stamp_ns) @ pose_matrix(expected)
    np.testing.assert_allclose(motion.pose_at(stamp_ns, "lidar"), truth, rtol=0, atol=1e-8)


def test_sensor_that_nothing_connects(bag):
    with pytest.raises(MotionError, match=r"preprocess\.mounting"):
        motion_from_bag(bag, "/odom", PreprocessConfig()).pose_at(START, "camera")


@pytest.mark.parametrize(
    ("topic", "message"),
    [("/wheels", "has no topic /wheels; it has .*/odom"), ("/points", "is a sensor_msgs/msg/PointCloud2, not a nav_")],
)
def test_wrong_topic(bag, topic, message):
    with pytest.raises(DataError, match=message):
        motion_from_bag(bag, topic, PreprocessConfig())


def test_static_transforms_connect_siblings_and_tell_loops():
    tree = StaticTransforms()
    tree.add("base", "/left", pose_matrix((0, 1, 0, 0, 0, 0)))
    tree.add("base", "right", pose_matrix((0, -1, 0, 0, 0, 0)))
    np.testing.assert_allclose(tree.pose("left", "right"), pose_matrix((0, -2, 0, 0, 0, 0)))
    np.testing.assert_allclose(tree.pose("right", "base"), pose_matrix((0, 1, 0, 0, 0, 0)))
    assert tree.pose("right", "camera") is None
    tree.add("right", "base", np.eye(4))
    assert tree.pose("right", "camera") is None
