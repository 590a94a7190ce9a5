"""The installed vision_msgs, generated here or given."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.ros

CREATE = """
import rclpy
from sensor_msgs.msg import PointCloud2
from vision_msgs.msg import Detection3DArray

rclpy.init()
node = rclpy.create_node("creator")
node.create_publisher(Detection3DArray, "detections", 1)
node.create_subscription(PointCloud2, "clouds", lambda message: None, 1)
node.create_subscription(Detection3DArray, "detections", lambda message: None, 1)
node.create_subscription(PointCloud2, "more_clouds", lambda message: None, 1)
node.destroy_node()
rclpy.shutdown()
"""


@pytest.mark.usefixtures("ros")
def test_has_every_type_support_that_rmw_asks_for():
    # Messages get through without the one that describes their type, but rmw leaves an error for the next call.
    result = subprocess.run([sys.executable, "-c", CREATE], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr
    assert "rcutils_set_error_state" not in result.stderr
