"""The sensor's pose and motion from TF; tf2_ros is replaced, since it is not on the package index."""

import importlib.util
import math
import sys
import types

import numpy as np
import pytest
from moving import Drive

if importlib.util.find_spec("rclpy") is None:
    pytest.skip("rclpy is not installed", allow_module_level=True)

from geometry_msgs.msg import TransformStamped
from std_msgs.msg import Header

from dsvt_ros.config import PreprocessConfig
from dsvt_ros.errors import ConfigError
from dsvt_ros.motion import MotionError
from dsvt_ros.ros.motion import SensorMotion
from dsvt_ros.ros.node_config import MotionConfig
from dsvt_ros.ros.transforms import SensorPose, TransformError, Transforms

pytestmark = pytest.mark.ros


class LookupFailureError(Exception):
    pass


class Buffer:
    """The transforms base_link from lidar and odom from lidar, up to 5 s; in odom the lidar moves by 2 m/s."""

    def lookup_transform(self, target, source, time, timeout):
        self.timeout_s = timeout.nanoseconds / 1e9
        if target not in ("base_link", "odom") or source != "lidar" or time.nanoseconds > 5 * 10**9:
            raise LookupFailureError(f"{source} is not connected to {target}")
        found = TransformStamped()
        found.transform.translation.z = 1.5
        found.transform.translation.x = 2.0 * time.nanoseconds / 1e9 if target == "odom" else 0.0
        found.transform.rotation.z = found.transform.rotation.w = math.sqrt(0.5)
        return found


class FakeNode:
    """Remembers subscriptions."""

    def __init__(self):
        self.topics = []

    def resolve_topic_name(self, topic):
        return topic.replace("~", "/dsvt_detector")

    def create_subscription(self, kind, topic, callback, qos):
        self.topics.append(topic)
        self.callback = callback
        return topic

    def destroy_subscription(self, subscription):
        self.topics.remove(subscription)


@pytest.fixture
def tf2_ros(monkeypatch):
    module = types.ModuleType("tf2_ros")
    module.Buffer = Buffer
    module.TransformListener = lambda buffer, node, spin_thread: types.SimpleNamespace(unregister=lambda: None)
    module.TransformException = LookupFailureError
    monkeypatch.setitem(sys.modules, "tf2_ros", module)


def header(frame_id, seconds):
    header = Header(frame_id=frame_id)
    header.stamp.sec = seconds
    return header


@pytest.fixture
def transforms(tf2_ros):
    return Transforms(None, "a test needs it", instead="skip it")


def test_pose_at_the_stamp_of_the_cloud(transforms):
    pose = SensorPose(transforms, "base_link").at(header("lidar", 3), 0.1)
    # Turned to the left by 90 degrees, 1.5 m up.
    np.testing.assert_allclose(pose @ [1, 0, 0, 1], [0, 1, 1.5, 1], atol=1e-12)


@pytest.mark.parametrize(("frame_id", "seconds"), [("camera", 3), ("lidar", 6)])
def test_missing_transform_is_an_error_never_identity(transforms, frame_id, seconds):
    with pytest.raises(TransformError, match=f"preprocess.model_frame .* from '{frame_id}' to 'base_link'"):
        SensorPose(transforms, "base_link").at(header(frame_id, seconds), 0.1)


def test_without_tf2_ros_the_message_tells_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "tf2_ros", None)
    with pytest.raises(ConfigError, match=r"it is wanted, which needs TF.*install tf2_ros .* or do without"):
        Transforms(None, "it is wanted", instead="do without")


# --------------------------------------------------------------------------------------------------------- motion


def sensor_motion(transforms, source, node=None):
    return SensorMotion(node or FakeNode(), MotionConfig(source=source), PreprocessConfig(), transforms)


@pytest.mark.parametrize("source", ["tf", "auto"])
def test_motion_from_tf(transforms, source):
    motion = sensor_motion(transforms, source)
    assert motion.describe() == "tf"
    pose = motion.current().pose_at(4 * 10**9, "lidar", 0.25)
    np.testing.assert_allclose(pose @ [1, 0, 0, 1], [8, 1, 1.5, 1], atol=1e-12)
    assert transforms._buffer.timeout_s == pytest.approx(0.25)
    with pytest.raises(MotionError, match=r"motion\.fixed_frame: no transform from 'lidar' to 'odom': lidar is not"):
        motion.current().pose_at(6 * 10**9, "lidar")


def test_odometry_takes_over_from_tf_with_the_mounting_from_static_tf(transforms):
    node = FakeNode()
    motion = sensor_motion(transforms, "auto", node)
    assert node.topics == ["/dsvt_detector/input/odometry"]
    drive = Drive()
    for stamp_ns in (0, 10**8):
        node.callback(drive.odometry(stamp_ns))
    assert motion.describe() == "odometry on /dsvt_detector/input/odometry"
    expected = drive.vehicle(5 * 10**7) @ transforms.pose("base_link", "lidar", 0)
    np.testing.assert_allclose(motion.current().pose_at(5 * 10**7, "lidar"), expected, atol=1e-9)
    motion.close()
    assert node.topics == []


def test_motion_without_tf2_ros():
    motion = sensor_motion(None, "auto")
    assert motion.describe() == (
        "unknown: nobody publishes on /dsvt_detector/input/odometry, and tf2_ros is not installed"
    )
    with pytest.raises(MotionError, match="no odometry has come from /dsvt_detector/input/odometry"):
        motion.current().pose_at(0, "lidar")


@pytest.mark.parametrize("source", ["tf", "stationary"])
def test_nobody_listens_in_vain(transforms, source):
    node = FakeNode()
    motion = sensor_motion(transforms, source, node)
    assert (node.topics, motion.describe()) == ([], source)
    if source == "stationary":
        np.testing.assert_array_equal(motion.current().pose_at(7, "lidar"), np.eye(4))
