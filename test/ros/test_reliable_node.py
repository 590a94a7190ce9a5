"""A node that asks for reliable clouds: the largest ones arrive, best-effort publishers are named.

Its clock is simulated and stands still, which must not keep it from answering.
"""

import pytest
from harness import make_cloud, random_points

pytestmark = pytest.mark.ros


@pytest.fixture(scope="module")
def node(start_node, small_model):
    node = start_node(
        model=small_model, qos__reliability="reliable", input__intensity_field="reflectance", use_sim_time="true"
    )
    node.wait_for("active")
    return node


def test_two_million_points_are_answered(node, client):
    client.connect()
    cloud = make_cloud(random_points(2_000_000), stamp_ns=5)
    assert client.ask(cloud, timeout_s=60.0).header.stamp.nanosec == 5
    cloud = make_cloud(random_points(100), stamp_ns=6)
    assert client.ask(cloud).header.stamp.nanosec == 6


def test_clock_that_stands_still_makes_no_latency(node, client):
    client.connect()
    client.ask(make_cloud(random_points(100), stamp_ns=10**18))
    status, values = client.status()
    assert status.message != ""
    assert values["latency p50"].startswith("unknown")


def test_missing_intensity_is_told_once(node, client):
    client.connect()
    for i in range(3):
        cloud = make_cloud(random_points(100), stamp_ns=7 + i)
        cloud.fields = cloud.fields[:3]
        client.ask(cloud)
    assert node.output.count("clouds have no field reflectance") == 1


def test_best_effort_publisher_is_told_what_to_do(node, client):
    from rclpy.qos import QoSProfile, ReliabilityPolicy
    from sensor_msgs.msg import PointCloud2

    best_effort = QoSProfile(depth=1, reliability=ReliabilityPolicy.BEST_EFFORT)
    client.node.create_publisher(PointCloud2, "/dsvt_detector/input/pointcloud", best_effort)
    assert client.spin_until(lambda: "set qos.reliability to best_effort" in node.output)
