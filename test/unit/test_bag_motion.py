"""The motion of a bag's sensor."""

import math

import numpy as np
import pytest
from moving import SECOND, Drive

from dsvt_ros.config import PreprocessConfig
from dsvt_ros.errors import DataError
from dsvt_ros.motion import MotionError
from dsvt_ros.poses import pose_matrix

pytest.importorskip("rosbags", reason="bags need rosbags")

from dsvt_ros.io.bag_motion import StaticTransforms, motion_from_bag
from dsvt_ros.io.bags import BagWriter, StaticTransform, typestore

START = 1_700_000_000 * SECOND
PERIOD = SECOND // 50


def odometry_msg(drive, stamp_ns):
    """What the drive says, as a message of rosbags."""
    types, plain = typestore().types, drive.odometry(stamp_ns)
    p, q = plain.pose.pose.position, plain.pose.pose.orientation
    stamp = types["builtin_interfaces/msg/Time"](sec=stamp_ns // SECOND, nanosec=stamp_ns % SECOND)
    zero = types["geometry_msgs/msg/Vector3"](x=0.0, y=0.0, z=0.0)
    pose = types["geometry_msgs/msg/Pose"](
        position=types["geometry_msgs/msg/Point"](x=p.x, y=p.y, z=p.z),
        orientation=types["geometry_msgs/msg/Quaternion"](x=q.x, y=q.y, z=q.z, w=q.w),
    )
    return types["nav_msgs/msg/Odometry"](
        header=types["std_msgs/msg/Header"](stamp=stamp, frame_id="odom"),
        child_frame_id=plain.child_frame_id,
        pose=types["geometry_msgs/msg/PoseWithCovariance"](pose=pose, covariance=np.zeros(36)),
        twist=types["geometry_msgs/msg/TwistWithCovariance"](
            twist=types["geometry_msgs/msg/Twist"](linear=zero, angular=zero), covariance=np.zeros(36)
        ),
    )


def write_odometry(writer, drive, number=21):
    for k in range(number):
        writer.write_message("/odom", odometry_msg(drive, START + k * PERIOD), START + k * PERIOD)


@pytest.fixture
def drive():
    return Drive((4e5, 5e6, 30.0), start_ns=START)


@pytest.fixture
def bag(tmp_path, drive):
    up = StaticTransform("base_link", "mast", (0.5, 0.0, 1.0), (0.0, 0.0, math.sin(0.2), math.cos(0.2)))
    with BagWriter(tmp_path / "drive") as writer:
        writer.write_static_transforms([up, StaticTransform("mast", "lidar", (0.0, 0.0, 1.0))], START)
        write_odometry(writer, drive)
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
