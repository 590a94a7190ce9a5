"""The sensor's pose from TF; tf2_ros is replaced, since it is not on the package index."""

import importlib.util
import math
import sys
import types

import numpy as np
import pytest

if importlib.util.find_spec("rclpy") is None:
    pytest.skip("rclpy is not installed", allow_module_level=True)

from geometry_msgs.msg import TransformStamped
from std_msgs.msg import Header

from dsvt_ros.errors import ConfigError
from dsvt_ros.ros.transforms import SensorPose, TransformError, matrix_from_transform

pytestmark = pytest.mark.ros


class LookupFailureError(Exception):
    pass


class Buffer:
    """One transform, base_link from lidar, up to 5 s."""

    def lookup_transform(self, target, source, time, timeout):
        if (target, source) != ("base_link", "lidar") or time.nanoseconds > 5 * 10**9:
            raise LookupFailureError(f"{source} is not connected to {target}")
        found = TransformStamped()
        found.transform.translation.z = 1.5
        found.transform.rotation.z = found.transform.rotation.w = math.sqrt(0.5)
        return found


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


def test_pose_at_the_stamp_of_the_cloud(tf2_ros):
    pose = SensorPose(None, "base_link").at(header("lidar", 3), 0.1)
    # Turned to the left by 90 degrees, 1.5 m up.
    np.testing.assert_allclose(pose @ [1, 0, 0, 1], [0, 1, 1.5, 1], atol=1e-12)


@pytest.mark.parametrize(("frame_id", "seconds"), [("camera", 3), ("lidar", 6)])
def test_missing_transform_is_an_error_never_identity(tf2_ros, frame_id, seconds):
    with pytest.raises(TransformError, match=f"from '{frame_id}' to preprocess.model_frame 'base_link'"):
        SensorPose(None, "base_link").at(header(frame_id, seconds), 0.1)


def test_without_tf2_ros_the_message_tells_the_way_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "tf2_ros", None)
    with pytest.raises(ConfigError, match=r"preprocess\.sensor_pose"):
        SensorPose(None, "base_link")


def test_rotation_is_that_of_scipy():
    rotation = pytest.importorskip("scipy.spatial.transform").Rotation.from_euler("xyz", [0.1, -0.2, 2.5])
    message = TransformStamped().transform
    message.rotation.x, message.rotation.y, message.rotation.z, message.rotation.w = rotation.as_quat().tolist()
    np.testing.assert_allclose(matrix_from_transform(message)[:3, :3], rotation.as_matrix(), atol=1e-12)
